"""How near kvdrift's cost comes to that of the forward passes themselves: each row a ratio within one run.

What is compared is run in turn, repetition by repetition, so that both sides meet the same machine; the median of the
ratios counts, and their spread is printed beside it. Time is that of the processor, on one thread, which other programs
on the machine hardly change. A row whose goal is missed says so, and so does one that was not measured.

Rows are measured in pieces, and each piece is kept in build/speed as soon as it is done. A run goes on where another
one of the same code was broken off.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

import kvdrift
from benchmarks import judging, large, peers
from benchmarks.passes import audit_of, bare, capture, native_of, save_by_hooks, texts_of
from benchmarks.support import demo, say
from benchmarks.table import Kept, Piece, Row, interleaved, state_of, timed
from kvdrift.engines.hf.engine import HFEngine
from kvdrift.errors import UsageError
from kvdrift_bench.figures.markers import Markers

_ROOT = Path(__file__).resolve().parents[1]
_KEPT = _ROOT / "build" / "speed" / "rows.json"
_LIMIT_IMPORT_S = 0.3

_AUDIT_ROWS = (
    Row("default audit, ladder on", "processor time / bare passes at native and float64", 1.6),
    Row("default audit, `--ladder off`", "processor time / bare native passes", 1.5),
    Row("default audit, `--ladder layer`", "processor time / that of `--ladder model`", 2.0),
)
_CAPTURE_ROWS = (
    Row("capture alone, all sites, both passes", "processor time / bare native passes", 1.2),
    Row("capture alone, the same", "times as fast as torch hooks that save .pt", 3.0, at_least=True),
)
_JUDGE_ROWS = (
    Row("judge, traces of the default audit", "processor time for each GB", judging.SECONDS_A_GB, (), " s"),
    Row("judge, two million pairs", "processor time", judging.PAIRS_SECONDS, (), " s"),
    Row("judge, two million pairs", "peak memory", judging.PAIRS_MB, (), " MB"),
)
_COMMANDS = {
    "`kvdrift --help`": [*judging.KVDRIFT, "--help"],
    "`import kvdrift`": ["-c", "import sys, kvdrift; sys.exit('torch' in sys.modules)"],
}
_START_ROWS = tuple(
    Row(what, "processor time, a new process without torch", _LIMIT_IMPORT_S, (), " s") for what in _COMMANDS
)


def run(options: argparse.Namespace) -> bool:
    """Measure each piece that was asked for, print the table, and put it into docs/performance.md with `--document`."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    wanted = _wanted(options.pieces, options.full)
    versions = f"kvdrift {kvdrift.__version__}, torch {torch.__version__}, numpy {np.__version__}"
    kept = Kept(_KEPT, state_of({"repeats": options.repeats, "versions": versions}))
    for piece in wanted:
        if options.fresh or not kept.is_known(piece):
            say(f"{piece.name}:")
            kept.measure(piece, options.repeats)
    lines = _table(kept, options.repeats, versions)
    for line in lines:
        say(line)
    if options.document:
        command = f"./run bench speed{' --full' if options.full else ''} --repeats {options.repeats} --document"
        text = f"`{command}`:\n\n" + "\n".join(lines) + "\n"
        Markers.of("./run bench speed").write(_ROOT / "docs" / "performance.md", text)
    rows = [row for piece in wanted for row in kept.rows(piece)]
    return all(row.is_met or not row.values for row in rows)


def _wanted(names: str | None, full: bool) -> list[Piece]:
    if names is None:
        return [piece for piece in PIECES if full or not piece.is_long]
    asked = [name.strip() for name in names.split(",")]
    if strange := sorted(set(asked) - {piece.name for piece in PIECES}):
        known = ", ".join(piece.name for piece in PIECES)
        raise UsageError(f"--pieces names {strange[0]!r}; known: {known}")
    return [piece for piece in PIECES if piece.name in asked]


