"""What an engine must offer: sequences with `extend`, `rewind` and `close`, and the facts about itself.

Engines push arrays into a `Sink`; they know tokens and tensors and nothing of drift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from kvdrift.errors import CaptureError, UsageError
from kvdrift.trace.model import Array, Slots
from kvdrift.vocabulary.facts import AttentionSpec, Call, EngineFacts, Plant
from kvdrift.vocabulary.plan import AuditPlan
from kvdrift.vocabulary.sites import Site


class Sink(Protocol):
    """Receives what one forward call computed; `kvdrift.trace.model.Trace` is one.

    `values` is [position, ...] and `rows` [slot, kv head, dim], in the dtype that the engine computed; NaN and
    infinities are handed over as they are. `slots` is [slot], the logical position of each key or row.

    Where `inputs` is a dictionary, the engine puts the inputs [token, ...] of every layer into it, for all tokens fed,
    and under the number of layers what leaves the last one. An engine that cannot leaves it empty.
    """

    def add_rows(
        self, layer: int | None, site: Site, positions: tuple[int, ...], values: Array, slots: Slots | None = None
    ) -> None: ...

    def add_cache_read(self, layer: int, site: Site, positions: tuple[int, ...], slots: Slots, rows: Array) -> None: ...

    def add_attention(self, layer: int, spec: AttentionSpec) -> None: ...

    @property
    def calls(self) -> list[Call]: ...

    @property
    def inputs(self) -> dict[int, Array] | None: ...


class EngineSequence(Protocol):
    """One token sequence with its cache inside an engine."""

    @property
    def length(self) -> int: ...

    def extend(
        self,
        tokens: Sequence[int],
        *,
        probe: Sequence[int] = (),
        sink: Sink | None = None,
        replace: Mapping[int, Array] | None = None,
        plant: Plant | None = None,
    ) -> int:
        """Feed tokens on top of the cache and return the most likely next token.

        Args:
            tokens: token ids; the first one gets position `length`.
            probe: positions, all among the fed ones, whose sites go to `sink`.
            replace: layer inputs [token, hidden] by layer number, which take the place of what the layer below
                computed; key n_layers replaces the input of the final norm.
            plant: a fault to commit, for the positive control.
        """
        ...

    def rewind(self, n_tokens: int) -> None:
        """Drop the last positions from the cache."""
        ...

    def close(self) -> None:
        """Free the cache."""
        ...


class LiveEngine(Protocol):
    """One model in one inference engine, open and ready to run; what `kvdrift.Engine` is to a caller."""

    @property
    def info(self) -> EngineFacts: ...

    def new_sequence(self, max_length: int, *, keep_past: bool = False) -> EngineSequence:
        """Return an empty sequence; `keep_past` asks for one that can be rewound."""
        ...

    def at(self, rung: str) -> AbstractContextManager[None]:
        """Run with the same weights at another precision while the context is open."""
        ...


class Shifting(Protocol):
    """An engine that can change what enters its first layer, whatever is run; its facts say `perturbable`."""

    def shifted(self, shift: float) -> AbstractContextManager[None]:
        """Multiply the input of the first layer by `1 + shift * xi` while the context is open.

        xi is standard normal, and the same for calls of the same tokens whatever the sign and size of `shift`.
        """
        ...


class Shifts:
    """What `Shifting` asks for, of an engine or a recorder that reads `shift` where the first layer begins."""

    shift: float = 0.0

    @contextmanager
    def shifted(self, shift: float) -> Iterator[None]:
        """See `Shifting`."""
        before, self.shift = self.shift, shift
        try:
            yield
        finally:
            self.shift = before


def require_layers(wanted: Iterable[int] | None, name: str, n_layers: int) -> None:
    """Check the layers that are to be recorded, None for all, against those that the model has.

    Raises:
        UsageError: it does not have one of them.
    """
    last = max(wanted, default=-1) if wanted is not None else -1
    if last >= n_layers:
        raise UsageError(f"--layers names layer {last}, and {name} has layers 0 to {n_layers - 1}")


class NotPlanted(CaptureError):
    """A call that had a fault to commit met nothing that the fault is about: it is planted elsewhere, or not at all."""


def require_planted(plant: Plant | None, *, was_planted: bool) -> None:
    """Check that a call which had a fault to commit met what the fault is about; that of logits is committed later.

    Raises:
        NotPlanted: it did not.
    """
    if plant is not None and plant.site is not Site.LOGITS and not was_planted:
        raise NotPlanted(
            f"nothing at layer {plant.layer} / {plant.site} can be changed, so no positive control was planted"
        )


@runtime_checkable
class CanForget(Protocol):
    """An engine that can put back what calls leave in the model: anything but its parameters and caches."""

    def forget(self) -> None:
        """Put it back; no sequence is open."""
        ...


@runtime_checkable
class HasFunctions(Protocol):
    """An engine whose elementary functions may be coarser than the precision that it runs at."""

    def function_error(self, n_positions: int) -> float:
        """Return the largest error of exp, sin, cos, tanh and erf at the precision that runs, measured now.

        It is relative to 1, for the arguments that attention and rotations of `n_positions` tokens have. Inputs that
        are changed a little do not show it: a function errs alike at neighbouring arguments, and that of another
        engine errs otherwise.
        """
        ...


@runtime_checkable
class HoldsWeights(Protocol):
    """An engine that shows its weights, so that they can be held against those of another."""

    def weight_values(self) -> Iterator[tuple[str, Array]] | None:
        """Yield the name and the numbers of each weight, dequantised; None where they cannot be had as numbers."""
        ...


class Unwatched(Protocol):
    """What an engine says of the calls that it made while nothing watched."""

    @property
    def draws(self) -> bool:
        """Whether a call drew random numbers from a generator that all share."""
        ...


class CanGoUnobserved(Protocol):
    """An engine whose passes can also run while nothing watches them; without it, a verdict says so."""

    def unobserved(self, *, watched: bool = False) -> AbstractContextManager[Unwatched]:
        """Run as callers of the engine do while the context is open: no hook, no replacement, default arguments.

        `extend` then takes the last fed position as its only probe, and the sink gets its logits and the call. With
        `watched`, the same calls with the same arguments are watched, as in every other pass, in the precision that
        they run in by themselves: nothing that is pinned inside the model is lifted.

        Raises:
            NotApplicable: the engine cannot at the precision that it now runs at.
        """
        ...


class OpenEngine(NamedTuple):
    """An engine with a model open in it, and the model's own way from a text to token ids; None if it has none."""

    engine: LiveEngine
    encode: Callable[[str], list[int]] | None


