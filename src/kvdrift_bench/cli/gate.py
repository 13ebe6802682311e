"""`kvdrift-bench gate`: clean runs as continuous integration has them, and planted faults, through the gate."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from kvdrift.cli.errors import errors_as_messages
from kvdrift_bench.cli.console import Markdown, Out, measuring, what_is_left


def gate(
    clean: Annotated[int, typer.Option(min=0, help="Clean runs.")] = 200,
    faults: Annotated[int, typer.Option(min=0, help="Runs with a planted fault.")] = 40,
    out: Out = None,
    markdown: Markdown = None,
) -> None:
    """Send clean runs (threads, batches, kernels) and planted faults through the gate, beside three other rules."""
    with errors_as_messages(what_is_left(out)):
        with measuring() as progress:
            from kvdrift_bench.figures.document import GATE
            from kvdrift_bench.figures.gate_figures import render_gate
            from kvdrift_bench.run.gate_runs import PEERS, GateRun, clean_trials, fault_trials, run_gate
            from kvdrift_bench.run.records import RecordFile, of_keys

            trials = [*(fault_trials(faults) if faults else []), *clean_trials(clean)]
            file = RecordFile(out, GateRun)
            for run in run_gate(trials, file, progress):
                if run.error is not None:
                    typer.echo(f"{run.fault or 'clean'} {run.number}: {run.error}", err=True)
            runs = of_keys(file.records, [trial.key for trial in trials])
        command = shlex.join(["kvdrift-bench", "gate", "--clean", str(clean), "--faults", str(faults)])
        text = render_gate(runs, [(rule.name, rule.formula) for rule in PEERS], command)
        if markdown is not None:
            GATE.write(markdown, text)
        typer.echo(text, nl=False)


__all__ = ["gate"]
