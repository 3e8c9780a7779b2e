"""Whatever a user's file holds is read right, or stops in one line that names file, line or key, before training."""

from pathlib import Path

import pandas as pd
import pytest

from cwac_lab import train
from cwac_lab.config.run import read
from cwac_lab.core.cache import read_jsonl, write_jsonl
from cwac_lab.core.errors import LabError
from cwac_lab.data.reading import find_file, read_rows
from cwac_lab.data.sources import Prompts, load_prompts, load_task_rows
from cwac_lab.data.tasks.agnews import AGNews
from cwac_lab.data.tasks.alpaca import Alpaca
from cwac_lab.data.tasks.gsm8k import GSM8K
from cwac_lab.data.tasks.pubmedqa import PubMedQA
from cwac_lab.data.tasks.sst2 import SST2
from cwac_lab.examples import trainer as example
from cwac_lab.report import page
from cwac_lab.results.store import RunFolder
from support import tiny
from support.file_cases import FILES, LISTS, ROWS, lines, prompts

TASKS = {"sst2": SST2, "agnews": AGNews, "gsm8k": GSM8K, "pubmedqa": PubMedQA, "alpaca": Alpaca}


def put(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)


def told(error, root):
    """The line that the command line prints, without the folder of this test."""
    line = str(error)
    assert "\n" not in line
    return line.replace(f"{root}/", "").replace(str(root), "ROOT")


def found(files, expected, root, get):
    """Compare what is read with rows, or with a part of the one line."""
    put(root, files)
    if isinstance(expected, list):
        assert get() == expected
        return
    with pytest.raises(LabError) as stopped:
        get()
    assert expected in told(stopped.value, root)


@pytest.mark.parametrize("case", FILES)
def test_a_file_is_read_whole_or_stops_in_one_line(case, tmp_path):
    files, expected = FILES[case]
    found(files, expected, tmp_path, lambda: [row.cells for row in read_rows(find_file(tmp_path, "list"))])


@pytest.mark.parametrize("case", ROWS)
def test_a_row_of_a_task_is_read_right_or_named(case, tmp_path):
    name, suffix, content, expected = ROWS[case]

    def get():
        rows = load_task_rows("local", TASKS[name](name), "train", tmp_path)
        return [
            (row.prompt.rpartition("\n\n")[2].rpartition("Input: ")[2].removeprefix("Question: "), row.gold)
            for row in rows
        ]

    found({f"{name}/train.{suffix}": content}, expected, tmp_path, get)


@pytest.mark.parametrize("case", LISTS)
def test_a_list_of_prompts_is_read_right_or_its_key_is_named(case, tmp_path):
    suffix, content, settings, expected = LISTS[case]

    def get():
        return [row.prompt for row in load_prompts("local", Prompts("list", **settings), tmp_path, "mine")]

    found({f"list.{suffix}": content}, expected, tmp_path, get)


def test_one_table_in_three_formats_gives_the_same_rows(tmp_path):
    frame = pd.DataFrame(
        {
            "prompt": ["None", 'say "a, b"', "line\nbreak", "fa\u00e7ade \u2028 \U0001f600", "007"],
            "response": ["Sure, x", None, "NA", "", "nan"],
            "kind": ["a", "b", "a", "a", None],
        }
    )
    frame.to_csv(tmp_path / "one.csv", index=False)
    frame.to_json(tmp_path / "two.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "three.parquet")
    read_as = {}
    for name in ("one", "two", "three"):
        for wanted in ({}, {"kind": "a"}, {"response": ""}):
            spec = Prompts(name, response_column="response", category_column="kind", where=wanted)
            rows = load_prompts("local", spec, tmp_path)
            cells = [(row.id.removeprefix(name), row.prompt, row.opening, row.category) for row in rows]
            read_as.setdefault(str(wanted), []).append(cells)
    for first, *others in read_as.values():
        assert others == [first, first]
    assert [len(cells[0]) for cells in read_as.values()] == [5, 3, 2]
    assert [cell[2] for cell in read_as["{}"][0]] == ["Sure, x", None, "NA", None, "nan"]


def test_a_file_may_be_named_with_its_suffix(tmp_path):
    put(tmp_path, {"list.csv": "prompt\nx\n", "list.jsonl": prompts("y")})
    assert [row.prompt for row in load_prompts("local", Prompts("list.csv"), tmp_path)] == ["x"]


@pytest.mark.parametrize("source", ["embedded", "local", "hub"])
def test_a_list_with_a_suffix_is_a_file_whatever_the_source_is(source, tmp_path, monkeypatch):
    put(tmp_path, {"list.csv": "prompt\nx\n", "mine/list.jsonl": prompts("y")})
    monkeypatch.chdir(tmp_path)
    assert [row.prompt for row in load_prompts(source, Prompts("list.csv"), None)] == ["x"]
    assert [row.prompt for row in load_prompts(source, Prompts("list.jsonl"), tmp_path / "mine")] == ["y"]


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path, monkeypatch):
    put(tmp_path, {"list.csv": "prompt\nx\n"})

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(LabError, match=r"list\.csv cannot be read \(Permission denied\)"):
        read_rows(tmp_path / "list.csv")
    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(LabError, match=r"list cannot be read \(Permission denied\)"):
        find_file(tmp_path, "list")


