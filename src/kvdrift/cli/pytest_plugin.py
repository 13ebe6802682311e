"""The pytest plugin: audit a model in a test, and fail with verdict, address, cause and report in ten lines.

    def test_decode_computes_what_prefill_computes(kvdrift_audit):
        kvdrift_audit(model, tokenizer)

Nothing of the judging core is imported before a test asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kvdrift.pipeline.audit import Audit


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvdrift")
    group.addoption(
        "--kvdrift-inconclusive",
        choices=("fail", "warn"),
        default="fail",
        help="what a verdict INCONCLUSIVE does to a test (default: fail)",
    )
    group.addoption(
        "--kvdrift-out",
        type=Path,
        default=None,
        help="directory for reports, one a test (default: the test's tmp_path)",
    )


@pytest.fixture
def kvdrift_audit(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Audit]]:
    """Return a function that audits a model as `kvdrift.audit` does, and fails the test unless it passes.

    A test that asks for it and audits nothing fails: it has measured nothing.
    """
    chosen = request.config.getoption("--kvdrift-out")
    parent = tmp_path if chosen is None else chosen / _folder(request.node.nodeid)
    made: list[Audit] = []

    def audit(model: Any, tokenizer: Any = None, **options: Any) -> Audit:
        import kvdrift

        options.setdefault("out", parent / f"kvdrift-{len(made) + 1}")
        made.append(kvdrift.audit(model, tokenizer, **options))
        _judge(made[-1], request.config.getoption("--kvdrift-inconclusive"))
        return made[-1]

    yield audit
    if not made and not getattr(request.node, "rep_call_failed", False):
        pytest.fail("kvdrift_audit was asked for, and nothing was audited: call it with a model", pytrace=False)


def _judge(audit: Audit, inconclusive: str) -> None:
    __tracebackhide__ = True
    from kvdrift.pipeline.assertion import failure_of

    if (text := failure_of(audit, inconclusive)) is not None:
        pytest.fail(text, pytrace=False)


def _folder(nodeid: str) -> str:
    """A name for the folder of a test that any file system takes."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in nodeid)[-120:]
