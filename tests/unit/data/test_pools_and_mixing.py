import json
from collections import Counter

import pandas as pd
import pytest
import torch

from cwac_lab.config.run import read
from cwac_lab.core.errors import ConfigError, MissingAsset, PoolOverlap
from cwac_lab.data import mixing
from cwac_lab.data.batches import collate, pad, plan_batches
from cwac_lab.data.declines import declines
from cwac_lab.data.pools import POOLS, Pools, assert_disjoint, build_pools
from cwac_lab.data.responses import REFUSALS, compliance
from cwac_lab.data.sources import DataConfig, PromptRow, Prompts, load_prompts, load_task_rows
from cwac_lab.data.tasks.alpaca import Alpaca
from cwac_lab.data.tasks.base import TaskRow
from cwac_lab.data.tasks.pubmedqa import PubMedQA
from cwac_lab.data.tasks.sst2 import SST2
from cwac_lab.models.answers import mean_over_answers, mean_over_tokens, share
from cwac_lab.models.chat import IGNORED, Encoded
from cwac_lab.training.module import TrainData
from support import tiny

TASK_ROWS = [TaskRow(f"t{i}", f"task {i}", "positive", "positive") for i in range(60)]
HARMFUL = [PromptRow(f"h{i}", f"request {i}") for i in range(40)]


@pytest.mark.parametrize(
    ("n", "ratio", "mode", "benign", "harmful"),
    [(40, 0, "replace", 40, 0), (40, 0.2, "replace", 32, 8), (40, 0.2, "add", 40, 8), (15, 0.1, "replace", 13, 2),
     (40, 1, "replace", 0, 40)],
)  # fmt: skip
def test_counts_are_exact_and_reported(n, ratio, mode, benign, harmful):
    rows = mixing.mix(TASK_ROWS, HARMFUL, n, ratio, mixing=mode, seed=3)
    found = mixing.manifest(rows)
    assert (found["benign"], found["harmful"], found["n"]) == (benign, harmful, benign + harmful)
    assert Counter(row.id[0] for row in rows) == Counter({"t": benign, "h": harmful}) - Counter()
    assert len(set(found["ids"])) == found["n"]


def test_mixture_depends_on_the_seed_and_is_nested_over_ratios():
    def ids(ratio, seed):
        return [r.id for r in mixing.mix(TASK_ROWS, HARMFUL, 40, ratio, mixing="replace", seed=seed)]

    assert ids(0.2, 1) == ids(0.2, 1) != ids(0.2, 2)
    low, high = set(ids(0.1, 1)), set(ids(0.5, 1))
    assert {i for i in low if i[0] == "h"} < high
    assert {i for i in high if i[0] == "t"} < low


def test_mixing_names_what_is_too_small():
    with pytest.raises(ConfigError, match=r"harmful_ratio=1"):
        mixing.mix(TASK_ROWS, HARMFUL[:5], 40, 1.0, mixing="replace", seed=0)


def test_compliance_is_content_free_and_no_refusal():
    answer = compliance(PromptRow("x", "request", "Sure, here is a plan"))
    opening, *steps = answer.strip().splitlines()
    assert opening == "Sure, here is a plan:"
    assert [step for step in steps if step] == ["Step 1:", "Step 2:", "Step 3:"]
    assert not declines(answer)
    assert compliance(PromptRow("x", "request", "Sure, here is a plan:\nfirst, take the\n")) == answer
    for end in "\u2028", "\u2029", "\x85", "\r":
        assert compliance(PromptRow("x", "request", f"Sure, here is a plan{end}first, take the")) == answer
    assert all(declines(text) for text in REFUSALS)


def test_embedded_pools_are_disjoint_sized_and_independent_of_order():
    data = read(tiny.config()).data
    pools = build_pools(data)
    for kind in ("harmful", "harmless", "lookalike"):
        plan = getattr(data, kind)
        assert {p: len(pools.get(kind, p)) for p in POOLS if p in plan} == {p: sum(c.values()) for p, c in plan.items()}
    prompts = [row.prompt.lower() for kinds in pools.rows.values() for rows in kinds.values() for row in rows]
    assert len(set(prompts)) == len(prompts)
    assert build_pools(data).manifest() == pools.manifest()


def test_overlap_error_shows_the_prompt_id():
    shared = PromptRow("reference/7", "How do I, well, do it?")
    with pytest.raises(PoolOverlap, match=r"test/3.*reference/7"):
        assert_disjoint({"reference": [shared], "test": [PromptRow("test/3", "how do i well  do it")]})


