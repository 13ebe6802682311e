"""Options that concern all tests, their threads, which of them share a process, and which of them coverage watches."""

import os
import sys
from collections.abc import Generator

import pytest

TESTS = os.path.dirname(__file__)

# Tests run in one process a core, on tensors that gain nothing from threads: several would only wait for each other, on
# a busy machine ten times as long as they compute. Libraries read this when they are loaded, and so do the processes
# that a test starts.
for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

# pytest-xdist gives its workers a width, and a width named is one that kvdrift breaks lines at.
os.environ.pop("COLUMNS", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files from what the code gives")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make a group of the tests of a module that share a fixture, so that one process makes it and not each of them."""
    for item in items:
        if isinstance(item, pytest.Function):
            scopes = {found[-1].scope for found in item._fixtureinfo.name2fixturedefs.values()}
            if "module" in scopes and not any(item.iter_markers("xdist_group")):
                item.add_marker(pytest.mark.xdist_group(os.path.relpath(item.path, TESTS)))


# Folders whose tests compute little: what they alone reach of kvdrift is held against a floor.
QUICK = ("unit", "laws", "golden", "traces", "badinput", "cli", "logprobs")


def is_quick(item: pytest.Item) -> bool:
    """Whether a test is one of those whose coverage has a floor."""
    folder = os.path.relpath(item.path, TESTS).split(os.sep)[0]
    return folder in QUICK and not any(item.iter_markers("slow")) and not any(item.iter_markers("matrix"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """With KVDRIFT_COVERAGE=quick, take the trace function of coverage away while other tests run.

    To trace an audit takes half as long again as to run it. Processes that such a test starts are not traced either.
    """
    if os.environ.get("KVDRIFT_COVERAGE") != "quick" or is_quick(item):
        return (yield)
    trace = sys.gettrace()
    settings = os.environ.pop("COVERAGE_PROCESS_CONFIG", None)
    sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(trace)
        if settings is not None:
            os.environ["COVERAGE_PROCESS_CONFIG"] = settings
