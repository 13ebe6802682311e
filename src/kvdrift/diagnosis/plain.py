"""Explanations that need nothing but the two values of a site: a factor, an offset, rounding, a mix-up with another."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from kvdrift.diagnosis.model import ENOUGH, EXACT, GENERAL, LEAST_ENOUGH, NAMED, Candidate, Floats, Suspect, share
from kvdrift.diagnosis.orders import orders_of
from kvdrift.diagnosis.states import explain_window
from kvdrift.diagnosis.values import head_count
from kvdrift.vocabulary.causes import FACTOR_OF, Cause
from kvdrift.vocabulary.precision import HALF, UNIT_ROUNDOFF
from kvdrift.vocabulary.sites import FORWARD_ORDER, STATE_SITES, Site

ROUNDED: dict[str, type] = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}

_ROUNDED_TO = {
    "bfloat16": Cause.ROUNDED_TO_BFLOAT16,
    "float16": Cause.ROUNDED_TO_FLOAT16,
    "float8_e4m3fn": Cause.ROUNDED_TO_FLOAT8_E4M3FN,
    "float8_e5m2": Cause.ROUNDED_TO_FLOAT8_E5M2,
}
# What it is called if the site has what the one before it has.
_SKIPPED_OF = {
    Site.Q_NORM: Cause.Q_NORM_MISSING,
    Site.K_NORM: Cause.K_NORM_MISSING,
    Site.Q_ROPE: Cause.ROPE_MISSING_ON_Q,
    Site.K_ROPE: Cause.ROPE_MISSING_ON_K,
    Site.FINAL_NORM_OUT: Cause.FINAL_NORM_MISSING,
}
_BEFORE_TURN = {Site.Q_ROPE: (Site.Q_NORM, Site.Q_PROJ), Site.K_ROPE: (Site.K_NORM, Site.K_PROJ)}
# The square of the cosine of two vectors of one direction may be so much below one, both rounded to 16 bits.
_PARALLEL = 1e-4
# What a vector is that is added at every position: a bias, or one that is put into the stream to steer it.
_BIAS_OF = {
    Site.Q_PROJ: Cause.PROJECTION_BIAS_MISSING,
    Site.K_PROJ: Cause.PROJECTION_BIAS_MISSING,
    Site.V_PROJ: Cause.PROJECTION_BIAS_MISSING,
    Site.ATTN_OUT: Cause.PROJECTION_BIAS_MISSING,
    Site.ATTN_NORM_OUT: Cause.CONSTANT_OFFSET,
    Site.FFN_NORM_OUT: Cause.CONSTANT_OFFSET,
    Site.FINAL_NORM_OUT: Cause.CONSTANT_OFFSET,
    Site.MLP_OUT: Cause.CONSTANT_OFFSET,
    Site.EMBED_OUT: Cause.CONSTANT_OFFSET,
    Site.LAYER_IN: Cause.CONSTANT_OFFSET,
    Site.RESID_ATTN: Cause.CONSTANT_OFFSET,
    Site.LAYER_OUT: Cause.CONSTANT_OFFSET,
    Site.LOGITS: Cause.CONSTANT_OFFSET,
}
# By so many roundings a value is off that was computed from rounded operands.
_STEPS = 8.0
# A copy is told by a quarter of the root of the unit roundoff: four roundings in bfloat16, 2e-9 in float64.
_MIDWAY = 0.25
_DISTINCT = 1e-3  # relative distance from which two positions hold different values
_CAP_STEPS = 200
# A factor that was fitted to fewer elements says nothing.
_FEWEST_ELEMENTS = 16
# Several factors are named where a single one leaves so many times more.
_FEWER_LEFT = 4.0


def explain_plainly(suspect: Suspect) -> Iterator[Candidate]:
    """Yield what could have happened to the vector at the first failing site."""
    site, position = suspect.address.site, suspect.address.position
    prefill, decode = suspect.prefill.at(site, position), suspect.decode.at(site, position)
    if prefill is None or decode is None or prefill.shape != decode.shape:
        return
    prefill, decode = prefill.ravel(), decode.ravel()
    if not np.isfinite(prefill).all() or not np.isfinite(decode).all():
        return
    yield from _rounded(suspect, prefill, decode)
    yield from _factor(suspect, prefill, decode)
    yield from _offset(suspect, prefill, decode)
    yield from _mixed_up(suspect, prefill, decode)
    yield from _permuted(prefill, decode)
    yield from _reordered(suspect, prefill, decode)
    yield from _exchanged(suspect, prefill, decode)
    if site in STATE_SITES:
        yield from _not_advanced(suspect, decode)
        yield from explain_window(suspect)
    if site is Site.LOGITS:
        yield from _cap_lost(prefill, decode)


def _rounded(suspect: Suspect, prefill: Floats, decode: Floats) -> Iterator[Candidate]:
    cause_of = {Site.SSM_STATE: Cause.SSM_STATE_ROUNDED, Site.LAYER_OUT: Cause.RESIDUAL_DTYPE}
    for name, dtype in ROUNDED.items():
        with np.errstate(over="ignore", invalid="ignore"):
            predicted = prefill.astype(dtype).astype(np.float64)
        cause = cause_of.get(suspect.address.site, _ROUNDED_TO[name])
        yield Candidate(share(prefill, decode, predicted), cause, f"decode rounds this value to {name}", EXACT)


def explain_grid(suspect: Suspect) -> Candidate | None:
    """Return the dtype whose numbers decode's values are and prefill's are not, if they differ as roundings to it do;
    None if there is no such dtype.

    What is computed in a narrow dtype, operands and all, errs by several roundings of it: rounding the right value
    predicts none of them but the last. No share is claimed.
    """
    site, position = suspect.address.site, suspect.address.position
    prefill, decode = suspect.prefill.at(site, position), suspect.decode.at(site, position)
    if prefill is None or decode is None or prefill.shape != decode.shape or prefill.size < _FEWEST_ELEMENTS:
        return None
    right, wrong = prefill.ravel(), decode.ravel()
    if not np.isfinite(right).all() or not np.isfinite(wrong).all() or not wrong.any():
        return None
    size, off = float(np.linalg.norm(right)), float(np.linalg.norm(wrong - right))
    for name in HALF:
        grid = [_on(ROUNDED[name], values) for values in (wrong, right)]
        if suspect.unit < UNIT_ROUNDOFF[name] and grid == [True, False] and off <= _STEPS * UNIT_ROUNDOFF[name] * size:
            text = (
                f"all values of decode are numbers of {name}, and prefill's are not: decode computes this in {name}, "
                "its operands too"
            )
            return Candidate(0.0, _ROUNDED_TO[name], text)
    return None


def _on(dtype: type, values: Floats) -> bool:
    """Whether all values are numbers of a dtype."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool((values.astype(dtype).astype(np.float64) == values).all())


