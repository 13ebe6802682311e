"""Perturbed passes at the finest rung, from which the noise of each pass is measured: engine x prompt -> traces.

In kv_aligned the inputs of all layers are changed, each from what it was in the clean prefill: no layer inherits the
noise of another. As designed, those of the first layer are changed, for every token fed on both routes: the noise
of all layers below is then in that of each layer, as it is in the drift.

A row of zeros, such as the embedding of a padding token, has no relative change, and a norm makes any other change of
it one as large as the row: such rows stay, and the steps are measured that have another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from kvdrift.capture.modes import prefill_probes
from kvdrift.engines.base import LiveEngine
from kvdrift.pairing.floors import SCALES, FloorTable
from kvdrift.trace.model import Array, PassPair, Trace
from kvdrift.trace.recording import RecordedPair, perturbed_label
from kvdrift.vocabulary.facts import Prompt
from kvdrift.vocabulary.plan import Mode, PairRole
from kvdrift.vocabulary.sites import STATE_SITES

# Any fixed number does.
_SEED = 20260

# Decode steps that are run as designed: the first reads what prefill wrote, the second what a step wrote. A recurrent
# state is compared where both routes stop: prefill stops at the last token alone, so all steps are run.
_STEPS = 2


def capture_noise(
    engine: LiveEngine, prompt: Prompt, pairs: Mapping[Mode, PassPair], inputs: Mapping[int, Array]
) -> Iterator[RecordedPair]:
    """Record the perturbed passes of one prompt at the precision that the engine now runs at.

    A larger change follows where a smaller one was swallowed. Aligned inputs come first: what swallows there does so as
    designed as well, where changes of other operands may hide it.

    Args:
        engine: runs at the finest rung.
        prompt: that the passes are of.
        pairs: the clean passes of the prompt, by mode.
        inputs: layer inputs [token, hidden] of the clean prefill, of all tokens.
    """
    floors = FloorTable()
    for mode, pair in sorted(pairs.items(), key=lambda item: item[0] is not Mode.KV_ALIGNED):
        size: float | None = SCALES[pair.prefill.rung].sizes[0]
        while size is not None:
            for shift, found in _run(engine, prompt, pair, inputs, size):
                floors.remember(found, shift)
                yield RecordedPair(PairRole.PERTURBED, found, shift=shift)
            floors.complete(pair)
            size = floors.wants_larger(mode)


def _run(
    engine: LiveEngine, prompt: Prompt, pair: PassPair, inputs: Mapping[int, Array], size: float
) -> Iterator[tuple[float, PassPair]]:
    """Both passes at either sign. The decode steps come first: no prefill of this text lies between them and the clean
    ones, whose rows an engine with one pool for all sequences might still hold."""
    aligned = pair.mode is Mode.KV_ALIGNED
    moving = tuple(at for at in prompt.probed if inputs[0][at].any())
    changed = {
        shift: {layer: _changed(inputs[layer], shift, layer, not moving) for layer in (inputs if aligned else (0,))}
        for shift in (size, -size)
    }
    positions = _steps_of(pair, prompt, moving or prompt.probed)
    decodes = {shift: _trace(pair.decode, pair, shift) for shift in changed}
    (_aligned if aligned else _as_designed)(engine, prompt, positions, changed, decodes)
    for shift, values in changed.items():
        prefill = _trace(pair.prefill, pair, shift)
        # The tokens, the cache and the rows of the head of the pass itself: a pass that depends on its own length, or a
        # head with another kernel for one row, would look noisy, and some caches hand out all their slots.
        sequence = engine.new_sequence(len(prompt.tokens))
        replaced = _part(values, 0, len(prompt.tokens))
        sequence.extend(prompt.tokens, probe=prefill_probes(prompt), sink=prefill, replace=replaced)
        sequence.close()
        prefill.keep(positions)
        prefill.release()
        yield shift, PassPair(pair.mode, prefill, decodes[shift], positions)


def _steps_of(pair: PassPair, prompt: Prompt, moving: tuple[int, ...]) -> tuple[int, ...]:
    """The decode steps that are measured, of those whose token changes; a recurrent state is recorded at the last."""
    states = prompt.probed[-1:] if _has_states(pair) else ()
    if pair.mode is Mode.KV_ALIGNED:
        return states or moving[-1:]
    return tuple(sorted({*moving, *states})) if states else moving[:_STEPS]


def _aligned(
    engine: LiveEngine,
    prompt: Prompt,
    positions: tuple[int, ...],
    changed: Mapping[float, Mapping[int, Array]],
    decodes: Mapping[float, Trace],
) -> None:
    """One decode step at every shift, on rows that one clean prefill wrote, or, in a cache that can go back only once,
    one for each."""
    (last,) = positions
    sequence = None
    for shift, values in changed.items():
        if sequence is None:
            sequence = engine.new_sequence(len(prompt.tokens), keep_past=True)
            sequence.extend(prompt.tokens[: last + 1])
        sequence.rewind(1)
        replaced = _part(values, last, last + 1)
        sequence.extend(prompt.tokens[last : last + 1], probe=positions, sink=decodes[shift], replace=replaced)
        decodes[shift].release()
        if engine.info.rewinds_once:
            sequence.close()
            sequence = None
    if sequence is not None:
        sequence.close()


def _as_designed(
    engine: LiveEngine,
    prompt: Prompt,
    positions: tuple[int, ...],
    changed: Mapping[float, Mapping[int, Array]],
    decodes: Mapping[float, Trace],
) -> None:
    """The first decode steps at every shift, on rows of a perturbed prefill of the prompt."""
    n_first = len(prompt.prompt)
    for shift, values in changed.items():
        sequence = engine.new_sequence(len(prompt.tokens))
        sequence.extend(prompt.prompt, replace=_part(values, 0, n_first))
        for at in range(n_first, positions[-1] + 1):
            replaced = _part(values, at, at + 1)
            probe, sink = ((at,), decodes[shift]) if at in positions else ((), None)
            sequence.extend(prompt.tokens[at : at + 1], probe=probe, sink=sink, replace=replaced)
        sequence.close()
        decodes[shift].release()


def _has_states(pair: PassPair) -> bool:
    """Whether either pass shows a recurrent state."""
    return any(record.site in STATE_SITES for trace in (pair.prefill, pair.decode) for record in trace.rows)


def _part(inputs: Mapping[int, Array], start: int, stop: int) -> dict[int, Array]:
    return {layer: values[start:stop] for layer, values in inputs.items()}


def _changed(values: Array, shift: float, layer: int, zeros_too: bool) -> Array:
    """`x (1 + shift xi)` [token, ..., hidden]; xi is the same for either sign and for every size.

    A row of zeros stays one. With `zeros_too`, where no step has another, it takes a change of the size that the other
    rows of the layer have, in the root mean square. Where all rows are zero, nothing tells a size, and none changes.
    """
    xi = np.random.default_rng((_SEED, layer)).standard_normal(values.shape)
    wide = values.astype(np.float64)
    is_zero = np.asarray(~wide.any(axis=-1))
    others = wide[~is_zero]
    size = np.sqrt(np.mean(others * others)) if zeros_too and others.size else 0.0
    return np.asarray(wide + shift * np.where(is_zero[..., None], size, wide) * xi).astype(values.dtype)


def _trace(clean: Trace, pair: PassPair, shift: float) -> Trace:
    """An empty trace for the perturbed pass that belongs to a clean one."""
    return Trace(clean.prompt, clean.pass_name, perturbed_label(pair.mode, shift), clean.rung, clean.tokens)
