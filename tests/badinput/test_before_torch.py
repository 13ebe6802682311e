"""What is wrong with a command and can be seen in it is told before an engine is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Runs the command, and says whether torch was imported on the way.
RUN = """
import sys
from kvdrift.cli.app import main
try:
    main()
finally:
    print("torch" if "torch" in sys.modules else "no torch")
"""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["./misspelt"], 3, "there is no model at ./misspelt; check the path"),
        (["llamacpp:misspelt.gguf"], 3, "there is no model at misspelt.gguf; check the path"),
        (["--prompt", ""], 2, "the prompt 'prompt_0' is empty (no tokens); give at least one token"),
    ],
)
def test_it_is_told_at_once(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, "audit", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stdout, done.stderr) == (code, "no torch\n", f"kvdrift: {message}\n")
