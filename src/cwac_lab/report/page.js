"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const PAGE = 25;
const COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d00", "#7a5195", "#777777"];
const SYMBOLS = ["circle", "square", "diamond", "cross", "triangle-up", "star", "hexagon", "pentagon"];

const unique = (values) => [...new Set(values)];
const fill = (select, values, texts = values) => {
  select.replaceChildren(...values.map((value, i) => new Option(texts[i], value)));
};
const element = (name, text = "", className = "") => {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
};

function layout(more) {
  const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), automargin: true };
  const { xaxis = {}, yaxis = {}, ...rest } = more;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--text"), size: 13 },
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
  };
}
const titled = (axis = {}) => (axis.title ? { ...axis, title: { text: axis.title } } : axis);
// The legend lies below the axes, a line a trace, and takes nothing of their height.
function draw(id, traces, more) {
  const axes = Object.fromEntries(Object.entries(more).filter(([name]) => /^[xy]axis/.test(name))
    .map(([name, axis]) => [name, titled(axis)]));
  const named = traces.filter((trace) => trace.name).length;
  const below = named ? 60 + 21 * named : 50;
  const height = more.height ?? 340 + below;
  const margin = { l: 55, r: 15, t: 20, b: below, ...more.margin };
  const legend = { orientation: "v", x: 0, xanchor: "left", y: -55 / (height - 20 - below), yanchor: "top" };
  by(id).style.height = `${height}px`;
  Plotly.react(id, traces, layout({ ...more, ...axes, height, margin, legend }), { responsive: true, displaylogo: false });
}
const bars = (cells, rate) => ({
  type: "data", symmetric: false, thickness: 1,
  array: cells.map((c) => c[rate].high - c[rate].value), arrayminus: cells.map((c) => c[rate].value - c[rate].low),
});
const told = (cell) => {
  const say = (words, r) => (r.value === null ? `${words} n/a` : `${words} ${r.value} [${r.low}, ${r.high}] (n=${r.n})`);
  const kept = cell.retained_refusals.value === null ? "" : `<br>${say("retained refusals", cell.retained_refusals)}`;
  return `${cell.method}<br>${say("HS", cell.harmful_score)}${kept}<br>${say("FA", cell.finetune_accuracy)}` +
    `<br>${cell.seeds} seed${cell.seeds === 1 ? "" : "s"}${cell.broken ? ", broken" : ""}`;
};
const scored = (cell) => cell.harmful_score.value !== null;

function drawTrade() {
  const ratio = Number(by("trade-ratio").value);
  const cells = data.cells.filter((c) => c.setting === by("trade-setting").value && c.ratio === ratio)
    .filter((c) => scored(c) && c.finetune_accuracy.value !== null);
  const front = cells.filter((a) => !a.broken && !cells.some((b) => !b.broken && b !== a &&
    b.harmful_score.value <= a.harmful_score.value && b.finetune_accuracy.value >= a.finetune_accuracy.value &&
    (b.harmful_score.value < a.harmful_score.value || b.finetune_accuracy.value > a.finetune_accuracy.value)))
    .sort((a, b) => a.harmful_score.value - b.harmful_score.value);
  const points = cells.map((cell, i) => ({
    x: [cell.harmful_score.value], y: [cell.finetune_accuracy.value], name: cell.method, mode: "markers",
    error_x: bars([cell], "harmful_score"), error_y: bars([cell], "finetune_accuracy"),
    marker: { size: 11, color: COLORS[i % COLORS.length],
      symbol: SYMBOLS[i % SYMBOLS.length] + (cell.broken ? "-open" : "") },
    hovertemplate: `${told(cell)}<extra></extra>`,
  }));
  const line = { x: front.map((c) => c.harmful_score.value), y: front.map((c) => c.finetune_accuracy.value),
    mode: "lines", name: "Pareto front", line: { dash: "dot", color: css("--faint") }, hoverinfo: "skip" };
  draw("trade-plot", [line, ...points],
    { xaxis: { title: "harmful score, % (lower is better)" }, yaxis: { title: "fine-tuning accuracy, %" } });
}

function drawRatio() {
  const cells = data.cells.filter((c) => c.setting === by("ratio-setting").value && c.ratio !== null && scored(c));
  const lines = unique(cells.map((c) => c.method)).map((method, i) => {
    const mine = cells.filter((c) => c.method === method).sort((a, b) => a.ratio - b.ratio);
    return { x: mine.map((c) => c.ratio), y: mine.map((c) => c.harmful_score.value), name: method,
      error_y: bars(mine, "harmful_score"), mode: "lines+markers", text: mine.map(told),
      hovertemplate: "%{text}<extra></extra>", line: { color: COLORS[i % COLORS.length] },
      marker: { symbol: mine.map((c) => SYMBOLS[i % SYMBOLS.length] + (c.broken ? "-open" : "")), size: 9 } };
  });
  const several = lines.filter((line) => line.x.length > 1);
  draw("ratio-plot", several.length ? several : lines, { xaxis: { title: "harmful ratio" }, yaxis: { title: "harmful score, %", range: [-3, 103] } });
}

