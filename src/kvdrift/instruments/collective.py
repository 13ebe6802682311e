"""Collectives: is what ranks share the sum of what each of them holds? A value that is not names the rank.

Blind where the parts of the sum were not recorded beside it, and to a part that is itself wrong: that is a difference
between the passes, which other instruments see.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from kvdrift.instruments.base import NOTHING, Judges, Panel, Run, Seen
from kvdrift.trace.ranks import SumCheck
from kvdrift.trace.recording import RecordedPair
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.evidence import Evidence
from kvdrift.vocabulary.plan import PairRole

_STATISTIC = "largest difference of a sum and its parts over what rounding of the sum allows"


@dataclass(slots=True)
class Collectives:
    """Holds the sums that were recorded against their parts, in both passes."""

    name: ClassVar[str] = "collective"
    judges: ClassVar[Judges] = "mode"
    checks: dict[str, dict[Address, dict[str, SumCheck]]] = field(default_factory=dict)  # by mode, address and pass

    def see(self, item: RecordedPair, run: Run) -> None:
        """Note what the sums of a native pair showed when they were read."""
        pair = item.pair
        if item.role is not PairRole.PAIR or pair.prefill.rung != run.info.dtype:
            return
        for trace in (pair.prefill, pair.decode):
            for check in trace.sums:
                if check.position in pair.positions:
                    address = Address(trace.prompt, check.position, check.layer, check.site)
                    self.checks.setdefault(pair.mode, {}).setdefault(address, {})[trace.pass_name] = check

    def judge(self, run: Run, mode: str, panel: Panel) -> Seen:
        """A sum that is wrong in decode alone is a fault of decode, one in prefill alone of prefill; one that is wrong
        in both may as well be a slip of the recording."""
        found = self.checks.get(mode)
        if not found:
            return NOTHING
        wrong = {address: [c for c in by.values() if c.excess > 1.0] for address, by in found.items()}
        begins = tuple(address for address in found if len(wrong[address]) == 1)
        shared = [address for address in found if len(wrong[address]) > 1]
        worst = max(check.excess for by in found.values() for check in by.values())
        said = next((c.guilty for address in (*begins, *shared) for c in wrong[address] if c.guilty), "")
        where = next(iter((*begins, *shared)), None)
        reason = None
        if shared and not begins:
            reason = f"the value at {shared[0]} is not that of its parts in both passes" + (f": {said}" if said else "")
        text = f"{len(begins) + len(shared)} of {len(found)} shared values are not those of their parts"
        return Seen(
            evidence=(
                Evidence(
                    instrument=self.name,
                    mode=mode,
                    statistic_name=_STATISTIC,
                    statistic=worst,
                    bound=1.0,
                    supports="H1" if begins else (None if shared else "H0"),
                    valid=reason is None,
                    reason=reason,
                    text=text if where is None else f"{text}; first: {where}" + (f", {said}" if said else ""),
                ),
            ),
            begins=begins,
            beyond=begins,
        )
