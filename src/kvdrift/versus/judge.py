"""Where two engines part beyond the noise of both, and which of them is off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import ml_dtypes
import numpy as np

from kvdrift.errors import AlignmentError
from kvdrift.versus.explain import explain
from kvdrift.versus.floors import floors_of, margin_of
from kvdrift.versus.laws import Broken, check_laws, kept_elsewhere
from kvdrift.versus.layouts import unify
from kvdrift.versus.maps import map_of
from kvdrift.versus.outcome import ACROSS, DriftMap, Parting, VersusDecision
from kvdrift.versus.record import Side
from kvdrift.versus.values import Floats, PassValues, relative
from kvdrift.versus.weights import same_numbers, share_nothing, what_differs
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.evidence import Caveat, Verdict
from kvdrift.vocabulary.precision import UNIT_ROUNDOFF
from kvdrift.vocabulary.sites import PARENTS, Site

_PASSES = ("prefill", "decode")
# A law that is broken by less is rounding: exact products are kept in float32, and an attention replay sums in another
# order. Times the roundoff of the side, where that is coarser.
_LAW = 1e-5
_LAW_ROUNDINGS = 256.0


def judge(a: Side, b: Side) -> VersusDecision:
    """Judge two recorded sides.

    Raises:
        AlignmentError: they cannot be laid beside each other: layers, widths or tokens differ.
    """
    _check_shapes(a, b)
    _refuse_rounded_weights(a, b)
    _refuse_other_weights(a, b)
    remarks = unify(a, b)
    floors = {(side.name, name): floors_of(side, name) for side in (a, b) for name in _PASSES}
    margins = {side.name: margin_of(side) for side in (a, b)}

    def bound(one: tuple[str, str], two: tuple[str, str]) -> Callable[[Place], float]:
        return lambda place: sum(margins[key[0]] * floors[key].get(place, 0.0) for key in (one, two))

    own = [
        _first(f"{side.name} against itself", side, side, _PASSES, bound((side.name, "prefill"), (side.name, "decode")))
        for side in (a, b)
    ]
    across, conventions = _real(a, b, bound(("A", "prefill"), ("B", "prefill")))
    fits = {
        side.name: _passes_that_fit(side, other, item, bound)
        for side, other, item in ((a, b, own[0]), (b, a, own[1]))
        if item
    }
    verdict = _decide(a, b, own, across, fits)
    places = a_and_b(a, b)
    n_compared = sum(
        len(a.prompts[name].prefill.rows[place].keys() & b.prompts[name].prefill.rows[place].keys())
        for name in _shared(a, b)
        for place in places
    )
    reasons = [] if n_compared else ["nothing was recorded in both; record the same sites of the same tokens"]
    reasons += _blind(a, b)
    idle = tuple(str(place) for place in conventions)
    maps = _maps(a, b, own, (across, conventions), bound)
    return _decision(a, b, verdict, own, across, (remarks, idle, reasons, maps), n_compared, bound)


def _maps(
    a: Side,
    b: Side,
    own: list[Parting | None],
    across: tuple[Parting | None, tuple[Place, ...]],
    bound: Callable[[tuple[str, str], tuple[str, str]], Callable[[Place], float]],
) -> tuple[DriftMap, ...]:
    """The maps of A against B and of each against itself."""
    first, conventions = across
    both = map_of(ACROSS, (a, b), ("prefill", "prefill"), bound(("A", "prefill"), ("B", "prefill")), first, conventions)
    alone = [
        map_of(
            f"{side.name} against itself", (side, side), ("prefill", "decode"),
            bound((side.name, "prefill"), (side.name, "decode")), parting,
        )
        for side, parting in zip((a, b), own, strict=True)
    ]  # fmt: skip
    return (both, *(item for item in alone if item.cells))


def _decision(
    a: Side,
    b: Side,
    found: tuple[str | None, str | None, Parting | None, tuple[str, str] | None],
    own: list[Parting | None],
    across: Parting | None,
    notes: tuple[tuple[str, ...], tuple[str, ...], list[str], tuple[DriftMap, ...]],
    n_compared: int,
    bound: Callable[[tuple[str, str], tuple[str, str]], Callable[[Place], float]],
) -> VersusDecision:
    guilty, guilty_pass, first, cause = found
    remarks, conventions, reasons, maps = notes
    last = Place(None, Site.LOGITS)
    minimum = bound(("A", "prefill"), ("B", "prefill"))(last)
    if first is not None:
        verdict, conclusion = Verdict.MISMATCH, _sentence(guilty, guilty_pass, first, cause)
    elif reasons:
        verdict, conclusion = Verdict.INCONCLUSIVE, "Neither H0 nor H1: " + "; ".join(reasons)
    else:
        verdict = Verdict.STRUCTURAL_DRIFT
        conclusion = (
            f"H0: A and B compute one function, in prefill and in decode; they differ by rounding at {a.rung}. A "
            f"difference of more than {minimum:.1g} in the logits would have been seen"
        )
    return VersusDecision(
        verdict=verdict,
        conclusion=conclusion,
        reasons=() if first is not None else tuple(reasons),
        first=None if first is None else first.address,
        guilty=guilty,
        guilty_pass=guilty_pass,
        cause=cause,
        partings=tuple(item for item in (*own, across) if item is not None),
        conventions=conventions,
        unmatched=_unmatched(a, b),
        minimum=minimum,
        n_compared=n_compared,
        native=_native(a, b),
        caveats=tuple(_caveats(a, b, remarks)),
        maps=maps,
    )


def _shared(a: Side, b: Side) -> list[str]:
    return [name for name in a.prompts if name in b.prompts]


def a_and_b(a: Side, b: Side) -> list[Place]:
    """Return the places that both sides have in prefill, in forward order."""
    common: set[Place] = set()
    for name in _shared(a, b):
        common |= a.prompts[name].prefill.rows.keys() & b.prompts[name].prefill.rows.keys()
    return sorted(common, key=lambda place: place.forward_rank)


def _check_shapes(a: Side, b: Side) -> None:
    if a.facts.n_layers != b.facts.n_layers:
        raise AlignmentError(
            f"A has {a.facts.n_layers} layers and B {b.facts.n_layers}; compare two engines of one model"
        )
    for name in _shared(a, b):
        if a.prompts[name].tokens != b.prompts[name].tokens:
            at = next(
                i
                for i, (x, y) in enumerate(zip(a.prompts[name].tokens, b.prompts[name].tokens, strict=False))
                if x != y
            )
            raise AlignmentError(f"the tokens of {name} differ from position {at} on; record both on the same ids")
        one, two = a.prompts[name].prefill.rows, b.prompts[name].prefill.rows
        for place in sorted(one.keys() & two.keys(), key=lambda each: each.forward_rank):
            for at in one[place].keys() & two[place].keys():
                x, y = one[place][at], two[place][at]
                if place.site not in (Site.K_CACHE, Site.V_CACHE) and x.shape != y.shape:
                    raise AlignmentError(f"{place} has {x.size} values in A and {y.size} in B; these are not one model")


def _refuse_rounded_weights(a: Side, b: Side) -> None:
    """Refuse weights of one side that are those of the other, rounded: every place would differ by that.

    Seen in the rows of the embedding, which are weights.
    """
    place = Place(None, Site.EMBED_OUT)
    for name in _shared(a, b):
        one, two = (side.prompts[name].prefill.rows.get(place, {}) for side in (a, b))
        x = np.array([one[at] for at in sorted(one.keys() & two.keys())])
        y = np.array([two[at] for at in sorted(one.keys() & two.keys())])
        if not x.size or (x == y).all():
            continue
        for coarse, fine, rounded, exact in (("A", "B", x, y), ("B", "A", y, x)):
            for dtype in (ml_dtypes.bfloat16, np.float16, np.float32):
                if (exact.astype(dtype).astype(np.float64) == rounded).all():
                    raise AlignmentError(
                        f"the weights of {coarse} are those of {fine} rounded to {np.dtype(dtype).name} (embed_out of "
                        f"{name}); load both from the same file in one dtype"
                    )


def _refuse_other_weights(a: Side, b: Side) -> None:
    """Refuse two models that share no matrix: every place would differ by that.

    Raises:
        AlignmentError: they do not.
    """
    if a.weights is not None and b.weights is not None and share_nothing(a.weights, b.weights):
        raise AlignmentError(
            f"A and B have other weights: none of the {len(a.weights.matrices)} matrices of A is in B; load both from "
            "the same checkpoint, in one dtype and one quantisation"
        )


def _drifts(
    one: Mapping[Place, dict[int, Floats]], two: Mapping[Place, dict[int, Floats]]
) -> dict[Place, dict[int, float]]:
    return {
        place: {at: relative(one[place][at], two[place][at]) for at in sorted(one[place].keys() & two[place].keys())}
        for place in one.keys() & two.keys()
    }


def _first(what: str, one: Side, two: Side, passes: tuple[str, str], bound: Callable[[Place], float]) -> Parting | None:
    """The first place in forward order, and the first position there, beyond the bound."""
    best: Parting | None = None
    for name in _shared(one, two):
        drifts = _drifts(_pass(one, name, passes[0]).rows, _pass(two, name, passes[1]).rows)
        for place, by_position in drifts.items():
            for at, size in by_position.items():
                if size > bound(place) or np.isnan(size):
                    found = Parting(what, Address(name, at, *place), size, bound(place))
                    if best is None or (found.address.forward_rank, at) < (
                        best.address.forward_rank,
                        best.address.position,
                    ):
                        best = found
    return best


def _pass(side: Side, prompt: str, name: str) -> PassValues:
    item = side.prompts[prompt]
    return item.prefill if name == "prefill" else item.decode


def _real(a: Side, b: Side, bound: Callable[[Place], float]) -> tuple[Parting | None, tuple[Place, ...]]:
    """The first place at which A and B part and which matters, and the places which do not.

    A place matters if something that is computed of it differs as well, or nothing is. Engines may keep a row before or
    after a factor or a weight that the next step applies: what is computed of it then agrees.
    """
    beyond: set[Place] = set()
    seen: set[Place] = set(a_and_b(a, b))
    for name in _shared(a, b):
        for place, drifts in _drifts(a.prompts[name].prefill.rows, b.prompts[name].prefill.rows).items():
            if any(size > bound(place) or np.isnan(size) for size in drifts.values()):
                beyond.add(place)
    idle = {place for place in beyond if not _matters(place, beyond, seen, a.facts.n_layers)}
    best: Parting | None = None
    for name in _shared(a, b):
        drifts_of = _drifts(a.prompts[name].prefill.rows, b.prompts[name].prefill.rows)
        for place in beyond - idle:
            for at, size in drifts_of.get(place, {}).items():
                if size > bound(place) or np.isnan(size):
                    found = Parting(ACROSS, Address(name, at, *place), size, bound(place))
                    if best is None or (found.address.forward_rank, at) < (
                        best.address.forward_rank,
                        best.address.position,
                    ):
                        best = found
    return best, tuple(sorted(idle, key=lambda each: each.forward_rank))


def _matters(place: Place, beyond: set[Place], seen: set[Place], n_layers: int) -> bool:
    children = _children(place, seen, n_layers)
    return not children or any(child in beyond for child in children)


def _children(place: Place, seen: set[Place], n_layers: int) -> set[Place]:
    """The nearest recorded places that are computed of a place."""
    found: set[Place] = set()
    waiting, known = _direct(place, n_layers), {place}
    while waiting:
        child = waiting.pop()
        if child in known:
            continue
        known.add(child)
        if child in seen:
            found.add(child)
        else:
            waiting += _direct(child, n_layers)
    return found


def _direct(place: Place, n_layers: int) -> list[Place]:
    layer, site = place
    if layer is None:
        if site is Site.EMBED_OUT:
            return [Place(0, Site.LAYER_IN)]
        return [Place(None, Site.LOGITS)] if site is Site.FINAL_NORM_OUT else []
    if site is Site.LAYER_OUT:
        return [Place(layer + 1, Site.LAYER_IN)] if layer + 1 < n_layers else [Place(None, Site.FINAL_NORM_OUT)]
    # Scores are not compared: a query or a key shows in what attention computes.
    return [Place(layer, child) for child, parents in PARENTS.items() if site in parents]


def _passes_that_fit(
    side: Side,
    other: Side,
    parting: Parting,
    bound: Callable[[tuple[str, str], tuple[str, str]], Callable[[Place], float]],
) -> list[str]:
    """The passes of a side that agree with the other side's prefill where its own two part.

    There alone: what a faulty prefill left in the cache shows in all that decode computes later.
    """
    address, fits = parting.address, []
    reference = other.prompts[address.prompt].prefill.rows.get(address.place, {}).get(address.position)
    for name in _PASSES:
        value = _pass(side, address.prompt, name).rows.get(address.place, {}).get(address.position)
        limit = bound((side.name, name), (other.name, "prefill"))(address.place)
        if value is not None and reference is not None and relative(reference, value) <= limit:
            fits.append(name)
    return fits


def _decide(
    a: Side, b: Side, own: list[Parting | None], across: Parting | None, agree: Mapping[str, list[str]]
) -> tuple[str | None, str | None, Parting | None, tuple[str, str] | None]:
    """Return the guilty side, its pass, where it shows, and the cause."""
    broken = [side for side, item in zip("AB", own, strict=True) if item is not None]
    if len(broken) == 1:
        side = broken[0]
        other = "B" if side == "A" else "A"
        found = own["AB".index(side)]
        fits = agree[side]
        wrong = {"prefill": "decode", "decode": "prefill"}[fits[0]] if len(fits) == 1 else None
        agrees = f"its {fits[0]} agrees with {other}" if wrong else f"and neither pass agrees with {other}"
        return side, wrong, found, ("contradicts_itself", f"prefill and decode of {side} differ, {agrees}")
    if len(broken) == 2:
        first = min((item for item in own if item is not None), key=lambda item: item.address.forward_rank)
        return None, None, first, ("both_contradict_themselves", "in both, decode is not what prefill computes")
    if across is None:
        return None, None, None, None
    guilty, cause = _by_laws(a, b, across)
    if guilty is None:
        cause = explain(a, b, across.address.prompt, across.address.place, a.facts.n_layers)
    return guilty, None, across, cause


def _by_laws(a: Side, b: Side, across: Parting) -> tuple[str | None, tuple[str, str] | None]:
    """The one side that breaks a law at the place where both part."""
    place, prompt, n_layers = across.address.place, across.address.prompt, a.facts.n_layers
    broken = {}
    for side in (a, b):
        limit = max(_LAW, _LAW_ROUNDINGS * UNIT_ROUNDOFF[side.rung])

        def is_broken(item: Broken, limit: float = limit) -> bool:
            return item.size > limit

        values = side.prompts[prompt].prefill
        found = [item for item in check_laws(values, place, n_layers) if is_broken(item)]
        if found:
            convicts = kept_elsewhere(values, place, n_layers, is_broken)
            broken[side.name] = (max(found, key=lambda item: item.size), convicts)
    if len(broken) != 1:
        return None, None
    (name, (item, convicts)) = next(iter(broken.items()))
    if not convicts:
        return None, None
    return name, ("breaks_a_law", f"{item.text} (by {item.size:.2g}); that holds in the other engine")


def _sentence(guilty: str | None, guilty_pass: str | None, first: Parting, cause: tuple[str, str] | None) -> str:
    said = "" if cause is None else f": {cause[1]}"
    if guilty is not None:
        which = f"the {guilty_pass} of {guilty}" if guilty_pass else guilty
        return f"H1: {which} is off, first at {first.address}{said}"
    if cause is not None and cause[0] == "both_contradict_themselves":
        return f"H1: both are off, first at {first.address}{said}"
    return f"H1: both are consistent, and they compute different functions at {first.address}{said}"


def _blind(a: Side, b: Side) -> list[str]:
    """Why agreement would say nothing."""
    found = []
    for side in (a, b):
        if not any(Place(None, Site.LOGITS) in item.prefill.rows for item in side.prompts.values()):
            found.append(f"{side.name} has no logits, so that nothing is known of its last step; record them")
        if not any(item.decode.rows for item in side.prompts.values()):
            found.append(f"{side.name} has no decode pass, so that it may contradict itself; record one")
    for one, two in ((a, b), (b, a)):
        if alone := sorted(one.prompts.keys() - two.prompts.keys()):
            found.append(f"{', '.join(alone)} was recorded of {one.name} alone; record the same prompts of both")
    last = Place(None, Site.LOGITS)
    apart = [name for name in _shared(a, b) if not _common(a, b, name, last)]
    if apart and not found:
        found.append(f"no logits of {', '.join(apart)} stand at one position in both; record the same positions")
    return found


def _common(a: Side, b: Side, prompt: str, place: Place) -> set[int]:
    """The positions at which both prefills recorded a place."""
    one, two = (side.prompts[prompt].prefill.rows.get(place, {}) for side in (a, b))
    return {*one} & {*two}


def _unmatched(a: Side, b: Side) -> tuple[str, ...]:
    every = [{place for item in side.prompts.values() for place in item.prefill.rows} for side in (a, b)]
    sites = [{place.site for place in places} for places in every]
    lines = [f"{site} is in A alone" for site in sorted(sites[0] - sites[1])]
    lines += [f"{site} is in B alone" for site in sorted(sites[1] - sites[0])]
    both = sites[0] & sites[1]
    for name, places in (("A", every[0] - every[1]), ("B", every[1] - every[0])):
        lines += [f"{place} is in {name} alone" for place in sorted(places, key=str) if place.site in both]
    return tuple(lines)


def _native(a: Side, b: Side) -> float | None:
    sizes = [
        relative(a.native[name], b.native[name])
        for name in _shared(a, b)
        if name in a.native and name in b.native and a.native[name].size
    ]
    return max(sizes) if sizes else None


def _caveats(a: Side, b: Side, remarks: tuple[str, ...]) -> list[Caveat]:
    found = [Caveat("LAYOUT", text) for text in remarks]
    for side in (a, b):
        found += [Caveat("SIDE", f"{side.name}: {text}") for text in side.remarks]
        if not side.is_measured:
            found.append(
                Caveat("NOISE_STATED", f"the noise of {side.name} was not measured, and is stated for {side.rung}")
            )
        if side.facts.dtype != side.rung:
            found.append(
                Caveat(
                    "NATIVE_NOT_JUDGED",
                    f"{side.name} runs in {side.facts.dtype}, and was compared at {side.rung}: what exists in "
                    f"{side.facts.dtype} alone, `kvdrift audit` of {side.name} looks for",
                )
            )
    return [*found, *_about_weights(a, b)]


def _about_weights(a: Side, b: Side) -> Iterator[Caveat]:
    """Say whether both compute with the same weights, as far as that is known."""
    if a.facts.model_hash is not None and a.facts.model_hash == b.facts.model_hash:
        return
    if a.weights is None or b.weights is None:
        silent = "A and B do" if a.weights is b.weights else "A does" if a.weights is None else "B does"
        text = f"the weights are not the same bytes in the same form, and {silent} not show numbers to compare"
        yield Caveat("WEIGHTS", text)
    elif same_numbers(a.weights, b.weights):
        text = (
            f"the weights of A and B are the same {a.weights.n} numbers, transposed, fused, permuted or tied otherwise"
        )
        yield Caveat("LAYOUT", text)
    else:
        yield Caveat(
            "WEIGHTS", f"the weights of A and B are not the same numbers: {what_differs(a.weights, b.weights)}"
        )
