"""A against B: two dumps of logprobs, two engines, or two directories of traces. Only composes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvdrift.errors import UsageError
from kvdrift.logprobs.compare import LogprobComparison, compare_logprobs
from kvdrift.logprobs.files import SUFFIXES, is_dump
from kvdrift.logprobs.outcome import LogprobPlan


def compare(
    a: Any, b: Any, *, out: str | Path | None = None, command: str | None = None, **options: Any
) -> LogprobComparison:
    """Compare A with B: is what they differ by rounding, where does it begin, and which of them is off?

    Args:
        a: a dump of logprobs, `FILE` or `FILE:COLUMN`.
        b: another one, of the same tokens.
        out: the run directory; nothing is written without it.
        command: how the comparison is run again, for the report.
        options: those of `kvdrift compare`: third, repeat, repeat_b, dtype_a, dtype_b, drop, alpha, seed.

    Raises:
        UsageError: something cannot be compared, or an option is not known.
        TraceError: a file cannot be read.
        AlignmentError: the tokens do not belong together.
    """
    place = None if out is None else Path(out)
    for target in (a, b):
        if not is_dump(target):
            raise UsageError(
                f"cannot compare {str(target)[:80]!r}: a dump of logprobs is a file that ends in {', '.join(SUFFIXES)}"
            )
    names = {"third", "repeat", "repeat_b"}
    given: dict[str, Any] = {
        name: str(value) if name in names and value is not None else value for name, value in options.items()
    }
    if unknown := sorted(set(given) - set(LogprobPlan.__slots__)):
        raise UsageError(f"compare takes no {unknown[0]!r}; it takes {', '.join(LogprobPlan.__slots__)}")
    return compare_logprobs(str(a), str(b), LogprobPlan(**given), out=place, command=command)
