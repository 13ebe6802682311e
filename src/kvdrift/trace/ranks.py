"""What one rank of an engine that splits its layers holds of a tensor, and what a sum over ranks showed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvdrift.vocabulary.sites import Site

Span = tuple[int, int]
Axis = Literal["heads", "columns", "sum"]


@dataclass(frozen=True, slots=True)
class RankPart:
    """What one record holds of its tensor: `span` [first, stop) of its heads or columns, None for an addend."""

    rank: int | None
    axis: Axis
    span: Span | None

    @property
    def name(self) -> str:
        """The part in words.

        >>> RankPart(1, "heads", (4, 8)).name
        'rank 1 (heads 4-7)'
        """
        what = "" if self.span is None else f"{self.axis} {self.span[0]}-{self.span[1] - 1}"
        if self.rank is None:
            return what
        return f"rank {self.rank}" + (f" ({what})" if what else "")


@dataclass(frozen=True, slots=True)
class SumCheck:
    """How the value that ranks share agrees with what they hold of it.

    `excess` is the difference over what rounding of the sum allows. `guilty` names the rank that explains it, and how;
    "" if none does.
    """

    layer: int | None
    site: Site
    position: int
    excess: float
    guilty: str = ""
