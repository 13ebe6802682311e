"""Options that concern all tests, and one thread for each of them."""

import os

import pytest

# Tests run in one process a core, on tensors that gain nothing from threads: several would only wait for each other, on
# a busy machine ten times as long as they compute. Libraries read this when they are loaded, and so do the processes
# that a test starts.
for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files from what the code gives")
