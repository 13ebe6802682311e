"""The report of GRETA StageTrace files as their own analyser names it: FILE.md, and FILE.tsv with every tensor."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from kvdrift import __version__
from kvdrift.address import Address
from kvdrift.auditor import Audit
from kvdrift.compare.align import Unpaired
from kvdrift.compare.drift import NO_LAYER, DriftRow
from kvdrift.errors import KvdriftError, TraceError, UsageError
from kvdrift.imported import judge_recording, run_of
from kvdrift.plan import Mode
from kvdrift.progress import terminal_progress
from kvdrift.report.view import build_view
from kvdrift.run import Run
from kvdrift.sites import Site, forward_rank
from kvdrift.trace.foreign.greta import open_greta
from kvdrift.trace.recording import UNKNOWN_TOKEN
from kvdrift.verdict.decide import Decision

COLUMNS = ("prompt", "token_id", "pos_id", "layer", "tensor", "status", "first_fail", "root_cause", "mode")
TRACE_OFFSET = "TRACE_OFFSET"
SCRIPT = "tools/benchmarks/analyze_b3_66_prefill_decode_drift.py"
_NONE = "-"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(
    epilog="Example:\n\n    analyze_b3_66_prefill_decode_drift.py -i b3_66/traces -m both -o B3_66_REPORT.md\n\n"
    "Exit codes: 0 EXACT or STRUCTURAL_DRIFT, 1 MISMATCH, 2 usage, 5 bad trace, 6 INCONCLUSIVE."
)
def analyse(
    traces_dir: Annotated[Path, typer.Option("--traces-dir", "-i", help="The directory of GRETA StageTrace files.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The report, FILE.md; FILE.tsv is written beside it.")],
    mode: Annotated[str, typer.Option("--mode", "-m", help="as_designed, kv_aligned or both.")] = "both",
) -> None:
    """Judge prefill against decode in GRETA traces: is the drift structural, or a real mismatch?"""
    try:
        result = analyse_traces(traces_dir, output, mode, command=shlex.join([SCRIPT, *sys.argv[1:]]))
    except KvdriftError as error:
        typer.echo(f"kvdrift: {error}", err=True)
        raise typer.Exit(error.exit_code) from error
    typer.echo(f"{result.verdict}: {result.view['hypotheses']['conclusion']}")
    typer.echo(f"report: {output}")
    raise typer.Exit(result.exit_code)


def analyse_traces(traces_dir: Path, output: Path, mode: str, *, command: str | None = None) -> Audit:
    """Judge a directory of GRETA traces, and write the report and its table.

    Raises:
        UsageError: the mode is unknown, or the files cannot be written.
        TraceError: there are no traces, or they are damaged.
    """
    if mode not in ("both", *Mode):
        raise UsageError(f"unknown mode {mode!r}; use --mode as_designed, kv_aligned or both")
    if output.suffix != ".md":
        raise UsageError(f"the report is {output}, and must end in .md; the table is written beside it as .tsv")
    if not output.parent.is_dir():
        raise UsageError(f"cannot write {output}: there is no directory {output.parent}")
    if not traces_dir.is_dir():
        raise TraceError(f"there is no directory {traces_dir}")
    only = None if mode == "both" else Mode(mode)
    recording = open_greta(traces_dir, unmarked=only or Mode.AS_DESIGNED, only=only)
    try:
        with terminal_progress() as progress:
            run = run_of(recording, progress=progress, command=command, versions={"kvdrift": __version__})
            decision = judge_recording(run, recording)
    finally:
        recording.close()
    result = Audit(decision, build_view(run, decision), None)
    lines = ["\t".join(COLUMNS), *("\t".join(line) for line in table(run, decision))]
    causes = sorted({line.split("\t")[7] for line in lines[1:]} - {_NONE})
    ending = f"**Root cause**: {', '.join(causes) or 'none'}  \n**Script**: `{SCRIPT}`\n"
    _write(output.with_suffix(".tsv"), "\n".join(lines) + "\n")
    _write(output, result.to_markdown().rstrip("\n") + "  \n" + ending)
    return result


def table(run: Run, decision: Decision) -> Iterator[tuple[str, ...]]:
    """Yield a line for every value of the native rung: PASS has the same bits, DRIFT differs by no more than rounding
    can or where nothing bounds it, FAIL is beyond rounding, TRACE_OFFSET has no partner. The root cause is the first
    failing site of the same prompt and position."""
    for mode in run.modes:
        beyond = {address_key(address) for address in decision.natives[str(mode)].beyond}
        first: dict[tuple[str, int], Address] = {}  # by prompt and position
        for address in sorted(decision.natives[str(mode)].beyond, key=lambda a: a.forward_rank):
            first.setdefault((address.prompt, address.position), address)
        rows = sorted(run.table.select(str(mode), run.info.dtype).values(), key=_order)
        for row in rows:
            yield _line(row, str(mode), first.get((row.prompt, row.position)), row.key in beyond)
        for label, _, value in run.table.unpaired:
            if label == mode:
                yield _unpaired(value, str(mode))


def address_key(address: Address) -> tuple[str, int, int, str]:
    """Return the key of an address in the drift table."""
    return (
        address.prompt,
        address.position,
        NO_LAYER if address.layer is None else address.layer,
        str(address.site),
    )


def _line(row: DriftRow, mode: str, first: Address | None, is_beyond: bool) -> tuple[str, ...]:
    status = "PASS" if row.equal else ("FAIL" if is_beyond else "DRIFT")
    cause = _cause(first) if first is not None and not row.equal and _follows(row, first) else _NONE
    is_first = first is not None and row.key == address_key(first)
    return (
        row.prompt,
        _NONE if row.token_id == UNKNOWN_TOKEN else str(row.token_id),
        str(row.position),
        str(row.layer),
        row.site,
        status,
        cause if is_first else _NONE,
        cause,
        mode,
    )


def _unpaired(value: Unpaired, mode: str) -> tuple[str, ...]:
    layer = NO_LAYER if value.layer is None else value.layer
    where = (value.prompt, _NONE, str(value.position), str(layer), str(value.site))
    return (*where, TRACE_OFFSET, TRACE_OFFSET, TRACE_OFFSET, mode)


def _follows(row: DriftRow, first: Address) -> bool:
    return forward_rank(None if row.layer == NO_LAYER else row.layer, Site(row.site)) >= first.forward_rank


def _cause(first: Address) -> str:
    return f"{str(first.site).upper()}_DRIFT"


def _order(row: DriftRow) -> tuple[object, ...]:
    return (row.prompt, row.position, forward_rank(None if row.layer == NO_LAYER else row.layer, Site(row.site)))


def _write(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(name, 0o666 & ~umask)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; name a file you may write with --output") from error


def main() -> None:
    """Entry point of the script."""
    app()
