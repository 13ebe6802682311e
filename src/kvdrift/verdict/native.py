"""What the native instruments say together about one mode: fresh sites, replay and the directed tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvdrift.compare.drift import DriftTable
from kvdrift.instruments.asymmetry import ErrorTable, judge_asymmetry
from kvdrift.instruments.directed import Directed, RowWise, judge_directed, judge_replay
from kvdrift.instruments.native import NativeFindings, beyond_alone, fresh_rows, judge_native
from kvdrift.instruments.recorded import Terms, judge_recorded
from kvdrift.instruments.replay import ReplayTable
from kvdrift.instruments.rowwise import RowTable
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.causes import FACTOR_OF, Cause
from kvdrift.vocabulary.evidence import Evidence
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.precision import Arithmetic


@dataclass(frozen=True, slots=True)
class NativeJudgement:
    """The first address beyond noise at the native dtype, None if there is none, and the evidence for it.

    `carries` says whether these instruments cover everything that was compared, so that they can stand without a
    precision ladder; `uncovered` are the layer sites that they do not. `beyond` are all addresses that are beyond noise
    each by itself: what shows only over many (prompt, position) pairs together is not among them.
    """

    first: Address | None
    evidence: tuple[Evidence, ...]
    causes: tuple[Directed, ...]
    n_beyond: int
    carries: bool = False
    uncovered: tuple[Place, ...] = ()
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

    @property
    def is_valid(self) -> bool:
        """Whether any of the instruments could judge."""
        return any(item.valid for item in self.evidence)


def judge_at_native(
    table: DriftTable,
    replay: ReplayTable,
    mode: str,
    arithmetic: Arithmetic,
    *,
    alpha: float,
    seed: int,
    errors: ErrorTable | None = None,
    slots: tuple[list[Address], Evidence] | None = None,
    row_wise: RowTable | None = None,
) -> NativeJudgement:
    """Judge one mode at the native dtype; fresh sites and row-wise causes need the aligned inputs of kv_aligned."""
    evidence: list[Evidence] = []
    found: list[Address] = []
    single: list[Address] = []
    causes: tuple[Directed, ...] = ()
    n_pairs = 0
    if mode == Mode.KV_ALIGNED:
        fresh = judge_native(table, mode, arithmetic)
        evidence.append(fresh.evidence)
        n_pairs = int(str(fresh.evidence.detail.get("n_pairs", 0)))
        found += fresh.first.values()
        alone = beyond_alone(table.select(mode, arithmetic.dtype), arithmetic)
        single += [address for address in alone.addresses() if address.place in fresh.first]
        causes += tuple(_scaled(fresh))
    by_row = None
    if mode == Mode.KV_ALIGNED and row_wise is not None and row_wise.rows:
        by_row = RowWise(row_wise, fresh_rows(table, mode, arithmetic).addresses())
    if any(row.mode == mode for row in replay.rows):
        replayed = judge_replay(
            replay.rows, mode, arithmetic, alpha, seed, is_specified=not arithmetic.is_configured, row_wise=by_row
        )
        evidence += replayed.evidence
        causes += replayed.causes
        found += replayed.beyond
        single += replayed.beyond
    elif by_row is not None:
        by_rows, directed = judge_directed((), mode, arithmetic, alpha, seed, by_row)
        evidence.append(directed)
        causes += by_rows
    found += [cause.address for cause in causes]
    if slots is not None:
        found += slots[0]
        single += slots[0]
        evidence.append(slots[1])
    if errors is not None and mode == Mode.KV_ALIGNED:
        one_sided = judge_asymmetry(errors, arithmetic.dtype, alpha, seed)
        evidence.append(one_sided.evidence)
        found += [] if one_sided.first is None else [one_sided.first]
    first = min(found, key=lambda a: a.forward_rank, default=None)
    n_beyond = len(set(found))
    return NativeJudgement(
        first,
        tuple(evidence),
        causes,
        n_beyond,
        beyond=tuple(dict.fromkeys(single)),
        n_within=max(0, n_pairs - n_beyond),
    )


def _scaled(fresh: NativeFindings) -> Iterator[Directed]:
    """The products that are off by a factor, as causes."""
    for place, gain in fresh.gains.items():
        cause = FACTOR_OF.get(place.site, Cause.SCALED)
        interval = (gain.mean - 2.0 * gain.error, gain.mean + 2.0 * gain.error)
        yield Directed(cause, place.layer, gain.mean, interval, None, fresh.first[place], gain.explained)


def judge_records(table: DriftTable, replay: ReplayTable, terms: Terms, *, alpha: float, seed: int) -> NativeJudgement:
    """Judge one mode of traces that were recorded elsewhere, by what they themselves bound."""
    rows = [row for row in replay.rows if row.mode == terms.mode]
    evidence: list[Evidence] = []
    addresses: list[Address] = []
    causes: tuple[Directed, ...] = ()
    within: set[tuple[str, int, int]] = set()
    if rows:
        replayed = judge_replay(rows, terms.mode, Arithmetic(terms.dtype), alpha, seed)
        evidence += replayed.evidence
        causes = replayed.causes
        # How finely an engine computes is its own affair where it does not say; a directed cause below that is not.
        addresses += [*replayed.beyond, *(cause.address for cause in causes)]
        beyond = {(address.prompt, address.position, address.layer) for address in addresses}
        within = {place for row in rows if (place := (row.prompt, row.position, row.layer)) not in beyond}
    found = judge_recorded(table, terms, within)
    evidence = [*found.evidence, *evidence]
    addresses += found.beyond
    first = min(addresses, key=lambda a: (a.forward_rank, a.position), default=None)
    return NativeJudgement(
        first,
        tuple(evidence),
        causes,
        len(set(addresses)),
        carries=found.n_places > 0 and not found.uncovered and first is None,
        uncovered=found.uncovered,
        beyond=tuple(dict.fromkeys(addresses)),
        n_within=found.n_within,
    )