@pytest.mark.parametrize(
    ("name", "settings", "line"),
    [
        ("harmful", {}, "data.lists.mine.name=harmful: accepted: harmful_requests | harmless_instructions"),
        ("mine.txt", {}, "harmless_lookalikes, or a file with its suffix (.jsonl, .json, .csv, .parquet)"),
        ("identity", {}, "data.lists.mine.name=identity: accepted: harmful_requests"),
        ("harmful_requests", {"where": {"kind": "x"}}, "data.lists.mine.where={'kind': 'x'}: accepted: nothing"),
    ],
)
def test_a_list_of_the_package_is_named_right(name, settings, line):
    with pytest.raises(LabError) as stopped:
        load_prompts("embedded", Prompts(name, **settings), None, "mine")
    assert line in str(stopped.value)


def test_cells_of_the_hub_are_checked_too(monkeypatch):
    told = [{"sentence": "x", "label": 1}, {"sentence": "y", "label": -1}]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: told)
    with pytest.raises(LabError, match=r"^stanfordnlp/sst2 validation, row 2: label=-1: accepted: negative, positive"):
        load_task_rows("hub", read(tiny.config("task=sst2")).task, "test", None)


def test_known_holes_of_the_hub_are_left_out_there_only(tmp_path, monkeypatch):
    told = [{"instruction": f"i{n}", "input": "", "output": output} for n, output in enumerate(("a", "", "c"))]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: told)
    task = read(tiny.config("task=alpaca")).task
    rows = load_task_rows("hub", task, "train", None)
    assert [(row.id, row.gold) for row in rows] == [("alpaca/train/0", "a"), ("alpaca/train/2", "c")]
    put(tmp_path, {"alpaca/train.jsonl": lines(*told)})
    with pytest.raises(LabError, match="line 2: output is empty"):
        load_task_rows("local", task, "train", tmp_path)


@pytest.mark.parametrize(
    "error", [IndexError("list index out of range"), TypeError("no len()"), AttributeError("strip")]
)
def test_what_a_task_of_ones_own_trips_over_is_placed(error, tmp_path):
    class Own(SST2):
        def format(self, row, row_id):
            raise error

    put(tmp_path, {"own/train.csv": "text\nx\n"})
    with pytest.raises(LabError, match=rf"own/train\.csv, line 2: {type(error).__name__}: .* \(task=own\)$"):
        load_task_rows("local", Own("own"), "train", tmp_path)


SEPARATED = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven\x1deight\x1enine\rten\nend"


