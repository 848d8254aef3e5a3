// What the planner draws, as SVG: a log-log plane with points, and bars over time.

import { bitsClass } from "./views.js";

const WIDE = 560;
const HIGH = 340;
const EDGE = { left: 52, right: 14, top: 10, bottom: 38 };

function add(parent, tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

export const short = (value) => {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  for (const [unit, name] of [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"]]) {
    if (size >= unit) return `${Number((value / unit).toPrecision(3))}${name}`;
  }
  return size >= 100 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));
};

/** What an estimate is coloured by: its width, not the mean over layers, embedding and head. */
export const widthOf = (one) => (one.bits === "own" ? one.weight_bits : one.bits);

/** Logarithmic axes around the values, with a line for each tick; functions from a value to its place. */
function plane(svg, xs, ys, names) {
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${WIDE} ${HIGH}`);
  const span = (values) => {
    const logs = values.filter((one) => one > 0).map(Math.log10);
    const [low, high] = [Math.min(...logs), Math.max(...logs)];
    const room = Math.max(0.08 * (high - low), 0.12);
    return [low - room, high + room];
  };
  const [left, right] = span(xs);
  const [low, high] = span(ys);
  const x = (value) => EDGE.left + ((Math.log10(value) - left) / (right - left)) * (WIDE - EDGE.left - EDGE.right);
  const y = (value) => HIGH - EDGE.bottom - ((Math.log10(value) - low) / (high - low)) * (HIGH - EDGE.top - EDGE.bottom);
  for (const at of ticks(left, right)) {
    add(svg, "line", { class: "grid", x1: x(at), x2: x(at), y1: EDGE.top, y2: HIGH - EDGE.bottom });
    add(svg, "text", { x: x(at), y: HIGH - EDGE.bottom + 15, "text-anchor": "middle" }, short(at));
  }
  for (const at of ticks(low, high)) {
    add(svg, "line", { class: "grid", x1: EDGE.left, x2: WIDE - EDGE.right, y1: y(at), y2: y(at) });
    add(svg, "text", { x: EDGE.left - 6, y: y(at) + 4, "text-anchor": "end" }, short(at));
  }
  add(svg, "text", { x: WIDE - EDGE.right, y: HIGH - 4, "text-anchor": "end" }, names[0]);
  add(svg, "text", { x: EDGE.left + 6, y: EDGE.top + 8 }, names[1]);
  return { x, y, left: 10 ** left, right: 10 ** right };
}

/** Up to about eight round numbers between two powers of ten. */
function ticks(low, high) {
  const steps = high - low > 3.5 ? [1] : high - low > 1.2 ? [1, 3] : [1, 1.5, 2, 3, 4, 6, 8];
  const every = high - low > 8 ? 2 : 1;
  const found = [];
  for (let power = Math.floor(low); power <= high; power += every) {
    for (const step of steps) {
      const at = step * 10 ** power;
      if (Math.log10(at) >= low && Math.log10(at) <= high) found.push(at);
    }
  }
  return found;
}

/** $/Mtok against TPOT, with intervals; colour is bits, hollow misses the limits, a ring is the front. */
export function drawPareto(svg, rows, limitMs) {
  const ms = (one) => one.tpot_s.value * 1e3;
  const xs = rows.map((one) => one.usd_per_mtok.value);
  const seen = plane(svg, xs, rows.map(ms), ["$ for a million tokens", "TPOT, ms"]);
  if (limitMs && limitMs < Math.max(...rows.map(ms)) && limitMs > Math.min(...rows.map(ms))) {
    add(svg, "line", { class: "limit", x1: EDGE.left, x2: WIDE - EDGE.right, y1: seen.y(limitMs), y2: seen.y(limitMs) });
  }
  const inside = (low, high, ...ends) => ends.map((end) => Math.max(low, Math.min(high, end)));
  for (const one of rows) {
    const [x, y] = [seen.x(one.usd_per_mtok.value), seen.y(ms(one))];
    const [a, b] = inside(EDGE.left, WIDE - EDGE.right, seen.x(one.usd_per_mtok.low), seen.x(one.usd_per_mtok.high));
    const [c, d] = inside(EDGE.top, HIGH - EDGE.bottom, seen.y(one.tpot_s.high * 1e3), seen.y(one.tpot_s.low * 1e3));
    add(svg, "path", { class: "whisker", d: `M${a},${y}H${b}M${x},${c}V${d}` });
  }
  const last = new Map(); // of each card the point to the right, which has room for a label
  for (const one of rows) {
    const [x, y] = [seen.x(one.usd_per_mtok.value), seen.y(ms(one))];
    const point = add(svg, "circle", { class: `point ${bitsClass(widthOf(one))}${one.keeps_slo === false ? " out" : ""}`, cx: x, cy: y, r: 6 });
    add(point, "title", {}, `${one.hardware}, ${one.bits}: ${short(one.usd_per_mtok.value)} $/Mtok, TPOT ${short(ms(one))} ms`);
    if (one.pareto) add(svg, "circle", { class: "front", cx: x, cy: y, r: 9.5 });
    if (x >= (last.get(one.hardware)?.x ?? 0)) last.set(one.hardware, { x, y });
  }
  for (const [name, { x, y }] of last) {
    const edge = x > WIDE * 0.78;
    add(svg, "text", { class: "label", x: edge ? x + 8 : x + 13, y: edge ? y - 13 : y + 4, "text-anchor": edge ? "end" : "start" }, name);
  }
}

/** Filled circles: a decoding step; hollow ones: a prompt. Areas are shares of the time. */
export function drawRoofline(svg, roof) {
  const points = roof.points.filter((one) => one.flops > 0 && one.intensity > 0);
  const ridge = roof.flops / roof.bytes_per_s;
  const xs = [...points.map((one) => one.intensity), ridge];
  const seen = plane(svg, xs, [...points.map((one) => one.flops), roof.flops], ["FLOP a byte", "FLOP/s"]);
  const least = Math.max(seen.left, Math.min(...points.map((one) => one.flops)) / roof.bytes_per_s);
  add(svg, "polyline", { class: "roof", points: [[least, least * roof.bytes_per_s], [ridge, roof.flops], [seen.right, roof.flops]]
    .map(([x, y]) => `${seen.x(x)},${seen.y(y)}`).join(" ") });
  for (const phase of ["decode", "prefill"]) {
    const mine = points.filter((one) => one.phase === phase);
    const total = mine.reduce((sum, one) => sum + one.seconds, 0);
    for (const one of mine) {
      const r = 3 + 13 * Math.sqrt(one.seconds / total);
      const point = add(svg, "circle", { class: phase, cx: seen.x(one.intensity), cy: seen.y(one.flops), r });
      add(point, "title", {}, `${phase}: ${one.name}, ${short(one.seconds * 1e3)} ms, bound by ${one.bound}`);
    }
  }
  add(svg, "circle", { class: "decode", cx: WIDE - 200, cy: HIGH - 62, r: 5 });
  add(svg, "text", { x: WIDE - 190, y: HIGH - 58 }, "decoding step");
  add(svg, "circle", { class: "prefill", cx: WIDE - 100, cy: HIGH - 62, r: 5 });
  add(svg, "text", { x: WIDE - 90, y: HIGH - 58 }, "one prompt");
}

/** A row for each request: it waits, its prompt is read, its answer comes. */
export function drawTimeline(svg, lives) {
  const wide = 1000;
  const each = Math.max(1.5, Math.min(8, 480 / lives.length));
  const high = each * lives.length + 24;
  const ends = Math.max(...lives.map((one) => one.end_s ?? one.at_s));
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${wide} ${high}`);
  const x = (seconds) => (seconds / ends) * (wide - 2);
  const step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600].find((one) => ends / one <= 12) ?? ends / 10;
  for (let at = 0; at <= ends; at += step) {
    add(svg, "line", { class: "grid", x1: x(at), x2: x(at), y1: 0, y2: high - 20 });
    add(svg, "text", { x: x(at), y: high - 6, "text-anchor": at ? "middle" : "start" }, `${Number(at.toPrecision(3))} s`);
  }
  lives.forEach((one, row) => {
    if (one.end_s === null) return;
    const kind = one.bits === null ? "plan" : bitsClass(one.bits);
    const group = add(svg, "g", {});
    const bits = one.bits === null ? "" : `, ${short(one.bits)} bits`;
    add(group, "title", {}, `${one.prompt_tokens} + ${one.output_tokens} tokens: TTFT ${short((one.first_s - one.at_s) * 1e3)} ms, ${short(one.end_s - one.at_s)} s in all${bits}`);
    for (const [name, from, to] of [["queue", one.at_s, one.begin_s], ["read", one.begin_s, one.first_s], [`answer-bar ${kind}`, one.first_s, one.end_s]]) {
      if (to > from) add(group, "rect", { class: name, x: x(from), y: row * each, width: Math.max(0.6, x(to) - x(from)), height: each * 0.82 });
    }
  });
}
