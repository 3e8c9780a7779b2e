"""Time and memory of the safety subspace at the shapes of a large model, on tokens of a falling spectrum.

``python -m cwac_lab.benchmarks.subspace`` takes one FFN output projection of Llama-2-7B (d_in 11008, d_out 4096). The
reference is the method taken literally: a full SVD of ``C = X^T X`` and the dense projector ``U U^T``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cwac_lab.core import linalg
from cwac_lab.defenses.cwac.subspace.solvers import Covariance, Gram, Randomized, cheapest

DENSE = "full SVD, dense projector"
WAYS = (DENSE, Covariance.name, Gram.name, Randomized.name)
# Columns that carry the spectrum; the rest is noise a hundred times weaker than the weakest of them.
DIRECTIONS = 1024


class Found(NamedTuple):
    """What one way took: seconds, peak gigabytes of its process, megabytes kept, and how far it spans the reference."""

    seconds: float
    peak_gb: float
    kept_mb: float
    smallest_cosine: float


def tokens(n: int, width: int, seed: int = 0) -> Float[Tensor, "n d"]:
    """Return tokens whose singular values fall as ``i^-1``, about as those of a language model's activations."""
    source = torch.Generator().manual_seed(seed)
    rank = min(DIRECTIONS, n, width)
    spectrum = torch.arange(1, rank + 1).float().reciprocal()
    left = torch.randn(n, rank, generator=source) * spectrum
    noise = 0.01 * float(spectrum[-1]) * torch.randn(n, width, generator=source)
    return left @ torch.linalg.qr(torch.randn(width, rank, generator=source)).Q.T + noise


def _dense(x: Float[Tensor, "n d"], rank: int) -> tuple[Float[Tensor, "d k"], int]:
    left, _, _ = torch.linalg.svd(x.T @ x)
    free = left[:, rank:]
    return left[:, :rank].clone(), (free @ free.T).nbytes


def _low_rank(way: str, x: Float[Tensor, "n d"], rank: int) -> tuple[Float[Tensor, "d k"], int]:
    (kind,) = (kind for kind in (Covariance, Gram, Randomized) if kind.name == way)
    solver = kind(x.shape[1], x.device)
    solver.add(x.double())
    basis = solver.solve(None, rank)[0].float()
    return basis, basis.nbytes


def _solve(way: str, n: int, width: int, rank: int, threads: int) -> tuple[Float[Tensor, "d k"], float, float, float]:
    torch.set_num_threads(threads)
    x = tokens(n, width)
    begin = time.perf_counter()
    basis, kept = _dense(x, rank) if way == DENSE else _low_rank(way, x, rank)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return basis, seconds, peak, kept / 1e6


def solvers(n: int, width: int, rank: int, threads: int, ways: Sequence[str] = WAYS) -> dict[str, Found]:
    """Return what every way took, each in a process of its own, whose peak memory is its own too."""
    found, reference = {}, None
    for way in ways:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            basis, seconds, peak, kept = pool.apply(_solve, (way, n, width, rank, threads))
        reference = basis if reference is None else reference
        cosine = float(torch.linalg.svdvals(reference.T @ basis).min())
        found[way] = Found(seconds, peak, kept, cosine)
    return found


def _median(work: Callable[[], object], repeats: int) -> float:
    taken = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:])


def projections(n: int, width: int, out: int, ranks: Sequence[int], repeats: int) -> dict[str, float]:
    """Return the median seconds of a layer's forward and backward over n tokens, and of what projecting it adds."""
    weight, x = torch.randn(out, width) / width**0.5, torch.randn(n, width)
    weight.requires_grad_(True)
    x.requires_grad_(True)

    def step() -> None:
        (x @ weight.T).sum().backward()

    taken = {"forward and backward": _median(step, repeats)}
    gradient = torch.randn(out, width)
    for rank in ranks:
        basis = torch.linalg.qr(torch.randn(width, rank)).Q
        with torch.no_grad():
            anchor = weight @ basis

            def restore(basis: Tensor = basis, anchor: Tensor = anchor) -> None:
                with torch.no_grad():
                    linalg.restore_on_span_(weight, basis, anchor)

            taken[f"gradient, k = {rank}"] = _median(partial(linalg.remove_span, gradient, basis), repeats)
            taken[f"weights, k = {rank}"] = _median(restore, repeats)
    dense = torch.eye(width)
    taken["dense projector"] = _median(lambda: gradient @ dense, repeats)
    return taken


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, words in (
        ("width", 11008, "d_in"),
        ("out", 4096, "d_out"),
        ("tokens", 3000, "reference tokens"),
        ("rank", 128, "protected directions"),
        ("step-tokens", 512, "tokens of a training step"),
        ("threads", torch.get_num_threads(), "threads of torch"),
        ("repeats", 5, "repeats of a projection"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=words)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    found = solvers(chosen.tokens, chosen.width, chosen.rank, chosen.threads)
    print(f"one site: {chosen.tokens} tokens of width {chosen.width}, k = {chosen.rank}, {chosen.threads} threads;")
    print(f"chosen by cost: {cheapest(chosen.tokens, chosen.width, chosen.rank).name}\n")
    print("| way | s | times faster | peak GB | kept MB | share of dense | smallest cosine |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    first = found[DENSE]
    for way, each in found.items():
        ratio, share = first.seconds / each.seconds, each.kept_mb / first.kept_mb
        print(
            f"| {way} | {each.seconds:.1f} | {ratio:.1f} | {each.peak_gb:.1f} | {each.kept_mb:.1f} | {share:.2%} | "
            f"{each.smallest_cosine:.6f} |"
        )
    ranks = (64, 128, 512)
    taken = projections(chosen.step_tokens, chosen.width, chosen.out, ranks, chosen.repeats)
    base = taken["forward and backward"]
    print(f"\n| one layer, {chosen.step_tokens} tokens a step | ms | share of the step |\n| --- | --- | --- |")
    for name, seconds in taken.items():
        print(f"| {name} | {1000 * seconds:.1f} | {seconds / base:.1%} |")


if __name__ == "__main__":
    main()
