"""What the instruments at the native dtype say together about one mode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvdrift.instruments.base import Directed, Seen
from kvdrift.instruments.bits import Bits
from kvdrift.instruments.ladder import Ladder
from kvdrift.instruments.recorded import Recorded, RecordedFindings
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.evidence import Evidence
from kvdrift.vocabulary.plan import Mode

# Instruments of a mode that are weighed apart from those at the native dtype.
_APART = (Bits.name, Ladder.name)


@dataclass(frozen=True, slots=True)
class NativeJudgement:
    """The first address beyond noise at the native dtype, None if there is none, and the evidence for it.

    `carries` says whether these instruments cover everything that was compared, so that they can stand without a
    precision ladder; `uncovered` are the layer sites that they do not, and `uncarried` those of them that drift more
    than their inputs explain. `beyond` are all addresses that are beyond noise
    each by itself: what shows only over many (prompt, position) pairs together is not among them.
    """

    first: Address | None
    evidence: tuple[Evidence, ...]
    causes: tuple[Directed, ...]
    n_beyond: int
    carries: bool = False
    uncovered: tuple[Place, ...] = ()
    uncarried: tuple[Place, ...] = ()
    beyond: tuple[Address, ...] = ()
    n_within: int = 0

    def why_not(self, mode: str) -> str | None:
        """Why a mode cannot be judged by these instruments alone, None if it can.

        In kv_aligned that takes the sites with equal inputs; in as_designed, where inputs differ, attention on its own
        operands is what can be judged.
        """
        needed = "native" if mode == Mode.KV_ALIGNED else "replay"
        found = next((item for item in self.evidence if item.instrument == needed), None)
        if found is None:
            return "attention could not be replayed"
        return None if found.valid else found.reason


def weigh_natively(seen: Mapping[str, Seen]) -> NativeJudgement:
    """Put together what all instruments of one mode saw at the native dtype."""
    native = {name: item for name, item in seen.items() if name not in _APART}
    begins = [address for item in native.values() for address in item.begins]
    beyond = tuple(dict.fromkeys(address for item in native.values() for address in item.beyond))
    evidence = tuple(evidence for item in native.values() for evidence in item.evidence)
    causes = tuple(cause for item in native.values() for cause in item.causes)
    n_beyond = len(set(begins))
    found = seen[Recorded.name].found
    if isinstance(found, RecordedFindings):
        first = min(begins, key=lambda a: (a.forward_rank, a.position), default=None)
        return NativeJudgement(
            first,
            evidence,
            causes,
            n_beyond,
            carries=found.n_places > 0 and not found.uncovered and first is None,
            uncovered=found.uncovered,
            uncarried=found.uncarried,
            # How finely a foreign engine computes is its own affair; a directed cause is not, wherever it begins.
            beyond=tuple(dict.fromkeys(begins)),
            n_within=found.n_within,
        )
    first = min(begins, key=lambda a: a.forward_rank, default=None)
    n_pairs = sum(item.n_pairs for item in native.values())
    return NativeJudgement(first, evidence, causes, n_beyond, beyond=beyond, n_within=max(0, n_pairs - n_beyond))