@runtime_checkable
class CanBeOpened(Protocol):
    """An engine of a caller's own, which `kvdrift.audit` takes in the place of a model."""

    def opened(self, plan: AuditPlan) -> AbstractContextManager[OpenEngine]:
        """Return a context in which the engine is open, for the layers of a plan."""
        ...


# ------------------------------------------------------------------------------------------- other routes (optional)

# What a scenario may need of an engine beyond `extend`.
Ability = Literal[
    "rewind",
    "batch",
    "padding",
    "reorder",
    "select",
    "reset",
    "copy",
    "move",
    "shift",
    "generate",
    "drafts",
    "draft_model",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteFacts:
    """What a scenario must know of a model to choose its lengths.

    Attributes:
        window: the smallest sliding window, None if every layer sees all tokens.
        switch: the length beyond which positions are encoded by another table (longrope, dynamic NTK), None for none.
        recurrent: whether a layer keeps a recurrent state instead of keys and values.
        shares_kv: whether layers read the keys and values of a lower layer.
        exports: the ways in which a cache is exported, by name; one without a name if there is one way.
        ring: cells of a layer with a window in a cache that writes them again, None if there is no such cache.
        branches: kinds of cache in which a copy of rows works in another way than in the engine's own kind.
        special: tokens that are no text, such as that of the padding.
    """

    window: int | None = None
    switch: int | None = None
    recurrent: bool = False
    shares_kv: bool = False
    exports: tuple[str, ...] = ("",)
    branches: tuple[str, ...] = ()
    ring: int | None = None
    special: frozenset[int] = frozenset()


class EngineRows(Protocol):
    """Rows of tokens in one cache, as a batch is: all of them end at the same slot, shorter ones begin with padding."""

    def extend(
        self,
        rows: Sequence[Sequence[int]],
        *,
        probes: Mapping[int, Sequence[int]],
        sinks: Mapping[int, Sink],
        plant: Plant | None = None,
    ) -> None:
        """Feed tokens to every row in one forward call.

        Args:
            rows: token ids by row. Only the first call may feed rows of different length, which it pads on the left.
            probes: for the rows that are recorded, positions among the fed ones; a position counts tokens, not padding.
            sinks: where the sites of those rows go.
            plant: a fault to commit, for the positive control.
        """
        ...

    def rewind(self, n_tokens: int) -> None:
        """Drop the last positions of every row."""
        ...

    def reorder(self, order: Sequence[int]) -> None:
        """Put row `order[i]` in place i, as beam search does; a row may be taken twice."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order."""
        ...

    def reset(self) -> None:
        """Empty the cache and keep the object, for another call."""
        ...

    def copy(self) -> EngineRows:
        """Return a copy that shares nothing with this one."""
        ...

    def move(self, way: str = "") -> EngineRows:
        """Export the cache and import it into a new object, which takes the place of this one.

        `way` is one of `RouteFacts.exports`.
        """
        ...

    def drop(self, first: int, n_tokens: int) -> None:
        """Drop the tokens from position `first` on from every row, and move those behind them to their places."""
        ...

    def close(self) -> None:
        """Free the cache."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What the engine's own generation loop is asked for: the most likely tokens, whatever its configuration says.

    Attributes:
        prompts: token ids by row; shorter rows are padded on the left.
        n_new: tokens to generate; no token ends a row earlier.
        n_beams: beams of one prompt, all of which are returned, the best first; 1 for the most likely token each time.
        drafts: what is proposed for the new tokens of one prompt, one after the other; empty for no drafts.
        draft_text: a text that a small draft model is taught, one made for this run, which then proposes most of the
            new tokens; empty for no draft model.
        n_drafts: how many drafts are verified in one call.
    """

    prompts: tuple[tuple[int, ...], ...]
    n_new: int
    n_beams: int = 1
    drafts: tuple[int, ...] = ()
    draft_text: tuple[int, ...] = ()
    n_drafts: int = 4


@dataclass(frozen=True, slots=True)
class FedRow:
    """One row of one forward call of a generation loop.

    `tokens` are all that the row then stood for, without padding. The last `n_fed` of them came with this call, and for
    the last `n_logits` there were logits.
    """

    tokens: tuple[int, ...]
    n_fed: int
    n_logits: int


@dataclass(frozen=True, slots=True)
class Generated:
    """What a generation loop did.

    Attributes:
        wanted: what it was asked for.
        sequences: the rows that it returned, prompt and all, without padding.
        calls: the rows of each of its forward calls.
        choices: what the engine needs to have the same tokens generated again at another precision.
        draft_error: what the draft model broke on, after which it proposed nothing; None if it did not.
        no_numbers: where the loop first chose among logits that are NaN, in words; None if it never did.
    """

    wanted: Generation
    sequences: tuple[tuple[int, ...], ...]
    calls: tuple[tuple[FedRow, ...], ...]
    choices: object = field(default=None, repr=False)
    draft_error: str | None = None
    no_numbers: str | None = None

    @property
    def has_drafts(self) -> bool:
        """Whether any call verified a draft: it then gave logits for more than one token."""
        return any(row.n_logits > 1 for rows in self.calls for row in rows)


@dataclass(frozen=True, slots=True)
class CallProbe:
    """Positions of one row of one forward call of a generation loop, and where their sites go."""

    call: int
    row: int
    positions: tuple[int, ...]
    sink: Sink


class Routes(Protocol):
    """What an engine offers to scenarios; an engine without it has no `routes`, and can run `decode` alone."""

    @property
    def facts(self) -> RouteFacts: ...

    def why_not(self, ability: Ability, cache: str | None = None) -> str | None:
        """Say why the engine, with its own kind of cache or another, lacks an ability; None if it has it."""
        ...

    def why_no_cache(self, cache: str) -> str | None:
        """Say why the model cannot run on a kind of cache; None if it can."""
        ...

    def honest_cache(self, cache: str) -> str | None:
        """Return the kind of cache whose rows are those of `cache` as kvdrift itself quantises them; None for a kind
        that keeps rows as they are, which a plain prefill is compared with."""
        ...

    def new_rows(
        self, n_rows: int, max_length: int, *, cache: str | None = None, keep_past: bool = False
    ) -> EngineRows:
        """Return `n_rows` empty rows that may grow to `max_length` slots each, in a cache of the engine's own kind or
        of the kind `cache`; `keep_past` asks for one that can be rewound."""
        ...

    def generate(self, wanted: Generation) -> Generated:
        """Run the engine's own generation loop with the cache that it makes.

        Raises:
            CaptureError: the loop broke off.
        """
        ...

    def generate_again(
        self, made: Generated, *, probes: Sequence[CallProbe] = (), plant: tuple[int, Plant] | None = None
    ) -> None:
        """Run the generation loop again, with the same choices whatever the values are now, and record it.

        Args:
            made: the run before.
            probes: what is recorded, by the calls and rows of that run.
            plant: a fault to commit in one of its calls, for the positive control.

        Raises:
            CaptureError: the loop broke off, or did not make the same calls or choose the same tokens again.
        """
        ...
