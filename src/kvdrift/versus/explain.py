"""What differs at the first place where two functions part, computed from the values on both sides of it.

All of it is fitted to the probed positions of one layer, and named only if the fit leaves almost nothing.
"""

from __future__ import annotations

import numpy as np

from kvdrift.versus.record import Side
from kvdrift.versus.rotation import rotation
from kvdrift.versus.settings import about, differing, in_words
from kvdrift.versus.streams import added_otherwise
from kvdrift.versus.values import Floats, PassValues, relative
from kvdrift.versus.weights import same_numbers, what_differs
from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.precision import UNIT_ROUNDOFF
from kvdrift.vocabulary.sites import CACHE_SITES, Site

# A fit is believed if it leaves this share of the difference, squared.
_LEFT = 1e-4
# Rows nearer to each other than this are the same but for rounding, also at float32.
_SAME = 1e-5
_NORMS = {
    Site.ATTN_NORM_OUT: (Site.LAYER_IN,),
    Site.FFN_NORM_OUT: (Site.RESID_ATTN,),
    Site.FINAL_NORM_OUT: (Site.LAYER_OUT,),
    Site.Q_NORM: (Site.Q_PROJ,),
    Site.K_NORM: (Site.K_PROJ,),
}
_INPUTS = {**_NORMS, Site.Q_ROPE: (Site.Q_NORM, Site.Q_PROJ), Site.K_ROPE: (Site.K_NORM, Site.K_PROJ)}
_PRODUCTS = {Site.Q_PROJ, Site.K_PROJ, Site.V_PROJ, Site.ATTN_OUT, Site.MLP_OUT, Site.LOGITS}
_OF_HEADS = {Site.Q_PROJ, Site.K_PROJ, Site.V_PROJ, Site.Q_NORM, Site.K_NORM, Site.Q_ROPE, Site.K_ROPE, Site.ATTN_CTX}


def explain(a: Side, b: Side, prompt: str, place: Place, n_layers: int) -> tuple[str, str]:
    """Return the name of what differs at `place`, and one sentence; `Cause.UNEXPLAINED` where nothing fits."""
    one, two = a.prompts[prompt].prefill, b.prompts[prompt].prefill
    positions = sorted(one.rows[place].keys() & two.rows[place].keys())
    if place.site in CACHE_SITES:
        found = _attention(one, two, place) or _rows_read(one, two, place, positions)
    else:
        left, right = (np.array([side.rows[place][at] for at in positions]) for side in (one, two))
        found = (
            _left_out(one, two, place, positions)
            or _factor(left, right)
            or rotation(one, two, place, positions)
            or _attention(one, two, place)
            or _norm(one, place, positions, left, right, n_layers)
            or added_otherwise(one, two, place)
            or (_cap(left, right) if place.site is Site.LOGITS else None)
            or _other_order(one, place, left, right)
        )
    differ = differing(a.settings, b.settings)
    settings = about(differ, place.site)
    if found is not None:
        return found[0], found[1] + (f" (settings: {settings})" if settings else "")
    if settings:
        return "settings", f"the settings differ: {settings}"
    name, text = _rounded_weights(a, b, place, prompt) or _by_site(a, b, place.site)
    return name, text + (f" (settings that differ: {in_words(differ)})" if differ else "")


def _rounded_weights(a: Side, b: Side, place: Place, prompt: str) -> tuple[str, str] | None:
    """A product of other weights that is off by what rounding of weights to the dtype of one side makes.

    Rounding moves each weight by up to `u` of itself, 0.3 to 0.5 `u` in the root mean square, and a row of products by
    as much of itself, whatever its length.
    """
    if place.site not in _PRODUCTS or (a.weights is not None and b.weights is not None and a.weights == b.weights):
        return None
    one, two = (side.prompts[prompt].prefill.rows[place] for side in (a, b))
    size = float(np.median([relative(one[at], two[at]) for at in one.keys() & two.keys()]))
    for side in (a, b):
        dtype = side.facts.dtype
        unit = UNIT_ROUNDOFF.get(dtype, 0.0)
        if dtype != side.rung and unit / 8.0 < size < unit:
            text = (
                f"{place.site} is off by {size:.1g}, as much as weights make that one side alone has rounded to {dtype}"
            )
            return "weights_rounded", f"{text} (a merged adapter, a copy in another dtype)"
    return None


