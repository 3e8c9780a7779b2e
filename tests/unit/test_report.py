import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import tiny
from cwac_lab.cache import cached_folder, digest, write_json
from cwac_lab.report.latex import latex
from cwac_lab.report.paired import differences
from cwac_lab.report.tables import cell, markdown, records, summary
from cwac_lab.results.store import RunFolder, run_key, runs
from cwac_lab.stats import wilson


def rate(hits, n):
    return wilson(hits, n).to_dict()


def record(folder, constraint, ratio, seed, hits, **config):
    run = RunFolder(folder / "runs" / f"{constraint}-{ratio}-{seed}-{digest(config)[:4]}")
    run.write("config.json", {"constraint": config, "trainer": {"learning_rate": 1}})
    rates = {"harmful_score": rate(hits, 100), "finetune_accuracy": rate(80, 100), "over_refusal": rate(2, 100),
             "over_refusal_lookalike": rate(5, 100), "incoherent": rate(0, 300)}  # fmt: skip
    settings = {
        "weights": "w",
        "weights_content": "c0ffee",
        "task": "sst2",
        "data": "local",
        "split": "test",
        "constraint": constraint,
    }
    run.write("metrics.json", {**settings, "harmful_ratio": ratio, "seed": seed, "broken": False, **rates})
    run.mark("ok")
    return run


def test_rows_are_means_over_seeds_and_start_comes_first(tmp_path):
    for seed, hits in enumerate((10, 20, 30)):
        record(tmp_path, "coupled", 0.2, seed, hits)
    record(tmp_path, "none", 0.2, 0, 90)
    record(tmp_path, "start", None, 0, 5)
    table = summary(records(runs(tmp_path)))
    assert table["constraint"].tolist() == ["start", "none", "coupled"]
    assert table["seeds"].tolist() == [1, 1, 3]
    assert table["HS"][2].startswith("20.0 [13.3, 28.9] (n=100) 10..30")
    assert "w (c0ffee) | sst2, local data, test split" in markdown(table)


def test_two_settings_of_one_constraint_are_two_rows(tmp_path):
    record(tmp_path, "weight", 0.2, 0, 10, energy=0.9)
    record(tmp_path, "weight", 0.2, 1, 40, energy=0.99)
    table = summary(records(runs(tmp_path)))
    assert table["variant"].tolist() == ["energy=0.9", "energy=0.99"]


def test_settings_that_a_run_did_not_use_do_not_split_a_row(tmp_path):
    for seed, (reference, size) in enumerate([("all", 8), ("refused", 16)]):
        run = record(tmp_path, "none", 0.2, seed, 90)
        run.write("config.json", {"constraint": {}, "data": {"reference": reference}, "sae": {"k": size}})
    table = summary(records(runs(tmp_path)))
    assert (table["seeds"].tolist(), table["variant"].tolist()) == ([2], [""])


def test_differences_are_paired_by_seed_and_item(tmp_path):
    """Accuracy against the plain run of the seed, refusals against the start; incoherent answers do not count."""

    def judged(run, right, refused):
        task = [{"kind": "task", "id": f"t{i}", "correct": i < right} for i in range(10)]
        asked = [
            {"kind": "harmful", "id": f"h{i}", "refused": i < refused, "complied": i >= refused, "incoherent": i == 9}
            for i in range(10)
        ]
        run.write("verdicts.jsonl", [*task, *reversed(asked)])

    for seed, (plain, held) in enumerate([(8, 6), (9, 9)]):
        judged(record(tmp_path, "none", 0.2, seed, 90), plain, 0)
        judged(record(tmp_path, "weight", 0.2, seed, 10), held, 8 - seed)
    judged(record(tmp_path, "none", 0.1, 0, 90), 0, 0)
    judged(record(tmp_path, "start", None, 0, 5), 0, 9)
    rows = records(runs(tmp_path))
    summary(rows)
    (row,) = differences(rows).to_dict("records")
    assert row["constraint"] == "weight"
    assert row["FA - none"].startswith("-10.0 [")
    assert row["FA - none"].partition(" p=")[0].endswith("(n=10, 2 seeds)")
    assert row["HS - start"].startswith("+16.7 [")  # 1 and 2 of 9 coherent answers
    assert row["over-refusal - start"] == ""
    assert "Paired: w (c0ffee) | sst2" in markdown(differences(rows), "Paired: ")


def test_more_seeds_do_not_narrow_the_interval_over_prompts():
    one, three = cell([rate(20, 100)]), cell([rate(20, 100)] * 3)
    assert three.startswith(one)
    assert cell([rate(0, 0)]) == "n/a (n=0)"


def test_unfinished_runs_are_left_out(tmp_path):
    record(tmp_path, "none", 0.2, 0, 90).mark("failed", "stopped")
    assert records(runs(tmp_path)) == []


def test_the_key_of_a_run_ignores_what_changes_no_result():
    def key(*overrides, data="a"):
        from omegaconf import OmegaConf

        from cwac_lab.config import INCIDENTAL

        return run_key(OmegaConf.to_container(tiny.config(*overrides), resolve=True), INCIDENTAL, {"data": data})

    assert key() == key("logger=csv", "output_root=/elsewhere", "trainer.progress_bar=false", "force=true")
    assert key("harmful_ratio=0") == key("harmful_ratio=0.0")
    assert len({key(), key(data="b"), key("seed=1"), key("task=agnews"), key("constraint.weight.energy=0.5")}) == 5


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def broken(folder):
        (folder / "half").write_text("x")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        cached_folder(tmp_path, "kind", {"a": 1}, broken)
    assert not any(path.is_dir() for path in (tmp_path / "kind").iterdir())
    built = []
    for _ in range(2):
        folder = cached_folder(tmp_path, "kind", {"a": 1}, lambda f: built.append(write_json(f / "x.json", {})))
    assert (folder / "x.json").is_file()
    assert len(built) == 1


def test_those_who_need_a_folder_at_once_build_it_once(tmp_path):
    built = []

    def build(folder):
        time.sleep(0.2)
        built.append(write_json(folder / "x.json", {}))

    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: cached_folder(tmp_path, "kind", {"a": 1}, build), range(4)))
    assert len(built) == len(folders) == 1


def test_latex_marks_the_best_and_the_second_of_each_ratio(tmp_path):
    for constraint, hits in (("none", 90), ("weight", 10), ("coupled", 4), ("lisa", 50)):
        record(tmp_path, constraint, 0.2, 0, hits)
    record(tmp_path, "none", 0.1, 0, 70)
    record(tmp_path, "start", None, 0, 1)
    broken = record(tmp_path, "l2", 0.2, 0, 0)
    broken.write("metrics.json", broken.read("metrics.json") | {"broken": True})
    text = latex(records(runs(tmp_path)))
    lines = {tuple(line.split(" & ")[:2]): line for line in text.splitlines() if " & " in line}
    assert r"\textbf{4.0 [" in lines["0.2", "coupled"]
    assert r"\underline{10.0 [" in lines["0.2", "weight"]
    assert r"\textbf{70.0 [" in lines["0.1", "none"]
    for plain in (("0.2", "lisa"), ("0.2", "l2"), ("--", "start")):
        assert lines[plain].split(" & ")[3][0].isdigit()
    assert text.count(r"\toprule") == 1
    assert r"95 \% interval" in text
