"use strict";
// Which method keeps refusals, and at which cost: refusals over task accuracy, and over over-refusal.
const TASK = "finetune_accuracy";
const called = (name) => data.rates[name].title.slice(0, -2);
const better = (name) => `${called(name)}, % (${data.rates[name].higher ? "higher" : "lower"} is better)`;
const keptName = () => {
  const suite = by("trade-suite").value;
  return by("trade-kept").value + (suite ? `/${suite}` : "");
};
const keptOf = (cell) => rateOf(cell, keptName(), by("trade-category").value);
const costName = () => by("trade-cost").value;
// How good a value is, so that more is better whatever the rate.
const good = (name, value) => (data.rates[name].higher ? value : -value);

function tradeCells() {
  const ratio = by("trade-ratio").value;
  return data.cells.filter((c) => c.setting === by("trade-setting").value && (c.start || String(c.ratio) === ratio))
    .filter((c) => keptOf(c).n);
}

// The cells that no other beats in both rates; broken models and starts are on no front.
function frontOf(cells, across) {
  const value = (c) => [good(keptName(), keptOf(c).value), good(across, rateOf(c, across).value)];
  const sound = cells.filter((c) => !c.broken && !c.start && rateOf(c, across).n);
  const beats = (a, b) => a[0] >= b[0] && a[1] >= b[1] && (a[0] > b[0] || a[1] > b[1]);
  return sound.filter((a) => !sound.some((b) => beats(value(b), value(a)))).sort((a, b) => value(a)[0] - value(b)[0]);
}

// A start was not trained on the task: its accuracy is no cost of a method.
const isIn = (cell, across) => rateOf(cell, across).n > 0 && !(cell.start && across === TASK);

function panel(cells, across, axis, named) {
  const shown = cells.filter((c) => isIn(c, across));
  const points = shown.map((cell) => {
    const i = cells.indexOf(cell), rates = [rateOf(cell, across), keptOf(cell)];
    return {
      x: [rates[0].value], y: [rates[1].value], xaxis: `x${axis}`, yaxis: `y${axis}`, mode: "markers", name: cell.method,
      legendgroup: cell.method, showlegend: named(cell), customdata: [cell.runs[0]],
      error_x: bars([rates[0]]), error_y: bars([rates[1]]),
      marker: { size: 11, color: COLORS[i % COLORS.length], symbol: symbol(i, cell) },
      hovertemplate: `${told(cell, { [called(keptName())]: rates[1], [called(across)]: rates[0] })}<extra></extra>`,
    };
  });
  const front = frontOf(cells, across);
  const line = { x: front.map((c) => rateOf(c, across).value), y: front.map((c) => keptOf(c).value), mode: "lines",
    xaxis: `x${axis}`, yaxis: `y${axis}`, name: "nothing is better in both", showlegend: axis === "", hoverinfo: "skip",
    line: { dash: "dot", color: css("--faint") } };
  return [line, ...points];
}

function drawTrade() {
  const cells = tradeCells(), cost = costName(), narrow = window.innerWidth < 640;
  const left = new Set(cells.filter((c) => isIn(c, TASK)));
  const traces = [...panel(cells, TASK, "", () => true), ...panel(cells, cost, "2", (cell) => !left.has(cell))];
  const turned = (name) => (data.rates[name].higher ? {} : { autorange: "reversed" });
  const up = { title: better(keptName()), ...turned(keptName()) };
  const below = LEGEND + 21 * (cells.length + 1);
  draw("trade-plot", traces, {
    grid: narrow ? { rows: 2, columns: 1, pattern: "independent" } : { rows: 1, columns: 2, pattern: "independent" },
    xaxis: { title: better(TASK), ...turned(TASK) }, xaxis2: { title: better(cost), ...turned(cost) },
    yaxis: up, yaxis2: narrow ? up : { ...up, title: "" }, height: (narrow ? 700 : 380) + below,
  });
  sayTrade(cells, cost);
}

