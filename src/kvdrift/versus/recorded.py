"""A directory of traces as one side of a comparison: its finest precision, plain decode as the engine ran it."""

from __future__ import annotations

from kvdrift.errors import TraceError
from kvdrift.trace.recording import Recording
from kvdrift.versus.record import Side
from kvdrift.versus.values import PassValues, PromptPasses, values_of
from kvdrift.vocabulary.plan import Mode, PairRole
from kvdrift.vocabulary.precision import UNIT_ROUNDOFF


def side_of_recording(name: str, recording: Recording, where: str, rung: str | None = None) -> Side:
    """Read one side from traces, at `rung` or at the finest precision that they hold.

    Raises:
        TraceError: they hold no plain prefill and decode, or none at that precision.
    """
    found = {
        item.pair.prefill.rung
        for item in recording.pairs()
        if item.role is PairRole.PAIR and item.scenario is None and item.pair.mode is Mode.AS_DESIGNED
    } & UNIT_ROUNDOFF.keys()
    if not found:
        raise TraceError(f"{where} holds no prefill and decode of one text as the engine ran them (mode as_designed)")
    chosen = min(found, key=lambda each: UNIT_ROUNDOFF[each]) if rung is None else rung
    if chosen not in found:
        raise TraceError(f"{where} holds {', '.join(sorted(found))}, and not {chosen}, which the other side has")
    side = Side(name, f"traces of {recording.facts.engine}: {recording.facts.model}", recording.facts, chosen)
    shifted: dict[str, dict[bool, tuple[PassValues, PassValues]]] = {}
    for item in recording.pairs():
        pair = item.pair
        if item.scenario is not None or pair.mode is not Mode.AS_DESIGNED or pair.prefill.rung != chosen:
            continue
        prompt = pair.prefill.prompt
        if item.role is PairRole.PAIR:
            side.prompts[prompt] = PromptPasses(
                tuple(pair.prefill.tokens), tuple(pair.positions), values_of(pair.prefill), values_of(pair.decode)
            )
        elif item.role is PairRole.PERTURBED:
            # A later pair has a larger change, made where the smaller one was swallowed; the first is the sharpest.
            shifted.setdefault(prompt, {}).setdefault(
                item.shift > 0.0, (values_of(pair.prefill), values_of(pair.decode))
            )
    for prompt, changed in shifted.items():
        if prompt in side.prompts and len(changed) == 2:
            (up, up_decode), (down, down_decode) = changed[True], changed[False]
            side.prompts[prompt].changed = {"prefill": (up, down), "decode": (up_decode, down_decode)}
    if 0 < len(shifted) < len(side.prompts):
        # Noise was measured on one prompt, whose floors are those of its places.
        known = next(item for item in side.prompts.values() if item.changed is not None)
        for passes in side.prompts.values():
            passes.changed = passes.changed or _none_of(known)
    return side


def _none_of(known: PromptPasses) -> dict[str, tuple[PassValues, PassValues]]:
    """Passes without a row, which leave the floors to the prompt that was measured."""
    assert known.changed is not None
    return {name: (PassValues(), PassValues()) for name in known.changed}