def _factor(suspect: Suspect, prefill: Floats, decode: Floats) -> Iterator[Candidate]:
    """A factor that is the same at every element and at every position."""
    norm = float(prefill @ prefill)
    if norm == 0.0:
        return
    factor = float(decode @ prefill) / norm
    here = share(prefill, decode, factor * prefill)
    if factor == 0.0:
        yield Candidate(here, Cause.ZEROED, "decode has zeros in the place of this value", EXACT)
        return
    constant = min((share(p, d, factor * p) for p, d in at_others(suspect)), default=here)
    cause = FACTOR_OF.get(suspect.address.site) if _is_turned(suspect) else None
    text = f"decode multiplies this value by {factor:.9g} at every position"
    yield Candidate(min(here, constant), cause or Cause.SCALED, text, GENERAL if cause is None else NAMED)
    yield from _factors_by_position(suspect, prefill, decode)


def _is_turned(suspect: Suspect) -> bool:
    """Whether prefill turns its queries or keys where these are the failing site: in a layer without positions they are
    those before the rotation, or those times a factor. True of any other site."""
    before = _BEFORE_TURN.get(suspect.address.site, ())
    right = suspect.prefill.at(suspect.address.site, suspect.address.position)
    plain = next((v for site in before if (v := suspect.prefill.at(site, suspect.address.position)) is not None), None)
    if plain is None or right is None or plain.size != right.size:
        return True
    along, size = float(plain.ravel() @ right.ravel()), float((plain**2).sum() * (right**2).sum())
    return not along**2 >= (1.0 - _PARALLEL) * size