const measured = data.runs.filter((run) => run.drift.layers);
function drawDrift() {
  const kind = by("drift-kind").value;
  const chosen = ["drift-left", "drift-right"].map((id) => measured[Number(by(id).value)]);
  const rows = chosen.map((run) => Object.values(run.drift.layers[kind]));
  const top = Math.max(...rows.flat(2));
  const maps = chosen.map((run, i) => ({
    type: "heatmap", z: rows[i], y: Object.keys(run.drift.layers[kind]), zmin: 0, zmax: top, colorscale: "Viridis",
    xaxis: i ? "x2" : "x", yaxis: i ? "y2" : "y", showscale: i === 1,
    hovertemplate: "layer %{x}, %{y}: %{z}<extra></extra>",
  }));
  const narrow = window.innerWidth < 640;
  draw("drift-plot", maps, {
    grid: narrow ? { rows: 2, columns: 1, pattern: "independent" } : { rows: 1, columns: 2, pattern: "independent" },
    xaxis: { title: `layer: ${chosen[0].facts.constraint}` }, xaxis2: { title: `layer: ${chosen[1].facts.constraint}` },
    margin: { l: 75, r: 15, t: 20, b: 50 }, height: narrow ? 640 : 420,
  });
}

const logged = data.runs.filter((run) => run.curve.step);
function drawCurve() {
  const { step, ...losses } = logged[Number(by("curve-run").value)].curve;
  const lines = Object.entries(losses).map(([name, values], i) => ({
    x: step, y: values, name, mode: "lines", connectgaps: true, line: { color: COLORS[i % COLORS.length] } }));
  draw("curve-plot", lines, { xaxis: { title: "optimizer step" }, yaxis: { title: "loss" } });
}

const answered = data.runs.filter((run) => run.answers);
const unpacked = new Map();
async function answersOf(run) {
  if (!unpacked.has(run.name)) {
    const bytes = Uint8Array.from(atob(run.answers), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    unpacked.set(run.name, await new Response(stream).json());
  }
  return unpacked.get(run.name);
}

function card(row) {
  const box = element("article", "", "answer");
  const form = row.form === "system" ? " · under the system prompt" : "";
  const head = element("p", `${row.kind} · ${row.id}${form} · `, "head");
  for (const [judge, verdict] of Object.entries(row.said)) {
    const mark = element("span", judge === "task" ? verdict : `${judge}: ${verdict}`, `verdict ${row.kind} ${verdict}`);
    mark.title = row.reasons[judge] || "";
    head.append(mark);
  }
  box.append(head);
  if (row.kind === "harmful") {
    const hidden = element("button", "", "blurred");
    hidden.type = "button";
    hidden.setAttribute("aria-expanded", "false");
    hidden.setAttribute("aria-label", "Harmful prompt, hidden: show it");
    hidden.append(element("span", row.prompt));
    hidden.addEventListener("click", () => {
      const open = hidden.getAttribute("aria-expanded") !== "true";
      hidden.setAttribute("aria-expanded", String(open));
      hidden.setAttribute("aria-label", open ? row.prompt : "Harmful prompt, hidden: show it");
    });
    box.append(hidden);
  } else box.append(element("p", row.prompt));
  box.append(element("p", row.output || "(empty)", "output"));
  return box;
}

let first = 0;
async function showAnswers() {
  const rows = await answersOf(answered[Number(by("answer-run").value)]);
  const kind = by("answer-kind").value, verdict = by("answer-verdict").value;
  const text = by("answer-text").value.toLowerCase(), split = by("answer-split").checked;
  const found = rows.filter((row) => {
    const said = Object.values(row.said);
    return (kind === "all" || row.kind === kind) && (verdict === "all" || said[0] === verdict) &&
      (!split || unique(said).length > 1) && (!text || `${row.prompt} ${row.output}`.toLowerCase().includes(text));
  });
  first = Math.max(0, Math.min(first, found.length - 1));
  first -= first % PAGE;
  by("answer-count").textContent = found.length
    ? `${found.length} of ${rows.length} answers, ${first + 1} to ${Math.min(first + PAGE, found.length)} shown`
    : `none of ${rows.length} answers`;
  by("answer-list").replaceChildren(...found.slice(first, first + PAGE).map(card));
  by("answer-back").disabled = first === 0;
  by("answer-more").disabled = first + PAGE >= found.length;
}

function showRecord() {
  const run = data.runs[Number(by("record-run").value)];
  const list = element("dl");
  const add = (name, value) => list.append(element("dt", name), element("dd", String(value)));
  if (run.failed) add("failed", run.failed);
  for (const [name, value] of Object.entries(run.facts)) add(name, value);
  for (const [name, r] of Object.entries(run.rates)) {
    add(name, r.value === null ? "n/a" : `${r.value} [${r.low}, ${r.high}] (n=${r.n})`);
  }
  for (const [judge, kappa] of Object.entries(run.judges)) {
    const known = Object.entries(kappa).filter(([, k]) => k.kappa !== null);
    const words = ([kind, k]) =>
      `${kind} ${k.kappa.toFixed(2)} [${k.low.toFixed(2)}, ${k.high.toFixed(2)}] (n=${k.n})`;
    add(`kappa with ${judge}`, known.map(words).join(", ") || "n/a");
  }
  for (const [name, value] of Object.entries(run.drift.means?.harmful ?? {})) {
    add(`drift, ${name} (n=${run.drift.n.harmful} prompts)`, value);
  }
  const more = (title, values) => {
    const part = element("details"), inner = element("dl");
    part.append(element("summary", title), inner);
    for (const [name, value] of Object.entries(values)) inner.append(element("dt", name), element("dd", String(value)));
    return part;
  };
  by("record").replaceChildren(list, more("Settings", run.settings), more("Provenance", run.provenance));
}

// What is below the first screen is drawn when it comes into view.
function whenSeen(section, action) {
  const watch = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    watch.disconnect();
    action();
  }, { rootMargin: "400px" });
  watch.observe(by(section));
}
function on(ids, action, section = null) {
  for (const id of ids) by(id).addEventListener("input", action);
  if (section) whenSeen(section, action);
  else action();
}
function whereAny(list, section, none, ids, action) {
  if (!list.length) {
    by(none).hidden = false;
    by(section).hidden = true;
    for (const id of ids) by(id).disabled = true;
    return;
  }
  on(ids, action, section);
}