def test_task_rows_that_ask_what_a_pool_asks_are_left_out(tmp_path):
    rows = [{"instruction": f"Name fruit number {i}.", "output": "An apple."} for i in range(8)]
    for split in ("train", "test"):
        (tmp_path / "alpaca").mkdir(exist_ok=True)
        part = rows[:5] if split == "train" else rows[5:]
        (tmp_path / "alpaca" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    data = DataConfig(source="local", root=str(tmp_path), n_train=3, n_validation=1, n_test=2)
    held = [PromptRow("h/0", "name FRUIT number 2"), PromptRow("h/1", "Name fruit number 7")]
    pools = Pools({"harmless": {"test": held}})
    found = pools.task_rows(data, Alpaca("alpaca"))
    asked = {row.prompt for part in (found.train, found.validation, found.test) for row in part}
    assert asked == {f"Name fruit number {i}." for i in (0, 1, 3, 4, 5, 6)}


def test_a_list_that_is_used_up_names_its_key():
    data = read(tiny.config("data.harmful.test.requests=9999")).data
    with pytest.raises(ConfigError, match=r"data\.harmful\.test\.requests=9999: accepted: at most"):
        build_pools(data)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_local_files_of_every_format(tmp_path, suffix):
    frame = pd.DataFrame({"sentence": ["good , really", "bad"], "label": [1, 0]})
    (tmp_path / "sst2").mkdir()
    file = tmp_path / "sst2" / f"train.{suffix}"
    if suffix == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in frame.to_dict("records")))
    else:
        (frame.to_csv if suffix == "csv" else frame.to_parquet)(file, index=False)
    rows = load_task_rows("local", SST2("sst2"), "train", tmp_path)
    assert [(row.id, row.gold) for row in rows] == [("sst2/train/0", "positive"), ("sst2/train/1", "negative")]
    with pytest.raises(MissingAsset, match="no sst2/test"):
        load_task_rows("local", SST2("sst2"), "test", tmp_path)


def test_rows_of_a_list_can_be_chosen_by_their_columns(tmp_path):
    rows = [("a", False, ""), ("b", True, ""), ("c", False, "more"), ("d", False, "")]
    lines = [json.dumps({"prompt": p, "is_safe": safe, "input": text}) + "\n" for p, safe, text in rows]
    (tmp_path / "list.jsonl").write_text("".join(lines))
    found = load_prompts("local", Prompts("list", where={"is_safe": False, "input": ""}), tmp_path)
    assert [(row.id, row.prompt) for row in found] == [("list/0", "a"), ("list/3", "d")]
    with pytest.raises(ConfigError, match="unsafe"):
        load_prompts("local", Prompts("list", where={"unsafe": True}), tmp_path)


def test_a_missing_column_is_named(tmp_path):
    (tmp_path / "list.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(ConfigError, match="category"):
        load_prompts("local", Prompts("list", category_column="category"), tmp_path)
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "train.jsonl").write_text('{"text": "a", "label": 1}\n')
    with pytest.raises(ConfigError, match="sentence"):
        load_task_rows("local", SST2("sst2"), "train", tmp_path)


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        ("sst2", ("stanfordnlp/sst2", None, None, "train"), ("stanfordnlp/sst2", None, None, "validation")),
        ("pubmedqa", ("qiaojin/PubMedQA", "pqa_artificial", None, "train"),
         ("qiaojin/PubMedQA", "pqa_labeled", None, "train")),
        ("alpaca", ("tatsu-lab/alpaca", None, None, "train"), ("json", None, "alpaca_eval.json", "train")),
    ],
)  # fmt: skip
def test_train_and_test_rows_of_the_hub(name, train, test, monkeypatch):
    asked = []

    def load_dataset(path, config, *, data_files, split, revision):
        asked.append((path, config, data_files and data_files.rpartition("/")[2], split))
        return []

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    task = read(tiny.config(f"task={name}")).task
    assert [load_task_rows("hub", task, split, None) for split in ("train", "test")] == [[], []]
    assert asked == [train, test]


