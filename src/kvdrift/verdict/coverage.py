"""Whether what was recorded is a chain from the cache to the logits in every layer, and up to where it holds.

A fault shows in what was recorded behind it. So a layer is covered if something of its attention and what it hands on
were compared at every probed position, and the whole is covered if every layer is and so are the logits. A model may
lack a site; where an engine says which it has, only those are asked for. Facts alone: nothing here is a statistic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from kvdrift.measure.measured import Measured
from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.facts import OUTSIDE
from kvdrift.vocabulary.scope import Scope
from kvdrift.vocabulary.sites import STATE_SITES, Site

# The chain of a layer, in forward order; drawn in the report.
CHAIN = (
    Site.K_CACHE,
    Site.V_CACHE,
    Site.ATTN_CTX,
    Site.ATTN_OUT,
    Site.RESID_ATTN,
    Site.MLP_OUT,
    Site.LAYER_OUT,
)
# What shows a fault of attention: itself, or what is computed from it inside the layer.
_ATTENTION = (Site.ATTN_CTX, Site.ATTN_OUT, Site.RESID_ATTN)


@dataclass(frozen=True, slots=True)
class Chain:
    """The chain of one mode.

    Attributes:
        layers: by layer, the sites of `CHAIN` and whether each was compared at every probed position; None for a site
            that the model does not have.
        outside: the same of the sites behind the layers.
        compared: every place that was compared at every probed position.
        missing: the first place that the scope asks for and that was not compared, None if the chain is whole.
        last: the last place up to which it is whole, None if that is nowhere.
    """

    layers: Mapping[int, Mapping[Site, bool | None]]
    outside: Mapping[Site, bool | None]
    compared: frozenset[Place]
    missing: Place | None
    last: Place | None

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing that the scope asks for."""
        return self.missing is None


def chain_of(measured: Measured, mode: str) -> Chain:
    """Return the chain of one mode at the native dtype."""
    whole = frozenset(compared_throughout(measured, mode))
    n_layers = measured.info.n_layers
    layers = {layer: _drawn(measured, layer, whole) for layer in range(n_layers)}
    outside = {site: _state(measured, Place(None, site), whole) for site in (Site.FINAL_NORM_OUT, Site.LOGITS)}
    missing, last = _walk(measured, measured.scope, whole)
    return Chain(layers, outside, whole, missing, last)


def _walk(measured: Measured, scope: Scope, whole: frozenset[Place]) -> tuple[Place | None, Place | None]:
    """The first place that a scope asks for and that is not among `whole`, and the last one before it."""
    last: Place | None = None
    for wanted, ways in _wanted(measured, scope, measured.info.n_layers):
        found = [place for way in ways for place in way if all(item in whole for item in way)]
        if not found:
            return wanted, last
        here = [place for place in found if last is None or place.forward_rank > last.forward_rank]
        last = max(here, key=lambda place: place.forward_rank, default=last)
    return None, last


def _wanted(measured: Measured, scope: Scope, n_layers: int) -> Iterator[tuple[Place, list[tuple[Place, ...]]]]:
    """Every link that the scope asks for, with the sets of places of which one must have been compared."""
    if scope.up_to is Site.EMBED_OUT:
        yield Place(None, Site.EMBED_OUT), [(Place(None, Site.EMBED_OUT),)]
        return
    for layer in range(n_layers):
        if scope.has_layer(layer):
            yield from _of_layer(measured, scope, layer, n_layers)
    if scope.up_to is Site.FINAL_NORM_OUT:
        yield Place(None, Site.FINAL_NORM_OUT), [(Place(None, Site.FINAL_NORM_OUT),)]
    if not scope.attention and scope.layers is None and scope.has_site(Site.LOGITS):
        yield Place(None, Site.LOGITS), [(Place(None, Site.LOGITS),)]


def _of_layer(
    measured: Measured, scope: Scope, layer: int, n_layers: int
) -> Iterator[tuple[Place, list[tuple[Place, ...]]]]:
    """The links of one layer: its attention, and what it hands on or the site up to which something is claimed."""
    offered = _offered(measured, layer)
    sites = (Site.ATTN_CTX,) if scope.attention else tuple(site for site in _ATTENTION if scope.has_site(site))
    if sites and (offered is None or set(sites) & offered):
        # A recurrent layer has its state instead.
        yield Place(layer, sites[0]), [(Place(layer, site),) for site in (*sites, *STATE_SITES)]
    if scope.attention:
        return
    if scope.up_to is not None and not scope.has_site(Site.LAYER_OUT):
        if scope.up_to not in sites and (offered is None or scope.up_to in offered):
            yield Place(layer, scope.up_to), [(Place(layer, scope.up_to),)]
        return
    behind = [Place(layer + 1, Site.LAYER_IN)]
    if layer + 1 == n_layers:
        behind = [Place(None, Site.FINAL_NORM_OUT), Place(None, Site.LOGITS)]
    ways = [(Place(layer, Site.LAYER_OUT),), *((place,) for place in behind)]
    yield Place(layer, Site.LAYER_OUT), [*ways, (Place(layer, Site.RESID_ATTN), Place(layer, Site.MLP_OUT))]


def _offered(measured: Measured, layer: int | None) -> set[Site] | None:
    """The sites that the model has in a layer, or outside the layers; None if the engine does not say."""
    sites = measured.info.sites
    found = sites.get(OUTSIDE if layer is None else str(layer))
    return None if found is None else set(found)


def _state(measured: Measured, place: Place, whole: frozenset[Place]) -> bool | None:
    offered = _offered(measured, place.layer)
    if place in whole:
        return True
    return None if offered is not None and place.site not in offered else False


def _drawn(measured: Measured, layer: int, whole: frozenset[Place]) -> dict[Site, bool | None]:
    return {site: _state(measured, Place(layer, site), whole) for site in CHAIN}


def compared_throughout(measured: Measured, mode: str) -> set[Place]:
    """The places that were compared at every (prompt, position) at which anything was."""
    rows = measured.table.select(mode, measured.info.dtype)
    if not len(rows):
        return set()
    units = rows.prompt.astype(np.int64) << 32 | rows.position.astype(np.int64)
    n_units = len(np.unique(units))
    counts = np.bincount(rows.place, minlength=len(rows.places))
    return {place for code, place in enumerate(rows.places) if counts[code] == n_units or place.site in STATE_SITES}


def scope_that_holds(measured: Measured, chain: Chain) -> str | None:
    """Return the value of --scope that makes the largest claim that the chain carries, None if there is none."""
    n_layers = measured.info.n_layers
    candidates = {f"up-to={Site.LAYER_OUT}": Scope(up_to=Site.LAYER_OUT)}
    # Up to the layer in which something is missing all of them are whole, since that is how far the walk came.
    if chain.missing is not None and (n := chain.missing.layer or 0):
        candidates[f"layers=0-{n - 1}" if n > 1 else "layers=0"] = Scope(layers=tuple(range(n)))
    common = [site for site in Site if all(Place(layer, site) in chain.compared for layer in range(n_layers))]
    candidates |= {f"up-to={site}": Scope(up_to=site) for site in reversed(common)}
    return next((text for text, scope in candidates.items() if _walk(measured, scope, chain.compared)[0] is None), None)
