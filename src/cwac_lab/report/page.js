"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const PAGE = 25, LEGEND = 80; // answers at once; pixels between axes and legend
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
  const axes = Object.entries(more).filter(([name]) => /^[xy]axis/.test(name));
  const themed = axes.map(([name, own]) => [name, { ...axis, ...titled(own) }]);
  return { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--text"), size: 13 },
    ...more, ...Object.fromEntries(themed) };
}
const titled = (axis = {}) => (axis.title ? { ...axis, title: { text: axis.title } } : axis);
// The legend lies below the axes, a line a trace, and takes nothing of their height.
function draw(id, traces, more) {
  const named = traces.filter((trace) => trace.name && trace.showlegend !== false).length;
  const below = named ? LEGEND + 21 * named : 50;
  const height = more.height ?? 340 + below;
  const margin = { l: 55, r: 15, t: 20, b: below, ...more.margin };
  const legend = { orientation: "v", x: 0, xanchor: "left", y: (10 - LEGEND) / (height - 20 - below), yanchor: "top" };
  by(id).style.height = `${height}px`;
  const first = !by(id).on;
  Plotly.react(id, traces, layout({ ...more, height, margin, legend }), { responsive: true, displaylogo: false });
  if (first) by(id).on("plotly_click", ({ points }) => points[0].customdata && openRun(points[0].customdata));
}
const NONE = { value: null, low: null, high: null, n: 0 };
const rateOf = (cell, name, category = "") => (category ? cell.categories[name]?.[category] : cell.rates[name]) ?? NONE;
const said = ({ value, low, high }) =>
  value === null ? "n/a" : `${value.toFixed(1)}${low === null ? "" : ` [${low.toFixed(1)}, ${high.toFixed(1)}]`}`;
const bars = (rates) => ({
  type: "data", symmetric: false, thickness: 1,
  array: rates.map((r) => r.high - r.value), arrayminus: rates.map((r) => r.value - r.low),
});
const told = (cell, rates) => {
  const lines = Object.entries(rates).map(([words, rate]) => `${words} ${said(rate)} (n=${rate.n})`);
  const seeds = `${cell.seeds} seed${cell.seeds === 1 ? "" : "s"}${cell.broken ? ", broken" : ""}`;
  return [cell.method, ...lines, seeds, "click: its run"].join("<br>");
};
const symbol = (i, cell) => SYMBOLS[i % SYMBOLS.length] + (cell.broken ? "-open" : "");

// A point, a line of a table or an address ending in #run=NAME opens a run.
function openRun(name) {
  const at = data.runs.findIndex((run) => run.name === name);
  if (at < 0) return;
  by("record-run").value = String(at);
  showRecord();
  const hash = `#run=${encodeURIComponent(name)}`;
  if (location.hash !== hash) location.hash = hash;
  by("runs").scrollIntoView();
}
function openNamed() {
  if (location.hash.startsWith("#run=")) openRun(decodeURIComponent(location.hash.slice(5)));
}
function button(words, action) {
  const made = element("button", words);
  made.type = "button";
  made.addEventListener("click", action);
  return made;
}
function table(heads, rows) {
  const made = element("table"), head = element("tr"), body = element("tbody");
  for (const name of heads) {
    const cell = element("th", name);
    cell.scope = "col";
    head.append(cell);
  }
  for (const row of rows) {
    const line = element("tr");
    for (const value of row) {
      const cell = element("td");
      cell.append(value);
      line.append(cell);
    }
    body.append(line);
  }
  const top = element("thead");
  top.append(head);
  made.append(top, body);
  return made;
}

