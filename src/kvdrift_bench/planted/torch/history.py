"""What the sequences of a model did before the call that runs: some faults strike only after a certain history."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary


@dataclass(slots=True)
class SequenceLog:
    """The forward calls of one sequence, or of the rows of one batch.

    Attributes:
        n_rows: of the batch when it was begun.
        calls: tokens in the cache before each call and tokens fed by it; while a call runs, it is the last.
        previous: the sequence that was begun before this one, in this cache or another; what came before that is gone.
        before_reset: the sequence that this cache held before it was emptied.
        between: the sequence that made the call right before this one, if this sequence had been begun before that.
    """

    n_rows: int = 1
    calls: list[tuple[int, int]] = field(default_factory=list)
    previous: SequenceLog | None = None
    before_reset: SequenceLog | None = None
    between: SequenceLog | None = None

    @property
    def length(self) -> int:
        """Tokens after the last call; 0 before the first."""
        return sum(self.calls[-1]) if self.calls else 0

    @property
    def decoded(self) -> bool:
        """Whether any call found something in the cache."""
        return any(past > 0 for past, _ in self.calls)

    @property
    def call_before(self) -> tuple[int, int]:
        """The call before the last one; (0, 0) if there was none."""
        return self.calls[-2] if len(self.calls) > 1 else (0, 0)

    @property
    def went_back(self) -> bool:
        """Whether tokens were dropped between the last two calls."""
        return self.calls[-1][0] < sum(self.call_before)

    @property
    def is_later_chunk(self) -> bool:
        """Whether the last call is the fourth of several tokens or a later one, and no token was ever dropped."""
        several = [q_len for _, q_len in self.calls if q_len > 1]
        went_on = all(after[0] == sum(before) for before, after in pairwise(self.calls))
        return went_on and self.calls[-1][1] > 1 and len(several) >= 4


class History:
    """The logs of the caches that a model has seen."""

    def __init__(self) -> None:
        self._logs: WeakKeyDictionary[Any, SequenceLog] = WeakKeyDictionary()
        self._begun: SequenceLog | None = None
        self._last: SequenceLog | None = None

    def enter(self, cache: Any, past: int, q_len: int, n_rows: int) -> SequenceLog:
        """Note a call on a cache that holds `past` tokens, and return the log of its sequence."""
        held = None if cache is None else self._logs.get(cache)
        log = held if past > 0 else None
        if log is None:
            log = SequenceLog(n_rows)
            if held is not None:
                log.before_reset, held.before_reset = held, None
            if past == 0:  # otherwise it is a copy of a cache, which goes on with the sequence of another
                log.previous, self._begun = self._begun, log
                if log.previous is not None:
                    log.previous.previous = None
            if cache is not None:
                self._logs[cache] = log
        log.between = self._last if log.calls and self._last is not log else None
        self._last = log
        log.calls.append((past, q_len))
        return log
