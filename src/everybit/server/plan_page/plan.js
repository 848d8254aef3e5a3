// The planner's page: asks the server for estimates, fleets and simulations, and shows them.

import { post, request } from "./api.js";
import { drawPareto, drawRoofline, drawTimeline, short, widthOf } from "./plots.js";
import { bitsClass, h } from "./views.js";

const $ = (id) => document.getElementById(id);
const PASTE = "config";
const FIRST = { model: "meta-llama/Llama-3.1-8B", cards: ["h100-sxm", "a100-80-sxm", "a10g"], bits: ["own", "everybit4", "everybit3"] };
const RUNGS = ["everybit3", "everybit4", "everybit8"];

let choices = { models: [], cards: [], bits: [] };
let estimates = [];

const number = (id) => ($(id).value === "" ? null : Number($(id).value));
const checked = (id) => [...$(id).querySelectorAll("input:checked")].map((one) => one.value);
const list = (id, lines) => $(id).replaceChildren(...lines.map((line) => h("li", {}, line)));
const bitsName = (bits) => (bits === "own" ? "as stored" : bits);
const tint = (bits) => h("i", { className: `swatch ${bitsClass(bits)}` });

/** What every request says. Throws for a config that is not JSON. */
function common() {
  const body = { engine: $("engine").value };
  if ($("model").value !== PASTE) body.model = $("model").value;
  else {
    try {
      body.config = JSON.parse($("config").value);
    } catch {
      throw new Error("The pasted config.json is not JSON.");
    }
  }
  const slo = {};
  if (number("ttft") !== null) slo.ttft_ms = number("ttft");
  if (number("tpot") !== null) slo.tpot_ms = number("tpot");
  return Object.keys(slo).length ? { ...body, slo } : body;
}

function choice() {
  const cards = checked("cards");
  const prices = Object.fromEntries(cards.map((card) => [card, $(`price-${card}`).value]).filter(([, usd]) => usd !== "")
    .map(([card, usd]) => [card, Number(usd)]));
  return { cards, bits: checked("bits"), prices };
}

/** One plan at a time: the buttons rest meanwhile. */
async function ask(path, body, show) {
  const buttons = document.querySelectorAll(".ask button, .row button");
  for (const button of buttons) button.disabled = true;
  $("status").className = "status";
  $("status").textContent = "Computing …";
  try {
    show(await (await post(path, body())).json());
    $("status").textContent = "";
  } catch (error) {
    $("status").className = "status error";
    $("status").textContent = error.message;
    $("status").scrollIntoView({ block: "nearest" });
  }
  for (const button of buttons) button.disabled = false;
}

const interval = (one, scale = 1) => (one === null ? [h("td", {}, "–")] : [h("td", {}, short(one.value * scale),
  h("small", {}, `${short(one.low * scale)} – ${short(one.high * scale)}`))]);
const header = (...names) => h("thead", {}, h("tr", {}, ...names.map((name) => h("th", { scope: "col" }, name))));

// --- estimates
function showEstimates(found) {
  const cost = (one) => one.usd_per_mtok?.value ?? Infinity;
  estimates = found.estimates.sort((a, b) => (b.keeps_slo ?? true) - (a.keeps_slo ?? true) || cost(a) - cost(b) || a.tpot_s.value - b.tpot_s.value);
  const unknown = found.model.unknown.length ? ` Not used of the config: ${found.model.unknown.join(", ")}.` : "";
  $("summary").textContent = `${found.model.name}, ${short(found.model.parameters)} weights. Steady load, in closed form; intervals hold nine of ten truths.${unknown}`;
  $("estimates").replaceChildren(
    header("Card and bits", "TTFT ms", "TPOT ms", "Tokens/s", "$/Mtok", "J/token", "Decoding is bound by", "Card's figures"),
    h("tbody", {}, ...estimates.map((one, index) => {
      const button = h("button", { type: "button" }, `${one.hardware}, ${bitsName(one.bits)}`);
      button.addEventListener("click", () => explain(index));
      const [what, share] = one.binding.decode;
      const kept = one.keeps_slo === false ? h("small", {}, "misses the limits") : one.running < one.concurrency ? h("small", {}, `memory holds ${Math.floor(one.running)}`) : "";
      return h("tr", { className: one.keeps_slo === false ? "missed" : "" }, h("td", {}, tint(widthOf(one)), button, kept),
        ...interval(one.ttft_s, 1e3), ...interval(one.tpot_s, 1e3), ...interval(one.tokens_per_s), ...interval(one.usd_per_mtok),
        ...interval(one.joules_per_token), h("td", {}, what, h("small", {}, `${Math.round(share * 100)}% of the time`)), h("td", {}, one.known));
    })));
  list("impossible", found.impossible.map((one) => `${one.card}, ${bitsName(one.bits)}: ${one.why}`));
  $("plots").hidden = !estimates.length;
  const priced = estimates.filter((one) => one.usd_per_mtok?.value > 0);
  const unpriced = new Set(estimates.filter((one) => !priced.includes(one)).map((one) => one.hardware));
  $("pareto-title").textContent = "Cost and speed; ringed: no other is better in bits, cost and speed. Hollow: misses the limits."
    + (unpriced.size ? ` Without a price: ${[...unpriced].join(", ")}.` : "");
  if (priced.length) drawPareto($("pareto"), priced, number("tpot"));
  else $("pareto").replaceChildren();
  if (estimates.length) explain(0);
}

