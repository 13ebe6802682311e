"""The stage on which a scenario drives its rows: on paper first, then on an engine.

A scenario names no positions, references or precisions. It extends rows and says of which calls the values are
compared; the stage keeps the books: which tokens each row holds, and which recorded values belong to which sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from kvdrift.engines.base import Ability, CallProbe, EngineRows, Generated, Generation, RouteFacts, Routes
from kvdrift.errors import NotApplicable, UsageError
from kvdrift.replay.quantisation import FORMATS
from kvdrift.scenarios.returned import is_plain_prefill, require_computed, returned_positions
from kvdrift.trace.model import Trace
from kvdrift.vocabulary.facts import EngineFacts, Plant, Prompt, Segment

# Positions compared of one call: the first two and the last two show what happens at either end of a chunk.
_MOST_COMPARED = 4
# A route that needs more tokens than this is run only on a prompt that has them.
LONGEST_MADE_UP = 512
# Any fixed choice does: continuing tokens must only differ from each other.
_STRIDE = 7919

Tokens = Sequence[int]


@dataclass(slots=True)
class _StageRow:
    name: str
    tokens: list[int]
    segment: int | None = None  # index among the stage's segments
    quantised: str | None = None
    n_first: int = 0
    dropped: tuple[int, ...] = ()
    kept: int = 0
    n_moved: int = 0


@dataclass(frozen=True, slots=True)
class Planted:
    """The positive control: the fault is committed in the call that compares `position` of a segment."""

    segment: str
    position: int
    plant: Plant


class Stage:
    """What a scenario works with: prompts, facts about the model, and rows to drive.

    Attributes:
        prompt: tokens of the longest prompt of the audit.
        continuation: the tokens that the model itself puts after it.
        others: the other prompts of the audit, longest first, each with its continuation.
        facts: lengths at which this model does something else.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        routes: Routes,
        info: EngineFacts,
        *,
        rung: str | None = None,
        label: str = "",
        segments: Sequence[Segment] = (),
        generated: Sequence[Generated] = (),
        planted: Planted | None = None,
    ) -> None:
        ordered = sorted(prompts, key=lambda item: -len(item.prompt))
        self.prompt = ordered[0].prompt
        self.continuation = ordered[0].continuation
        self.others = tuple(item.tokens for item in ordered[1:])
        self.facts: RouteFacts = routes.facts
        self.max_positions = info.max_positions
        self.n_calls = 0
        self.traces: list[Trace] = []
        self._base = ordered[0].name
        self._routes = routes
        self._vocab_size = info.vocab_size or 1 << 10
        self._rung = rung  # None: on paper
        self._label = label
        self._given = list(segments)
        self._given_loops = list(generated)
        self._planted = planted
        self.segments: list[Segment] = []
        self.generated: list[Generated] = []
        self._names: set[str] = set()

    # ------------------------------------------------------------------------------------------------- for scenarios

    @property
    def tokens(self) -> tuple[int, ...]:
        """The prompt and its continuation."""
        return self.prompt + self.continuation

    def text(self, length: int, most: int = LONGEST_MADE_UP) -> tuple[int, ...]:
        """Return `length` tokens: those of the prompt and its continuation, and made-up ones where they do not reach.

        Raises:
            NotApplicable: more than `most` tokens would have to be run that no prompt has.
        """
        if length > len(self.tokens) and length > most:
            raise NotApplicable(
                f"needs {length} tokens, and the longest prompt with its continuation has {len(self.tokens)}; "
                "give a prompt that long"
            )
        self.need_positions(length)
        made_up = self.different(max(0, length - len(self.tokens)))
        return (self.tokens + made_up)[:length]

    def different(self, n_tokens: int, salt: int = 0) -> tuple[int, ...]:
        """Return made-up tokens, each another one than the token at the same place of the continuation, and none that
        the model takes for something else than text."""
        found = []
        for index in range(n_tokens):
            token = 1 + (_STRIDE * (index + 1) + 101 * (salt + 1)) % (self._vocab_size - 1)
            avoided = self.facts.special.union(self.continuation[index : index + 1])
            for _ in avoided:
                token = 1 + token % (self._vocab_size - 1) if token in avoided else token
            found.append(token)
        return tuple(found)

    def need(self, *abilities: Ability, cache: str | None = None) -> None:
        """Leave the scenario if the engine lacks an ability.

        Raises:
            NotApplicable: with the engine's reason.
        """
        for ability in abilities:
            reason = self.lacks(ability, cache)
            if reason is not None:
                raise NotApplicable(reason)

    def lacks(self, ability: Ability, cache: str | None = None) -> str | None:
        """Return why the engine lacks an ability, None if it has it."""
        return self._routes.why_not(ability, cache)

    def need_cache(self, cache: str) -> None:
        """Leave the scenario if the model cannot run on a kind of cache.

        Raises:
            NotApplicable: with the engine's reason.
        """
        reason = self._routes.why_no_cache(cache)
        if reason is not None:
            raise NotApplicable(reason)

    def need_positions(self, length: int) -> None:
        """Leave the scenario if the model has no positions for a row of `length` tokens.

        Raises:
            NotApplicable: with both lengths.
        """
        # Where tables change with the length, that length is where they begin to grow, and no end.
        grows = self.facts.switch is not None and self.facts.switch == self.max_positions
        if self.max_positions is not None and length > self.max_positions and not grows:
            raise NotApplicable(f"needs {length} tokens, and the model takes {self.max_positions}")

    def need_tokens(self, least: int) -> None:
        """Leave the scenario if the longest prompt is too short for it.

        Raises:
            NotApplicable: with both lengths.
        """
        if len(self.prompt) < least:
            raise NotApplicable(f"needs a prompt of {least} tokens, and the longest has {len(self.prompt)}")

    def rows(
        self, n_rows: int = 1, name: str = "", *, length: int, cache: str | None = None, keep_past: bool = False
    ) -> StageRows:
        """Return `n_rows` empty rows in one cache, which may grow to `length` tokens each.

        `name` tells the rows of one scenario apart in the report; `keep_past` asks for a cache that can be rewound.
        """
        engine = None if self._rung is None else self._routes.new_rows(n_rows, length, cache=cache, keep_past=keep_past)
        names = [self._name(name, row, n_rows) for row in range(n_rows)]
        rows = StageRows(self, engine, names, [[] for _ in range(n_rows)])
        if cache is not None and cache in FORMATS:
            rows.quantised_by(cache)
        return rows

    def generate(
        self,
        prompts: Sequence[Tokens],
        *,
        n_new: int,
        n_beams: int = 1,
        drafts: Tokens = (),
        draft_text: Tokens = (),
    ) -> Generated:
        """Have the engine's own loop generate `n_new` tokens, and return what it did; see `Generation`.

        It runs on paper, at the native precision; afterwards what it did then is known and returned again.
        """
        index = len(self.generated)
        if self._rung is None:
            self.need_positions(max(len(prompt) for prompt in prompts) + n_new)
            rows = tuple(tuple(prompt) for prompt in prompts)
            wanted = Generation(
                prompts=rows, n_new=n_new, n_beams=n_beams, drafts=tuple(drafts), draft_text=tuple(draft_text)
            )
            made = self._routes.generate(wanted)
            self.n_calls += len(made.calls)
        elif index >= len(self._given_loops):
            raise UsageError(f"the scenario {self._label!r} did not take the steps again that it took on paper")
        else:
            made = self._given_loops[index]
        self.generated.append(made)
        return made

    def compare_generated(self, made: Generated, *, name: str, choice: str = "") -> None:
        """Compare what a loop computed, of each row that it returned, with a plain prefill of that row.

        `choice` asks to judge its choices too: "greedy" for the most likely token each time, "beams" for beam search.

        Raises:
            ValueError: the loop returned tokens that it never computed.
        """
        rows = [
            _StageRow(self._name(name, row, len(made.sequences)), list(tokens))
            for row, tokens in enumerate(made.sequences)
        ]
        choice = "" if made.no_numbers else choice
        group = f"{choice} {name}" if choice == "beams" else choice
        found: list[tuple[int, int, int, tuple[int, ...]]] = []
        require_computed(made)
        for call, row, sequence, positions in returned_positions(made):
            if is_plain_prefill(made, call):
                continue
            if rows[sequence].segment is None:
                rows[sequence].segment = self.open_segment(rows[sequence])
            index = _open(rows[sequence])
            segment = self.segments[index]
            self.segments[index] = msgspec.structs.replace(
                segment, positions=(*segment.positions, *positions), choice=group
            )
            found.append((call, row, _open(rows[sequence]), positions))
        if self._rung is None:
            return
        probes = [CallProbe(call, row, positions, self.traces[index]) for call, row, index, positions in found]
        plants = [(call, self.plant_for(index, positions)) for call, _, index, positions in found]
        planted = next(((call, plant) for call, plant in plants if plant is not None), None)
        self.n_calls += len(made.calls)
        self._routes.generate_again(made, probes=probes, plant=planted)

    # ------------------------------------------------------------------------------------------------------ the books

    @property
    def on_paper(self) -> bool:
        """Whether nothing is run, only written down."""
        return self._rung is None

    @property
    def is_planted(self) -> bool:
        """Whether this is the positive control's run, of which the call with the fault alone is looked at."""
        return self._planted is not None

    def _name(self, name: str, row: int, n_rows: int) -> str:
        parts = [self._base, name, f"row {row}" if n_rows > 1 else ""]
        return " / ".join(part for part in parts if part)

    def unique(self, name: str) -> str:
        """Return `name`, with a number if it is taken."""
        n, found = 1, name
        while found in self._names:
            n += 1
            found = f"{name} #{n}"
        self._names.add(found)
        return found

    def open_segment(self, row: _StageRow) -> int:
        """Begin a segment for a row, and a trace for it when the scenario is really run."""
        index = len(self.segments)
        name = self.unique(row.name)
        if self._rung is None:
            self.segments.append(
                Segment(
                    name,
                    tuple(row.tokens),
                    quantised=row.quantised,
                    n_first=row.n_first,
                    dropped=row.dropped,
                    kept=row.kept,
                    n_moved=row.n_moved,
                )
            )
        else:
            if index >= len(self._given) or self._given[index].name != name:
                raise UsageError(f"the scenario {self._label!r} did not take the steps again that it took on paper")
            given = self._given[index]
            self.segments.append(Segment(name, given.tokens))
            self.traces.append(Trace(name, "decode", self._label, self._rung, given.tokens))
        return index

    def plant_for(self, segment: int, positions: Sequence[int]) -> Plant | None:
        """Return the fault to commit in the call that compares these positions, if it is the planted one."""
        planted = self._planted
        if planted is None or self.segments[segment].name != planted.segment or planted.position not in positions:
            return None
        return planted.plant


