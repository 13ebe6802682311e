"""One route as measured: pairs of passes go in, the tables of the instruments come out. It judges nothing.

It is filled while an engine is captured or while saved traces are read, in the same way. Plain decode is one such
route, and every scenario is another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from kvdrift.instruments.base import Foreign, Instrument, QuantisedRows, Tentative, instrument_of
from kvdrift.instruments.panel import new_instruments
from kvdrift.instruments.rounded import RoundedScores
from kvdrift.instruments.route import Route, prove_route
from kvdrift.measure.attention import AttentionTable
from kvdrift.measure.eight_bits import note_8_bits
from kvdrift.measure.merges import note_merges
from kvdrift.measure.scales import note_scales
from kvdrift.measure.suspects import Suspects
from kvdrift.pairing.drift import DriftTable
from kvdrift.pairing.floors import FloorTable
from kvdrift.pairing.merges import Merges
from kvdrift.pairing.rows import Block
from kvdrift.pairing.scales import Scales
from kvdrift.replay.eight_bits import Kernel
from kvdrift.scenarios.catalogue import DECODE
from kvdrift.trace.model import PassPair
from kvdrift.trace.recording import RecordedPair
from kvdrift.vocabulary.facts import EngineFacts, Plant, Prompt
from kvdrift.vocabulary.plan import REPEATED, AuditPlan, Mode, PairRole, control_label
from kvdrift.vocabulary.schedule import is_specified, modes_of, rungs_of
from kvdrift.vocabulary.scope import Scope
from kvdrift.vocabulary.sites import Site
from kvdrift.vocabulary.units import Unit, repeated_units

T = TypeVar("T")


@dataclass(slots=True)
class Measured:
    """Everything that was measured of one route.

    Attributes:
        prompts: the prompts of plain decode, or the segments that a scenario compares.
        scenario: its name; `DECODE` for plain decode.
        choices: by segment, how a generation loop chose its tokens, where that is judged.
        quantised: by segment, which rows a quantised cache has quantised.
        prove: returns the proof that the two passes of a pair took two routes.
        failure: why a scenario broke off, None if it did not.
        rung_failures: why a rung of the ladder could not run.
        plant: the first fault of the positive control, None if none was planted.
        plants: all of them, each of which has a pair of its own.
        foreign: set for traces that kvdrift did not capture itself.
        asked: the scope that the verdict was asked for.
    """

    plan: AuditPlan
    info: EngineFacts
    prompts: list[Prompt]
    created: str
    command: str | None = None
    scenario: str = DECODE
    choices: Mapping[str, str] = field(default_factory=dict)
    quantised: Mapping[str, QuantisedRows] = field(default_factory=dict)
    prove: Callable[[PassPair], Route] = prove_route
    failure: str | None = None
    rung_failures: dict[str, str] = field(default_factory=dict)
    plant: Plant | None = None
    plants: list[Plant] = field(default_factory=list)
    control_mode: Mode | None = None
    foreign: Foreign | None = None
    asked: Scope = field(default_factory=Scope)
    table: DriftTable = field(default_factory=DriftTable)
    floors: FloorTable = field(default_factory=FloorTable)
    suspects: Suspects = field(default_factory=Suspects)
    kernel: Kernel = field(default_factory=Kernel)
    routes: list[Route] = field(default_factory=list)
    attention: AttentionTable = field(default_factory=AttentionTable)
    seen_sites: dict[int | None, set[Site]] = field(default_factory=dict)
    instruments: tuple[Instrument, ...] = field(default_factory=new_instruments)

    def add(self, item: RecordedPair) -> None:
        """Compare one pair of passes; its traces are not kept.

        Raises:
            AlignmentError: the passes are of different runs.
        """
        if item.role is PairRole.PERTURBED:
            known = self.floors.remember(item.pair, item.shift)
            if known is not None:
                self._look_again(known, item)
            return
        if item.role is PairRole.PAIR and item.pair.prefill.rung == self.info.ladder.upper:
            self.floors.complete(item.pair)
        if item.role is not PairRole.SPECIFICATION and item.role not in REPEATED:  # the one has no counterpart
            self._compare(item)
        for instrument in self.instruments:
            instrument.see(item, self)
            item.pair.prefill.release_pages()
            item.pair.decode.release_pages()
        if item.role is PairRole.PAIR and item.pair.prefill.rung == self.info.dtype and self.foreign is None:
            self._keep_suspected(item.pair)

    def _keep_suspected(self, pair: PassPair) -> None:
        """Keep the values at which an instrument alone sees more than noise."""
        for instrument in self.instruments:
            if isinstance(instrument, Tentative) and (found := instrument.suspected(pair, self)):
                self.suspects.keep(instrument.name, pair, found, self.info.arithmetic.at(pair.prefill.rung))

    def _look_again(self, pair: PassPair, perturbed: RecordedPair) -> None:
        """Look at a clean pair once its noise is known, where that came later, as in a scenario: before, nothing could
        be beyond it."""
        rows = self.table.select(pair.mode, pair.prefill.rung)
        rows = rows.where(rows.of_prompt(pair.decode.prompt))
        self.suspects.watch(self.table, pair, rows, self.info.arithmetic, self.info.ladder, self.floors)
        self.instrument(RoundedScores).see(replace(perturbed, role=PairRole.PAIR, pair=pair, shift=0.0), self)

    def _compare(self, item: RecordedPair) -> None:
        """Enter a pair into the drift table."""
        native = item.role is PairRole.PAIR and item.pair.prefill.rung == self.info.dtype
        label = item.pair.mode if item.role is PairRole.PAIR else str(item.role)
        if item.role is PairRole.CONTROL:
            label = control_label(len(self.plants))
        block = self.table.add(item.pair, label, with_hashes=native)
        if item.role is PairRole.PAIR:
            self.table.note_angles(item.pair, label)
            note_scales(self.table.scales.setdefault(label, Scales()), item.pair)
            note_merges(self.table.merges.setdefault(label, Merges()), item.pair, self.info.dtype)
            note_8_bits(self.table.of_8_bits.setdefault(label, Merges()), item.pair, self.kernel)
            self._note(item.pair, block, native)
        elif item.role is PairRole.CONTROL:
            self._note_control(item, label)
        _mark_unequal(self.table, block, item)

    def _note_control(self, item: RecordedPair, label: str) -> None:
        """Note a fault that was planted. What has no partner beside the first of them has none beside the others."""
        if item.plant is None:
            return
        if self.plants:
            self.table.unpaired = [value for value in self.table.unpaired if value[0] != label]
        else:
            self.plant, self.control_mode = item.plant, item.pair.mode
        self.plants.append(item.plant)

    def release(self) -> None:
        """Do nothing: no trace was kept."""

    def replace_control(self, item: RecordedPair) -> None:
        """Compare a control that takes the place of an earlier one.

        What has no partner in it is counted with the clean pair already.
        """
        self.table.forget(PairRole.CONTROL)
        self.plants.clear()
        self.add(item)
        self.table.unpaired = [value for value in self.table.unpaired if value[0] != PairRole.CONTROL]

    def _note(self, pair: PassPair, block: Block, native: bool) -> None:
        """Note what belongs to no instrument: suspects, path proof, coverage, and statistics of attention."""
        info = self.info
        self.suspects.watch(self.table, pair, self.table.rows_of(block), info.arithmetic, info.ladder, self.floors)
        self.routes.append(self.prove(pair))
        if native:
            self.attention.add(pair)
            for trace in (pair.prefill, pair.decode):
                for layer, site in trace.places():
                    self.seen_sites.setdefault(layer, set()).add(site)

    def instrument(self, kind: type[T]) -> T:
        """Return the instrument of a class."""
        return instrument_of(self.instruments, kind)

    @property
    def is_scenario(self) -> bool:
        """Whether this is another route than plain decode."""
        return self.scenario != DECODE

    @property
    def scope(self) -> Scope:
        """What the verdict is about: what was asked for, and no more layers than were to be recorded."""
        layers = self.plan.layers
        if layers is None or self.asked.layers is not None:
            return self.asked
        return replace(self.asked, layers=layers)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The modes that were asked for and that this engine can run."""
        return modes_of(self.plan, self.info)

    @property
    def rungs(self) -> tuple[str, ...]:
        """The precisions to run at, in the order in which they run."""
        return rungs_of(self.plan, self.info)

    @property
    def control_rung(self) -> str:
        """The precision at which the positive control is planted."""
        return self.rungs[-1]

    @property
    def is_specified(self) -> bool:
        """Whether the errors of both passes can be told apart."""
        return is_specified(self.plan, self.info)

    @property
    def failures(self) -> dict[str, str]:
        """Why a mode did not run or broke off."""
        if self.is_scenario:
            found = {str(Mode.KV_ALIGNED): "a scenario runs as designed"}
            return found if self.failure is None else {**found, str(Mode.AS_DESIGNED): self.failure}
        if Mode.KV_ALIGNED in self.plan.modes and not self.info.can_rewind:
            return {str(Mode.KV_ALIGNED): f"not available: {self.info.why_no_rewind}"}
        return {}

    @property
    def probed_tokens(self) -> dict[str, tuple[int, ...]]:
        """The tokens on which the first compared values depend, by prompt.

        Segments of a scenario that begin alike must give the same at their first compared token.
        """
        return {prompt.name: prompt.prompt if self.is_scenario else prompt.tokens for prompt in self.prompts}

    @property
    def repeated_units(self) -> frozenset[Unit]:
        """The probed (prompt, position) pairs that have the same tokens, up to their own, as an earlier pair."""
        return repeated_units(self.prompts)

    def alone(self, prompt: str) -> Measured:
        """Return what was measured of one prompt: its rows, its values without a partner and its routes."""
        return replace(
            self, table=self.table.part(prompt), routes=[route for route in self.routes if route.prompt == prompt]
        )


def _mark_unequal(table: DriftTable, block: Block, item: RecordedPair) -> None:
    """Take the word of the engine's own hashes where the recorded digits agree and they do not."""
    if not item.unequal:
        return
    rows = table.rows_of(block)
    unequal = [(address.layer, address.site, address.position) in item.unequal for address in rows.addresses()]
    hidden = rows.equal & np.array(unequal, dtype=bool)
    table.replace_block(
        block,
        equal=rows.equal & ~hidden,
        n_differ=np.where(hidden, 1, rows.n_differ),
        rel_l2=np.where(hidden, item.digits, rows.rel_l2),
    )
