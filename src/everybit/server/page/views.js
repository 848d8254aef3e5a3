// What the page draws: elements, step charts, answers with their figures, and the load strip.

import { request } from "./api.js";

/** An element with properties and children. Strings become text, never markup. */
export function h(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function svg(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/** 4 of 4, "4" and "plan 4.1"; NaN of "plan". */
const height = (bits) => (typeof bits === "number" ? bits : parseFloat(String(bits).match(/\d+(\.\d+)?/)?.[0]));

export const bitsClass = (bits) => {
  const rounded = Math.round(height(bits));
  return rounded >= 1 ? `b${Math.min(8, Math.max(2, rounded))}` : "plan";
};
const bitsName = (bits) => (/^[\d.]+$/.test(String(bits)) ? `${bits} bits` : String(bits));

/** Bits over something, in steps from zero: one rectangle for each run of equal bits. */
export class StepChart {
  #run = null;
  #at = 0;

  constructor(element, most, least) {
    this.element = element;
    this.most = most;
    this.least = least; // the width that is drawn even if less of it is filled
    element.setAttribute("preserveAspectRatio", "none");
    this.clear();
  }

  clear() {
    this.element.replaceChildren();
    for (let y = 2; y <= this.most; y += 2) {
      this.element.append(svg("line", { x1: 0, x2: "100%", y1: this.most - y, y2: this.most - y, class: "grid" }));
    }
    this.#run = null;
    this.#at = 0;
    this.#fit();
  }

  /** Adds `width` of `bits`; a gap where they are null. */
  add(bits, width = 1) {
    if (bits === null) {
      this.#run = null;
    } else if (this.#run?.bits === bits) {
      this.#run.width += width;
      for (const part of this.#run.parts) part.setAttribute("width", this.#run.width);
    } else {
      const top = Math.min(height(bits) || this.most / 2, this.most);
      const at = { x: this.#at, y: this.most - top, width, class: bitsClass(bits) };
      const parts = [svg("rect", { ...at, height: top }), svg("rect", { ...at, height: this.most / 18, class: `${at.class} top` })];
      this.element.append(...parts);
      this.#run = { bits, width, parts };
    }
    this.#at += width;
    this.#fit();
  }

  #fit() {
    this.element.setAttribute("viewBox", `0 0 ${Math.max(this.#at, this.least)} ${this.most}`);
  }
}

/** One answer: its text as it arrives, and beneath it the bits and the figures. */
export class AnswerView {
  #tokens = 0;
  #arrivals = [];
  #begun = performance.now();
  #first = null;
  #last = null;
  #counts = {};
  #span = null;

  constructor(label, tint, most) {
    this.text = h("div", { className: "text", ariaLive: "polite", ariaBusy: "true" });
    this.speed = h("span", { className: "speed" });
    this.figures = h("p", { className: "figures" });
    const drawing = svg("svg", { class: "chart", role: "img", "aria-label": "Bits of each token" });
    this.chart = new StepChart(drawing, most, 48);
    this.plot = h("div", { className: "plot", hidden: true }, h("span", { ariaHidden: "true" }, String(most)), drawing);
    this.element = h("article", { className: "answer busy", ariaLabel: `Answer, ${label}` },
      h("header", {}, h("i", { className: `swatch ${tint}` }), h("b", {}, label), this.speed), this.text, this.plot, this.figures);
  }

  /** A piece of text, and the bits of each token in it. */
  add(text, bits) {
    const now = performance.now();
    if (text) this.#write(text, bits);
    if (!bits.length) return;
    this.#first ??= now;
    this.#last = now;
    this.#tokens += bits.length;
    this.#arrivals.push([now, bits.length]);
    this.plot.hidden = false;
    for (const one of bits) {
      this.chart.add(one);
      this.#counts[one] = (this.#counts[one] ?? 0) + 1;
    }
    while (now - this.#arrivals[0][0] > 2000) this.#arrivals.shift();
    const [[start, skipped]] = this.#arrivals;
    const recent = this.#arrivals.reduce((sum, [, count]) => sum + count, -skipped);
    if (now - start > 100) this.speed.textContent = `${((recent * 1000) / (now - start)).toFixed(1)} tokens/s now`;
  }

  /** Text is only ever text. Tokens of the same bits share an element; a piece of several bits counts as its lowest. */
  #write(text, bits) {
    const lowest = bits.length ? bits.reduce((a, b) => (height(b) < height(a) ? b : a)) : this.#span?.bits;
    if (!this.#span || this.#span.bits !== lowest) {
      if (this.#span) this.text.classList.add("mixed");
      const element = lowest === undefined ? h("span") : h("span", { className: `token ${bitsClass(lowest)}`, title: bitsName(lowest) });
      this.#span = { bits: lowest, element };
      this.text.append(element);
    }
    this.#span.element.append(text);
  }

  note(message, kind = "note") {
    this.plot.before(h("p", { className: kind, role: kind === "error" ? "alert" : null }, message));
  }

  /** The figures, from the server's usage where it sent one. */
  finish(usage) {
    this.element.classList.remove("busy");
    this.text.ariaBusy = "false";
    this.speed.textContent = "";
    const counts = Object.entries(usage?.tokens_by_bits ?? this.#counts);
    const tokens = usage?.completion_tokens ?? this.#tokens;
    if (!tokens) return;
    const figure = (value, name) => h("span", {}, h("b", {}, value), ` ${name}`);
    const seconds = (this.#last - this.#first) / 1000;
    const rate = this.#tokens > 1 && seconds > 0 ? [figure(((this.#tokens - 1) / seconds).toFixed(1), "tokens/s")] : [];
    const wait = this.#first === null ? [] : [figure(duration(this.#first - this.#begun), "to the first token")];
    const split = counts.sort(([a], [b]) => height(b) - height(a)).map(([bits, count]) =>
      h("span", { className: "count" }, h("i", { className: `swatch ${bitsClass(bits)}` }), h("b", {}, String(count)), ` at ${bitsName(bits)}`));
    this.figures.replaceChildren(...split, ...rate, ...wait);
  }
}

const duration = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

/** Polls /status once a second while the tab is seen, and shows the model's load. */
export class LoadStrip {
  #samples = [];
  #drawn = 0;
  #waiting = false;

  constructor(told) {
    this.told = told; // called with the bits of now, or null
    this.chart = new StepChart(document.getElementById("load-chart"), 8, 120);
    setInterval(() => this.#poll(), 1000);
    document.addEventListener("visibilitychange", () => this.#poll());
  }

  watch(model, most) {
    this.model = model;
    this.#samples = [];
    this.#drawn = performance.now();
    this.chart.most = most;
    this.#show(null);
    this.#poll();
  }

  async #poll() {
    if (document.hidden || this.#waiting || !this.model) return;
    this.#waiting = true;
    try {
      const response = await request("/status", { signal: AbortSignal.timeout(5000) }, true);
      this.#show((await response.json()).models?.[this.model]);
    } catch { // the server is away, or wants a key that will come with the first answer
      this.#show(null);
      await new Promise((done) => setTimeout(done, 4000));
    }
    this.#waiting = false;
  }

  #show(state) {
    const set = (id, text) => { document.getElementById(id).textContent = text; };
    const bits = state?.bits_now ?? null;
    set("load-bits", bits ?? "–");
    document.getElementById("load-bits").className = bits === null ? "" : bitsClass(bits);
    set("load-speed", state ? Number(state.tokens_per_s ?? 0).toFixed(1) : "–");
    set("load-running", state?.running ?? "–");
    set("load-queue", state ? `${state.waiting} of ${state.queue_limit}` : "–");
    const percent = (blocks) => (state?.kv_blocks ? (100 * blocks) / state.kv_blocks : 0);
    const used = percent(state?.kv_blocks - state?.kv_blocks_free); // a cached block that nobody holds is free
    set("load-kv-text", state?.kv_blocks ? `${Math.round(used)}%` : "–");
    const [held, cached] = document.getElementById("load-kv").children;
    held.style.width = `${used}%`;
    cached.style.width = `${Math.min(percent(state?.kv_blocks_cached ?? 0), 100 - used)}%`;
    this.#draw(bits);
    this.told(bits);
  }

  #draw(bits) {
    const missed = Math.round((performance.now() - this.#drawn) / 1000) - 1; // seconds without a reading
    this.#drawn = performance.now();
    this.#samples.push(...Array(Math.min(120, Math.max(0, missed))).fill(null), bits);
    this.#samples = this.#samples.slice(-120);
    this.chart.clear();
    this.chart.add(null, 120 - this.#samples.length);
    for (const sample of this.#samples) this.chart.add(sample);
  }
}