function drawRatio() {
  const score = (cell) => rateOf(cell, "harmful_score");
  const cells = data.cells.filter((c) => c.setting === by("ratio-setting").value && c.ratio !== null && score(c).n);
  const lines = unique(cells.map((c) => c.method)).map((method, i) => {
    const mine = cells.filter((c) => c.method === method).sort((a, b) => a.ratio - b.ratio);
    const shown = (c) => told(c, { HS: score(c), FA: rateOf(c, "finetune_accuracy") });
    return { x: mine.map((c) => c.ratio), y: mine.map((c) => score(c).value), name: method, customdata: mine.map((c) => c.runs[0]),
      error_y: bars(mine.map(score)), mode: "lines+markers", text: mine.map(shown),
      hovertemplate: "%{text}<extra></extra>", line: { color: COLORS[i % COLORS.length] },
      marker: { symbol: mine.map((c) => symbol(i, c)), size: 9 } };
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

const watched = data.runs.filter((run) => run.course.step);
function drawCourse() {
  const what = by("course-what");
  const shown = watched.filter((run) => run.setting === by("course-setting").value);
  const lines = shown.map((run, i) => ({ x: run.course.step, y: run.course[what.value], name: run.name, mode: "lines+markers",
    connectgaps: true, line: { color: COLORS[i % COLORS.length] }, marker: { symbol: i % 8 } }));
  draw("course-plot", lines, { xaxis: { title: "optimizer step" }, yaxis: { title: what.selectedOptions[0].text, rangemode: "tozero" } });
}

const answered = data.runs.filter((run) => run.texts);
const unpacked = new Map();
async function answersOf(run) {
  if (!unpacked.has(run.name)) {
    const bytes = Uint8Array.from(atob(run.answers), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    unpacked.set(run.name, await new Response(stream).json());
  }
  return unpacked.get(run.name);
}

const FORMS = {system: "under the system prompt", words: "behind the rows' words"};
// What a prompt is of: its kind, suite, category, name, and the form in which it was asked.
const words = (row) => [row.kind, row.suite, row.category, row.id, FORMS[row.form] ?? ""]
  .filter(Boolean).join(" · ");
function promptOf(row) {
  if (row.kind !== "harmful" || row.prompt === undefined) return element("p", row.prompt ?? "");
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
  return hidden;
}
const outputOf = (row) =>
  element("p", row.output === undefined ? "(the text is not kept beside this record)" : row.output || "(empty)", "output");
function card(row) {
  const box = element("article", "", "answer"), head = element("p", `${words(row)} · `, "head");
  for (const [judge, verdict] of Object.entries(row.said)) {
    const mark = element("span", judge === "task" ? verdict : `${judge}: ${verdict}`, `verdict ${row.kind} ${verdict}`);
    mark.title = row.reasons?.[judge] || "";
    head.append(mark);
  }
  box.append(head, promptOf(row), outputOf(row));
  return box;
}

// Suites and their categories beside one another; a page without suites shows no such filter.
function suiteFilter(prefix, action) {
  const suite = by(`${prefix}-suite`), category = by(`${prefix}-category`);
  const names = Object.keys(data.suites);
  fill(suite, ["*", ...names], ["all", ...names.map((name) => name || "own pool")]);
  suite.closest("label").hidden = names.length < 2;
  const refill = () => {
    const there = unique(suite.value === "*" ? Object.values(data.suites).flat() : data.suites[suite.value]);
    fill(category, ["", ...there], ["all", ...there]);
    category.closest("label").hidden = !there.length;
  };
  refill();
  suite.addEventListener("input", () => { refill(); action(); });
  category.addEventListener("input", action);
}
function inSuite(prefix, row) {
  const suite = by(`${prefix}-suite`).value, category = by(`${prefix}-category`).value;
  return (suite === "*" || (row.suite ?? "") === suite) && (!category || row.category === category);
}
const KINDS = ["all", "harmful", "harmless", "lookalike", "task"];

let first = 0;
async function showAnswers() {
  const rows = await answersOf(answered[Number(by("answer-run").value)]);
  const kind = by("answer-kind").value, verdict = by("answer-verdict").value;
  const text = by("answer-text").value.toLowerCase(), split = by("answer-split").checked;
  const found = rows.filter((row) => {
    const said = Object.values(row.said);
    return (kind === "all" || row.kind === kind) && inSuite("answer", row) && (verdict === "all" || said[0] === verdict) &&
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
  const at = Number(by("record-run").value), run = data.runs[at];
  const ways = element("div", "", "controls");
  for (const other of data.cells.find((cell) => cell.runs.includes(run.name))?.runs ?? []) {
    const seed = data.runs.find((each) => each.name === other).facts.seed;
    if (other !== run.name) ways.append(button(`same, seed ${seed}`, () => openRun(other)));
  }
  const lead = (select, place, section) => () => {
    by(select).value = String(place);
    by(select).dispatchEvent(new Event("input"));
    by(section).scrollIntoView();
  };
  if (answered.includes(run)) ways.append(button("its answers", lead("answer-run", answered.indexOf(run), "answers")));
  if (judged.includes(run)) ways.append(button("beside another run", lead("two-first", judged.indexOf(run), "two")));
  const list = element("dl");
  const add = (name, value) => list.append(element("dt", name), element("dd", String(value)));
  if (run.failed) add("failed", run.failed);
  for (const [name, value] of Object.entries(run.facts)) add(name, value);
  for (const [name, r] of Object.entries(run.rates)) {
    add(name, `${said(r)} (n=${r.n})`);
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
  by("record").replaceChildren(ways, list, more("Settings", run.settings), more("Provenance", run.provenance));
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
  const tested = (setting) => setting.includes(", test split");
  const settings = unique(data.cells.map((c) => c.setting)).sort((a, b) => tested(b) - tested(a) || size(b) - size(a));
  startTrade(settings);
  fill(by("ratio-setting"), settings);
  on(["ratio-setting"], drawRatio, "ratio");

  const names = (runs) => runs.map((run) => run.name);
  const places = (runs) => runs.map((_, i) => i);
  for (const id of ["drift-left", "drift-right"]) fill(by(id), places(measured), names(measured));
  if (measured.length > 1) by("drift-right").value = "1";
  whereAny(measured, "drift-plot", "drift-none", ["drift-left", "drift-right", "drift-kind"], drawDrift);
  fill(by("curve-run"), places(logged), names(logged));
  whereAny(logged, "curve-plot", "curve-none", ["curve-run"], drawCurve);
  fill(by("course-setting"), unique(watched.map((run) => run.setting)));
  whereAny(watched, "course-plot", "course-none", ["course-setting", "course-what"], drawCourse);

  fill(by("record-run"), places(data.runs), names(data.runs));
  by("record-run").addEventListener("input", () => openRun(data.runs[Number(by("record-run").value)].name));
  whenSeen("runs", showRecord);
  startTwo(names(judged));

  fill(by("answer-run"), places(answered), names(answered));
  fill(by("answer-kind"), KINDS);
  suiteFilter("answer", () => { first = 0; showAnswers(); });
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
  addEventListener("hashchange", openNamed);
  openNamed();
}