def _table(kept: Kept, repeats: int, versions: str) -> list[str]:
    """The table of all pieces, whenever they were measured; a row without values says what measures it."""
    rows = [(piece, row) for piece in PIECES for row in kept.rows(piece)]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, 1 thread of torch; Python {platform.python_version()}"
    lines = [
        "| work | measure | goal | median (spread) | |",
        "|---|---|---|---|---|",
        *((row if row.values else _unmeasured(piece, row)).line() for piece, row in rows),
        "",
        f"{machine}; {versions}; {repeats} repetitions, {kept.seconds(PIECES):.0f} s by the clock.",
    ]
    if stale := kept.stale(PIECES):
        lines.append(f"Measured before the last changes of the code: {', '.join(stale)}.")
    return lines


def _unmeasured(piece: Piece, row: Row) -> Row:
    return Row(row.what, row.measure, row.limit, (), row.unit, row.at_least, f"takes `--pieces {piece.name}`")


def _filled(rows: Sequence[Row], values: Sequence[Sequence[float]], notes: Sequence[str] = ()) -> list[Row]:
    """The rows with what was measured of them."""
    notes = notes or [""] * len(rows)
    return [
        Row(row.what, row.measure, row.limit, tuple(found), row.unit, row.at_least, note)
        for row, found, note in zip(rows, values, notes, strict=True)
    ]


def _audits(repeats: int) -> list[Row]:
    loaded = demo()
    texts, native = texts_of(loaded), native_of(loaded.model)
    model = interleaved(repeats, audit_of(loaded), lambda: bare(loaded.model, texts, (native, "float64")))
    off = interleaved(repeats, audit_of(loaded, "off"), lambda: bare(loaded.model, texts, (native,)))
    layer = interleaved(repeats, audit_of(loaded, "layer"), audit_of(loaded))
    return _filled(_AUDIT_ROWS, (model, off, layer))


def _captures(repeats: int) -> list[Row]:
    """Capture of both passes at all sites, against the passes alone and against hooks that save what they see."""
    loaded = demo()
    texts, native = texts_of(loaded), native_of(loaded.model)
    rounds = []
    for _ in range(repeats + 1):
        with HFEngine(loaded.model) as engine:
            captured = timed(partial(capture, engine, texts))
        rounds.append((captured, bare(loaded.model, texts, (native,)), save_by_hooks(loaded.model, texts)))
    over = [captured / plain for captured, plain, _ in rounds[1:]]
    times = [saved / captured for captured, _, saved in rounds[1:]]
    return _filled(_CAPTURE_ROWS, (over, times), ("", "the hooks save what modules give, no scores and no cache"))


def _judging(repeats: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        seconds = judging.seconds_a_gb(Path(folder) / "run", repeats)
        spent, _ = judging.two_million(Path(folder) / "traces")
    return _filled(_JUDGE_ROWS, (seconds, [spent.processor], [spent.peak_mb]))


def _starts(repeats: int) -> list[Row]:
    times = [
        [judging.python_of({}, *command).processor for _ in range(2 * repeats + 1)] for command in _COMMANDS.values()
    ]
    return _filled(_START_ROWS, times)


PIECES = (
    Piece("audits", _audits, _AUDIT_ROWS),
    Piece("captures", _captures, _CAPTURE_ROWS),
    Piece("nnsight", peers.capture_rows, (peers.CAPTURE_ROW,)),
    Piece("judging", _judging, _JUDGE_ROWS),
    Piece("comparators", peers.judged, peers.JUDGE_ROWS),
    Piece("starts", _starts, _START_ROWS),
    Piece("offload", large.offload, large.OFFLOAD_ROWS),
    Piece("long", large.long, large.LONG_ROWS, is_long=True),
    Piece("growth", large.growth, large.GROWTH_ROWS, is_long=True),
    Piece("big", large.big, large.BIG_ROWS, is_long=True),
    Piece("sparse", large.sparse, large.SPARSE_ROWS, is_long=True),
    Piece("scenarios", large.scenarios, large.SCENARIO_ROWS, is_long=True),
)