function explain(index) {
  const one = estimates[index];
  const drawn = one.roofline ? "each circle an operator, its area the share of the time" : "none, an operator of this model moves no bytes";
  $("roofline-title").textContent = `Roofline of ${one.hardware}, ${bitsName(one.bits)}: ${drawn}`;
  if (one.roofline) drawRoofline($("roofline"), one.roofline);
  else $("roofline").replaceChildren();
  list("why", one.why);
  [...$("estimates").querySelectorAll("tbody tr")].forEach((row, at) => row.classList.toggle("shown", at === index));
}

// --- fleet
function demand() {
  return $("demand").value.trim().split("\n").map((line) => {
    const [prompt, output, requests_per_s, ...more] = line.trim().split(/[\s,;]+/).map(Number);
    if (more.length || !(requests_per_s > 0)) throw new Error(`Demand "${line.slice(0, 60)}": expected prompt, answer and requests/s.`);
    return { prompt, output, requests_per_s };
  });
}

function fleetBody() {
  const body = { ...common(), ...choice(), demand: demand(), tp: $("fleet-tp").value.trim().split(/[\s,;]+/).map(Number), utilisation: number("utilisation") };
  if (number("power") !== null) body.power_w = number("power");
  if (number("least") !== null) body.least_quality = number("least");
  return body;
}

function showFleet({ model, fleet, demand, types, impossible, rests_on }) {
  const bitsOf = (name) => (name.endsWith(", own") ? (8 * model.weight_bytes.own) / model.parameters : name.split(", ").pop());
  const names = Object.keys(fleet.counts);
  const type = (name) => types.find((one) => one.name === name);
  const share = (value) => (value === undefined ? "–" : `${Math.round(100 * value)}%`);
  $("bill").textContent = `${fleet.usd_per_h.toFixed(2)} $/h, ${Math.round(fleet.usd_per_h * 730).toLocaleString("en")} $ a month`;
  $("fleet").replaceChildren(
    header("Replicas", "$/h", "Busy", "Power, W", ...demand.map((one) => `${short(one.requests_per_s)}/s of ${one.name}`)),
    h("tbody", {}, ...names.map((name) => h("tr", {}, h("td", {}, tint(bitsOf(name)), `${fleet.counts[name]} of: ${name}`),
      h("td", {}, (fleet.counts[name] * type(name).usd_per_h).toFixed(2)), h("td", {}, share(fleet.loads[name])), h("td", {}, type(name).power_w ? short(fleet.counts[name] * type(name).power_w) : "–"),
      ...fleet.split.map((row) => h("td", {}, share(row[name])))))));
  const counts = (one) => Object.entries(one.counts).map(([name, count]) => `${count} of: ${name}`).join(" and ");
  list("fleet-notes", [
    `No fleet of these types costs less than ${fleet.bound_usd_per_h.toFixed(2)} $/h. Not simulated; utilisation at most ${share(fleet.utilisation)}.`,
    ...fleet.binding.map((one) => `Binding: ${one.limit} ${short(one.value)}; without it ${one.saves_usd_per_h.toFixed(2)} $/h less, at ${short(one.relaxed)} ${one.relaxed_saves_usd_per_h.toFixed(2)} $/h less.`),
    ...(fleet.binding.length ? [] : ["Binding: no limit; the demand alone sets the bill."]),
    ...(fleet.runner_up ? [`Runner-up: ${counts(fleet.runner_up)} at ${fleet.runner_up.usd_per_h.toFixed(2)} $/h.`] : []),
    ...names.map((name) => `${name}: ${rests_on[name].efficiencies}; figures of the card: ${rests_on[name].card}.`),
    ...Object.entries(impossible).map(([name, why]) => `Impossible: ${name}: ${why}`),
  ]);
}