class StageRows:
    """StageRows of tokens in one cache; made by `Stage.rows`."""

    def __init__(self, stage: Stage, engine: EngineRows | None, names: list[str], tokens: list[list[int]]) -> None:
        self._stage = stage
        self._engine = engine
        self._rows = [_StageRow(name, row) for name, row in zip(names, tokens, strict=True)]

    def quantised_by(self, cache: str) -> None:
        """Note that the cache quantises its rows."""
        for row in self._rows:
            row.quantised = cache

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens in each row."""
        return tuple(len(row.tokens) for row in self._rows)

    def extend(self, tokens: Tokens | Sequence[Tokens], *, compare: bool = False, only: Sequence[int] = ()) -> None:
        """Feed tokens in one forward call: one list for a single row, a list for each row otherwise.

        With `compare`, the values of the fed tokens are compared with a plain prefill: the first two and the last two
        of each row, or of the rows `only`.
        """
        fed = [list(row) for row in self._by_row(tokens)]
        if any(not row for row in fed):
            raise UsageError("a scenario must feed at least one token to every row")
        before = self.lengths
        for row, new in zip(self._rows, fed, strict=True):
            row.n_first = row.n_first if row.tokens else len(new)
            row.tokens.extend(new)
        if self._stage.on_paper:
            self._stage.need_positions(max(self.lengths))
        probes: dict[int, list[int]] = {}
        for index, row in enumerate(self._rows):
            if compare and (not only or index in only):
                probes[index] = self._compared(row, before[index], len(row.tokens))
        self._stage.n_calls += 1
        if self._engine is None:
            return
        plants = {i: self._stage.plant_for(_open(self._rows[i]), probed) for i, probed in probes.items()}
        plant = next((plant for plant in plants.values() if plant is not None), None)
        if self._stage.is_planted and plant is None:
            probes = {}  # nobody looks at the other calls of a control
        self._engine.extend(
            fed,
            probes=probes,
            sinks={index: self._stage.traces[_open(self._rows[index])] for index in probes},
            plant=plant,
        )

    def rewind(self, n_tokens: int) -> None:
        """Drop the last tokens of every row."""
        for row in self._rows:
            if n_tokens > len(row.tokens):
                raise UsageError(f"cannot rewind {n_tokens} tokens of a row of {len(row.tokens)}")
            del row.tokens[len(row.tokens) - n_tokens :]
            self._cut(row)
        if self._engine is not None:
            self._engine.rewind(n_tokens)

    def reorder(self, order: Sequence[int]) -> None:
        """Put row `order[i]` in place i, as beam search does."""
        self._take(order)
        if self._engine is not None:
            self._engine.reorder(order)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows only."""
        self._take(rows)
        if self._engine is not None:
            self._engine.select(rows)

    def reset(self) -> None:
        """Empty the cache and keep the object."""
        for row in self._rows:
            row.tokens.clear()
            row.segment = None
        if self._engine is not None:
            self._engine.reset()

    def copy(self, name: str) -> StageRows:
        """Return a copy that shares nothing with these rows; `name` tells it apart."""
        names = [f"{row.name} / {name}" for row in self._rows]
        engine = None if self._engine is None else self._engine.copy()
        return StageRows(self._stage, engine, names, [list(row.tokens) for row in self._rows])

    def move(self, way: str = "") -> None:
        """Export the cache and go on with what was imported from that; `way` is one of the engine's, if it has any."""
        if self._engine is not None:
            self._engine = self._engine.move(way)

    def drop(self, first: int, n_tokens: int) -> None:
        """Drop tokens from position `first` on from every row, once, and move those behind them to their places.

        The reference of what follows has the same rows: those of tokens that saw the dropped ones, at the places that
        they have now.
        """
        for row in self._rows:
            if row.dropped or first + n_tokens > len(row.tokens):
                raise UsageError(f"cannot drop {n_tokens} tokens from position {first} of {row.name!r}, once")
            row.dropped, row.kept = tuple(row.tokens[first : first + n_tokens]), first
            del row.tokens[first : first + n_tokens]
            row.n_moved, row.segment = len(row.tokens) - first, None
        if self._engine is not None:
            self._engine.drop(first, n_tokens)

    def close(self) -> None:
        """Free the cache."""
        if self._engine is not None:
            self._engine.close()

    def __enter__(self) -> StageRows:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _by_row(self, tokens: Tokens | Sequence[Tokens]) -> Sequence[Tokens]:
        rows: Sequence[Tokens]
        if tokens and isinstance(tokens[0], int):
            rows = [tokens]  # type: ignore[list-item]
        else:
            rows = tokens  # type: ignore[assignment]
        if len(rows) != len(self._rows):
            raise UsageError(f"{len(rows)} lists of tokens were fed to {len(self._rows)} rows")
        return rows

    def _take(self, order: Sequence[int]) -> None:
        kept = [self._rows[index] for index in order]
        names = [row.name for row in self._rows]
        while len(names) < len(kept):
            names.append(f"{names[0]} more {len(names)}")
        self._rows = [_StageRow(name, list(row.tokens)) for name, row in zip(names, kept, strict=False)]

    def _compared(self, row: _StageRow, first: int, stop: int) -> list[int]:
        """Choose the positions that are compared, and enter them in the row's segment."""
        fed = list(range(first, stop))
        if len(fed) > _MOST_COMPARED:
            fed = [*fed[: _MOST_COMPARED // 2], *fed[-_MOST_COMPARED // 2 :]]
        if row.segment is None:
            row.segment = self._stage.open_segment(row)
        segment = self._stage.segments[row.segment]
        tokens = tuple(row.tokens) if self._stage.on_paper else segment.tokens
        self._stage.segments[row.segment] = msgspec.structs.replace(
            segment, positions=(*segment.positions, *fed), tokens=tokens
        )
        return fed

    def _cut(self, row: _StageRow) -> None:
        """A rewind behind a compared position begins a new segment: other tokens may come."""
        if row.segment is not None and self._stage.segments[row.segment].positions[-1] >= len(row.tokens):
            row.segment = None


def _open(row: _StageRow) -> int:
    assert row.segment is not None
    return row.segment
