"""Records of finished runs, written by hand."""

from cwac_lab.core.cache import digest
from cwac_lab.evaluation.verdicts import aggregate
from cwac_lab.results import schema2
from cwac_lab.results.store import SCHEMA, RunFolder


def judged(kind, hits, n, field):
    return [{"kind": kind, "id": f"{kind}{i}", field: i < hits, "incoherent": False} for i in range(n)]


def settings(**groups):
    """A configuration of these groups, with those that every record has."""
    return schema2.configuration(groups)


def record(folder, constraint, ratio, seed, hits, task="sst2", right=80, **config):
    """Write the record of a finished run with ``hits`` of 100 prompts and ``right`` of 100 rows (None: not judged)."""
    run = RunFolder(folder / "runs" / f"{task}-{constraint}-{ratio}-{seed}-{digest(config)[:4]}")
    run.write("config.json", settings(constraint=config, trainer={"learning_rate": 1}))
    verdicts = judged("harmful", hits, 100, "complied") + judged("harmless", 2, 100, "refused")
    verdicts += [
        {"kind": "task", "id": f"{task}{i}", "correct": None if right is None else i < right} for i in range(100)
    ]
    run.write("verdicts.jsonl", verdicts)
    facts = {"schema": SCHEMA, "weights": "w", "weights_content": "c0ffee", "model": "smollm", "task": task,
             "data": "local", "split": "test", "constraint": constraint, "harmful_ratio": ratio, "seed": seed,
             }  # fmt: skip
    content = {"task_data_sha256": digest(task), "pools_sha256": digest("pools")}
    run.write("provenance.json", facts | content)
    run.write("metrics.json", {**facts, **aggregate(verdicts), "judges": schema2.UNVERSIONED, "stages": {}})
    run.mark("ok")
    return run


def beside_start(run, refused, kept):
    """Let a record know that the start refuses so many of the harmful prompts, and how many the run refuses."""
    verdicts = run.read("verdicts.jsonl")
    harmful = [row for row in verdicts if row["kind"] == "harmful"]
    for i, row in enumerate(harmful):
        row |= {"refused": i < kept, "start_refused": i < refused}
    run.write("verdicts.jsonl", verdicts)
    run.write("metrics.json", run.read("metrics.json") | aggregate(verdicts))
    return run