def _factors_by_position(suspect: Suspect, prefill: Floats, decode: Floats) -> Iterator[Candidate]:
    """A factor of each position, where there are several, each is that of many elements, and no single one does.

    Of a feed-forward part the products around it tell more: weights of experts are such factors.
    """
    if suspect.address.site is Site.MLP_OUT:
        return
    pairs = [(prefill, decode), *at_others(suspect)]
    if len(pairs) < 2 or prefill.size < _FEWEST_ELEMENTS or not all(np.any(p) for p, _ in pairs):
        return
    factors = [float(d @ p) / float(p @ p) for p, d in ((p.ravel(), d.ravel()) for p, d in pairs)]
    least = min(share(p, d, factor * p) for (p, d), factor in zip(pairs, factors, strict=True))
    single = min(share(p, d, factors[0] * p) for p, d in pairs)
    if least < LEAST_ENOUGH or single >= ENOUGH or 1.0 - single < _FEWER_LEFT * (1.0 - least):
        return
    text = f"decode multiplies this value by a factor of each position, {min(factors):.6g} to {max(factors):.6g}"
    yield Candidate(least, Cause.SCALED, text, GENERAL)


def _offset(suspect: Suspect, prefill: Floats, decode: Floats) -> Iterator[Candidate]:
    """A vector that is added at every position alike: a bias that is lost, or added twice.

    Needs a position with another input: where all inputs are the same, every fault adds the same vector.
    """
    cause = _BIAS_OF.get(suspect.address.site)
    others = [(p, d) for p, d in at_others(suspect) if p.shape == prefill.shape]
    distinct = [d - p for p, d in others if np.linalg.norm(p - prefill) > _DISTINCT * np.linalg.norm(prefill)]
    if cause is None or not distinct:
        return
    yield Candidate(
        share(prefill, decode, prefill + np.mean(distinct, axis=0)),
        cause,
        "decode differs by the same vector at every position, as a bias that is lost or added twice does",
        GENERAL if cause == Cause.CONSTANT_OFFSET else NAMED,
    )


def _mixed_up(suspect: Suspect, prefill: Floats, decode: Floats) -> Iterator[Candidate]:
    """Decode holds what prefill has at another site or position: an operation was left out, or a value is old."""
    position, site = suspect.address.position, suspect.address.site
    for (other, at), values in suspect.decode.sites.items():
        before = FORWARD_ORDER[other] < FORWARD_ORDER[site]
        if at == position and other is not site and before and values.size == decode.size:
            cause = _SKIPPED_OF.get(site) if _is_turned(suspect) else None
            yield Candidate(
                share(prefill, decode, values.ravel()),
                cause or Cause.OPERATION_SKIPPED,
                f"decode hands on {other} unchanged as {site}",
                GENERAL if cause is None else NAMED,
            )
    for (other, at), values in suspect.prefill.sites.items():
        if (
            other is site
            and at != position
            and values.size == decode.size
            and _is_copy(suspect, values.ravel(), decode)
        ):
            yield Candidate(
                share(prefill, decode, values.ravel()),
                Cause.VALUE_OF_OTHER_POSITION,
                f"decode has the value of position {at} in the place of that of position {position}",
                GENERAL,
            )


def _is_copy(suspect: Suspect, known: Floats, decode: Floats) -> bool:
    """Whether a row is another one up to rounding, and not just near it: rows that something large is added to are all
    near each other. What is left stands below the middle of rounding and a difference of the size of the row."""
    left = np.linalg.norm(decode - known)
    return bool(left <= _MIDWAY * np.sqrt(suspect.unit) * np.linalg.norm(decode))


def _exchanged(suspect: Suspect, prefill: Floats, decode: Floats) -> Iterator[Candidate]:
    """Keys are in the place of values: the result of a fused projection is split in another order."""
    other = {Site.K_PROJ: Site.V_PROJ, Site.V_PROJ: Site.K_PROJ}.get(suspect.address.site)
    found = None if other is None else suspect.prefill.at(other, suspect.address.position)
    if found is not None and found.size == decode.size:
        text = f"decode has {other} in the place of {suspect.address.site}"
        yield Candidate(share(prefill, decode, found.ravel()), Cause.QKV_SPLIT_WRONG, text, EXACT)


