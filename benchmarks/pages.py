"""What report.html of a large model costs: time to make, size, and time until a browser has drawn it."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

import kvdrift
from benchmarks import cost
from benchmarks.judging import write_pairs
from benchmarks.support import say
from benchmarks.table import Row
from kvdrift.pipeline.audit import Audit
from kvdrift.pipeline.judge import judge_directory
from kvdrift_bench.figures.markers import Markers
from kvdrift_bench.planted.torch import corpus_for

MAKE_S, SIZE_MB, DRAW_S = 5.0, 8.0, 2.0
N_LAYERS, N_POSITIONS = 100, 1000
_BLANK = "<!doctype html><title>blank</title>"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def run(options: argparse.Namespace) -> bool:
    """Measure the page of judged traces and that of an audit with a fault, print the rows, and document them."""
    rows = [row for what, audit in _audits() for row in _rows(what, audit, options.repeats)]
    lines = [
        "| page | measure | goal | median (spread) | |",
        "|---|---|---|---|---|",
        *(row.line() for row in rows),
        "",
        f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}; kvdrift "
        f"{kvdrift.__version__}; {_version()}; {options.repeats} repetitions. Drawing is what a screenshot of the page "
        "takes above one of an empty page, in turn.",
    ]
    for line in lines:
        say(line)
    if options.document:
        path = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
        Markers.of("./run bench pages").write(path, "`./run bench pages --document`:\n\n" + "\n".join(lines) + "\n")
    return all(row.is_met or not row.values for row in rows)


def _audits() -> Iterator[tuple[str, Audit]]:
    with tempfile.TemporaryDirectory() as folder:
        n_pairs = write_pairs(Path(folder) / "traces", n_layers=N_LAYERS, n_prompts=4, n_positions=N_POSITIONS // 4)
        audit, _ = judge_directory(Path(folder) / "traces", scope=("sampled",))
        yield f"traces of {N_LAYERS} layers and {N_POSITIONS:,} positions, {n_pairs / 1e6:.1f} million pairs", audit
    model = cost.random_llama(N_LAYERS, hidden=64, intermediate=128, positions=2048)
    fault = next(each for each in corpus_for(N_LAYERS) if each.name == "slot_stale")
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, 500, (N_POSITIONS,), generator=generator).tolist()
    with fault.plant(model):
        audit = kvdrift.audit(model, prompts={"p": prompt}, span=4)
    yield f"audit of {N_LAYERS} layers, a prompt of {N_POSITIONS:,} tokens, {audit.verdict}", audit


def _rows(what: str, audit: Audit, repeats: int) -> Iterator[Row]:
    made, page = [], ""
    for _ in range(repeats):
        began = time.perf_counter()
        page = audit.to_html()
        made.append(time.perf_counter() - began)
    yield Row(what, "time to make", MAKE_S, made, " s")
    yield Row("the same", "size", SIZE_MB, [len(page.encode()) / 1e6], " MB")
    name = next(filter(shutil.which, _BROWSERS), None)
    if name is None:
        yield Row("the same", "time to draw", DRAW_S, note=f"no browser is installed ({', '.join(_BROWSERS)})")
        return
    with tempfile.TemporaryDirectory() as folder:
        for file, text in (("page.html", page), ("blank.html", _BLANK)):
            (Path(folder) / file).write_text(text, encoding="utf-8")
        drawn = [_draw(name, Path(folder), file) for _ in range(repeats + 1) for file in ("page.html", "blank.html")]
    pairs = list(zip(drawn[2::2], drawn[3::2], strict=True))  # the first pair warms up
    yield Row("the same", "time to draw", DRAW_S, [page_s - blank_s for page_s, blank_s in pairs], " s")


def _draw(browser: str, folder: Path, file: str) -> float:
    """Seconds of a browser that starts, draws a page and leaves a screenshot."""
    began = time.perf_counter()
    subprocess.run(
        [browser, *_options(folder), f"--screenshot={folder / 'shot.png'}", (folder / file).as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return time.perf_counter() - began


def _options(folder: Path) -> Iterable[str]:
    return (
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *("--window-size=1280,900", f"--user-data-dir={folder / 'profile'}"),
    )


def _version() -> str:
    name = next(filter(shutil.which, _BROWSERS), None)
    if name is None:
        return "no browser"
    return subprocess.run([name, "--version"], capture_output=True, text=True, check=True).stdout.strip()
