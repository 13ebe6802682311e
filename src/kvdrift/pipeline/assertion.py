"""An audit as an assertion: nothing for a pass, an AssertionError of ten lines for anything else."""

from __future__ import annotations

import warnings
from typing import Any

from kvdrift.pipeline.audit import Audit, audit
from kvdrift.report.lines import ten_lines
from kvdrift.vocabulary.evidence import Verdict


class InconclusiveWarning(UserWarning):
    """An audit could not tell, and `--kvdrift-inconclusive=warn` says not to fail on that."""


def assert_no_kv_mismatch(model: Any, tokenizer: Any = None, *, inconclusive: str = "fail", **options: Any) -> Audit:
    """Audit a model, and raise AssertionError unless decode computes what prefill computes.

    Args:
        model: as for `kvdrift.audit`, and so are `tokenizer` and `options`.
        tokenizer: needed only for prompts given as text.
        inconclusive: "fail", or "warn" to be content with a warning where the audit could not tell.
        options: all other arguments of `kvdrift.audit`.

    Raises:
        AssertionError: the verdict is MISMATCH, or INCONCLUSIVE where that fails.
        ValueError: `inconclusive` is neither of the two.
    """
    __tracebackhide__ = True
    if inconclusive not in ("fail", "warn"):
        raise ValueError(f"inconclusive={inconclusive!r}; use 'fail' or 'warn'")
    result = audit(model, tokenizer, **options)
    if (text := failure_of(result, inconclusive)) is not None:
        raise AssertionError(text)
    return result


def failure_of(result: Audit, inconclusive: str) -> str | None:
    """Return what a failing test says; None for a pass, and for a verdict INCONCLUSIVE that is only warned of."""
    if result.exit_code == 0:
        return None
    text = "\n".join(ten_lines(result.view, result.path))
    if result.verdict is Verdict.INCONCLUSIVE and inconclusive == "warn":
        warnings.warn(InconclusiveWarning(text), stacklevel=4)
        return None
    return text