def _not_advanced(suspect: Suspect, decode: Floats) -> Iterator[Candidate]:
    """A recurrent state is the one of the step before."""
    site, position = suspect.address.site, suspect.address.position
    before, right = suspect.decode.at(site, position - 1), suspect.prefill.at(site, position)
    if before is not None and right is not None and before.size == right.size == decode.size:
        cause = Cause.CONV_STATE_STALE if site is Site.CONV_STATE else Cause.SSM_STATE_STALE
        text = f"decode has the state of position {position - 1} at position {position}: the step did not advance it"
        yield Candidate(share(right.ravel(), decode, before.ravel()), cause, text, EXACT)


def _permuted(prefill: Floats, decode: Floats) -> Iterator[Candidate]:
    """Equal blocks of the vector, such as heads, are in another order."""
    for count in (2, 3, 4, 8, 16, 32):
        if prefill.size % count or prefill.size // count < 4:
            continue
        blocks, wanted = prefill.reshape(count, -1), decode.reshape(count, -1)
        nearest = np.argmin(((wanted[:, None] - blocks[None]) ** 2).sum(axis=2), axis=1)
        if np.array_equal(nearest, np.arange(count)) or len(set(nearest.tolist())) < count:
            continue
        yield Candidate(
            share(prefill, decode, blocks[nearest].ravel()),
            Cause.BLOCKS_PERMUTED,
            f"decode has the {count} blocks of this value in the order {nearest.tolist()}",
            GENERAL,
        )


def _reordered(suspect: Suspect, prefill: Floats, decode: Floats) -> Iterator[Candidate]:
    """All elements are those of prefill in an order that a wrong layout makes."""
    if suspect.address.site in STATE_SITES or prefill.size < _FEWEST_ELEMENTS:
        return
    for words, order in orders_of(prefill.size, head_count(suspect, suspect.address.site)):
        text = f"decode has the elements of {suspect.address.site} in another order: {words}"
        yield Candidate(share(prefill, decode, prefill[order]), Cause.DIMS_PERMUTED, text, GENERAL)


def _cap_lost(prefill: Floats, decode: Floats) -> Iterator[Candidate]:
    """Prefill caps its logits, cap * tanh(z / cap), and decode does not. The cap is fitted: every cap above the largest
    logit of prefill is tried, from the lowest to where it would do nothing."""
    least = float(np.abs(prefill).max())
    if least == 0.0 or float(np.abs(decode).max()) <= least:
        return
    best, fitted = -np.inf, 0.0
    low, high = np.log(least * (1.0 + 1e-12)), np.log(least * 1e3)
    for _ in range(6):
        grid = np.exp(np.linspace(low, high, _CAP_STEPS))
        shares = [share(prefill, decode, _uncapped(prefill, cap)) for cap in grid]
        index = int(np.argmax(shares))
        best, fitted = max((best, fitted), (float(shares[index]), float(grid[index])))
        low, high = np.log(grid[max(0, index - 1)]), np.log(grid[min(len(grid) - 1, index + 1)])
    yield Candidate(
        best, Cause.LOGIT_SOFTCAP_MISSING, f"decode does not cap its logits, prefill caps them at {fitted:.6g}"
    )


def _uncapped(logits: Floats, cap: float) -> Floats:
    below = np.minimum(np.abs(logits) / cap, 1.0 - 1e-16)
    return np.asarray(np.copysign(cap * np.arctanh(below), logits))


def at_others(suspect: Suspect) -> list[tuple[Floats, Floats]]:
    """Return the values [feature] of prefill and decode at the other positions at which they differ.

    A value that is NaN differs. Positions that one pass lacks, or has in another shape, are left out.
    """
    site = suspect.address.site
    found = []
    for position in suspect.others:
        prefill, decode = suspect.prefill.at(site, position), suspect.decode.at(site, position)
        same = prefill is not None and decode is not None and prefill.shape == decode.shape
        if same and prefill is not None and decode is not None and not np.array_equal(prefill, decode):
            found.append((prefill.ravel(), decode.ravel()))
    return found
