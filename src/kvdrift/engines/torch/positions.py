"""How many positions a table of learned positions has, and which is the first: seen from the rows that calls take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class PositionTables(TorchFunctionMode):
    """Watches the first call of a text for tables of which it takes one row after the other, a row for each token.

    `least` is the fewest tokens that such a table has rows for, None without one: some models leave out the rows up to
    that of the padding token. `first` is the row that the first token takes of that table. The tokens themselves must
    not follow each other. Tables that are read in another way, such as slices of a parameter, are not seen.
    """

    def __init__(self, n_tokens: int) -> None:
        super().__init__()
        self._n_tokens = n_tokens
        self.least: int | None = None
        self.first: int | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at a lookup, and make the call as it is."""
        given = kwargs or {}
        if func is torch.nn.functional.embedding:
            rows, table = (*args, *(given[name] for name in ("input", "weight") if name in given))[:2]
            self._look(rows, table)
        return func(*args, **given)

    def _look(self, rows: Tensor, table: Tensor) -> None:
        taken = rows.flatten().tolist() if rows.numel() == self._n_tokens else []
        if taken and taken == list(range(taken[0], taken[0] + self._n_tokens)):
            found = table.shape[0] - taken[0]
            if self.least is None or found < self.least:
                self.least, self.first = found, taken[0]


def first_position(own: PositionTables, call: Callable[[Tensor], Any], n_tokens: int, device: torch.device) -> int:
    """Return the number that a model itself gives to the first token of a text.

    RoBERTa counts from the row behind that of the padding token, and takes position_ids for rows. OPT adds the same
    distance to the position_ids that it is given, and so counts from 0.

    Args:
        own: what a call without position_ids took.
        call: calls the model on `n_tokens` tokens with the position_ids that it is given.
    """
    if not own.first:
        return 0
    given = PositionTables(n_tokens)
    with given:
        call(torch.arange(n_tokens, device=device)[None])
    return own.first - (own.first if given.first is None else given.first)


def positions_taken(named: Iterable[Any], tables: PositionTables) -> int | None:
    """Return the fewest positions of those that a configuration names and those of its tables; None without any."""
    found = [value for value in (*named, tables.least) if isinstance(value, int) and not isinstance(value, bool)]
    return min((value for value in found if value > 0), default=None)
