"use strict";
// Two runs beside one another: settings and rates that differ, and the prompts with another verdict.
const judged = data.runs.filter((run) => run.answers);
const itemOf = (row) => [row.kind, row.suite ?? "", row.id, row.form ?? ""].join("\u0000");
const verdictOf = (row) => Object.values(row.said)[0];

function pairsOf(before, after) {
  const known = new Map(before.map((row) => [itemOf(row), row]));
  return after.filter((row) => known.has(itemOf(row))).map((row) => [known.get(itemOf(row)), row]);
}

function differingSettings(a, b) {
  const all = (run) => ({ ...run.facts, ...run.settings });
  const [ours, other] = [all(a), all(b)];
  return unique([...Object.keys(ours), ...Object.keys(other)]).filter((key) => ours[key] !== other[key])
    .map((key) => [key, String(ours[key] ?? "not known"), String(other[key] ?? "not known")]);
}
function differingPackages(a, b) {
  return unique([...Object.keys(a.provenance), ...Object.keys(b.provenance)])
    .filter((key) => String(a.provenance[key]) !== String(b.provenance[key]))
    .map((key) => [key, String(a.provenance[key] ?? "not known"), String(b.provenance[key] ?? "not known")]);
}

function twoCard([before, after], runs) {
  const box = element("article", "", "answer");
  box.append(element("p", words(after), "head"), promptOf(after.prompt === undefined ? before : after));
  for (const [i, row] of [before, after].entries()) {
    const head = element("p", `${runs[i].name} `, "head");
    head.append(element("span", verdictOf(row), `verdict ${row.kind} ${verdictOf(row)}`));
    box.append(head, outputOf(row));
  }
  return box;
}

let turn = 0, place = 0;
async function showTwo() {
  const mine = ++turn, runs = ["two-first", "two-second"].map((id) => judged[Number(by(id).value)]);
  const [before, after] = await Promise.all(runs.map(answersOf));
  if (mine !== turn) return; // another choice was made meanwhile
  const settings = differingSettings(...runs), packages = differingPackages(...runs);
  const names = runs.map((run) => run.name);
  const more = element("details");
  more.append(element("summary", `Code and machine: ${packages.length} differ`), table(["", ...names], packages));
  by("two-settings").replaceChildren(table(["setting", ...names], settings), ...(packages.length ? [more] : []));
  const rates = unique(runs.flatMap((run) => Object.keys(run.rates)));
  const cells = (rate) => runs.flatMap((run) => [said(run.rates[rate] ?? NONE), String(run.rates[rate]?.n ?? 0)]);
  by("two-rates").replaceChildren(table(["rate", names[0], "n", names[1], "n"], rates.map((rate) => [rate, ...cells(rate)])));

  const kind = by("two-kind").value, text = by("two-text").value.toLowerCase();
  const asked = pairsOf(before, after).filter(([, row]) => (kind === "all" || row.kind === kind) && inSuite("two", row));
  const apart = asked.filter(([a, b]) => verdictOf(a) !== verdictOf(b))
    .filter(([a, b]) => !text || [b.id, b.prompt, a.output, b.output].join(" ").toLowerCase().includes(text));
  const way = ([a, b]) => `${verdictOf(a)} → ${verdictOf(b)}`;
  const ways = unique(apart.map(way)).sort(), chosen = by("two-way").value;
  const counts = ways.map((each) => `${each} (${apart.filter((pair) => way(pair) === each).length})`);
  fill(by("two-way"), ["all", ...ways], [`all (${apart.length})`, ...counts]);
  if (ways.includes(chosen)) by("two-way").value = chosen;
  const found = apart.filter((pair) => by("two-way").value === "all" || way(pair) === by("two-way").value);
  place = Math.max(0, Math.min(place, found.length - 1));
  place -= place % PAGE;
  const part = found.length ? `, ${place + 1} to ${Math.min(place + PAGE, found.length)} shown` : "";
  by("two-count").textContent = `${found.length} of ${asked.length} prompts that both were asked have another verdict${part}`;
  by("two-list").replaceChildren(...found.slice(place, place + PAGE).map((pair) => twoCard(pair, runs)));
  by("two-back").disabled = place === 0;
  by("two-more").disabled = place + PAGE >= found.length;
}

function startTwo(names) {
  const ids = ["two-first", "two-second", "two-kind", "two-way", "two-text"];
  if (judged.length < 2) {
    by("two-count").textContent = "No two runs have verdicts.";
    for (const id of [...ids, "two-suite", "two-category", "two-back", "two-more"]) by(id).disabled = true;
    return;
  }
  for (const id of ids.slice(0, 2)) fill(by(id), judged.map((_, i) => i), names);
  // Two methods of one setting, where there are two.
  const cells = data.cells.filter((c) => c.setting === by("trade-setting").value && String(c.ratio) === by("trade-ratio").value);
  const places = cells.map((c) => judged.findIndex((run) => run.name === c.runs[0])).filter((at) => at >= 0);
  const [first, second] = places.length > 1 ? places : [0, 1];
  by("two-first").value = String(first);
  by("two-second").value = String(second);
  fill(by("two-kind"), KINDS);
  const again = () => { place = 0; showTwo(); };
  suiteFilter("two", again);
  on(ids, again, "two");
  by("two-back").addEventListener("click", () => { place -= PAGE; showTwo(); });
  by("two-more").addEventListener("click", () => { place += PAGE; showTwo(); });
}
