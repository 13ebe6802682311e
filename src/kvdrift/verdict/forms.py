"""What one pass computes in another form than the other, so that something in it has no partner.

A decode step may attend to latent rows that prefill expands first, or in a kernel that shows none of its operands. What
only one pass shows inside attention, at every token, is then no value that was lost: what attention hands on is
compared in both, and a fault of either form shows there. Likewise a kernel may compute a norm together with the
products behind it, or a product with the residual sum: what one pass alone shows on the way is no value that was lost
where the ladder compares what comes out. Traces of other programs are asked for all that they offer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from kvdrift.instruments.ladder import frame_noise
from kvdrift.measure.measured import Measured
from kvdrift.pairing.align import Unpaired
from kvdrift.pairing.merges import Merges
from kvdrift.verdict.coverage import compared_throughout
from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.evidence import Caveat
from kvdrift.vocabulary.sites import CACHE_SITES, FORWARD_ORDER, Site

# From here on what two frames leave is more than float64 rounds.
_COARSE_TURN = 2.0**-36

# In front of what attention hands on, and seen through the calls that attention makes.
_INSIDE = CACHE_SITES | {Site.Q_ROPE, Site.ATTN_SCORES, Site.ATTN_PROBS}


# What shows attention itself, and all in front of its residual sum.
_UNSEEN = _INSIDE | {Site.ATTN_CTX}
_BEFORE_SUM = frozenset([*Site][FORWARD_ORDER[Site.ATTN_NORM_OUT] : FORWARD_ORDER[Site.RESID_ATTN]])

# What a fused kernel does not show, and what comes out of it in the same layer, or behind the layers.
_FUSED: tuple[tuple[frozenset[Site], tuple[Site, ...]], ...] = (
    (
        frozenset({Site.ATTN_NORM_OUT, Site.Q_PROJ, Site.K_PROJ, Site.V_PROJ, Site.Q_NORM, Site.K_NORM, Site.K_ROPE}),
        (Site.Q_ROPE, Site.K_CACHE, Site.V_CACHE, Site.ATTN_CTX),
    ),
    (frozenset({Site.ATTN_OUT}), (Site.RESID_ATTN,)),
    (frozenset({Site.FFN_NORM_OUT, Site.ROUTER}), (Site.MLP_OUT,)),
    (frozenset({Site.ATTN_OUT, Site.RESID_ATTN, Site.FFN_NORM_OUT, Site.ROUTER, Site.MLP_OUT}), (Site.LAYER_OUT,)),
    (frozenset({Site.FINAL_NORM_OUT}), (Site.LOGITS,)),
)


# The same where one pass shows nothing of attention itself: it computes it without its modules.
_WITHOUT_MODULES: tuple[tuple[frozenset[Site], tuple[Site, ...]], ...] = (
    (frozenset({Site.ATTN_CTX}), (Site.ATTN_OUT,)),
    (_BEFORE_SUM, (Site.RESID_ATTN,)),
)


def other_forms(measured: Measured, mode: str) -> frozenset[Place]:
    """The places that the two passes never both show in one shape, where what comes of them was compared at every
    probed position: inside attention, and with the ladder inside fused kernels."""
    if measured.foreign is not None:
        return frozenset()
    fused = frozenset[Place]() if measured.plan.ladder == "off" else fused_forms(measured, mode)
    return _forms_of_attention(measured, mode) | fused


def fused_forms(measured: Measured, mode: str) -> frozenset[Place]:
    """The places that one pass alone shows on the way to what both show at every probed position."""
    if measured.foreign is not None:
        return frozenset()
    values = [value for value in _without_partner(measured, mode) if value.only_in in ("prefill", "decode")]
    compared = _compared(measured, mode)
    alone = {Place(value.layer, value.site) for value in values} - compared
    if not alone:
        return frozenset()
    whole = compared_throughout(measured, mode)
    seen = {place.layer for place in compared if place.site in _UNSEEN}
    return frozenset(
        place
        for place in alone
        for inside, behind in (*_FUSED, *(() if place.layer in seen else _WITHOUT_MODULES))
        if place.site in inside and all(Place(place.layer, site) in whole for site in behind)
    )


def _compared(measured: Measured, mode: str) -> set[Place]:
    return {place for rung in measured.table.rungs for place in measured.table.select(mode, rung).places}


def _forms_of_attention(measured: Measured, mode: str) -> frozenset[Place]:
    """The places inside attention, in layers whose context was compared at every probed position."""
    lost = {Place(value.layer, value.site) for value in _without_partner(measured, mode) if value.site in _INSIDE}
    if not lost:
        return frozenset()
    whole = compared_throughout(measured, mode)
    alone = lost - _compared(measured, mode)
    # Where keys are compared, attention has one form, and what else lacks a partner was not recorded.
    layers = {
        place.layer for place in alone if place.site is Site.K_CACHE and Place(place.layer, Site.ATTN_CTX) in whole
    }
    return frozenset(place for place in alone if place.layer in layers)


def strays(measured: Measured, mode: str) -> list[Unpaired]:
    """The values of a mode without a partner that no other form of attention accounts for."""
    forms = other_forms(measured, mode)
    return [value for value in _without_partner(measured, mode) if Place(value.layer, value.site) not in forms]


def partnerless(measured: Measured) -> list[tuple[str, str, Unpaired]]:
    """All values without a partner that no other form of attention accounts for, each with its mode and rung."""
    forms = {str(mode): other_forms(measured, mode) for mode in measured.modes}
    of_others = frozenset().union(*forms.values())  # what a control changes, and what is compared beside a mode
    return [
        item
        for item in measured.table.unpaired
        if Place(item[2].layer, item[2].site) not in forms.get(item[0], of_others)
    ]


def _without_partner(measured: Measured, mode: str) -> list[Unpaired]:
    return [value for label, _, value in measured.table.unpaired if label == mode]


def fused_caveat(measured: Measured) -> Caveat | None:
    """Say what one pass alone shows because the other computes it together with what comes behind, None if nothing."""
    forms = {place for mode in measured.modes for place in other_forms(measured, mode)}
    forms -= {place for mode in measured.modes for place in _forms_of_attention(measured, mode)}
    if not forms:
        return None
    sites, where = _named(forms)
    return Caveat(
        "FUSED",
        f"one pass alone shows {sites} in {where}, as where a kernel computes a norm and the products behind it at "
        "once: they were not compared. What comes out of them was, at every probed position: a fault is seen there, "
        "and its cause may not be told.",
    )


def _named(forms: Collection[Place]) -> tuple[str, str]:
    """The sites of some places, and their layers, in words."""
    layers = sorted({place.layer for place in forms if place.layer is not None})
    sites = ", ".join(site for site in Site if any(place.site is site for place in forms))
    if not layers:
        return sites, "what lies behind the layers"
    return sites, f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers, the first {layers[0]}"


def form_caveat(measured: Measured) -> Caveat | None:
    """Say what of attention was not compared because the passes attend in two forms, None if all was."""
    if measured.foreign is not None:
        return None
    forms = {place for mode in measured.modes for place in _forms_of_attention(measured, mode)}
    if not forms:
        return None
    sites, where = _named(forms)
    return Caveat(
        "OTHER_FORM",
        f"the passes attend in two forms in {where}: {sites} are of other shapes in decode, or one pass alone shows "
        "them, so they were not compared. What attention hands on (attn_ctx) was, at every probed position: a fault in "
        "what goes into attention is seen there, and its cause may not be told.",
    )


def frame_caveat(measured: Measured) -> Caveat | None:
    """Say where queries and keys of one pass were turned back into the frame of the other, None if nowhere."""
    turned = {key: layers for key, layers in measured.table.turned.items() if key[0] in measured.modes}
    layers = sorted(set[int]().union(*turned.values()))
    if not layers:
        return None
    upper = measured.info.ladder.upper
    noise = max((frame_noise(left) for (_, rung), left in turned.items() if rung == upper), default=0.0)
    coarse = ""
    if noise > _COARSE_TURN:
        coarse = f" The turns agree up to {noise:.1e}, as those of a table of float32 do, and bounds allow for it."
    return Caveat(
        "OTHER_FRAME",
        f"queries and keys of decode are turned alike against those of prefill in {_layers(layers)}: positions that "
        "are counted from another token on, such as padding, or features in another order. No product of a query with "
        "a key changes, so attention does not; they were turned back before they were compared." + coarse,
    )


def fold_caveat(measured: Measured) -> Caveat | None:
    """Say where queries or keys of decode hold a part of the scale that prefill multiplies scores by, None if
    nowhere."""
    found = {mode: folds for mode, folds in measured.table.folded.items() if folds and mode in measured.modes}
    if not found:
        return None
    layers = sorted(set[int]().union(*found.values()))
    folds = [fold for by_layer in found.values() for fold in by_layer.values()]
    what = {
        "queries": {f"{factor:.4g}" for fold in folds for factor in fold.heads or (fold.query,) if factor != 1.0},
        "keys": {f"{fold.key:.4g}" for fold in folds if fold.key != 1.0},
    }
    held = " and ".join(f"{name} by {', '.join(sorted(by)[:3])}" for name, by in what.items() if by)
    return Caveat(
        "SCALE_IN_OPERANDS",
        f"decode multiplies {held} in {_layers(layers)}, and its scores are those of prefill: it holds a part of the "
        "scale there that prefill multiplies the products by. The rows were divided by it before they were compared.",
    )


def row_scale_caveat(measured: Measured) -> Caveat | None:
    """Say where decode keeps keys or values by scales that it applies behind their products, None if nowhere."""
    found = {place for mode, places in measured.table.rescaled.items() if mode in measured.modes for place in places}
    if not found:
        return None
    names = {Site.K_CACHE: "keys", Site.V_CACHE: "values"}
    what = " and ".join(name for site, name in names.items() if any(place[1] is site for place in found))
    layers = sorted({layer for layer, _ in found})
    return Caveat(
        "SCALES_BEHIND",
        f"decode attends to {what} by a scale of each row and head in {_layers(layers)}, as a cache of integers does "
        "whose scales multiply scores and probabilities; scores and context are those of prefill. The rows were "
        "divided by these factors before they were compared, so that one that no score and no context shows is not "
        "seen.",
    )


def gain_caveat(measured: Measured) -> Caveat | None:
    """Say which norms give rows without their gains in decode, None if none does."""
    found = {place for mode, places in measured.table.gained.items() if mode in measured.modes for place in places}
    if not found:
        return None
    sites, where = _named({Place(*place) for place in found})
    return Caveat(
        "GAIN_IN_WEIGHTS",
        f"one pass gives {sites} without the weights of the norm in {where}, and what comes out of the products behind "
        "it is the same: it holds these weights in the matrices that read the norm. Decode's rows were multiplied by "
        "them before they were compared; a norm that is off by less than one part in 64 is seen in what comes of it.",
    )


def angle_caveat(measured: Measured) -> Caveat | None:
    """Say where one pass turns queries and keys by angles of float32, None if nowhere."""
    found = {mode: layers for mode, layers in measured.table.angles.items() if layers and mode in measured.modes}
    if not found:
        return None
    layers = sorted(set[int]().union(*found.values()))
    off = max(max(by_layer.values()) for by_layer in found.values())
    return Caveat(
        "FLOAT32_ANGLES",
        "at float64 the passes turn queries and keys by angles that differ as those of a table of float32 do, in "
        f"{_layers(layers)}: by {off:.1e} of a row at most, each pair of elements alike in all heads. That is "
        "rounding, and bounds allow for it: from there on the ladder tells nothing smaller.",
    )


def scale_caveat(measured: Measured) -> Caveat | None:
    """Say where one pass multiplies scores by a constant with fewer digits, None if nowhere."""
    found = [found for mode, found in measured.table.scales.items() if found.noise and mode in measured.modes]
    if not found:
        return None
    layers = sorted({layer for item in found for layer in item.noise})
    factors = [factor for item in found for factor in item.factors]
    return Caveat(
        "ROUNDED_SCALE",
        f"at float64 decode multiplies the scores of {_layers(layers)} by 1 {np.mean(factors):+.1e} beside prefill, "
        f"which makes {max(max(item.noise.values()) for item in found):.1e} of a context at most: one constant in all "
        "heads, tokens and layers, as a scale in float32 or log2(e) with nine digits is. That is rounding, and bounds "
        "allow for it: from there on the ladder tells nothing smaller.",
    )


def merge_caveat(measured: Measured) -> Caveat | None:
    """Say where one pass merges parts of attention that are kept in 16 bits, None if nowhere."""
    off = _contexts_off(measured, measured.table.merges)
    if not off:
        return None
    layers, largest = sorted(off), max(off.values())
    return Caveat(
        "PARTS_OF_16_BITS",
        f"at float64 one pass merges attention from parts of its keys that are kept in 16 bits, in {_layers(layers)}: "
        f"its contexts are those of such a merge, and off by {largest:.1e} at most. That is rounding, and bounds allow "
        "for it: from there on the ladder tells nothing smaller.",
    )


def eight_bits_caveat(measured: Measured) -> Caveat | None:
    """Say where both passes attend with operands of 8 bits that depend on what a call reads, None if nowhere."""
    off = _contexts_off(measured, measured.table.of_8_bits)
    if not off:
        return None
    layers, largest = sorted(off), max(off.values())
    return Caveat(
        "OPERANDS_OF_8_BITS",
        f"both passes attend with operands of 8 bits in {_layers(layers)}, whose mean or steps depend on all keys and "
        f"queries of a call: contexts are those of such operands at float64, and off by {largest:.1e} of themselves at "
        "most. That is rounding, and bounds allow for it: from there on the ladder tells nothing smaller.",
    )


def _contexts_off(measured: Measured, known: Mapping[str, Merges]) -> dict[int, float]:
    """By layer, by what contexts of a coarser kernel are off at most, over the modes that ran."""
    found: dict[int, float] = {}
    for mode in measured.modes:
        for layer, size in (known[mode].noise if mode in known else {}).items():
            found[layer] = max(size, found.get(layer, 0.0))
    return found


def _layers(layers: Sequence[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers, the first {layers[0]}"


__all__ = [
    "angle_caveat",
    "eight_bits_caveat",
    "fold_caveat",
    "form_caveat",
    "frame_caveat",
    "fused_caveat",
    "fused_forms",
    "gain_caveat",
    "merge_caveat",
    "other_forms",
    "partnerless",
    "row_scale_caveat",
    "scale_caveat",
    "strays",
]
