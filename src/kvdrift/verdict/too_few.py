"""Too few units: which instruments could not test for want of them, and which prompts would do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kvdrift.measure.measured import Measured
from kvdrift.verdict.native import NativeJudgement
from kvdrift.vocabulary.evidence import Caveat, Evidence, Verdict

# Tokens of a prompt from which on causes in attention no longer look alike.
_LONG_ENOUGH = 8


def units_caveats(measured: Measured, natives: Mapping[str, NativeJudgement], verdict: Verdict) -> Iterator[Caveat]:
    """Yield what the reader must know of the units: those that count once, and instruments that had too few of them to
    add to a verdict other than MISMATCH."""
    repeated, probed = len(measured.repeated_units), sum(len(prompt.probed) for prompt in measured.prompts)
    if repeated:
        yield Caveat(
            "REPEATED_UNITS",
            f"{repeated} of {probed} (prompt, position) pairs have the same tokens, up to their own, as another one; "
            "such pairs count once in every statistic, so these add nothing",
        )
    few = _too_few(natives)
    if few and verdict is not Verdict.MISMATCH:
        names = " and ".join(sorted({item.instrument for item in few}))
        yield Caveat(
            "FEW_UNITS",
            f"{names} could not test: {few[0].reason}; so no minimum is stated for small errors in one direction at "
            "the native dtype; the recommendations say which prompts would do",
        )


def prompts_that_would_do(measured: Measured, natives: Mapping[str, NativeJudgement]) -> str | None:
    """Return the prompts to add, how many and how long, or the span that would do; None where units are enough."""
    few = _too_few(natives)
    if not few:
        return None
    needed = max(_count(item, "units_needed") for item in few)
    missing = needed - min(_count(item, "n_units") for item in few)
    span = max(1, measured.plan.span)
    n_prompts = -(-missing // span)
    repeated = measured.repeated_units
    distinct = sum(any((p.name, at) not in repeated for at in p.probed) for p in measured.prompts)
    add = (
        f"Add {n_prompts} {'prompt' if n_prompts == 1 else 'prompts'} of other text, {_LONG_ENOUGH} tokens long or "
        "longer"
    )
    if measured.foreign is not None:
        return f"{add}, to what is recorded"
    longer = -(-needed // max(1, distinct))
    return f"{add} (--prompts FILE, prompts={{...}}), or probe further: --span {longer} (span={longer})"


def _too_few(natives: Mapping[str, NativeJudgement]) -> list[Evidence]:
    """The evidence of instruments that more units would help."""
    return [
        item
        for native in natives.values()
        for item in native.evidence
        if not item.valid and item.detail.get("units_needed") is not None
    ]


def _count(item: Evidence, name: str) -> int:
    value = item.detail[name]
    assert isinstance(value, int)
    return value
