"""The documents: what is generated is current, links lead somewhere, pages keep their size, tables show the records."""

import re
from pathlib import Path

import pytest

from cwac_lab.docs import keys, long_tables, site, starts
from cwac_lab.results.store import flat
from support.cover import some

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
TABULATED = sorted(file.parent for file in (ROOT / "experiments").glob(f"*/{long_tables.VIEWS}"))
GENERATED = {DOCS / "configuration.md", *(DOCS / "tables").glob("*.md")}
PAGES = sorted({ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS.glob("*.md")} - GENERATED)
LINKED = [*PAGES, *sorted(GENERATED), *sorted(ROOT.glob("experiments/*/README.md"))]
RENEW = "run `make docs` and look at what changed"


@pytest.mark.parametrize("folder", some(TABULATED, TABULATED[0], others="slow"), ids=lambda folder: folder.name)
def test_long_tables_are_what_their_records_give(folder):
    page = DOCS / "tables" / f"{folder.name}.md"
    assert page.read_text(encoding="utf-8") == long_tables.experiment(folder), RENEW


def test_the_table_of_drift_is_what_its_records_give():
    assert (DOCS / "tables" / "drift.md").read_text(encoding="utf-8") == long_tables.drift(ROOT / "experiments"), RENEW


def test_the_table_of_the_start_is_what_its_rates_give():
    assert (DOCS / "tables" / "start.md").read_text(encoding="utf-8") == starts.page(), RENEW


def test_the_index_lists_every_long_table_and_no_other():
    listed = set(re.findall(r"\]\(([^)#]+)\)", (DOCS / "tables" / "README.md").read_text(encoding="utf-8")))
    there = {file.name for file in (DOCS / "tables").glob("*.md")} - {"README.md"}
    assert listed == there
    assert there >= {f"{folder.name}.md" for folder in TABULATED}


@pytest.mark.slow
def test_the_page_of_settings_is_that_of_the_code():
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == keys.page(), RENEW


def test_every_key_has_a_meaning_and_stands_on_the_page():
    listed = {key.name: key for _, found in keys.sections() for key in found}
    assert [name for name, key in listed.items() if not key.meaning] == []
    free = [re.compile(re.escape(name).replace("NAME", r"\w+") + r"(\..+)?") for name in listed if "NAME" in name]
    plans = ("data.harmful.", "data.harmless.", "data.lookalike.", "forms.others", "hydra")
    missing = [
        key
        for key in flat(keys._composed())
        if key not in listed
        and not key.startswith(plans)
        and not key.endswith("_target_")
        and not any(pattern.fullmatch(key) for pattern in free)
    ]
    assert missing == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("trainer.schedule", "constant | constant_with_warmup | linear | cosine"),
        ("harmful_ratio", "[0, 1]"),
        ("tuning.alpha", "(0, inf)"),
        ("constraint.sppft.block", "two relative depths, 0 <= from <= to <= 1"),
        ("data.root", ""),
    ],
)
def test_what_is_accepted_is_what_the_check_says(name, words):
    (found,) = {key.accepted for _, listed in keys.sections() for key in listed if key.name == name}
    assert found == words


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int | None, "integer or null"),
        (list[float], "list of number"),
        (dict[str, dict[str, int]], "mapping to mapping to integer"),
    ],
)
def test_a_type_is_told_in_words(hint, words):
    assert keys._kind(hint) == words


def _anchors(text):
    """Return the anchors of a page's headings, as GitHub and mkdocs make them of plain words."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def broken_links(page):
    """Return the relative links of a page whose file or heading is not there."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target.read_text(encoding="utf-8"))):
            found.append(link)
    return found


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_a_broken_link_is_seen(tmp_path):
    (tmp_path / "other.md").write_text("# A heading: of two\n")
    page = tmp_path / "page.md"
    page.write_text("[a](other.md#a-heading-of-two) [b](other.md#none) [c](none.md) `[d](none.md)` [e](https://f.g)\n")
    assert broken_links(page) == ["other.md#none", "none.md"]


def test_figures_that_are_shown_are_there_and_no_others():
    assert {file.name for file in (DOCS / "figures").glob("*.svg")} == long_tables.shown(ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_keeps_its_size(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    readme = page.name == "README.md"
    most = {"README.md": 120, "CHANGELOG.md": 400}.get(page.name, 150)
    assert len(lines) <= most
    assert [line for line in lines if len(line) > (110 if readme else 200)] == []


def test_small_tables_show_what_the_long_ones_say():
    cell = re.compile(r"[+-]?\d+\.\d \[[^\]]+\]")
    known = {
        found for page in (DOCS / "tables").glob("*.md") for found in cell.findall(page.read_text(encoding="utf-8"))
    }
    for page in (ROOT / "README.md", DOCS / "results.md", DOCS / "results-earlier.md"):
        rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
        shown = [found for row in rows for found in cell.findall(row)]
        assert shown, page.name
        assert [found for found in shown if found not in known] == [], page.name


@pytest.mark.parametrize(
    ("link", "at", "shown"),
    [
        ("[a](docs/judges.md#by-kind)", "", "[a](judges.md#by-kind)"),
        ("![a](docs/figures/x.svg)", "", "![a](figures/x.svg)"),
        ("[a](../CHANGELOG.md)", "docs", "[a](changelog.md)"),
        ("[a](../evidence.md#what)", "docs/tables", "[a](../evidence.md#what)"),
        ("[a](../src/cwac_lab/train.py)", "docs", "a (`src/cwac_lab/train.py`)"),
        ("[`conf/x.yaml`](../conf/x.yaml)", "docs", "`conf/x.yaml`"),
        ("[a](https://b.c) [d](#e)", "docs", "[a](https://b.c) [d](#e)"),
    ],
)
def test_the_site_leads_to_its_own_pages_and_names_files_of_the_code(link, at, shown):
    assert site.rewritten(link, at) == shown
