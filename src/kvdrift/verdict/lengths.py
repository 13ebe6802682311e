"""A length sweep, length by length: what the evidence of the whole audit says of each prompt of the sweep.

Nothing is measured or tested anew here, so that `alpha` stays that of the whole audit: a length is a MISMATCH if an
address of its prompt is beyond noise in the audit. What an instrument found over many (prompt, position) pairs together
belongs to no single length; a length without an address of its own is INCONCLUSIVE then, and no pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvdrift.instruments.bits import compare_bits
from kvdrift.measure.measured import Measured
from kvdrift.pairing.rows import DriftRow
from kvdrift.verdict.boundaries import Boundary, Sweep, find_boundaries
from kvdrift.verdict.decide import Decision, doubts_of, worst_of
from kvdrift.verdict.forms import strays
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.plan import SELF_NOISE, Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeAtLength:
    """One mode at one length. Drifts are relative, in the 2-norm, at the native dtype; `largest` is the pair that
    drifts most, and `excess` the largest drift over noise on the ladder. None where nothing was measured."""

    verdict: Verdict
    n_pairs: int
    n_equal: int
    largest: DriftRow | None
    excess: float | None
    beyond: tuple[Address, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """One length of a sweep. `self_noise` is the largest drift between two prefills of the last prompt token; kernels
    are those of prefill and decode, as observed."""

    length: int
    prompt: str
    verdict: Verdict
    first_failure: Address | None
    modes: Mapping[str, ModeAtLength]
    self_noise: float | None
    kernels: tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """The lengths of a sweep in ascending order, and where behaviour changes between them.

    `pooled` are first failures that belong to no single length; `untested` says what there were too few pairs for.
    """

    lengths: tuple[Length, ...]
    boundaries: tuple[Boundary, ...]
    pooled: tuple[Address, ...]
    untested: str | None


def judge_lengths(measured: Measured, decision: Decision, lengths: Mapping[str, int]) -> Lengths:
    """Return what `decision` says of each length, by prompt name in `lengths`, and the boundaries between them."""
    beyond: dict[str, list[Address]] = {mode: _beyond(decision, mode) for mode in measured.modes}
    pooled = {
        outcome.mode: outcome.first_failure
        for outcome in decision.outcomes
        if outcome.first_failure is not None and outcome.first_failure not in beyond[outcome.mode]
    }
    rows = tuple(
        _length(measured.alone(prompt), decision, prompt, length, beyond, pooled)
        for prompt, length in sorted(lengths.items(), key=lambda item: item[1])
    )
    sweep = Sweep(lengths, measured.table, measured.routes, measured.info.dtype, measured.modes)
    boundaries, untested = find_boundaries(sweep, beyond, measured.plan.alpha)
    single = {address for addresses in beyond.values() for address in addresses}
    nowhere = tuple(address for address in dict.fromkeys(pooled.values()) if address not in single)
    return Lengths(lengths=rows, boundaries=boundaries, pooled=nowhere, untested=untested)


def _beyond(decision: Decision, mode: str) -> list[Address]:
    """The addresses of `mode` beyond noise each by itself; those of the ladder come first: they are exact."""
    excess = decision.climbs[mode].excess
    ladder = excess.rows.addresses(excess.beyond)
    return list(dict.fromkeys([*_in_order(ladder), *_in_order(decision.natives[mode].beyond)]))


def _in_order(addresses: Sequence[Address]) -> list[Address]:
    return sorted(addresses, key=lambda a: (a.forward_rank, a.position))


def _length(
    part: Measured,
    decision: Decision,
    prompt: str,
    length: int,
    beyond: Mapping[str, Sequence[Address]],
    pooled: Mapping[str, Address],
) -> Length:
    modes: dict[str, ModeAtLength] = {
        mode: _mode(part, decision, mode, prompt, beyond[mode], pooled.get(mode)) for mode in part.modes
    }
    noise = part.table.select(SELF_NOISE, part.info.dtype).rel_l2
    # As for the whole audit: nothing is inherited in kv_aligned, so the origin is there.
    failures = [modes[mode].beyond[0] for mode in (Mode.KV_ALIGNED, Mode.AS_DESIGNED) if _has(modes, mode)]
    return Length(
        length=length,
        prompt=prompt,
        verdict=worst_of([mode.verdict for mode in modes.values()]),
        first_failure=next(iter(failures), None),
        modes=modes,
        self_noise=float(noise.max()) if len(noise) else None,
        kernels=(_kernels(part, "prefill"), _kernels(part, "decode")),
    )


def _has(modes: Mapping[str, ModeAtLength], mode: Mode) -> bool:
    return mode in modes and bool(modes[mode].beyond)


def _mode(
    part: Measured, decision: Decision, mode: str, prompt: str, beyond: Sequence[Address], pooled: Address | None
) -> ModeAtLength:
    rows = part.table.select(mode, part.info.dtype)
    bits = compare_bits(part.table, mode, part.info.dtype, part.routes)
    own = tuple(address for address in beyond if address.prompt == prompt)
    reasons: list[str] = []
    if own:
        verdict = Verdict.MISMATCH
    else:
        checks = [item for item in decision.evidence if item.mode is None]
        n_unpaired = len(strays(part, mode))
        found, native = decision.climbs[mode], decision.natives[mode]
        reasons = doubts_of(part, mode, bits, found, native, checks, len(rows), n_unpaired)
        if pooled is not None:
            reasons.append(f"a mismatch at {pooled.site} was found over all lengths together, at none of them alone")
        verdict = Verdict.EXACT if bits.statistic == 1.0 else Verdict.STRUCTURAL_DRIFT
        verdict = Verdict.INCONCLUSIVE if reasons else verdict
    climbed = decision.climbs[mode].excess
    drift = np.nan_to_num(rows.rel_l2, nan=np.inf, posinf=np.inf)
    return ModeAtLength(
        verdict=verdict,
        n_pairs=len(rows),
        n_equal=int(rows.equal.sum()),
        largest=rows.row(int(drift.argmax())) if len(rows) else None,
        excess=climbed.where(climbed.rows.of_prompt(prompt)).largest,
        beyond=own,
        reasons=tuple(reasons),
    )


def _kernels(part: Measured, side: str) -> str:
    """The kernels of one pass at the native dtype, or what attention is called where no kernel was seen."""
    calls = [call for route in part.routes if route.rung == part.info.dtype for call in getattr(route, side)]
    names = dict.fromkeys(name for call in calls for name in call.kernels or (call.attention,))
    return ", ".join(names) or "not seen"
