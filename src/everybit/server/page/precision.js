// The precision slider: a staircase of bits over a native range input.

import { bitsClass, h } from "./views.js";

const AUTO = "auto";

export class PrecisionSlider {
  #bits = [];
  #columns = [];
  #live = null;
  #changed;

  constructor(name, changed) {
    this.#changed = changed;
    this.big = h("p", { className: "big", ariaHidden: "true" }); // the range says the same
    this.caption = h("p", { className: "caption" });
    this.stairs = h("div", { className: "stairs", ariaHidden: "true" });
    this.range = h("input", { type: "range", min: "0", step: "1", ariaLabel: `Precision ${name}` });
    this.floor = h("select");
    this.ceiling = h("select");
    this.limits = h("div", { className: "limits" },
      h("label", {}, h("span", {}, "Floor"), this.floor), h("label", {}, h("span", {}, "Ceiling"), this.ceiling));
    this.name = h("span", { className: "name" }, name);
    this.element = h("div", { className: "slider" },
      h("div", { className: "readout" }, this.name, this.big, h("div", { className: "beside" }, this.caption, this.limits)),
      h("div", { className: "track" }, this.stairs, this.range));
    this.range.addEventListener("input", () => this.#show());
    for (const [moved, other] of [[this.floor, this.ceiling], [this.ceiling, this.floor]]) {
      moved.addEventListener("change", () => {
        const crossed = this.floor.value && this.ceiling.value && Number(this.floor.value) > Number(this.ceiling.value);
        if (crossed) other.value = moved.value;
        this.#show();
      });
    }
  }

  /** The precisions of another model. Keeps the choice where it can. */
  offer(bits, first = AUTO) {
    const before = this.#bits.length ? this.value : first;
    this.#bits = bits;
    const most = Math.max(...bits);
    this.#columns = [AUTO, ...bits].map((value) => {
      const cells = Array.from({ length: value === AUTO ? most : value }, (_, row) => // auto: a row of each precision's colour
        (value === AUTO ? bits.find((b) => b > row) : value));
      return h("div", { className: "step" },
        h("div", { className: "cells" }, ...cells.map((of) => h("i", { className: bitsClass(of) }))),
        h("b", {}, String(value)));
    });
    this.stairs.replaceChildren(...this.#columns);
    this.range.max = String(bits.length);
    this.element.style.setProperty("--steps", String(bits.length + 1));
    this.element.style.setProperty("--most", String(most));
    for (const limit of [this.floor, this.ceiling]) {
      const chosen = limit.value;
      limit.replaceChildren(new Option("none", ""), ...bits.map((b) => new Option(String(b), String(b))));
      limit.value = bits.includes(Number(chosen)) ? chosen : "";
    }
    this.range.value = String(bits.indexOf(before) + 1); // 0, auto, where this model lacks it
    this.#show();
  }

  get value() {
    return this.#bits[Number(this.range.value) - 1] ?? AUTO;
  }

  /** What goes into the request. */
  get fields() {
    const fields = { precision: this.value };
    if (this.value === AUTO && this.floor.value) fields.precision_floor = Number(this.floor.value);
    if (this.value === AUTO && this.ceiling.value) fields.precision_ceiling = Number(this.ceiling.value);
    return fields;
  }

  get label() {
    if (this.value !== AUTO) return `${this.value} bits`;
    const { precision_floor: low, precision_ceiling: high } = this.fields;
    return AUTO + (low ? ` from ${low}` : "") + (high ? ` up to ${high}` : "");
  }

  get tint() {
    return this.value === AUTO ? "any" : bitsClass(this.value);
  }

  /** The bits that the server uses for "auto" at this moment. */
  set live(bits) {
    if (bits === this.#live) return;
    this.#live = bits;
    if (this.#bits.length) this.#show();
  }

  /** Bits to spell the wordmark with. */
  get shown() {
    return this.value === AUTO ? this.#live : this.value;
  }

  #show() {
    const value = this.value;
    const auto = value === AUTO;
    const low = Number(this.floor.value) || 0;
    const high = Number(this.ceiling.value) || Infinity;
    const most = Math.max(...this.#bits);
    this.#columns.forEach((column, index) => {
      const bits = this.#bits[index - 1] ?? AUTO;
      column.classList.toggle("chosen", bits === value);
      column.classList.toggle("live", auto && bits === this.#live);
      column.classList.toggle("out", auto && bits !== AUTO && (bits < low || bits > high));
    });
    this.element.classList.toggle("auto", auto);
    this.big.replaceChildren(String(value), h("small", {}, auto ? "" : " bits"));
    this.caption.textContent = auto ? "Follows the load." : `Reads ${value} of ${most} bits of each weight.`;
    this.limits.hidden = !auto;
    this.range.ariaValueText = auto ? "auto" : `${value} bits`;
    this.#changed();
  }
}
