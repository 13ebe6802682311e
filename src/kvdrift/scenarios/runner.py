"""Runs scenarios on an engine: each once on paper, then at every precision, with prefills that all of them share."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, cast

from kvdrift.engines.base import Generated, LiveEngine, Routes, Shifting
from kvdrift.engines.displace import displace, forget
from kvdrift.errors import NotApplicable
from kvdrift.replay.quantisation import FORMATS
from kvdrift.scenarios.model import Scenario
from kvdrift.scenarios.stage import Planted, Stage
from kvdrift.trace.model import PassPair, Trace
from kvdrift.trace.recording import REFERENCE, perturbed_label
from kvdrift.vocabulary.facts import EngineFacts, Passes, Plant, Prompt, Segment
from kvdrift.vocabulary.plan import Mode


class _Key(NamedTuple):
    """What a reference is of: its tokens, the kind of the quantised cache and the length of its first call, and, of
    tokens that were dropped, `(dropped, kept, n_moved)` as in `Segment`."""

    tokens: tuple[int, ...]
    quantised: str | None = None
    n_first: int = 0
    gap: tuple[tuple[int, ...], int, int] | None = None


NO_ROUTES = "this engine offers no other route than decode"


@dataclass(slots=True)
class Script:
    """A scenario on paper: the segments that it will compare and what a generation loop did, or why there are none.

    `not_applicable` is the reason why it does not apply, `failure` what broke; at most one of them is set on paper. A
    loop that chose among NaN has failed, and what it computed is compared all the same.
    """

    scenario: Scenario
    segments: list[Segment] = field(default_factory=list)
    not_applicable: str | None = None
    failure: str | None = None
    generated: list[Generated] = field(default_factory=list)

    @property
    def runs(self) -> bool:
        return bool(self.segments)

    def fail(self, what: str, error: BaseException) -> None:
        """Note the first thing that broke."""
        line = next(iter(str(error).strip().splitlines()), "")
        self.failure = self.failure or f"{what}: {type(error).__name__}: {line}".rstrip(": ")


class Company:
    """The scenarios of an audit and what they share: prompts, engine and prefills."""

    def __init__(self, engine: LiveEngine, scenarios: Sequence[Scenario], prompts: Sequence[Prompt]) -> None:
        self._engine = engine
        self._info: EngineFacts = engine.info
        self._prompts = list(prompts)
        self._routes: Routes | None = getattr(engine, "routes", None)
        self._references: dict[_Key, Trace] = {}
        self._broken: dict[_Key, Exception] = {}  # why a prefill of this rung has no trace
        self.passes = Passes()
        self.scripts = [self._write(scenario) for scenario in scenarios]

    def _stage(self, script: Script | None = None, rung: str | None = None, planted: Planted | None = None) -> Stage:
        assert self._routes is not None
        return Stage(
            self._prompts,
            self._routes,
            self._info,
            rung=rung,
            label="" if script is None else script.scenario.name,
            segments=() if script is None else script.segments,
            generated=() if script is None else script.generated,
            planted=planted,
        )

    def _write(self, scenario: Scenario) -> Script:
        """Run a scenario on paper."""
        script = Script(scenario)
        if self._routes is None:
            script.not_applicable = NO_ROUTES
            return script
        try:
            stage = self._stage()
            scenario.steps(stage)
        except NotApplicable as reason:
            script.not_applicable = str(reason)
        except Exception as error:  # noqa: BLE001 - whatever breaks in a scenario, the scenario has failed
            script.fail("its steps failed on paper", error)
        else:
            script.segments = [segment for segment in stage.segments if segment.positions]
            script.generated = stage.generated
            script.failure = next((made.no_numbers for made in stage.generated if made.no_numbers), None)
            self.passes.made += sum(len(made.calls) for made in stage.generated)
            if not script.segments:
                script.failure = "its steps compare nothing"
        forget(self._engine)
        return script

    def open_rung(self, rung: str, *, with_noise: bool) -> PassPair | None:
        """Run the prefills that the scenarios share, and return the self-noise that they share, if there is any.

        One that breaks is missing for the scenarios that compare with it, and for no other.
        """
        wanted: dict[_Key, set[int]] = {}
        n_segments = 0
        for script in self.scripts:
            for segment in script.segments:
                wanted.setdefault(_key(segment), set()).update(segment.positions)
                n_segments += 1
        base = max(self._prompts, key=lambda item: len(item.prompt))
        last = len(base.prompt) - 1
        noise = with_noise and last > 0 and bool(wanted)
        if noise:
            wanted.setdefault(_Key(base.tokens), set()).add(last)
        for index, (key, positions) in enumerate(wanted.items()):
            try:
                self._references[key] = self._reference(f"reference {index}", key, sorted(positions), rung)
            except Exception as error:  # noqa: BLE001 - whatever breaks here, only who needs it has failed
                self._broken[key] = error
                forget(self._engine)
        self.passes.made += len(wanted)
        self.passes.saved += max(0, n_segments + noise - len(wanted))
        if not noise or _Key(base.tokens) in self._broken:
            return None
        alone = self._prefill("reference 0", "prompt_alone", base.prompt, [last], rung)
        self.passes.made += 1
        return self._pair(_Key(base.tokens), alone, (last,))

    def run(self, script: Script, rung: str, planted: Planted | None = None) -> Iterator[PassPair]:
        """Run a scenario at the precision that the engine now has, and yield a pair for each segment; with a planted
        fault, for the segment that has it. Other tokens are computed first, at least as many as in any segment, so that
        no fault hides behind rows that lie in memory; one that is planted in what a call computes cannot.

        Raises:
            Exception: what broke in the scenario, or in a prefill that it is compared with.
        """
        broken = next((why for segment in script.segments if (why := self._broken.get(_key(segment)))), None)
        if broken is not None:
            raise broken
        if planted is None:
            displace(self._engine, max((segment.tokens for segment in script.segments), key=len))
            self.passes.made += 1
        else:
            self.passes.saved += 1
        stage = self._stage(script, rung, planted)
        try:
            script.scenario.steps(stage)
        finally:
            self.passes.made += stage.n_calls
            forget(self._engine)
        if len(stage.traces) < len(script.segments):
            raise ValueError("it took fewer steps than on paper")
        for segment, trace in zip(script.segments, stage.traces, strict=True):
            trace.release()
            if planted is None:
                yield self._pair(_key(segment), trace, segment.positions)
            elif segment.name == planted.segment:
                yield self._pair(_key(segment), trace, (planted.position,))

    def perturbed(self, script: Script, rung: str, shift: float, names: Collection[str]) -> Iterator[PassPair]:
        """Run a scenario with what enters the first layer changed, and yield the pairs of the segments `names`, whose
        references are changed as well.

        The clean references stay what the other scenarios are compared with.
        """
        shifting = cast("Shifting", self._engine)
        clean, chosen = self._references, [segment for segment in script.segments if segment.name in names]
        label = perturbed_label(script.scenario.name, shift)
        with shifting.shifted(shift):
            decodes = {pair.decode.prompt: pair for pair in self.run(script, rung)}
            try:
                keys = {_key(segment): clean[_key(segment)] for segment in chosen}
                self._references = {
                    key: self._reference(known.prompt, key, sorted(_positions(chosen, key)), rung)
                    for key, known in keys.items()
                }
                self.passes.made += len(keys)
                for segment in chosen:
                    prefill = replace(self._references[_key(segment)], label=label)
                    decode = replace(decodes[segment.name].decode, label=label)
                    yield PassPair(Mode.AS_DESIGNED, prefill, decode, segment.positions)
            finally:
                self._references = clean

    def control(self, script: Script, rung: str, plant: Plant) -> Iterator[PassPair]:
        """Run a scenario again with a fault in the last call that it compares."""
        segment = script.segments[-1]
        return self.run(script, rung, Planted(segment.name, segment.positions[-1], plant))

    def reference_of_control(self, script: Script) -> tuple[Trace, int]:
        """Return the prefill beside which the control is seen, and its position."""
        segment = script.segments[-1]
        return self._references[_key(segment)], segment.positions[-1]

    def close_rung(self) -> None:
        """Let go of the shared prefills."""
        self._references.clear()
        self._broken.clear()

    def _pair(self, key: _Key, trace: Trace, positions: tuple[int, ...]) -> PassPair:
        return PassPair(Mode.AS_DESIGNED, self._references[key], trace, positions)

    def _reference(self, name: str, key: _Key, positions: Sequence[int], rung: str) -> Trace:
        tokens, quantised, n_first, gap = key
        if gap is not None:
            return self._moved(name, tokens, gap, positions, rung)
        if quantised is None:
            return self._prefill(name, REFERENCE, tokens, positions, rung)
        assert self._routes is not None
        trace = Trace(name, "prefill", REFERENCE, rung, tokens)
        rows = self._routes.new_rows(1, len(tokens), cache=self._routes.honest_cache(quantised))
        # As many tokens at once as the cache can take until it quantises again: later ones read other rows.
        block = FORMATS[quantised].residual or len(tokens)
        starts = [0, *range(n_first, len(tokens), block)]
        for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
            probed = [position for position in positions if start <= position < stop]
            rows.extend([tokens[start:stop]], probes={0: probed}, sinks={0: trace} if probed else {})
        rows.close()
        trace.release()
        return trace

    def _moved(
        self,
        name: str,
        tokens: tuple[int, ...],
        gap: tuple[tuple[int, ...], int, int],
        positions: Sequence[int],
        rung: str,
    ) -> Trace:
        """Compute tokens on rows of tokens that others stood between: what each layer got when they did, fed again to
        all layers at the places that are left. The keys are then rotated once, for the place that they have now."""
        dropped, kept, n_moved = gap
        end = kept + n_moved
        whole = (*tokens[:kept], *dropped, *tokens[kept:end])
        source = Trace(name, "prefill", REFERENCE, rung, whole, inputs={})
        sequence = self._engine.new_sequence(len(whole))
        sequence.extend(whole, probe=(len(whole) - 1,), sink=source)
        sequence.close()
        inputs = source.inputs or {}
        replace_by = {layer: inputs[layer][kept + len(dropped) :] for layer in range(self._info.n_layers)}
        trace = Trace(name, "prefill", REFERENCE, rung, tokens)
        sequence = self._engine.new_sequence(len(tokens))
        if kept:
            sequence.extend(tokens[:kept])
        sequence.extend(tokens[kept:end], replace=replace_by)
        sequence.extend(tokens[end:], probe=tuple(positions), sink=trace)
        sequence.close()
        trace.release()
        return trace

    def _prefill(self, name: str, label: str, tokens: Sequence[int], positions: Sequence[int], rung: str) -> Trace:
        trace = Trace(name, "prefill", label, rung, tuple(tokens))
        sequence = self._engine.new_sequence(len(tokens))
        sequence.extend(tokens, probe=tuple(positions), sink=trace)
        sequence.close()
        trace.release()
        return trace


def _positions(segments: Sequence[Segment], key: _Key) -> set[int]:
    """The positions at which the segments of one reference are compared."""
    return {position for segment in segments if _key(segment) == key for position in segment.positions}


def _key(segment: Segment) -> _Key:
    gap = (segment.dropped, segment.kept, segment.n_moved) if segment.dropped else None
    return _Key(segment.tokens, segment.quantised, segment.n_first if segment.quantised else 0, gap)


def renamed(pair: PassPair) -> PassPair:
    """Return the pair with its prefill under the name of the row that it is compared with."""
    return PassPair(pair.mode, replace(pair.prefill, prompt=pair.decode.prompt), pair.decode, pair.positions)
