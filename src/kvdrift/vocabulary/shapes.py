"""The shape of an error: what can be said of a difference that no cause of the catalogue makes.

docs/adding/cause.md shows how a relation is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Pass = Literal["prefill", "decode"]


class Extent(StrEnum):
    """Which part of a value differs."""

    ALL = "all"
    HEADS = "heads"  # some heads, each as a whole
    ELEMENT = "element"  # a single one
    BLOCK = "block"  # as long as a power of two, at a multiple of its length
    TAIL = "tail"  # from some element to the last
    TILE = "tile"  # any other run of neighbours
    SCATTERED = "scattered"


class Relation(StrEnum):
    """What the part that differs has to do with the same part of prefill."""

    NONFINITE = "nonfinite"  # NaN or infinite in one pass alone
    ZEROS = "zeros"
    SIGN_FLIPPED = "sign_flipped"
    FACTOR = "factor"  # one for all values
    FACTOR_BY_ROW = "factor_by_row"  # another for each position or slot
    FACTOR_BY_HEAD = "factor_by_head"  # another for each head
    OFFSET = "offset"  # one number added to every element
    SAME_VECTOR = "same_vector"  # one vector added to every row
    ROWS_PERMUTED = "rows_permuted"
    HEADS_PERMUTED = "heads_permuted"
    ELEMENTS_PERMUTED = "elements_permuted"
    ONE_DIRECTION = "one_direction"  # multiples of one vector added: an error of rank one
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorShape:
    """The shape of the error at the first failing site, from the values that were kept of it.

    Attributes:
        extent: which part of the value differs.
        heads: the heads that differ, if not all of several do.
        elements: first and last element that differ, counted in a head where the value has heads that differ as a
            whole or alike, else in the vector; for scores and probabilities these are keys. None for all of them.
        slots: the cached positions that differ, for rows of the cache; empty if all do.
        relation: what decode has there, in terms of prefill.
        size: the factor, or the number that is added; None for other relations.
        explained: the share of the squared difference that the relation removes, 0 for none.
        positions: where the site differs beyond rounding.
        guilty: the pass that is off, None if the values do not tell.
        text: one sentence for the reader, without its full stop.
    """

    extent: Extent
    heads: tuple[int, ...]
    elements: tuple[int, int] | None
    slots: tuple[int, ...]
    relation: Relation
    size: float | None
    explained: float
    positions: tuple[int, ...]
    guilty: Pass | None
    text: str
