"""What repeated runs of one text say: the same bits, jitter of rounding, or something else each time.

Two runs of one computation in another order of sums differ by rounding, and that shrinks with the unit roundoff. What
stays when the model runs at its finest rung is not rounding: a random number, a race, a row that reads its neighbour.
The line between the two is that of the ladder, the geometric midpoint of both unit roundoffs (decision 1): jitter of
the native dtype lies below it at the fine rung, and a difference in what is computed does not. An accident that does
not happen again at the fine rung is told by its size alone: half of the digits are no rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from kvdrift.pairing.drift import DriftTable
from kvdrift.pairing.rows import Rows
from kvdrift.trace.model import PassPair
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.facts import EngineFacts
from kvdrift.vocabulary.precision import UNIT_ROUNDOFF

State = Literal["bit-identical", "jitter", "different", "unclear"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """A run, or a row of a batch, beside its standard.

    Attributes:
        where: "run 3" or "row 1".
        n_pairs: values that were compared; 0 proves nothing.
        n_differ: those that do not have the same bits, and those without a partner.
        size: the largest relative difference (2-norm) of a value, NaN where one is not a number.
        ulp: the largest difference in units of the last place.
        first: the first value in forward order that differs, None if none does; where rounding is told from other
            differences, the first that differs by more than rounding.
    """

    where: str
    n_pairs: int
    n_differ: int
    size: float
    ulp: float
    first: Address | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All runs, or all rows of a batch: `changed` has those that differ from their standard, and where the state is
    "different" those that differ by more than rounding.

    `fine` is the largest relative difference beyond rounding at the finest rung, None if there is none; `why` says why
    a state is "unclear".
    """

    name: str
    n: int
    state: State
    changed: tuple[Changed, ...]
    fine: float | None = None
    why: str | None = None

    @property
    def size(self) -> float:
        """The largest relative difference; 0.0 for equal bits, NaN where a value is not a number."""
        sizes = [item.size for item in self.changed]
        return math.nan if any(map(math.isnan, sizes)) else max(sizes, default=0.0)

    @property
    def text(self) -> str:
        """One sentence for the reader, without its full stop."""
        if self.state == "unclear" and not self.changed:
            return f"{self.name}: unclear, {self.why}"
        if not self.changed:
            return f"{self.name}: bit-identical"
        first = min((item.first for item in self.changed if item.first is not None), key=_order, default=None)
        rows = ", ".join(item.where for item in self.changed)
        ulp = max(item.ulp for item in self.changed)
        fine = "" if self.fine is None else f", {self.fine:.2g} at the finest precision"
        sized = f"up to {self.size:.2g} relative ({ulp:.3g} ULP){fine}"
        where = "" if first is None else f", from {_place(first)} on"
        why = f" ({self.why})" if self.why else ""
        return f"{self.name}: {self.state}, {sized}, in {rows}{where}{why}"


def look_at(where: str, pair: PassPair, bound: float = 0.0) -> Changed:
    """Compare two runs of one text; values that differ by at most `bound`, relative, count as the same."""
    table = DriftTable()
    rows = table.rows_of(table.add(pair, "as_designed", with_hashes=False))
    lost = len(table.unpaired)
    differ = np.flatnonzero(~rows.equal & ~(rows.rel_l2 <= bound) if bound else ~rows.equal)
    sizes = rows.rel_l2[differ]
    first = _first(rows, differ)
    if lost and first is None:
        first = table.unpaired[0][2].address
    return Changed(
        where=where,
        n_pairs=len(rows),
        n_differ=len(differ) + lost,
        size=math.nan if lost or np.isnan(sizes).any() else float(sizes.max(initial=0.0)),
        ulp=float(rows.max_ulp[differ].max(initial=0.0)),
        first=first,
    )


def _first(rows: Rows, differ: np.ndarray[tuple[int, ...], np.dtype[np.intp]]) -> Address | None:
    if not len(differ):
        return None
    return min((rows.row(int(at)).address for at in differ), key=_order)


def _order(address: Address) -> tuple[tuple[int, int], int]:
    return address.forward_rank, address.position


def _place(address: Address) -> str:
    layer = "" if address.layer is None else f"layer {address.layer} / "
    return f"{layer}{address.site} (position {address.position})"


def judge_group(
    name: str, native: Iterable[Changed], fine: Sequence[Changed] | None, info: EngineFacts, why_no_fine: str | None
) -> Group:
    """Say what repeated runs are: see this module.

    Args:
        name: of the group.
        native: every run or row at the native dtype.
        fine: the same at the finest rung, beyond `midpoint` alone; None if that was not run.
        info: facts of the engine.
        why_no_fine: why it was not.
    """
    native = list(native)
    changed = tuple(item for item in native if item.n_differ)
    if not native or not all(item.n_pairs for item in native):
        return Group(name=name, n=len(native), state="unclear", changed=changed, why="nothing was compared")
    if not changed:
        return Group(name=name, n=len(native), state="bit-identical", changed=())
    if any(math.isnan(item.size) or math.isinf(item.size) for item in changed):
        return Group(name=name, n=len(native), state="different", changed=changed)
    if fine is None:
        return Group(name=name, n=len(native), state="unclear", changed=changed, why=why_no_fine)
    beyond = {item.where: item for item in fine if item.n_differ}
    lost = tuple(item for item in changed if item.size > half_of_the_digits(info))
    if not beyond:
        state: State = "different" if lost else "jitter"
        return Group(name=name, n=len(native), state=state, changed=lost or changed)
    off = tuple(replace(item, first=beyond[item.where].first) for item in native if item.where in beyond)
    sizes = [item.size for item in beyond.values()]
    largest = math.nan if any(map(math.isnan, sizes)) else max(sizes)
    return Group(name=name, n=len(native), state="different", changed=off, fine=largest)


def half_of_the_digits(info: EngineFacts) -> float:
    """Return the relative difference at the native dtype up to which runs differ by rounding where the fine rung shows
    none, as of an accident that one run in ten has: the root of the unit roundoff, half of the digits of a value."""
    return math.sqrt(_native_roundoff(info))


def midpoint(info: EngineFacts) -> float:
    """Return the relative difference at the fine rung up to which runs differ by rounding: the geometric midpoint of
    the unit roundoffs of the native dtype and of the fine rung, or of what it cannot lift."""
    return math.sqrt(_native_roundoff(info) * max(UNIT_ROUNDOFF[info.ladder.upper], info.pinned))


def _native_roundoff(info: EngineFacts) -> float:
    """The unit roundoff of the native dtype. Where each kind of operation has its own, the coarsest: what one kind
    rounds, all behind it carry."""
    if info.roundoffs is not None:
        return max(info.roundoffs.all)
    return UNIT_ROUNDOFF.get(info.dtype, UNIT_ROUNDOFF["float32"])