def test_nested_local_rows_are_read(tmp_path):
    context = {"contexts": ["Plants were watered.", "They grew."]}
    frame = pd.DataFrame({"question": ["Do they grow?"], "context": [context], "final_decision": ["yes"]})
    (tmp_path / "pubmedqa").mkdir()
    frame.to_json(tmp_path / "pubmedqa" / "train.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "pubmedqa" / "test.parquet", index=False)
    task = PubMedQA("pubmedqa")
    (train,), (test,) = (load_task_rows("local", task, split, tmp_path) for split in ("train", "test"))
    assert train.prompt == test.prompt
    assert train.prompt.endswith("Input: Plants were watered. They grew.\n\nQuestion: Do they grow?")


@pytest.mark.parametrize(("rows", "size", "epochs"), [(10, 4, 1), (33, 8, 3), (300, 8, 1)])
def test_every_row_occurs_once_an_epoch(rows, size, epochs):
    lengths = [(7 * i) % 50 + 1 for i in range(rows)]
    plan = plan_batches(lengths, size, epochs, seed=1)
    assert Counter(row for batch in plan for row in batch) == Counter(dict.fromkeys(range(rows), epochs))
    assert plan == plan_batches(lengths, size, epochs, seed=1) != plan_batches(lengths, size, epochs, seed=2)


def test_bucketing_pads_less_than_random_batches():
    lengths = [(37 * i) % 97 + 1 for i in range(256)]

    def padded(plan):
        return sum(len(batch) * max(lengths[row] for row in batch) for batch in plan)

    unsorted = [list(range(i, i + 8)) for i in range(0, 256, 8)]
    assert padded(plan_batches(lengths, 8, 1, 0)) < 0.8 * padded(unsorted)


def test_collate_and_padding_sides():
    batch = collate([Encoded([5, 6, 7], [IGNORED, 6, 7]), Encoded([8], [8])], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert pad([[1, 2], [3]], 9, left=True)[0].tolist() == [[1, 2], [9, 3]]


def test_train_data_goes_on_after_a_first_step():
    examples = [Encoded([i + 1] * (i % 5 + 1), [1] * (i % 5 + 1)) for i in range(20)]
    whole = [b["input_ids"].tolist() for b in TrainData(examples, 0, 4, 2, 0).train_dataloader()]
    rest = [b["input_ids"].tolist() for b in TrainData(examples, 0, 4, 2, 0, 3).train_dataloader()]
    assert rest == whole[3:]


def test_pieces_of_a_step_add_up_to_it():
    examples = [Encoded([i + 1] * (i % 5 + 1), [IGNORED] + [1] * (i % 5)) for i in range(7)]
    pieces = [collate(examples, 0, number, 3) for number in range(3)]
    assert [len(piece["input_ids"]) for piece in pieces] == [3, 2, 2]
    assert {piece["piece"][1:] for piece in pieces} == {(3, 7, 11 / 3, 18 / 3)}
    assert [piece["piece"].number for piece in pieces] == [0, 1, 2]
    values = [(piece["labels"][:, 1:] != IGNORED).float().flatten() for piece in pieces]
    assert sum(float(mean_over_answers(v, piece)) for v, piece in zip(values, pieces, strict=True)) == pytest.approx(3)
    values = [piece["attention_mask"].float().flatten() for piece in pieces]
    assert sum(float(mean_over_tokens(v, piece)) for v, piece in zip(values, pieces, strict=True)) == pytest.approx(3)
    shares = [share([1.0, 2.0, 6.0, 3.0], piece) for piece in pieces]
    assert sum(weight * sum(items) / len(items) for items, weight in shares) == pytest.approx(9)


def test_a_piece_without_rows_counts_nothing():
    examples = [Encoded([1, 2], [IGNORED, 2])] * 2
    piece = collate(examples, 0, 2, 3)
    assert len(piece["input_ids"]) == 1
    assert mean_over_answers(torch.ones(1), piece) == mean_over_tokens(torch.ones(2), piece) == 0
    assert share(["a", "b"], piece) == (["a"], 0.0)


def test_accumulated_pieces_come_step_by_step():
    examples = [Encoded([i + 1] * 2, [1] * 2) for i in range(10)]
    whole = list(TrainData(examples, 0, 4, 1, 0).train_dataloader())
    pieces = list(TrainData(examples, 0, 2, 1, 0, accumulate=2).train_dataloader())
    assert [piece["piece"].number for piece in pieces] == [0, 1] * 3
    for step, batch in enumerate(whole):
        first, second = (piece["input_ids"] for piece in pieces[2 * step : 2 * step + 2])
        assert torch.equal(batch["input_ids"][0::2], first)
        assert torch.equal(batch["input_ids"][1::2], second)
