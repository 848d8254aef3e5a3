// The page: picks a model and a precision, sends the prompt, and shows the answers as they arrive.

import { frames, post, request } from "./api.js";
import { PrecisionSlider } from "./precision.js";
import { AnswerView, h, LoadStrip } from "./views.js";

const $ = (id) => document.getElementById(id);
const EXAMPLES = {
  chat: ["Why is the sky blue?", "Write a haiku about rounding."],
  text: ["Once upon a time", "There are three reasons why"],
};

let models = [];
let turns = []; // { prompt, answers: [text or null of each side] }
let running = null; // AbortController of the answers that are arriving
let comparing = false;

const letters = [..."everybit"].map((letter) => h("span", {}, letter));
$("wordmark").append(...letters);
/** Eight letters for eight bits: those that are read are dark. */
function spell() {
  const bits = sliders[0].shown ?? 8;
  letters.forEach((letter, index) => letter.classList.toggle("off", index >= bits));
}

const sliders = [new PrecisionSlider("A", () => spell()), new PrecisionSlider("B", () => {})];
$("sliders").append(...sliders.map((slider) => slider.element));
const load = new LoadStrip((bits) => {
  for (const slider of sliders) slider.live = bits;
});

const model = () => models.find((one) => one.id === $("model").value);
const isChat = () => model()?.everybit?.chat !== false;

function chooseModel() {
  const one = model();
  const bits = one?.everybit?.bits ?? [8];
  const chat = isChat();
  sliders[0].offer(bits);
  sliders[1].offer(bits, bits[1] ?? bits[0]);
  load.watch(one.id, Math.max(...bits));
  $("range").textContent = `${Math.min(...bits)} to ${Math.max(...bits)} bits`;
  $("mode-note").textContent = chat
    ? "Move the slider and ask: each token shows the bits it was computed with."
    : `${one.id} has no chat template, so it does not answer: it continues the text that you write.`;
  $("system-field").hidden = !chat;
  $("prompt-label").textContent = chat ? "Your message" : "Text to continue";
  $("prompt").placeholder = chat ? "Ask anything" : "Write the beginning of a text";
  $("send").textContent = chat ? "Send" : "Continue";
  $("examples").replaceChildren(...EXAMPLES[chat ? "chat" : "text"].map((text) => {
    const button = h("button", { type: "button" }, text);
    button.addEventListener("click", () => {
      write(text);
      $("prompt").focus();
    });
    return h("li", {}, button);
  }));
}

async function loadModels() {
  try {
    const list = await (await request("/v1/models")).json();
    models = list.data.filter((one) => !one.everybit?.alias_of);
    if (!models.length) throw new Error("The server has no model.");
    $("model").replaceChildren(...models.map((one) => new Option(one.id)));
    chooseModel();
  } catch (error) {
    $("mode-note").className = "error";
    $("mode-note").textContent = error.message;
  }
}

/** The request for one side. A side's history is its own answers, or the first side's where it was not asked. */
function body(prompt, side) {
  const common = {
    model: $("model").value, stream: true, stream_options: { include_usage: true }, ...sliders[side].fields,
  };
  for (const field of ["temperature", "max_tokens", "seed"]) {
    if ($(field).value !== "") common[field] = Number($(field).value);
  }
  if (!isChat()) return { ...common, prompt };
  const messages = [];
  if ($("system").value.trim()) messages.push({ role: "system", content: $("system").value.trim() });
  for (const turn of turns) {
    const said = turn.answers[side] ?? turn.answers[0];
    if (said) messages.push({ role: "user", content: turn.prompt }, { role: "assistant", content: said });
  }
  return { ...common, messages: [...messages, { role: "user", content: prompt }] };
}

const following = () => $("talk").scrollHeight - $("talk").scrollTop - $("talk").clientHeight < 80;

/** Streams one answer into its view. Returns its text, or null where nothing useful came. */
async function answer(view, path, content, signal) {
  let usage = null;
  let reason = null;
  let said = "";
  try {
    for await (const frame of frames(await post(path, content, signal))) {
      if (frame.error) throw new Error(frame.error.message ?? "The server gave up.");
      usage = frame.usage ?? usage;
      const choice = frame.choices?.[0];
      if (!choice) continue;
      const text = choice.delta?.content ?? choice.text ?? "";
      const follow = following();
      view.add(text, frame.bits ?? []);
      if (follow) $("talk").scrollTop = $("talk").scrollHeight;
      said += text;
      reason = choice.finish_reason ?? reason;
    }
    if (reason === null) throw new Error("The answer broke off: the connection to the server ended.");
    if (reason === "length") view.note("Ended at the limit of tokens.");
  } catch (error) {
    if (!signal.aborted) said = "";
    view.note(...(signal.aborted ? ["Stopped."] : [error.message, "error"]));
  }
  view.finish(usage);
  return said || null;
}

async function send() {
  const prompt = $("prompt").value;
  if (running || !prompt.trim() || !model()) return;
  running = new AbortController();
  const { signal } = running;
  const sides = comparing ? [0, 1] : [0];
  const most = Math.max(...model().everybit.bits);
  const views = sides.map((side) => new AnswerView(sliders[side].label, sliders[side].tint, most));
  $("turns").append(h("li", { className: isChat() ? "turn" : "turn continued" },
    h("p", { className: "prompt" }, prompt), h("div", { className: `answers of${sides.length}` }, ...views.map((view) => view.element))));
  $("empty").hidden = true;
  write("");
  $("talk").scrollTop = $("talk").scrollHeight;
  busy(true);
  const path = isChat() ? "/v1/chat/completions" : "/v1/completions";
  const mine = turns; // a new conversation meanwhile has turns of its own
  const answers = await Promise.all(sides.map((side, index) => answer(views[index], path, body(prompt, side), signal)));
  mine.push({ prompt, answers });
  if (following()) $("talk").scrollTop = $("talk").scrollHeight;
  if (running?.signal === signal) {
    running = null;
    busy(false);
  }
  $("announce").textContent = signal.aborted ? "Stopped." : "The answer is complete.";
}

function busy(on) {
  $("stop").hidden = !on;
  $("send").hidden = on;
  $("model").disabled = on;
}

function fresh() {
  running?.abort();
  running = null;
  busy(false);
  turns = [];
  $("turns").replaceChildren();
  $("empty").hidden = false;
  $("prompt").focus();
}

function compare(on) {
  comparing = on;
  $("one").ariaPressed = String(!on);
  $("two").ariaPressed = String(on);
  document.body.classList.toggle("two", on);
}

function write(text) {
  $("prompt").value = text;
  grow();
}

function grow() {
  const area = $("prompt");
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight + 2, 200)}px`; // and its border
}

const on = (id, type, act) => $(id).addEventListener(type, act);
on("dock", "submit", (event) => {
  event.preventDefault();
  send();
});
on("prompt", "keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
on("prompt", "input", grow);
on("key-cancel", "click", () => $("key-dialog").close());
on("stop", "click", () => running?.abort());
on("fresh", "click", fresh);
on("one", "click", () => compare(false));
on("two", "click", () => compare(true));
on("model", "change", () => {
  fresh();
  chooseModel();
});
on("underline", "change", () => document.body.classList.toggle("plain", !$("underline").checked));
$("settings").open = matchMedia("(min-width: 860px)").matches;
loadModels();
