"""Options that concern all tests, their threads, which of them share a process, and which of them coverage watches."""

import gc
import os
import sys
from collections.abc import Generator

import pytest

TESTS = os.path.dirname(__file__)

# An audit makes many objects that live as long as it does. To look through all that is alive for cycles as often as
# Python does by itself takes a twentieth of the time of tests that audit.
gc.set_threshold(50_000, 20, 100)

# Tests run in one process a core, on tensors that gain nothing from threads: several would only wait for each other, on
# a busy machine ten times as long as they compute. Libraries read this when they are loaded, and so do the processes
# that a test starts.
for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

# Where several threads are what a test is about, one that waits for the others sleeps: it would take the core that the
# other worker computes on, and an audit of a tiny model on two threads then takes ten times the processor time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Each worker and each process that a test starts would compile kvdrift and the tests anew: half of the time that it
# takes to collect them.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# pytest-xdist gives its workers a width, and a width named is one that kvdrift breaks lines at.
os.environ.pop("COLUMNS", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files from what the code gives")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Failures(terminal))


class Failures:
    """Names a test when it fails: the output of a run that is cut off by time has no summary."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = str(report.longrepr if crash is None else crash.message).strip().partition("\n")[0]
            self._terminal.write_line(f"\n{report.nodeid}, {report.when}, {report.duration:.0f} s: {said[:300]}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make a group of the tests of a module that share a fixture, so that one process makes it and not each of them."""
    for item in items:
        if isinstance(item, pytest.Function):
            scopes = {found[-1].scope for found in item._fixtureinfo.name2fixturedefs.values()}
            if "module" in scopes and not any(item.iter_markers("xdist_group")):
                item.add_marker(pytest.mark.xdist_group(os.path.relpath(item.path, TESTS)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """In a worker of pytest-xdist, before it tells what it collected: tell the groups, and begin with what takes long.

    pytest-xdist 3.8 hides a group in a field of the item that pytest 9.2 does not read any more
    (https://github.com/pytest-dev/pytest-xdist/issues/1386): every worker then makes what a group shares, without a
    word.
    """
    if not getattr(session.config.option, "loadgroup", False):
        return
    for item in session.items:
        groups = sorted({str(mark.args[0]) for mark in item.iter_markers("xdist_group")})
        name = f"{item.nodeid}@{'_'.join(groups)}"
        if groups and not item.nodeid.endswith(name.removeprefix(item.nodeid)):
            from _pytest.nodeid import NodeId

            item._id = NodeId.parse(name)
    # Groups come first, the largest ahead; a long test at the end would leave the other workers without one.
    session.items.sort(key=lambda item: not any(item.iter_markers("slow")))


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
