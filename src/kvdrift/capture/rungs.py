"""Runs plain decode at one precision after the other and hands on what it records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

from kvdrift.capture.control import capture_control
from kvdrift.capture.modes import capture_prompt
from kvdrift.capture.noise import capture_noise
from kvdrift.capture.unobserved import capture_unobserved
from kvdrift.engines.base import LiveEngine
from kvdrift.errors import CaptureError, KvdriftError
from kvdrift.instruments.unobserved import Unobserved
from kvdrift.measure.measured import Measured
from kvdrift.trace.model import Array
from kvdrift.trace.recording import PairSink, RecordedPair
from kvdrift.vocabulary.facts import Prompt
from kvdrift.vocabulary.plan import Mode, PairRole
from kvdrift.vocabulary.progress import Progress
from kvdrift.vocabulary.schedule import unobserved_prompt


@contextmanager
def missing_rung(measured: Measured, rung: str) -> Iterator[None]:
    """Turn what breaks at one precision into a missing rung, and note why.

    Raises:
        CaptureError: the native precision broke; without it there is nothing to audit.
    """
    try:
        yield
    except (CaptureError, RuntimeError, MemoryError) as error:
        if rung == measured.info.dtype:
            raise
        measured.rung_failures.setdefault(rung, _words(error))


def _words(error: Exception) -> str:
    if isinstance(error, KvdriftError):
        return str(error)
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return f"{type(error).__name__}: {line}"


@dataclass(slots=True)
class DecodeCapture:
    """Plain decode of all prompts. What it records goes to `sink`, which feeds `measured`.

    The layer inputs of native prefill are kept until the fine rung has started its specification from them.
    """

    engine: LiveEngine
    measured: Measured
    sink: PairSink
    _inputs: dict[str, dict[int, Array]] = field(default_factory=dict)

    def _order(self, rung: str) -> list[Prompt]:
        """The prompts; where noise is measured, one of middle length comes first."""
        prompts = list(self.measured.prompts)
        if self._measures_noise(rung):
            by_length = sorted(prompts, key=lambda prompt: len(prompt.tokens))
            middle = by_length[len(prompts) // 2]
            prompts.sort(key=lambda prompt: prompt is not middle)
        return prompts

    def _measures_noise(self, rung: str) -> bool:
        return self.measured.info.perturbable and rung == self.measured.info.ladder.upper

    def run(self, rung: str, progress: Progress) -> None:
        """Capture every prompt at one precision, and at the last one the positive control.

        Raises:
            CaptureError: the model itself failed at its native dtype.
        """
        measured = self.measured
        with missing_rung(measured, rung), self.engine.at(rung):
            for prompt in self._order(rung):
                progress.step(f"{prompt.name}: prefill and decode at {rung}")
                self._capture(prompt, rung)
                self.sink.release()
            if rung == measured.control_rung:
                progress.step("the positive control")
                for control in capture_control(self.engine, measured):
                    self.sink.add(control)

    def run_unobserved(self, rung: str, progress: Progress) -> None:
        """Run one prompt unobserved, and each pass twice, where plain decode itself was not asked for: whether what
        scenarios record is what the engine runs, and whether it gives the same each time.

        Raises:
            CaptureError: the model itself failed at its native dtype.
        """
        measured = self.measured
        prompt = unobserved_prompt(measured.prompts)
        doubted = rung == measured.info.ladder.upper and measured.instrument(Unobserved).in_doubt(measured)
        if rung != measured.info.dtype and not doubted:
            return
        progress.step(f"{prompt.name}: unobserved at {rung}")
        with missing_rung(measured, rung), self.engine.at(rung):
            for item in capture_unobserved(self.engine, prompt, rung, None):
                self.sink.add(item)
            self.sink.release()

    def _capture(self, prompt: Prompt, rung: str) -> None:
        """Capture all routes of one prompt before any is compared: where one fails, none of them counts."""
        measured = self.measured
        for_noise = self._measures_noise(rung) and self._wants_noise()
        for_specification = measured.is_specified and rung == measured.info.dtype
        kept: dict[int, Array] | None = {} if for_noise or for_specification else None
        inputs = self._inputs.pop(prompt.name, None) if rung == measured.control_rung else None
        exactly = getattr(self.engine, "exact_products", nullcontext)  # of an engine that holds its weights
        with exactly():
            items = list(capture_prompt(self.engine, prompt, measured.modes, rung, kept=kept, inputs=inputs))
        if for_noise and kept:
            pairs = {item.pair.mode: item.pair for item in items if item.role is PairRole.PAIR}
            # They come before the pairs that they belong to, whose first failure is then known at once.
            items = [*capture_noise(self.engine, prompt, pairs, kept), *items]
        items += self._unobserved(prompt, rung, items)
        for item in items:
            self.sink.add(item)
        if kept and for_specification:
            self._inputs[prompt.name] = kept

    def _unobserved(self, prompt: Prompt, rung: str, items: Sequence[RecordedPair]) -> list[RecordedPair]:
        """Run one prompt unobserved: at the native precision, and at the fine one if it differed there."""
        measured = self.measured
        if prompt.name != unobserved_prompt(measured.prompts).name or Mode.AS_DESIGNED not in measured.modes:
            return []
        if rung == measured.info.dtype:
            seen = next(item.pair for item in items if item.role is PairRole.PAIR)
            return list(capture_unobserved(self.engine, prompt, rung, seen))
        if rung != measured.info.ladder.upper or not measured.instrument(Unobserved).in_doubt(measured):
            return []
        try:
            return list(capture_unobserved(self.engine, prompt, rung, None))
        except (CaptureError, RuntimeError):  # without what is lifted while it is watched, not every model runs there
            return []

    def _wants_noise(self) -> bool:
        """Whether the noise of another prompt is to be measured: of the first one, and of all where it is coarse."""
        floors = self.measured.floors
        return any(not floors.has(mode) or floors.is_coarse(mode) for mode in self.measured.modes)
