"""Why a recording that agrees is not yet a pass, and the one step that gives a conclusion."""

from __future__ import annotations

from collections.abc import Sequence

from kvdrift.measure.measured import Measured
from kvdrift.verdict.coverage import Chain, scope_that_holds
from kvdrift.verdict.native import NativeJudgement
from kvdrift.vocabulary.address import Place

_SAMPLED = "--scope sampled"


def doubts_of_recording(
    measured: Measured, native: NativeJudgement, chain: Chain, *, has_ladder: bool, differs: bool
) -> list[str]:
    """Return what the files of another program lack for a pass in the scope that was asked for, as one reason.

    Args:
        measured: the route; its `foreign` is set.
        native: what bounds the differences without a ladder.
        chain: which sites were compared.
        has_ladder: whether a precision ladder judged them.
        differs: whether any pair differs.
    """
    foreign, scope = measured.foreign, measured.scope
    assert foreign is not None
    on_bounds = differs and not has_ladder
    places = native.uncarried if scope.sampled else native.uncovered
    nothing_bounds = on_bounds and (bool(places) or not (native.carries or scope.sampled))
    if scope.sampled:
        return [_nothing_bounds(places, None)] if nothing_bounds else []
    found = []
    if foreign.sampled is not None:
        found.append(foreign.sampled)
    if on_bounds and foreign.computed_in is None and foreign.sampled is None:
        found.append(
            "the dtype that the engine computes in is not known, so that rounding cannot be told from small faults"
        )
    if nothing_bounds:
        alone = None if found or not chain.is_whole else ""
        found.append(_nothing_bounds(places, alone))
    if not chain.is_whole:
        found.append(incomplete(measured, chain, with_step=not found))
    if not found or found == [_nothing_bounds(places, "")] or (len(found) == 1 and not chain.is_whole):
        return found
    if len(found) == 1 and foreign.sampled is None:
        return [f'{found[0]}; name it in facts.json beside the traces: {{"dtype": "bfloat16"}}']
    return [f"{'; '.join(found)}; a conclusion about what was recorded, at this precision: {_SAMPLED}"]


def incomplete(measured: Measured, chain: Chain, *, with_step: bool = True) -> str:
    """Return up to where a verdict holds whose chain is not whole, and what would settle it."""
    where = "nothing of a layer" if chain.last is None else f"{chain.last}"
    text = f"the verdict holds up to {where}: {chain.missing} was not compared at every probed position"
    if not with_step:
        return text
    scope = scope_that_holds(measured, chain)
    claim = "" if scope is None else f", or claim less: --scope {scope}"
    return f"{text}, so a fault behind it would not be seen; record it{claim}"


def _nothing_bounds(places: Sequence[Place], alone: str | None) -> str:
    """Why recorded traces without a ladder cannot be called a pass; with what settles it where `alone` is text."""
    layer, site = places[0] if places else (None, None)
    first = "" if site is None else f"; first: {site}" + ("" if layer is None else f" of layer {layer}")
    text = f"{len(places)} layer sites differ where nothing bounds what rounding may do{first}"
    if alone is None:
        return text
    return (
        f"{text}; the same passes at float32 and float64 (the precision ladder), or a second prefill of the same "
        "tokens (self-noise), settle it"
    )
