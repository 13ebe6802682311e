"""Runs an engine along both routes and records them: engine x plan -> traces.

Knows sequences of `extend` and `rewind`; knows nothing of tensors' meaning or of verdicts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from kvdrift.engines.base import EngineSequence, LiveEngine
from kvdrift.engines.displace import displace, other_tokens
from kvdrift.errors import CaptureError
from kvdrift.trace.model import Array, PassPair, Trace
from kvdrift.trace.recording import RecordedPair
from kvdrift.vocabulary.facts import Plant, Prompt
from kvdrift.vocabulary.plan import Mode, PairRole
from kvdrift.vocabulary.sites import Site


def continue_greedily(engine: LiveEngine, prompt: Sequence[int], span: int) -> tuple[int, ...]:
    """Return the engine's own `span` most likely next tokens, one decode step each."""
    sequence = engine.new_sequence(len(prompt) + span)
    tokens = [sequence.extend(prompt)]
    while len(tokens) < span:
        tokens.append(sequence.extend(tokens[-1:]))
    sequence.close()
    return tuple(tokens)


def capture_prompt(
    engine: LiveEngine,
    prompt: Prompt,
    modes: Sequence[Mode],
    rung: str,
    *,
    kept: dict[int, Array] | None = None,
    inputs: Mapping[int, Array] | None = None,
) -> Iterator[RecordedPair]:
    """Record prefill and the decode routes of `modes` for one prompt at the precision the engine now runs at.

    The self-noise pairs the last prompt position of the full prefill with the same position in a prefill of the prompt
    alone: the same token on the same route at another length, so what differs is the engine's own rounding.

    Args:
        engine: runs at `rung`.
        prompt: with its continuation, whose positions are compared.
        modes: those that are wanted; kv_aligned runs only where the engine can rewind.
        rung: the precision that the engine runs at.
        kept: receives the layer inputs of prefill, where the engine shows them; None if nobody wants them.
        inputs: layer inputs of native prefill; with them a specification is recorded too.
    """
    last_prompt = len(prompt.prompt) - 1
    aligned = Mode.KV_ALIGNED in modes and engine.info.can_rewind
    specification = _specify(engine, prompt, rung, inputs) if inputs else None
    prefill, sequence = _prefill(engine, prompt, rung, keep_past=aligned, kept=kept)
    # One sequence after the other: an engine with one pool for all of them overwrites the rows of an earlier one.
    on_its_rows = _aligned(engine, prompt, rung, prefill, sequence) if aligned else None
    sequence.close()
    displace(engine, prompt.tokens)
    decode, alone = _decode(engine, prompt, rung, steps=Mode.AS_DESIGNED in modes)
    if Mode.AS_DESIGNED in modes:
        yield RecordedPair(PairRole.PAIR, PassPair(Mode.AS_DESIGNED, prefill, decode, prompt.probed))
    if on_its_rows is not None:
        yield RecordedPair(PairRole.PAIR, on_its_rows)
    if len(prompt.prompt) > 1:  # a prompt of one token is fed as a decode step is, and may have the faults of one
        yield RecordedPair(PairRole.SELF_NOISE, PassPair(Mode.AS_DESIGNED, prefill, alone, (last_prompt,)))
    if specification is not None:
        # It has no counterpart.
        yield RecordedPair(
            PairRole.SPECIFICATION, PassPair(Mode.KV_ALIGNED, specification, specification, prompt.probed)
        )