function main() {
  const size = (setting) => data.cells.filter((c) => c.setting === setting).length;
  const tested = (setting) => setting.endsWith("test split");
  const settings = unique(data.cells.map((c) => c.setting)).sort((a, b) => tested(b) - tested(a) || size(b) - size(a));
  fill(by("trade-setting"), settings);
  fill(by("ratio-setting"), settings);
  const ratios = () => {
    const mine = data.cells.filter((c) => c.setting === by("trade-setting").value && c.ratio !== null);
    const known = unique(mine.map((c) => c.ratio)).sort((a, b) => a - b);
    const most = (ratio) => mine.filter((c) => c.ratio === ratio).length;
    fill(by("trade-ratio"), known);
    if (known.length) by("trade-ratio").value = known.reduce((a, b) => (most(b) > most(a) ? b : a));
    drawTrade();
  };
  on(["trade-setting"], ratios);
  by("trade-ratio").addEventListener("input", drawTrade);
  on(["ratio-setting"], drawRatio, "ratio");

  const names = (runs) => runs.map((run) => run.name);
  const places = (runs) => runs.map((_, i) => i);
  for (const id of ["drift-left", "drift-right"]) fill(by(id), places(measured), names(measured));
  if (measured.length > 1) by("drift-right").value = "1";
  whereAny(measured, "drift-plot", "drift-none", ["drift-left", "drift-right", "drift-kind"], drawDrift);
  fill(by("curve-run"), places(logged), names(logged));
  whereAny(logged, "curve-plot", "curve-none", ["curve-run"], drawCurve);

  fill(by("record-run"), places(data.runs), names(data.runs));
  on(["record-run"], showRecord, "runs");

  fill(by("answer-run"), places(answered), names(answered));
  fill(by("answer-kind"), ["all", "harmful", "harmless", "lookalike", "task"]);
  fill(by("answer-verdict"), ["all", "complied", "refused", "incoherent", "unknown", "correct", "wrong", "not scored"]);
  if (answered.length) {
    on(["answer-run", "answer-kind", "answer-verdict", "answer-text", "answer-split"], () => { first = 0; showAnswers(); }, "answers");
    by("answer-back").addEventListener("click", () => { first -= PAGE; showAnswers(); });
    by("answer-more").addEventListener("click", () => { first += PAGE; showAnswers(); });
  } else {
    by("answer-count").textContent = "No answers are kept beside these records.";
    for (const id of ["answer-back", "answer-more"]) by(id).disabled = true;
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => location.reload());
}
main();
