"""What the screen shows of starts: each model's own n, and which of them babbles."""

from __future__ import annotations

from cwac_lab.core.stats import wilson
from cwac_lab.report.console import Screen


def model(hits, n, incoherent):
    rate = {"rate": "harmful_score", **wilson(hits, n).to_dict(), "incoherent": incoherent, "broken": incoherent > 20}
    return {"sets": {"harmful, test pool": rate}}


def test_each_model_has_its_own_n_and_one_that_babbles_is_told(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    Screen().rates({"models": {"before": model(70, 80, 0.0), "after": model(0, 3, 96.25)}})
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if "harmful, test pool" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")][1:] == [
        "87.5 [78.5, 93.1]", "80", "0.0", "0.0 [0.0, 56.1]", "3", "96.2",
    ]  # fmt: skip
    assert "broken model: after: too many incoherent answers" in shown
    assert "broken model: before" not in shown