class PlantedStep:
    """One decode step that is run again and again, each time with another fault, and the clean prefill of its token.

    `prefill` is there from the start.
    """

    def __init__(self, engine: LiveEngine, prompt: Prompt, mode: Mode, rung: str, position: int) -> None:
        self._engine, self._prompt, self._mode, self._rung, self._position = engine, prompt, mode, rung, position
        self._tokens = prompt.tokens[: position + 1]
        self._sequence: EngineSequence | None = None
        self.prefill = self._run_prefill()

    def _run_prefill(self) -> Trace:
        prefill = Trace(self._prompt.name, "prefill", PairRole.CONTROL, self._rung, self._tokens)
        self._sequence = self._engine.new_sequence(len(self._tokens), keep_past=self._mode is Mode.KV_ALIGNED)
        self._sequence.extend(self._tokens, probe=(self._position,), sink=prefill)
        return prefill

    def record(self, plant: Plant) -> PassPair:
        """Record the step with `plant` committed in it.

        Raises:
            CaptureError: the engine met nothing where it is to be planted.
        """
        decode = Trace(self._prompt.name, "decode", PairRole.CONTROL, self._rung, self._tokens)
        replace = self._go_back()
        try:
            assert self._sequence is not None
            self._sequence.extend(self._tokens[-1:], probe=(self._position,), sink=decode, replace=replace, plant=plant)
        except CaptureError:
            self.close()
            raise
        if self._mode is not Mode.KV_ALIGNED or self._engine.info.rewinds_once:
            self.close()
        return PassPair(self._mode, self.prefill, decode, (self._position,))

    def _go_back(self) -> dict[int, Array]:
        """Stand in front of the step, and return what its layers are to be given."""
        if self._mode is Mode.KV_ALIGNED:
            if self._sequence is None:
                self.prefill = self._run_prefill()
            assert self._sequence is not None
            self._sequence.rewind(1)
            return _layer_inputs(self._engine, self.prefill, self._position)
        self.close()
        self._sequence = self._engine.new_sequence(len(self._tokens))
        self._sequence.extend(self._tokens[:-1])
        return {}

    def close(self) -> None:
        """Free the cache."""
        if self._sequence is not None:
            self._sequence.close()
            self._sequence = None


def _specify(engine: LiveEngine, prompt: Prompt, rung: str, inputs: Mapping[int, Array]) -> Trace:
    """Prefill in which no layer inherits the rounding of the one below: all start from `inputs`."""
    trace = Trace(prompt.name, "prefill", PairRole.SPECIFICATION, rung, prompt.tokens)
    sequence = engine.new_sequence(len(prompt.tokens))
    sequence.extend(prompt.tokens, probe=prompt.probed, sink=trace, replace=inputs)
    sequence.close()
    trace.release()
    return trace


def prefill_probes(prompt: Prompt) -> tuple[int, ...]:
    """What is recorded of a prefill of all tokens: the last token of the prompt, and the continuation."""
    return (len(prompt.prompt) - 1, *prompt.probed)


def _prefill(
    engine: LiveEngine, prompt: Prompt, rung: str, *, keep_past: bool, kept: dict[int, Array] | None
) -> tuple[Trace, EngineSequence]:
    trace = Trace(prompt.name, "prefill", "full", rung, prompt.tokens, inputs=kept)
    sequence = engine.new_sequence(len(prompt.tokens), keep_past=keep_past)
    sequence.extend(prompt.tokens, probe=prefill_probes(prompt), sink=trace)
    trace.inputs = None
    trace.release()
    return trace, sequence


def _decode(engine: LiveEngine, prompt: Prompt, rung: str, *, steps: bool) -> tuple[Trace, Trace]:
    """The prompt in one prefill of its own, then the continuation token by token."""
    alone = Trace(prompt.name, "prefill", "prompt_alone", rung, prompt.prompt)
    decode = Trace(prompt.name, "decode", str(Mode.AS_DESIGNED), rung, prompt.tokens)
    sequence = engine.new_sequence(len(prompt.tokens))
    sequence.extend(prompt.prompt, probe=(len(prompt.prompt) - 1,), sink=alone)
    if steps:
        for position, token in zip(prompt.probed, prompt.continuation, strict=True):
            sequence.extend([token], probe=(position,), sink=decode)
    sequence.close()
    alone.release()
    decode.release()
    return decode, alone


