"""Costs of runs as columns: what a record tells, means over seeds, and what is not averaged."""

import pytest

from cwac_lab.core.stats import Rate, mean_of
from cwac_lab.report import costs
from cwac_lab.report.card import card
from cwac_lab.report.console import Screen
from cwac_lab.report.grouping import records
from cwac_lab.report.tables import column_title, markdown, numbers, summary
from cwac_lab.results import load
from cwac_lab.results.store import runs
from support.recorded import record


def told(value, half, n=60):
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def costly(folder, seed, constraint="weight", **more):
    """A finished run that tells all costs."""
    run = record(folder, constraint, 0.2, seed, 10)
    task = {"acc,none": told(40.0 + 10 * seed, 9.0, 20) | {"unit": "%", "better": "higher"}}
    stages = {
        "start": {"seconds": 5.0, "peak_memory_gb": 1.0},
        "train": {"seconds": 100.0 + 20 * seed, "peak_memory_gb": 2.5 + seed, "peak_gpu_memory_gb": 0.5},
    }
    found = {
        "perplexity": told(50.0 + seed, 4.0), "perplexity_start": told(49.0, 4.0), "forgetting": told(0.02, 0.01),
        "plain_text": "a" * 64, "stages": stages, "training": {"trained_parameters": 1234}, "held_share": 0.97,
        "lm_eval": {"version": "0.4.13", "limit": 20, "asked": ["twenty"], "tasks": {"twenty": task}},
    }  # fmt: skip
    run.write("metrics.json", run.read("metrics.json") | found | more)
    return run


def rows(folder):
    return records(runs(folder))


ONE = {
    "perplexity": "50.0 [46.0, 54.0]", "perplexity_start": "49.0 [45.0, 53.0]", "forgetting": "0.020 [0.010, 0.030]",
    "seconds": "105", "train_seconds": "100", "peak_memory_gb": "2.50", "peak_gpu_memory_gb": "0.50",
    "trained_parameters": "1234", "held_share": "0.970", "lm_eval_twenty": "40.0 [31.0, 49.0]",
}  # fmt: skip


def test_each_cost_of_one_run(tmp_path):
    costly(tmp_path, 0)
    group = rows(tmp_path)
    assert {cost.name: costs.text(group, cost) for cost in costs.known(group)} == ONE
    titles = {cost.name: cost.title for cost in costs.known(group)}
    assert titles["forgetting"] == "forgetting, nats a token ↓"
    assert titles["lm_eval_twenty"] == "twenty (acc,none), % ↑"
    assert titles["held_share"] == "held of unseen harmful prompts, of 1 ↑"


def test_means_over_seeds_with_interval_or_range(tmp_path):
    for seed in (0, 1):
        costly(tmp_path, seed)
    group = rows(tmp_path)
    named = {cost.name: cost for cost in costs.known(group)}
    assert costs.text(group, named["seconds"]) == "115 (105 to 125)"
    assert costs.text(group, named["peak_gpu_memory_gb"]) == "0.50"
    assert costs.rate_of(group, named["perplexity"]) == mean_of([Rate(v, v - 4, v + 4, 60) for v in (50.0, 51.0)])
    assert (costs.rate_of(group, named["lm_eval_twenty"]).low, costs.rate_of(group, named["lm_eval_twenty"]).n) == (
        0,
        20,
    )
    found = costs.numbers(group, list(named.values()))
    assert (found["seconds"], found["seconds_lowest_seed"], found["seconds_highest_seed"]) == (115, 105, 125)
    assert found["perplexity_n"] == 60
    assert "seconds_low" not in found


@pytest.mark.parametrize(
    ("other", "name"),
    [({"plain_text": "b" * 64}, "perplexity"), ({"plain_text": "b" * 64}, "forgetting"), (None, "lm_eval_twenty")],
)
def test_what_was_measured_on_different_things_is_not_averaged(other, name, tmp_path):
    first = costly(tmp_path, 0)
    limited = first.read("metrics.json")["lm_eval"] | {"limit": None}
    costly(tmp_path, 1, **(other or {"lm_eval": limited}))
    group = rows(tmp_path)
    cost = next(cost for cost in costs.known(group) if cost.name == name)
    assert costs.text(group, cost) == "n/a (measured on 2 different things)"
    assert costs.rate_of(group, cost).value is None


def test_tables_show_what_is_forgotten_and_the_file_of_numbers_has_all(tmp_path):
    costly(tmp_path, 0)
    record(tmp_path, "none", 0.2, 0, 90)
    table = summary(rows(tmp_path))
    assert table["perplexity, plain text ↓"].tolist() == ["", ONE["perplexity"]]
    assert not [name for name in table if name.startswith(("time", "peak", "trained", "held"))]
    text = markdown(table)
    assert "| perplexity, plain text ↓ | n | forgetting, nats a token ↓ | n | twenty (acc,none), % ↑ | n |" in text
    assert column_title("n, forgetting") == "n"
    beside = numbers(rows(tmp_path)).to_dict("records")
    assert [row["constraint"] for row in beside] == ["none", "weight"]
    assert (beside[1]["held_share"], beside[1]["trained_parameters"], beside[1]["seconds"]) == (0.97, 1234, 105)


def test_records_of_before_have_no_new_column(tmp_path):
    record(tmp_path, "none", 0.2, 0, 90)
    group = rows(tmp_path)
    assert costs.known(group) == []
    assert not [name for name in summary(group) if "perplexity" in name or "forgetting" in name]


def test_the_screen_and_the_card_tell_of_them(tmp_path, capsys):
    run = costly(tmp_path, 0)
    metrics = run.facts()
    Screen().result("title", metrics)
    shown = " ".join(capsys.readouterr().out.split())
    for name in ("perplexity", "perplexity_start", "forgetting", "lm_eval_twenty"):
        assert ONE[name] in shown, name
    assert "the start's perplexity, plain text" in shown
    text = card({}, metrics | {"training": {"steps": 3}}, run.provenance(), "name")
    assert f"| forgetting, nats a token ↓ | {ONE['forgetting']} | 60 |" in text
    assert "abilities other than the task" not in text
    alone = {name: value for name, value in metrics.items() if name != "lm_eval"}
    assert "abilities other than the task" in card({}, alone | {"training": {"steps": 3}}, run.provenance(), "name")


def test_all_runs_as_one_table_have_them(tmp_path):
    costly(tmp_path, 0)
    record(tmp_path, "none", 0.2, 0, 90)
    frame = load(tmp_path).set_index("constraint")
    row = frame.loc["weight"]
    names = (
        "perplexity",
        "perplexity_start_low",
        "forgetting_n",
        "lm_eval_twenty_acc,none",
        "lm_eval_twenty_acc,none_n",
    )
    assert [row[name] for name in names] == [50.0, 45.0, 60, 40.0, 20]
    assert (row["held_share"], row["trained_parameters"], row["peak_memory_gb"]) == (0.97, 1234, 2.5)
    assert frame.loc["none"].isna()["forgetting"]
