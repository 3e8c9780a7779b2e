"""How long the page about all runs takes to open: ``python -m cwac_lab.benchmarks.page output_root=outputs``.

The runs of a store are taken over and over, up to ``RUNS``. It needs playwright and /usr/bin/chromium.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path

from omegaconf import DictConfig

from cwac_lab.core import cli

RUNS, ROUNDS = 500, 5
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync")


def multiply(root: Path, target: Path, n: int) -> None:
    """Write the records of a store's finished runs over and over, with seeds of their own, until there are n."""
    from cwac_lab.core.errors import MissingAsset
    from cwac_lab.results.store import CONFIG, DRIFT, GENERATIONS, METRICS, PROVENANCE, RunFolder, runs

    found = [run for run in runs(root) if run.status == "ok"]
    if not found:
        raise MissingAsset(f"output_root={root}: no finished runs there; run `python -m cwac_lab.train` first")
    for i in range(n):
        run = found[i % len(found)]
        copy = RunFolder(target / "runs" / f"{run.path.name}-{i:03}")
        for name in (DRIFT, GENERATIONS, *run.verdict_files()):
            if run.has(name):
                copy.write(name, run.read(name))
        copy.write(CONFIG, run.config())
        copy.write(PROVENANCE, run.provenance())
        copy.write(METRICS, {**run.facts(), "seed": i})
        copy.mark("ok")


def opening(page: Path, rounds: int, executable: str) -> list[float]:
    """Return the seconds until the first figure of a page is drawn, in a browser that is already open."""
    from playwright.sync_api import sync_playwright

    taken = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=executable, args=list(FLAGS))
        for _ in range(rounds):
            view = browser.new_page()
            begin = time.perf_counter()
            view.goto(page.as_uri())
            view.wait_for_selector("#trade-plot .main-svg")
            taken.append(time.perf_counter() - begin)
            view.close()
        browser.close()
    return taken


def main(config: DictConfig) -> None:
    """Print the median and the slowest of the openings."""
    from cwac_lab.core.errors import MissingAsset
    from cwac_lab.report.page import write

    executable = shutil.which("chromium")
    if executable is None:
        raise MissingAsset("chromium: not installed (accepted: Debian's package chromium)")
    with tempfile.TemporaryDirectory() as folder:
        multiply(Path(config.output_root), Path(folder), RUNS)
        page = write(Path(folder), lambda _: None)
        size = page.stat().st_size / 1e6
        taken = opening(page, ROUNDS, executable)
    median, slowest = statistics.median(taken), max(taken)
    print(f"{RUNS} runs, {size:.1f} MB: opens in {median:.2f} s (slowest {slowest:.2f}, n={ROUNDS})")


if __name__ == "__main__":
    cli.launch(main, "report")
