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


def cpp_engine(binary: Path, source: Path = EXAMPLES / "cpp_engine.cpp") -> Path:
    """Compile C++ with sanitizers; without a compiler the test is skipped, but never in continuous integration."""
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        assert os.environ.get("CI") != "true", "continuous integration needs a C++ compiler: install g++"
        pytest.skip("no C++ compiler on this machine")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-I", str(EXAMPLES)]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run([compiler, *flags, source, "-o", binary], check=True)
    return binary


def rust_program(binary: Path, source: Path = EXAMPLES / "rust_engine.rs") -> Path:
    """Compile Rust; without a compiler the test is skipped and says what it needs.

    Continuous integration has none and is not asked for one: kvdrift itself holds no Rust, and rustup fetches it from a
    network that a clone may not reach.
    """
    installed = Path.home() / ".cargo" / "bin" / "rustc"
    compiler = shutil.which("rustc") or (str(installed) if installed.is_file() else None)
    if compiler is None:
        pytest.skip("no Rust compiler on this machine: the Rust writer was not tested; install rustc 1.74 or newer")
    subprocess.run([compiler, "--edition", "2021", "-D", "warnings", "-O", source, "-o", binary], check=True)
    return binary
