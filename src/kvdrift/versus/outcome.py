"""What is decided about two engines, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.evidence import Caveat, Verdict

ACROSS = "A prefill against B prefill"


@dataclass(frozen=True, slots=True)
class Parting:
    """The first place at which two passes differ by more than both round.

    `size` is |difference| / |value| there, `bound` what rounding may make of it.
    """

    what: str
    address: Address
    size: float
    bound: float

    def __str__(self) -> str:
        return f"{self.what}: {self.address}, {self.size:.2g} where rounding makes at most {self.bound:.2g}"


@dataclass(frozen=True, slots=True)
class MapCell:
    """A place of two passes: its largest relative difference in the 2-norm, what rounding may make of it, the ratio of
    both, the number of values compared and of equal ones, and where the largest is. A `convention` is beyond the bound
    without consequence."""

    place: Place
    drift: float
    bound: float
    excess: float
    n: int
    n_equal: int
    worst: Address
    state: Literal["equal", "within", "beyond", "convention"]


@dataclass(frozen=True, slots=True)
class DriftMap:
    """All places of two passes, in forward order; `first` is where they part beyond rounding, None if nowhere."""

    what: str
    first: Address | None
    cells: tuple[MapCell, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class VersusDecision:
    """The judgement of two engines; docs/compare.md has the rules.

    Attributes:
        first: where they part, or where the guilty engine contradicts itself.
        guilty: A or B, None if neither was found off; `guilty_pass` is the pass of it that is off, None for both.
        cause: its name and one sentence, None for a pass.
        partings: A against itself, B against itself, A against B, where there are any.
        conventions: places that differ without consequence, such as a row kept before or after a factor.
        minimum: the typical bound at the last place, relative: what would have been seen.
        n_compared: addresses at which A and B were compared.
        native: typical relative difference of logits at the native precisions, None if they were not recorded.
        maps: A against B in prefill, then each against itself.
    """

    verdict: Verdict
    conclusion: str
    reasons: tuple[str, ...]
    first: Address | None
    guilty: str | None
    guilty_pass: str | None
    cause: tuple[str, str] | None
    partings: tuple[Parting, ...]
    conventions: tuple[str, ...]
    unmatched: tuple[str, ...]
    minimum: float
    n_compared: int
    native: float | None
    caveats: tuple[Caveat, ...]
    maps: tuple[DriftMap, ...]
