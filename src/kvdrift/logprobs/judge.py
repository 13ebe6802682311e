"""From pairs of logprobs to a verdict: what is beyond rounding, in which sequences, from where on, and who is off."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from kvdrift.instruments.sign_flips import sign_flip_max_t, units_for
from kvdrift.logprobs.causes import cause_of
from kvdrift.logprobs.change import changes
from kvdrift.logprobs.dump import Bools, Floats
from kvdrift.logprobs.estimates import Estimate, divergences, mean_over_sequences, mean_square_limit, rms_by_sequence
from kvdrift.logprobs.guilt import guilty_of_three, guilty_of_two
from kvdrift.logprobs.noise import PairNoise, noise_of, standardised, weight_of
from kvdrift.logprobs.outcome import (
    GIVEN,
    RULES,
    Flips,
    Guilt,
    LogprobDecision,
    LogprobPlan,
    Resemblance,
    SequenceResult,
    Ties,
    TokenStretch,
)
from kvdrift.logprobs.pairing import Pairs
from kvdrift.vocabulary.evidence import Caveat, Verdict

LEVEL = 0.95
# Errors of neighbouring tokens are dependent and some contexts are noisier: four tokens count as one.
_TOKENS_PER_UNIT = 4.0
_LOG_LIMIT = math.log(64.0)
# More tokens without a partner than this share, and a pass would be about something else.
_MOST_LOST = 0.1
# Sequences whose change is looked for; those furthest beyond rounding come first.
_MOST_CHANGES = 64
# Stretches of tokens that the drift along them is told for.
_MOST_STRETCHES = 24


def judge(pairs: Pairs, plan: LogprobPlan) -> LogprobDecision:
    """Judge paired dumps.

    alpha is split over three tests, each of which keeps its third: the typical drift of all sequences (sign flips of
    the log of rms over bound, unit: the sequence), that of one sequence (Bonferroni over sequences) and that of one
    token (Bonferroni over tokens). The null of all three is normal noise of at most the bound, so that the last two do
    not ask how many sequences there are.
    """
    noise = noise_of(pairs, plan.dtypes)
    d = pairs.b - pairs.a
    finite = np.isfinite(d)
    kept = finite if pairs.flipped is None else finite & ~pairs.flipped
    z = standardised(np.where(finite, d, 0.0), weight_of(pairs.a, pairs.b), noise.sigma, pairs.grain)
    sequences = _sequences(pairs, d, z / noise.margin, kept, plan)
    ratio, p_value, smallest_p = _overall(sequences, plan.seed)
    one_sided = int((np.isfinite(pairs.a) != np.isfinite(pairs.b)).sum())
    verdict, reasons = _verdict(pairs, sequences, (ratio, p_value, smallest_p), kept, plan, one_sided)
    estimates = divergences(d[kept], pairs.sequence[kept], level=LEVEL)
    cause = guilt = None
    if verdict is Verdict.MISMATCH:
        cause, guilt = _why(pairs, z, kept, sequences, noise, estimates.ratio, one_sided)
    return LogprobDecision(
        verdict=verdict,
        conclusion=_conclusion(verdict, reasons, sequences, noise, one_sided),
        reasons=reasons,
        noise=noise,
        estimates=estimates,
        typical=float(np.sqrt(np.mean(d[kept] ** 2))) if kept.any() else math.nan,
        ratio=ratio,
        p_value=p_value,
        smallest_p=smallest_p,
        sequences=sequences,
        along=_along(pairs, z / noise.margin, kept),
        rule=_rule_text(pairs, plan),
        cause=cause,
        guilt=guilt,
        ties=_ties(pairs, noise),
        flips=_flips(pairs, d, finite),
        n_tokens=int(d.size),
        n_nonfinite=int((~finite).sum()),
        lost=pairs.lost,
        alpha=plan.alpha,
        caveats=tuple(_caveats(pairs, plan, noise, d)),
    )


def _sequences(pairs: Pairs, d: Floats, u: Floats, kept: Bools, plan: LogprobPlan) -> tuple[SequenceResult, ...]:
    n = len(pairs.names)
    ratios, counts = rms_by_sequence(u, pairs.sequence, n, kept)
    limits = np.sqrt(mean_square_limit(plan.alpha / 3.0 / n, counts / _TOKENS_PER_UNIT))
    token_limit = NormalDist().inv_cdf(1.0 - plan.alpha / 6.0 / max(1, int(kept.sum())))
    size = np.where(kept, np.abs(u), -1.0)
    starts = np.searchsorted(pairs.sequence, np.arange(n + 1))
    largest = [int(starts[i] + np.argmax(size[starts[i] : starts[i + 1]])) for i in range(n)]
    wide = [bool(counts[i]) and bool(ratios[i] > limits[i]) for i in range(n)]
    far = [bool(size[largest[i]] > token_limit) for i in range(n)]
    found = _changes(pairs, u, kept, [i for i in range(n) if wide[i] or far[i]], ratios, plan)
    name, limit = plan.rule
    values = [_drop_value(name, d[starts[i] : starts[i + 1]]) for i in range(n)]
    result = []
    for i in range(n):
        at = int(pairs.position[largest[i]])
        why = None
        if wide[i]:
            why = (
                f"typical drift is {ratios[i]:.3g} times the bound, {limits[i]:.3g} is possible for {counts[i]} tokens"
            )
        elif far[i]:
            why = f"token {at} is {size[largest[i]]:.3g} times the bound, {token_limit:.3g} is possible"
        result.append(
            SequenceResult(
                name=pairs.names[i],
                n=int(counts[i]),
                ratio=float(ratios[i]),
                limit=float(limits[i]),
                largest=float(max(size[largest[i]], 0.0)),
                largest_at=at,
                beyond=why is not None,
                why=why,
                change=found.get(i),
                drop=values[i],
                dropped=pairs.dropped[i] if pairs.dropped is not None else not values[i] <= limit,
            )
        )
    return tuple(result)


def _along(pairs: Pairs, u: Floats, kept: Bools) -> tuple[TokenStretch, ...]:
    """The typical drift over the bound along the tokens of all sequences, in stretches of equal length."""
    if not kept.any():
        return ()
    position, squares = pairs.position[kept], u[kept] ** 2
    length = -(-int(position.max() + 1) // _MOST_STRETCHES)
    which = position // length
    return tuple(
        TokenStretch(i * length, (i + 1) * length - 1, int(found.sum()), float(np.sqrt(squares[found].mean())))
        for i in range(int(which.max()) + 1)
        if (found := which == i).any()
    )


def _changes(
    pairs: Pairs, u: Floats, kept: Bools, beyond: list[int], ratios: Floats, plan: LogprobPlan
) -> dict[int, int]:
    """The index from which on each of the sequences `beyond` drifts more, where there is such an index."""
    chosen = sorted(beyond, key=lambda i: -ratios[i])[:_MOST_CHANGES]
    rows = {i: u[kept & (pairs.sequence == i)] for i in chosen}
    places = {i: pairs.position[kept & (pairs.sequence == i)] for i in chosen}
    return {
        change.sequence: int(places[change.sequence][change.index])
        for change in changes(rows, seed=plan.seed)
        if change.p_value <= max(plan.alpha, 1.0 / 2000.0)
    }


def _drop_value(rule: str, d: Floats) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        if rule == "tme":
            return float(np.exp(np.abs(d)).mean())
        if rule == "geo":
            return float(np.exp(abs(d.mean())))
        if rule == "seq":
            return float(np.exp(abs(d.sum())))
        if rule == "max":
            return float(np.exp(np.abs(d).max()))
        return float((np.expm1(d) - d).mean())


def _overall(sequences: tuple[SequenceResult, ...], seed: int) -> tuple[float, float | None, float | None]:
    """Typical drift over the bound (geometric mean over sequences), its p-value, and the smallest there can be."""
    with np.errstate(divide="ignore"):
        logs = np.clip(np.log([item.ratio for item in sequences if item.n]), -_LOG_LIMIT, _LOG_LIMIT)
    if not logs.size:
        return math.nan, None, None
    ratio = float(np.exp(logs.mean()))
    if logs.size < 2:
        return ratio, None, None
    found = sign_flip_max_t(logs[None], seed=seed)
    return ratio, float(found.p_values[0]), found.smallest_p


def _verdict(
    pairs: Pairs,
    sequences: tuple[SequenceResult, ...],
    overall: tuple[float, float | None, float | None],
    kept: Bools,
    plan: LogprobPlan,
    one_sided: int,
) -> tuple[Verdict, tuple[str, ...]]:
    ratio, p_value, smallest = overall
    sure = p_value is not None and p_value <= plan.alpha / 3.0
    if one_sided or any(item.beyond for item in sequences) or (sure and ratio > 1.0):
        return Verdict.MISMATCH, ()
    reasons = []
    n_lost = sum(pairs.lost.values())
    if n_lost > _MOST_LOST * pairs.n_asked:
        what = "; ".join(f"{count}: {reason}" for reason, count in pairs.lost.items())
        reasons.append(f"{n_lost} tokens have no partner ({what}); write the same sequences in both dumps")
    if kept.sum() < 0.5 * kept.size:
        reasons.append(
            f"only {int(kept.sum())} of {kept.size} tokens are finite and have the same experts; replay the routing"
        )
    if not sure:
        if smallest is None or smallest > plan.alpha / 3.0:
            reasons.append(
                f"{len(sequences)} sequences give no p-value of {plan.alpha / 3.0:.1e}, which takes "
                f"{units_for(plan.alpha / 3.0) or 'a larger alpha'}; compare more"
            )
        else:
            reasons.append(
                f"typical drift is {ratio:.2g} times the bound, and which side of it is not clear (p {p_value:.1e}); "
                "compare more sequences, or measure the noise (--repeat)"
            )
    elif ratio >= 1.0:
        reasons.append(f"typical drift is {ratio:.2g} times the bound")
    return (Verdict.INCONCLUSIVE, tuple(reasons)) if reasons else (Verdict.STRUCTURAL_DRIFT, ())


def _why(
    pairs: Pairs,
    z: Floats,
    kept: Bools,
    sequences: tuple[SequenceResult, ...],
    noise: PairNoise,
    ratio: Estimate,
    one_sided: int,
) -> tuple[Resemblance | None, Guilt | None]:
    beyond = tuple(i for i, item in enumerate(sequences) if item.beyond) or tuple(range(len(sequences)))
    if pairs.third is not None:
        guilt = guilty_of_three(pairs, noise, beyond)
    else:
        guilt = guilty_of_two(ratio, f"{LEVEL:.0%} interval")
    if one_sided and not any(item.beyond for item in sequences):
        side = "A" if (~np.isfinite(pairs.a) & np.isfinite(pairs.b)).any() else "B"
        return Resemblance(
            "not_finite", f"{one_sided} logprobs are NaN or infinite on one side alone, {side} among them"
        ), guilt
    return cause_of(pairs, z, kept, sequences), guilt


def _conclusion(
    verdict: Verdict, reasons: tuple[str, ...], sequences: tuple[SequenceResult, ...], noise: PairNoise, one_sided: int
) -> str:
    beyond = sum(item.beyond for item in sequences)
    if verdict is Verdict.MISMATCH:
        if not beyond and one_sided:
            return f"H1: {one_sided} tokens have a finite logprob on one side alone"
        if not beyond:
            return "H1: typical drift of all sequences together is beyond rounding, that of none by itself"
        return f"H1: {beyond} of {len(sequences)} sequences are beyond what rounding can do"
    if verdict is Verdict.INCONCLUSIVE:
        return "Neither H0 nor H1: " + "; ".join(reasons)
    return (
        f"H0: rounding explains the difference in all {len(sequences)} sequences; typical drift of more than "
        f"{noise.bound:.2g} (1 - p) nats would have been seen, smaller faults would not"
    )


def _rule_text(pairs: Pairs, plan: LogprobPlan) -> str:
    name, limit = plan.rule
    return GIVEN if pairs.dropped is not None else f"{RULES[name]}, above {limit:g}"


def _ties(pairs: Pairs, noise: PairNoise) -> Ties | None:
    if not pairs.known_best.any():
        return None
    # Two logits move apart by sqrt(2) of what one moves by.
    near = pairs.known_best & (pairs.gap <= math.sqrt(2.0) * noise.bound)
    return Ties(int(pairs.known_best.sum()), int(near.sum()), int(pairs.moved.sum()), int((pairs.moved & near).sum()))


def _flips(pairs: Pairs, d: Floats, finite: Bools) -> Flips | None:
    if pairs.flipped is None:
        return None

    def k3(chosen: Bools) -> Estimate | None:
        part = d[chosen]
        return mean_over_sequences(np.expm1(part) - part, pairs.sequence[chosen], level=LEVEL) if part.size else None

    return Flips(
        int(pairs.flipped.sum()),
        int(d.size),
        k3(finite & pairs.flipped),
        k3(finite & ~pairs.flipped),
    )


def _caveats(pairs: Pairs, plan: LogprobPlan, noise: PairNoise, d: Floats) -> list[Caveat]:
    found = [
        Caveat("LOGPROBS_ONLY", "One number a token was seen, and nothing inside either engine."),
    ]
    for side, dtype in zip("AB", plan.dtypes, strict=True):
        if dtype is None:
            found.append(Caveat("DTYPE_UNKNOWN", f"The dtype of {side} was not told (--dtype-{side.lower()})."))
    for reason, count in pairs.lost.items():
        found.append(Caveat("TRACE_OFFSET", f"{count} of {pairs.n_asked} tokens were not compared: {reason}."))
    if n := int((~np.isfinite(d)).sum()):
        found.append(Caveat("NON_FINITE", f"{n} differences are not finite."))
    for name, sigma in noise.measured.items():
        if sigma == 0.0:
            found.append(Caveat("NO_SELF_NOISE", f"{name}: the same digits, which measures no noise."))
    if not noise.measured:
        found.append(Caveat("NOISE_STATED", "No repetition was given (--repeat), so noise is that of another model."))
    if not d.any():
        found.append(Caveat("NO_PATH_PROOF", "All digits are equal: nothing shows that two routes ran."))
    if pairs.other_prompts:
        found.append(Caveat("OTHER_PROMPTS", f"{len(pairs.other_prompts)} sequences have other prompt ids."))
    return found
