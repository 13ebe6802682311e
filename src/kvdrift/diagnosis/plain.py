"""Explanations that need nothing but the two values of a site: a factor, an offset, rounding, a mix-up with another."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from kvdrift.diagnosis.model import Candidate, Floats, Suspect, share
from kvdrift.sites import FORWARD_ORDER, Site

ROUNDED: dict[str, type] = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float8_e4m3fn": "fp8", "float8_e5m2": "fp8"}
# What a constant factor is called where the site says what was scaled.
_FACTOR_OF = {
    Site.Q_ROPE: "rope_attention_factor",
    Site.K_ROPE: "rope_attention_factor",
    Site.LOGITS: "logit_scale",
    Site.ATTN_NORM_OUT: "norm_weight_offset",
    Site.FFN_NORM_OUT: "norm_weight_offset",
    Site.FINAL_NORM_OUT: "norm_weight_offset",
}


def explain_plainly(suspect: Suspect) -> Iterator[Candidate]:
    """Yield what could have happened to the vector at the first failing site."""
    site, position = suspect.address.site, suspect.address.position
    prefill, decode = suspect.prefill.at(site, position), suspect.decode.at(site, position)
    if prefill is None or decode is None or prefill.shape != decode.shape:
        return
    prefill, decode = prefill.ravel(), decode.ravel()
    if not np.isfinite(prefill).all() or not np.isfinite(decode).all():
        return
    yield from _rounded(prefill, decode)
    yield from _factor(suspect, prefill, decode)
    yield from _offset(suspect, prefill, decode)
    yield from _mixed_up(suspect, prefill, decode)
    yield from _permuted(prefill, decode)


def _rounded(prefill: Floats, decode: Floats) -> Iterator[Candidate]:
    for name, dtype in ROUNDED.items():
        with np.errstate(over="ignore", invalid="ignore"):
            predicted = prefill.astype(dtype).astype(np.float64)
        yield Candidate(share(prefill, decode, predicted), f"rounded_to_{name}", f"decode rounds this value to {name}")


def _factor(suspect: Suspect, prefill: Floats, decode: Floats) -> Iterator[Candidate]:
    """A factor that is the same at every element; whether it is the same at other positions tells a constant from a
    quantity that depends on the input, such as a norm's epsilon."""
    norm = float(prefill @ prefill)
    if norm == 0.0:
        return
    factor = float(decode @ prefill) / norm
    here = share(prefill, decode, factor * prefill)
    if factor == 0.0:
        yield Candidate(here, "zeroed", "decode has zeros in the place of this value")
        return
    others = _at_others(suspect)
    constant = min((share(p, d, factor * p) for p, d in others), default=here)
    site = suspect.address.site
    cause = _FACTOR_OF.get(site, "scaled")
    yield Candidate(min(here, constant), cause, f"decode multiplies this value by {factor:.9g} at every position")
    source = {Site.ATTN_NORM_OUT: Site.LAYER_IN, Site.FFN_NORM_OUT: Site.RESID_ATTN}.get(site)
    if source is not None:
        yield from _norm(suspect, source, factor, here)


def _norm(suspect: Suspect, source: Site, factor: float, here: float) -> Iterator[Candidate]:
    """A norm computes y = w x / sqrt(m + e) with m the mean square of x: a factor f at mean square m means that e moved
    by (m + e) (1 / f^2 - 1), about m (...). An epsilon moves by the same amount at every position; a rounded root does
    not."""
    shifts = []
    for position in (suspect.address.position, *suspect.others):
        inputs, p, d = (
            suspect.decode.at(source, position),
            suspect.prefill.at(suspect.address.site, position),
            suspect.decode.at(suspect.address.site, position),
        )
        if inputs is not None and p is not None and d is not None and float(p.ravel() @ p.ravel()):
            at = float(d.ravel() @ p.ravel()) / float(p.ravel() @ p.ravel())
            shifts.append(float(np.mean(inputs**2)) * (1.0 / at**2 - 1.0))
    if not shifts:
        return
    steady = max(shifts) - min(shifts) <= 0.05 * abs(shifts[0])
    if steady:
        yield Candidate(
            here + 2e-9, "norm_epsilon", f"the norm of decode has an epsilon that is larger by {shifts[0]:.3g}"
        )
    elif abs(factor - 1.0) < 2.0**-6:
        text = (
            f"the norm of decode is off by a factor that changes with the row ({factor:.9g} here), like a rounded root"
        )
        yield Candidate(here + 1e-9, "norm_dtype", text)


def _offset(suspect: Suspect, prefill: Floats, decode: Floats) -> Iterator[Candidate]:
    """A vector that is added at every position alike: a bias that is lost, or added twice. Needs a second position."""
    others = [(p, d) for p, d in _at_others(suspect) if p.shape == prefill.shape]
    if others:
        added = np.mean([d - p for p, d in others], axis=0)
        yield Candidate(
            share(prefill, decode, prefill + added),
            "constant_offset",
            "decode differs by the same vector at every position, as a bias that is lost or added twice does",
        )


def _mixed_up(suspect: Suspect, prefill: Floats, decode: Floats) -> Iterator[Candidate]:
    """Decode holds what prefill has at another site: an operation was left out."""
    position, site = suspect.address.position, suspect.address.site
    for (other, at), values in suspect.decode.sites.items():
        before = FORWARD_ORDER[other] < FORWARD_ORDER[site]
        if at == position and other is not site and before and values.size == decode.size:
            yield Candidate(
                share(prefill, decode, values.ravel()),
                "operation_skipped",
                f"decode hands on {other} unchanged as {site}",
            )
    for (other, at), values in suspect.prefill.sites.items():
        if other is site and at != position and values.size == decode.size:
            yield Candidate(
                share(prefill, decode, values.ravel()),
                "value_of_other_position",
                f"decode has the value of position {at} in the place of that of position {position}",
            )


def _permuted(prefill: Floats, decode: Floats) -> Iterator[Candidate]:
    """Blocks of equal size, such as heads, stand in another order."""
    for count in (2, 3, 4, 6, 8, 9, 12, 16, 32, 64):
        if prefill.size % count or prefill.size == count:
            continue
        blocks, wanted = prefill.reshape(count, -1), decode.reshape(count, -1)
        nearest = np.argmin(((wanted[:, None] - blocks[None]) ** 2).sum(axis=2), axis=1)
        if np.array_equal(nearest, np.arange(count)):
            continue
        yield Candidate(
            share(prefill, decode, blocks[nearest].ravel()),
            "blocks_permuted",
            f"decode has the {count} blocks of this value in the order {nearest.tolist()}",
        )


def _at_others(suspect: Suspect) -> list[tuple[Floats, Floats]]:
    site = suspect.address.site
    found = []
    for position in suspect.others:
        prefill, decode = suspect.prefill.at(site, position), suspect.decode.at(site, position)
        same = prefill is not None and decode is not None and prefill.shape == decode.shape
        if same and prefill is not None and decode is not None and not np.array_equal(prefill, decode):
            found.append((prefill.ravel(), decode.ravel()))
    return found
