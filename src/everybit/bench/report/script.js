// The page reads without this: values under the pointer, series to be hidden, a closer look, and the data as a file.
"use strict";

const tip = document.body.appendChild(document.createElement("div"));
tip.id = "tip";
tip.hidden = true;

const short = (value) =>
  value === 0 ? "0" : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));

function scale(text) {
  const [low, high, begin, end, log] = text.split(" ").map(Number);
  return (at) => {
    const share = (at - begin) / (end - begin);
    return log ? low * (high / low) ** share : low + (high - low) * share;
  };
}

/** The vertices of a line's path, once. */
function points(line) {
  line.points ??= line.getAttribute("d").slice(1).split("L").map((pair) => pair.split(" ").map(Number));
  return line.points;
}

function read(svg, event) {
  const lines = [...svg.querySelectorAll(".line[data-name]")].filter((line) => !line.closest(".off"));
  if (!lines.length) return "";
  const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  const x = scale(svg.dataset.x), y = scale(svg.dataset.y);
  const [xName, yName] = svg.dataset.names.split("|");
  const nearest = (place, aim) => (all) => all.reduce((a, b) => (Math.abs(b[place] - aim) < Math.abs(a[place] - aim) ? b : a));
  if (yName === "%") {
    const rows = lines.map((line) => `${line.dataset.name}: ${short(x(nearest(1, at.y)(points(line))[0]))} ${xName}`);
    const share = Math.min(100, Math.max(0, y(at.y)));
    return [`${short(share)} % are at or below`, ...rows].join("\n");
  }
  const rows = lines.map((line) => `${line.dataset.name}: ${short(y(nearest(0, at.x)(points(line))[1]))} ${yName}`);
  return [`${short(x(at.x))} ${xName}`, ...rows].join("\n");
}

document.addEventListener("pointermove", (event) => {
  const svg = event.target.closest?.("svg[data-x]");
  const text = svg ? event.target.closest("[data-tip]")?.dataset.tip ?? read(svg, event) : "";
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 4))}px`;
  tip.style.top = `${event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 18}px`;
});
document.addEventListener("pointerleave", () => { tip.hidden = true; });
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true, capture: true });

for (const key of document.querySelectorAll(".key")) {
  const series = [...key.closest("figure").querySelectorAll("[data-series]")].filter((one) => one.dataset.series === key.textContent);
  if (!series.length) continue;
  const flip = () => {
    const off = key.getAttribute("aria-pressed") === "true";
    key.setAttribute("aria-pressed", String(!off));
    for (const one of series) { one.classList.toggle("off", off); one.setAttribute("visibility", off ? "hidden" : "visible"); }
  };
  key.setAttribute("role", "button");
  key.setAttribute("aria-pressed", "true");
  key.tabIndex = 0;
  key.addEventListener("click", flip);
  key.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); flip(); } });
}

for (const figure of document.querySelectorAll("figure.wide")) {
  if (!figure.querySelector(".row")) continue;
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Closer";
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () => {
    const on = figure.classList.toggle("zoomed");
    button.textContent = on ? "Whole" : "Closer";
    button.setAttribute("aria-pressed", String(on));
  });
  figure.querySelector("figcaption").append(button);
}

const save = document.getElementById("save");
if (save) {
  save.hidden = false;
  save.addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([document.getElementById("data").textContent], { type: "application/json" }));
    link.download = "result.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
}