def test_records_keep_every_separator(tmp_path):
    rows = [{"output": SEPARATED}, {"output": ""}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": ')
    with pytest.raises(LabError, match=r"rows\.jsonl, line 2: no JSON"):
        read_jsonl(tmp_path / "rows.jsonl")
    said = []
    assert page._kept(lambda run: run.read("rows.jsonl"), RunFolder(tmp_path), said.append) is None
    assert "line 2: no JSON" in said[0]


# Sizes of the pools, small enough for the files that ``good`` writes.
LOCAL = [
    *(f"data.harmful.{part}" for part in ("alignment.advbench=2", "alignment.requests=2", "alignment.reference=2")),
    *(f"data.harmful.{part}" for part in ("reference.advbench=3", "finetune.advbench=4", "validation.harmbench=2")),
    *(f"data.harmful.{part}" for part in ("validation.reference=2", "test.reference=3")),
    *(f"data.harmless.{part}.instructions=3" for part in ("alignment", "reference", "validation", "test")),
    *(f"data.lookalike.{part}.lookalikes=3" for part in ("alignment", "validation", "test")),
]


def good():
    """Files of a whole run."""
    rows = [{"prompt": f"item {i}", "category": None, "response": None} for i in range(12)]
    shared = {
        f"harmful/{name}.jsonl": lines(*(row | {"prompt": f"{name} {row['prompt']}"} for row in rows))
        for name in ("advbench", "reference", "validation")
    }
    sst2 = {
        f"sst2/{part}.csv": "sentence,label\n" + "".join(f"{part} {i},{i % 2}\n" for i in range(24))
        for part in ("train", "validation")
    }
    return {**shared, **sst2, "harmless/instructions.jsonl": prompts(*(f"plant {i}" for i in range(12)))}


def launched(folder, root, output, *more):
    shared = [each for each in tiny.small_run(folder, output) if not each.startswith(("data.harm", "data.look"))]
    tiny.launch(train.main, [*shared, "data=local", f"data.root={root}", "constraint=none", *LOCAL, *more])


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"sst2/train.csv": "sentence,label\nx,1\ny,-1\n"}, "sst2/train.csv, line 3: label='-1': accepted: negative"),
        ({"sst2/train.csv": "sentence,label\nwell, no,0\n"}, "sst2/train.csv, line 2: 3 fields, and the header has 2"),
        ({"sst2/validation.csv": "sentence,label\ncaf\u00e9,1\n".encode("latin-1")}, "line 2: byte 0xe9"),
        ({"harmful/validation.jsonl": '{"prompt": "", "category": 1}'}, "prompt is empty (data.lists.harmbench"),
        ({"harmless/instructions.csv": "prompt\nx\n"}, "there are instructions.jsonl and instructions.csv"),
        ({"harmful/reference.jsonl": '{"prompt": "x"'}, "harmful/reference.jsonl, line 1: no JSON or cut off"),
    ],
)  # fmt: skip
def test_the_command_line_stops_in_one_line_before_weights_are_loaded(
    files, line, tiny_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("cwac_lab.run.start.aligned", lambda *_: pytest.fail("a start is made"))
    put(tmp_path, good() | files)
    with pytest.raises(SystemExit) as stopped:
        launched(tiny_folder, tmp_path, tmp_path / "out", "model.align=refusals")
    (said,) = capsys.readouterr().err.strip().split("\n")
    assert stopped.value.code == 2
    assert said.startswith("error: ")
    assert line in said
    assert not list((tmp_path / "out").glob("runs/*"))


def test_a_run_on_texts_with_separators_is_read_again(tiny_folder, tmp_path, capsys):
    odd = lines(*({"prompt": f"plant {i}\u2028two\x85three\u2029", "category": "x\u2028y"} for i in range(12)))
    put(
        tmp_path, good() | {"harmful/reference.jsonl": odd, "harmless/instructions.jsonl": odd.replace("plant", "tree")}
    )
    launched(tiny_folder, tmp_path, tmp_path / "out")
    launched(tiny_folder, tmp_path, tmp_path / "out")
    assert "already done" in "".join(capsys.readouterr())
    (file,) = (tmp_path / "out").glob("runs/*/generations.jsonl")
    assert any("\u2028two\x85" in row["prompt"] for row in read_jsonl(file))


def test_the_example_of_the_trainer_names_a_bad_row(tiny_folder, tmp_path):
    put(
        tmp_path,
        {"rows.jsonl": lines({"prompt": "x", "response": "y"}, {"prompt": "z"}), "prompts.jsonl": prompts("x")},
    )
    asked = ["--model", tiny_folder, "--rows", tmp_path / "rows.jsonl", "--prompts", tmp_path / "prompts.jsonl"]
    with pytest.raises(LabError, match=r"rows with a column 'response'; .*rows\.jsonl, line 2 has prompt"):
        example.main([*map(str, asked), "--out", str(tmp_path / "out")])
