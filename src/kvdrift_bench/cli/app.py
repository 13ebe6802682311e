"""The script `kvdrift-bench`."""

from __future__ import annotations

from kvdrift.cli.output import prepare_stdout
from kvdrift_bench.cli.faults import app


def main() -> None:
    """Entry point of the console script."""
    prepare_stdout()
    app()