def _by_site(a: Side, b: Side, site: Site) -> tuple[str, str]:
    """What can differ at a site whose inputs agree."""
    other = a.weights is not None and b.weights is not None and not same_numbers(a.weights, b.weights)
    weights = f": {what_differs(a.weights, b.weights)}" if other and a.weights and b.weights else ""
    if site in (Site.EMBED_OUT, Site.Q_PROJ, Site.K_PROJ, Site.V_PROJ, Site.ATTN_OUT, Site.LOGITS):
        return "weights", f"{site} differs where its input does not: other weights, or another bias{weights}"
    if site is Site.MLP_OUT:
        text = "the MLP differs where its input does not: its activation, its weights or its experts"
        return "mlp", f"{text}{weights}"
    if site is Site.LAYER_IN:
        text = "the first layer gets something else of the embedding: a factor, positions that are added, or a norm"
        return "embedding", text
    return Cause.UNEXPLAINED, "no cause that kvdrift knows reproduces the difference"


def _left_out(one: PassValues, two: PassValues, place: Place, positions: list[int]) -> tuple[str, str] | None:
    """One side hands on what goes in as it is, where the other does something to it."""
    for site in _INPUTS.get(place.site, ()):
        source = Place(place.layer, site)
        at = [p for p in positions if p in one.rows.get(source, {}) and p in two.rows.get(source, {})]
        if not at:
            continue
        plain = [
            all(
                values.rows[source][p].shape == values.rows[place][p].shape
                and relative(values.rows[source][p], values.rows[place][p]) < _SAME
                for p in at
            )
            for values in (one, two)
        ]
        if plain[0] != plain[1]:
            name = "AB"[plain.index(True)]
            return "left_out", f"{name} hands {site} on as it is: the step that makes {place.site} is left out there"
        return None
    return None


def _rows_read(one: PassValues, two: PassValues, place: Place, positions: list[int]) -> tuple[str, str] | None:
    """The numbers of rows that a query reads, where they differ."""
    for at in positions:
        read = [len(values.rows[place][at]) for values in (one, two)]
        if read[0] != read[1]:
            return "rows_read", f"position {at} reads {read[0]} rows of {place.site} in A, and {read[1]} in B"
    return None


def _other_order(one: PassValues, place: Place, left: Floats, right: Floats) -> tuple[str, str] | None:
    """The same heads in another order."""
    if place.layer not in one.heads or place.site not in _OF_HEADS or left.shape[1] % one.heads[place.layer][1]:
        return None
    dim = one.heads[place.layer][1]
    a, b = (rows.reshape(len(rows), -1, dim) for rows in (left, right))
    order = []
    for head in range(b.shape[1]):
        errors = [relative(a[:, other], b[:, head]) for other in range(a.shape[1])]
        if min(errors) > _SAME:
            return None
        order.append(int(np.argmin(errors)))
    moved = [(head, other) for head, other in enumerate(order) if head != other]
    if not moved or sorted(order) != list(range(len(order))):
        return None
    return "heads_permuted", f"heads stand in another order: head {moved[0][0]} of B is head {moved[0][1]} of A"


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


def _attention(one: PassValues, two: PassValues, place: Place) -> tuple[str, str] | None:
    layer, site = place
    if layer is None or site not in (Site.ATTN_CTX, Site.ATTN_OUT, *CACHE_SITES):
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
            return name, _both(name, x, y)
    return None


def _both(name: str, x: object, y: object) -> str:
    """A setting of attention on both sides; of one that each head has, the first head that differs."""
    if isinstance(x, tuple) and isinstance(y, tuple) and len(x) == len(y):
        head = next((index for index, pair in enumerate(zip(x, y, strict=True)) if pair[0] != pair[1]), 0)
        return f"attention has other {name}: of head {head} {x[head]:.6g} in A and {y[head]:.6g} in B"
    return f"attention has the {name} {x} in A and {y} in B"