def _aligned(engine: LiveEngine, prompt: Prompt, rung: str, prefill: Trace, sequence: EngineSequence) -> PassPair:
    """Decode each probed token on the rows that prefill wrote for all tokens before it, layer inputs included.

    Positions are visited from the last to the first, so that one prefill serves them all: each step drops one more
    row. A cache that can go back only once needs a prefill for each position, which is then the reference too.
    """
    decode = Trace(prompt.name, "decode", str(Mode.KV_ALIGNED), rung, prompt.tokens)
    reference = prefill
    if engine.info.rewinds_once:
        reference = Trace(prompt.name, "prefill", str(Mode.KV_ALIGNED), rung, prompt.tokens)
    for position in reversed(prompt.probed):
        if engine.info.rewinds_once:
            sequence.close()
            sequence = engine.new_sequence(position + 1, keep_past=True)
            sequence.extend(prompt.tokens[: position + 1], probe=(position,), sink=reference)
        elif position == prompt.probed[0] and _step_on_displaced(engine, prompt, prefill, decode):
            break
        sequence.rewind(1)
        replace = _layer_inputs(engine, reference, position)
        sequence.extend([prompt.tokens[position]], probe=(position,), sink=decode, replace=replace)
        sequence.rewind(1)
    reference.release()
    decode.release()
    return PassPair(Mode.KV_ALIGNED, reference, decode, prompt.probed)


def _step_on_displaced(engine: LiveEngine, prompt: Prompt, prefill: Trace, decode: Trace) -> bool:
    """Take the first aligned step where prefill has left no right row in its slot, and say whether that worked.

    After a rewind the row that prefill wrote for the probed token may still lie in its slot, and hides a step that does
    not write its own. So the prompt is computed with another continuation first, all of which is dropped. What is kept
    are the rows of the prompt, of the same bits as before, since the call has the same shape. Where they are not (the
    rows of a model may depend on which tokens they are computed with, as under experts), nothing is recorded.
    """
    start, n_probed = len(prompt.prompt), len(prompt.probed)
    sequence = engine.new_sequence(len(prompt.tokens), keep_past=True)
    sequence.extend((*prompt.prompt, *other_tokens(prompt.tokens, engine.info.vocab_size)[start:]))
    sequence.rewind(n_probed)
    trial = Trace(prompt.name, "decode", decode.label, decode.rung, prompt.tokens)
    replace = _layer_inputs(engine, prefill, start)
    sequence.extend([prompt.tokens[start]], probe=(start,), sink=trial, replace=replace)
    sequence.close()
    if not _reads_its_past(trial, prefill, start):
        return False
    decode.append(trial)
    return True


def _reads_its_past(step: Trace, prefill: Trace, position: int) -> bool:
    """Whether a step at `position` read, for all tokens before it, the bytes that prefill wrote; False if nothing is
    known of what it read."""
    written = {(read.layer, read.site): read for read in prefill.cache_reads()}
    n_reads = 0
    for read in step.cache_reads():
        known = written.get((read.layer, read.site))
        past = read.slots < position
        if known is None or not np.isin(read.slots[past], known.slots).all():
            return False
        order = np.argsort(known.slots)
        rows = known.rows[order[np.searchsorted(known.slots, read.slots[past], sorter=order)]]
        if rows.tobytes() != read.rows[past].tobytes():
            return False
        n_reads += 1
    return n_reads > 0


def _layer_inputs(engine: LiveEngine, prefill: Trace, position: int) -> dict[int, Array]:
    """What each layer, and the final norm after them, received at `position` in prefill."""
    last = engine.info.n_layers - 1
    inputs: dict[int, Array] = {}
    for record in prefill.rows:
        if record.layer is None or position not in record.positions:
            continue
        row = record.values[record.positions.index(position)][np.newaxis]
        if record.site is Site.LAYER_IN:
            inputs[record.layer] = row
        elif record.site is Site.LAYER_OUT and record.layer == last:
            inputs[last + 1] = row
    return inputs
