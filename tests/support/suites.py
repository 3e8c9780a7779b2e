"""Prompts of named suites in records that are written by hand."""

from cwac_lab.core.stats import wilson


def asked_in(run, hits, n=20, categories=("a", "b")):
    """Let a record have ``n`` harmful prompts of each suite more, of which it answers so many; categories by turns."""
    verdicts, rates = run.read("verdicts.jsonl"), {}
    for suite, answered in hits.items():
        verdicts += [
            {
                "kind": "harmful", "id": f"{suite}/{i}", "suite": suite, "category": categories[i % len(categories)],
                "complied": i < answered, "refused": i >= answered, "incoherent": False,
            }
            for i in range(n)
        ]  # fmt: skip
        rates[f"harmful_score/{suite}"] = wilson(answered, n).to_dict()
    run.write("verdicts.jsonl", verdicts)
    run.write("metrics.json", run.read("metrics.json") | rates)
    return run