// --- simulation
function simulateBody() {
  const card = $("simulate-card").value;
  const body = { ...common(), card, bits: $("policy").value.split(" "), scheduler: $("scheduler").value, tp: number("tp"),
    replicas: number("replicas"), rate: number("rate"), seconds: number("seconds"), prompt: number("prompt-tokens"), output: number("output-tokens") };
  const usd = $(`price-${card}`).value;
  return usd === "" ? body : { ...body, usd_per_h: Number(usd) };
}

function showSimulation({ metrics, bill, timeline, rests_on }) {
  const { latency, requests, throughput } = metrics;
  const rows = {
    Requests: requests.failed ? `${requests.scored}, ${requests.failed} refused` : requests.scored,
    "TTFT p50 and p99, ms": `${short(latency.ttft_ms.p50)} · ${short(latency.ttft_ms.p99)}`,
    "TPOT p50 and p99, ms": latency.tpot_ms ? `${short(latency.tpot_ms.p50)} · ${short(latency.tpot_ms.p99)}` : "–",
    "Tokens/s": short(throughput.output_tokens_per_s),
    ...(metrics.goodput ? { "Within the limits": `${Math.round(100 * metrics.goodput.share)}%` } : {}),
    "Smooth streams": `${Math.round(100 * metrics.fluidity.smooth_share)}%`,
    ...(metrics.precision?.mean_bits ? { "Mean bits": short(metrics.precision.mean_bits) } : {}),
    "$/Mtok": short(bill.usd_per_mtok),
    "J/token": short(bill.joules_per_token),
  };
  $("simulated").replaceChildren(...Object.entries(rows).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value)))));
  $("timeline-figure").hidden = false;
  drawTimeline($("timeline"), timeline);
  list("simulate-notes", [`Step times: ${rests_on.efficiencies}; figures of the card: ${rests_on.card}.`]);
}

// --- the form
function offer() {
  $("model").replaceChildren(...choices.models.map((one) => new Option(one)), new Option("paste a config.json", PASTE));
  $("model").value = FIRST.model;
  $("bits").replaceChildren(...choices.bits.map((bits) =>
    h("label", {}, h("input", { type: "checkbox", value: bits, checked: FIRST.bits.includes(bits) }), h("span", {}, bitsName(bits)))));
  const rank = (one) => (FIRST.cards.includes(one.card) ? FIRST.cards.indexOf(one.card) : FIRST.cards.length);
  const cards = [...choices.cards].sort((a, b) => rank(a) - rank(b) || a.name.localeCompare(b.name));
  $("cards").replaceChildren(...cards.map((one) => h("div", {},
    h("label", {}, h("input", { type: "checkbox", value: one.card, checked: FIRST.cards.includes(one.card) }), h("span", {}, one.name)),
    h("input", { id: `price-${one.card}`, type: "number", min: "0", max: "1000", step: "any", placeholder: one.usd_per_h ?? "–", ariaLabel: `$/h of ${one.name}` }))));
  $("simulate-card").replaceChildren(...cards.map((one) => new Option(one.name, one.card)));
  const ladder = new Option(`auto: ${RUNGS.map((one) => one.slice(-1)).join(", ")} bits, as load allows`, RUNGS.join(" "));
  $("policy").replaceChildren(ladder, ...choices.bits.map((bits) => new Option(`${bitsName(bits)}, fixed`, bits)));
}

const on = (id, path, body, show) => $(id).addEventListener("submit", (event) => {
  event.preventDefault();
  ask(path, body, show);
});
on("ask", "/plan/estimate", () => ({ ...common(), ...choice(), users: number("users"), prompt: number("prompt-tokens"), output: number("output-tokens"), tp: number("tp") }), showEstimates);
on("fleet-form", "/plan/fleet", fleetBody, showFleet);
on("simulate-form", "/plan/simulate", simulateBody, showSimulation);
$("model").addEventListener("change", () => { $("config-field").hidden = $("model").value !== PASTE; });
$("key-cancel").addEventListener("click", () => $("key-dialog").close());
try {
  choices = await (await request("/plan/choices")).json();
  offer();
} catch (error) {
  $("status").className = "status error";
  $("status").textContent = error.message;
}
