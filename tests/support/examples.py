"""The example writers, run as a reader of the documentation would run them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import ROOT

EXAMPLES = ROOT / "examples" / "traces"


def numpy_engine(folder: Path, *options: str) -> Path:
    """Run the numpy example, and return the directory that it wrote."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, EXAMPLES / "numpy_engine.py", folder, *options], check=True, env=environment)
    return folder


def cpp_engine(binary: Path) -> Path:
    """Compile the C++ example; without a compiler the test is skipped, but never in continuous integration."""
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        assert os.environ.get("CI") != "true", "continuous integration needs a C++ compiler: install g++"
        pytest.skip("no C++ compiler on this machine")
    source = EXAMPLES / "cpp_engine.cpp"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, source, "-o", binary], check=True)
    return binary
