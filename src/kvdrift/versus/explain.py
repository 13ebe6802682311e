"""What differs at the first place where two functions part, computed from the values on both sides of it.

All of it is fitted to the probed positions of one layer, and named only if the fit leaves almost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kvdrift.versus.record import Side
from kvdrift.versus.values import Floats, PassValues
from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.sites import Site

# A fit is believed if it leaves this share of the difference, squared.
_LEFT = 1e-4
_NORMS = {
    Site.ATTN_NORM_OUT: (Site.LAYER_IN,),
    Site.FFN_NORM_OUT: (Site.RESID_ATTN,),
    Site.FINAL_NORM_OUT: (Site.LAYER_OUT,),
    Site.Q_NORM: (Site.Q_PROJ,),
    Site.K_NORM: (Site.K_PROJ,),
}
# Settings whose names have one of these words are about the places beside them.
_ABOUT = {
    "rope": (Site.Q_ROPE, Site.K_ROPE),
    "rotary": (Site.Q_ROPE, Site.K_ROPE),
    "eps": tuple(_NORMS),
    "act": (Site.MLP_OUT,),
    "window": (Site.ATTN_CTX,),
    "softcap": (Site.ATTN_CTX, Site.LOGITS),
    "scal": (Site.Q_ROPE, Site.ATTN_CTX, Site.LOGITS, Site.EMBED_OUT, Site.RESID_ATTN, Site.LAYER_OUT),
    "multiplier": (Site.ATTN_CTX, Site.LOGITS, Site.EMBED_OUT, Site.RESID_ATTN, Site.LAYER_OUT),
    "expert": (Site.ROUTER, Site.MLP_OUT),
    "head": (Site.Q_PROJ, Site.ATTN_CTX),
}


def explain(a: Side, b: Side, prompt: str, place: Place, n_layers: int) -> tuple[str, str]:
    """Return the name of what differs at `place`, and one sentence; `Cause.UNEXPLAINED` where nothing fits."""
    one, two = a.prompts[prompt].prefill, b.prompts[prompt].prefill
    positions = sorted(one.rows[place].keys() & two.rows[place].keys())
    left, right = (
        (np.array([side.rows[place][at] for at in positions]) for side in (one, two))
        if (place.site not in (Site.K_CACHE, Site.V_CACHE))
        else (np.zeros((0, 0)), np.zeros((0, 0)))
    )
    found = (
        _factor(left, right)
        or _rotation(one, two, place, positions)
        or _attention(one, two, place)
        or _norm(one, place, positions, left, right, n_layers)
        or (_cap(left, right) if place.site is Site.LOGITS else None)
    )
    settings = _settings(a.settings, b.settings, place.site)
    if found is not None:
        return found[0], found[1] + (f" (settings: {settings})" if settings else "")
    if settings:
        return "settings", f"the settings differ: {settings}"
    if place.site in (Site.EMBED_OUT, Site.Q_PROJ, Site.K_PROJ, Site.V_PROJ, Site.ATTN_OUT, Site.LOGITS):
        return "weights", f"{place.site} differs where its input does not: other weights, or another bias"
    if place.site is Site.MLP_OUT:
        return "mlp", "the MLP differs where its input does not: its activation, its weights or its experts"
    return Cause.UNEXPLAINED, "no cause that kvdrift knows reproduces the difference"


def _settings(a: Mapping[str, Any], b: Mapping[str, Any], site: Site) -> str:
    differ = [key for key in sorted(a.keys() & b.keys()) if a[key] != b[key]]
    about = [key for key in differ if any(word in key.lower() and site in sites for word, sites in _ABOUT.items())]
    return ", ".join(f"{key} {a[key]!r} in A, {b[key]!r} in B" for key in about)


def _share_left(left: Floats, right: Floats, fit: Floats) -> float:
    difference = float(((right - left) ** 2).sum())
    return float(((right - fit) ** 2).sum()) / difference if difference > 0.0 else 1.0


def _factor(left: Floats, right: Floats) -> tuple[str, str] | None:
    if not left.size or not left.any():
        return None
    factor = float((left * right).sum() / (left * left).sum())
    if _share_left(left, right, factor * left) > _LEFT:
        return None
    return "factor", f"B is A times {factor:.6g}"


def _cap(left: Floats, right: Floats) -> tuple[str, str] | None:
    """One side is softcap * tanh(other / softcap)."""
    for name, inner, outer in (("B", left, right), ("A", right, left)):
        if not inner.size or np.abs(outer).max() >= np.abs(inner).max():
            continue
        caps = np.geomspace(np.abs(outer).max() * 1.0001, np.abs(outer).max() * 100.0, 400)
        errors = [float(((cap * np.tanh(inner / cap) - outer) ** 2).sum()) for cap in caps]
        cap = float(caps[int(np.argmin(errors))])
        if min(errors) < 1e-2 * float(((inner - outer) ** 2).sum()):
            return "softcap", f"{name} caps its values softly, near {cap:.3g}, and the other side does not"
    return None


def _norm(
    one: PassValues, place: Place, positions: list[int], left: Floats, right: Floats, n_layers: int
) -> tuple[str, str] | None:
    """Rows with a factor of their own: another epsilon; elements with one, alike in all rows: another weight."""
    if place.site not in _NORMS or not left.size or (np.abs(left) == 0.0).all():
        return None
    factor = (left * right).sum(1) / (left * left).sum(1)
    if _share_left(left, right, factor[:, None] * left) <= _LEFT and len(positions) > 1:
        layer = n_layers - 1 if place.layer is None else place.layer
        inputs = one.rows.get(Place(layer, _NORMS[place.site][0]), {})
        if (all(at in inputs for at in positions) and place.layer is not None) or place.site is Site.FINAL_NORM_OUT:
            square = np.array([np.mean(inputs[at] ** 2) for at in positions if at in inputs])
            if len(square) == len(factor):
                # factor^2 = (square + eps of A) / (square + eps of B), linear in both.
                matrix = np.stack([np.ones_like(square), -(factor**2)], 1)
                solved, *_ = np.linalg.lstsq(matrix, square * (factor**2 - 1.0), rcond=None)
                if np.isfinite(solved).all() and solved.min() >= -1e-9:
                    return "eps", f"another epsilon under the root: about {solved[0]:.3g} in A, {solved[1]:.3g} in B"
        return "eps", "each row has a factor of its own: another epsilon, or another norm of the row"
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.median(right / left, axis=0)
    if np.isfinite(weight).all() and len(positions) > 1 and _share_left(left, right, weight * left) <= _LEFT:
        return "norm_weight", "each element has a factor of its own, the same in all rows: another weight of the norm"
    return None


def _rotation(one: PassValues, two: PassValues, place: Place, positions: list[int]) -> tuple[str, str] | None:
    """Angles of both sides against what went in: their base, or a displaced position."""
    layer, site = place
    if layer is None or site not in (Site.Q_ROPE, Site.K_ROPE) or layer not in one.heads or len(positions) < 2:
        return None
    dim = one.heads[layer][1]
    key = site is Site.K_ROPE
    source = next(
        (s for s in ((Site.K_NORM, Site.K_PROJ) if key else (Site.Q_NORM, Site.Q_PROJ)) if Place(layer, s) in one.rows),
        None,
    )
    if source is None:
        return None
    speeds: list[tuple[Floats, Floats]] = []
    for values in (one, two):
        before, after = values.rows.get(Place(layer, source), {}), values.rows.get(place, {})
        at = [p for p in positions if p in before and p in after and before[p].size == after[p].size]
        if len(at) < 2 or after[at[0]].size % dim:
            return None
        turned = np.array([_angles(before[p], after[p], dim) for p in at])
        speeds.append((np.array(at), turned))
    base = [_base(at, turned, dim) for at, turned in speeds]
    offset = [_offset(at, turned) for at, turned in speeds]
    if offset[0] is not None and offset[1] is not None and abs(offset[0] - offset[1]) > 0.5:
        return "position", f"positions are displaced: by {offset[0]:.0f} in A, by {offset[1]:.0f} in B"
    if base[0] is not None and base[1] is not None and abs(np.log(base[0] / base[1])) > 1e-3:
        return Cause.ROPE_BASE, f"the base of RoPE is {base[0]:.6g} in A and {base[1]:.6g} in B"
    return "rope", "positions turn the rows by other angles: other frequencies of RoPE, or another scaling of them"


def _angles(before: Floats, after: Floats, dim: int) -> Floats:
    """The angle by which each pair (i, i + dim/2) of a head was turned, [pair], over all heads together."""
    half = dim // 2
    x, y = before.reshape(-1, dim), after.reshape(-1, dim)
    u, v = x[:, :half] + 1j * x[:, half:], y[:, :half] + 1j * y[:, half:]
    return np.asarray(np.angle((v * np.conj(u)).sum(0)))


def _speed(at: Floats, turned: Floats) -> Floats:
    """Angle per position of each pair, from neighbouring positions."""
    steps = np.flatnonzero(np.diff(at) == 1)
    if not steps.size:
        return np.full(turned.shape[1], np.nan)
    return np.asarray(np.angle(np.exp(1j * (turned[steps + 1] - turned[steps])).mean(0)))


def _base(at: Floats, turned: Floats, dim: int) -> float | None:
    """The base of which the speeds are the powers, None if they are those of none."""
    speed = np.abs(_speed(at, turned))
    if not np.isfinite(speed).all() or (speed <= 0.0).any() or len(speed) < 2:
        return None
    index = 2.0 * np.arange(len(speed)) / dim
    slope = float((index @ np.log(speed)) / (index @ index))
    fits = np.abs(np.log(speed) - slope * index).max() < 1e-3
    return float(np.exp(-slope)) if fits else None


def _offset(at: Floats, turned: Floats) -> float | None:
    """By how many positions the fastest pair is ahead of its place."""
    speed = _speed(at, turned)
    if not np.isfinite(speed).all() or abs(speed[0]) < 1e-3:
        return None
    ahead = np.angle(np.exp(1j * (turned - at[:, None] * speed)).mean(0))
    return float(np.round(ahead[0] / speed[0])) if abs(ahead[0]) < np.pi else None


def _attention(one: PassValues, two: PassValues, place: Place) -> tuple[str, str] | None:
    layer, site = place
    if layer is None or site not in (Site.ATTN_CTX, Site.ATTN_OUT):
        return None
    a, b = one.attention.get(layer), two.attention.get(layer)
    if a is None or b is None:
        return None
    for field, name in (
        ("scale", "scale"),
        ("softcap", "softcap"),
        ("window", "window"),
        ("sinks", "sinks"),
        ("slopes", "slopes"),
    ):
        x, y = getattr(a, field), getattr(b, field)
        if x != y and not (isinstance(x, float) and isinstance(y, float) and abs(x - y) < 1e-6 * abs(x)):
            return name, f"attention has the {name} {x} in A and {y} in B"
    return None
