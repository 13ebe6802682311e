"""The script `kvdrift-bench`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from kvdrift.cli.output import prepare_stdout
from kvdrift.errors import EngineUnavailable
from kvdrift_bench.cli.faults import app


def main() -> None:
    """Entry point of the console script. It looks for what the figures need before hours of runs end without them."""
    if find_spec("scipy") is None:
        sys.stderr.write("kvdrift: the benchmark needs 'scipy'; pip install 'kvdrift[bench]'\n")
        sys.exit(EngineUnavailable.exit_code)
    prepare_stdout()
    app()