function sayTrade(cells, cost) {
  const name = keptName(), sound = cells.filter((c) => !c.broken && !c.start);
  const most = Math.max(...sound.map((c) => good(name, keptOf(c).value)));
  const best = sound.filter((c) => good(name, keptOf(c).value) === most);
  const costs = (c) => `${called(TASK)} ${said(rateOf(c, TASK))}, ${called(cost)} ${said(rateOf(c, cost))}`;
  by("trade-say").textContent = best.length
    ? `Best at harmful ratio ${by("trade-ratio").value}, with ${called(name)} ${said(keptOf(best[0]))}: ` +
      `${best.map((c) => `${c.method} (${costs(c)})`).join(" and ")}. Percent [95 % interval].`
    : "No model that is not broken has this rate at this ratio.";
  const sorted = [...cells].sort((a, b) => good(name, keptOf(b).value) - good(name, keptOf(a).value));
  const heads = ["method", data.rates[name].title, "n", data.rates[TASK].title, "n", data.rates[cost].title, "n", "seeds"];
  by("trade-table").replaceChildren(table(heads, sorted.map((c) => {
    const rates = [keptOf(c), rateOf(c, TASK), rateOf(c, cost)];
    const method = button(c.method + (c.broken ? " (broken)" : ""), () => openRun(c.runs[0]));
    return [method, ...rates.flatMap((rate) => [said(rate), String(rate.n)]), String(c.seeds)];
  })));
}

function startTrade(settings) {
  fill(by("trade-setting"), settings);
  const titled = (names) => names.map((name) => data.rates[name].title);
  const titledBase = (names) => names.map((base) => data.rates[base]?.title ?? base);
  const has = (name) => data.cells.some((c) => c.setting === by("trade-setting").value && c.ratio !== null && rateOf(c, name).n);
  const keep = (select, names, texts = names) => {
    const before = by(select).value;
    fill(by(select), names, texts);
    if (names.includes(before)) by(select).value = before;
  };
  const known = Object.entries(data.rates);
  const bases = known.filter(([, rate]) => rate.kinds.join() === "harmful").sort(([, a], [, b]) => b.higher - a.higher)
    .map(([, rate]) => rate.base);
  const costs = known.filter(([, rate]) => rate.kinds.length && !/harmful|task/.test(rate.kinds)).map(([name]) => name);
  const categories = () => {
    const there = data.suites[by("trade-suite").value] ?? [];
    const name = keptName(), mine = there.filter((each) => data.cells.some((c) => c.categories[name]?.[each]));
    keep("trade-category", ["", ...mine], ["all", ...mine]);
    by("trade-category").closest("label").hidden = !mine.length;
    drawTrade();
  };
  const suites = () => {
    const base = by("trade-kept").value;
    const there = known.filter(([name, rate]) => rate.base === base && has(name)).map(([, rate]) => rate.suite);
    const mine = there.length ? there : [""];
    keep("trade-suite", mine, mine.map((suite) => suite || "own pool"));
    by("trade-suite").closest("label").hidden = mine.length < 2;
    categories();
  };
  const all = () => {
    const mine = data.cells.filter((c) => c.setting === by("trade-setting").value && c.ratio !== null);
    const ratios = unique(mine.map((c) => c.ratio)).sort((a, b) => a - b);
    const most = (ratio) => mine.filter((c) => c.ratio === ratio).length;
    fill(by("trade-ratio"), ratios.map(String));
    if (ratios.length) by("trade-ratio").value = String(ratios.reduce((a, b) => (most(b) > most(a) ? b : a)));
    // Retained refusals first, where records have them: they are of what the start refuses.
    const kept = unique(bases).filter((base) => known.some(([name, rate]) => rate.base === base && has(name)));
    keep("trade-kept", kept.length ? kept : ["harmful_score"], titledBase(kept.length ? kept : ["harmful_score"]));
    const there = costs.filter(has);
    keep("trade-cost", there.length ? there : ["over_refusal"], titled(there.length ? there : ["over_refusal"]));
    suites();
  };
  by("trade-setting").addEventListener("input", all);
  by("trade-kept").addEventListener("input", suites);
  by("trade-suite").addEventListener("input", categories);
  for (const id of ["trade-ratio", "trade-category", "trade-cost"]) by(id).addEventListener("input", drawTrade);
  all();
}
