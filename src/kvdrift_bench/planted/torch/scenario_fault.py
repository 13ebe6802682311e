"""The one way to declare a fault that only a scenario can commit."""

from __future__ import annotations

from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.torch.model import Applies, Fault, FindLayer
from kvdrift_bench.planted.torch.parts import needs_cache
from kvdrift_bench.planted.torch.ways import Way, planted

CACHE = (Site.K_CACHE, Site.V_CACHE)
ROTATED = (Site.LAYER_IN, Site.Q_ROPE, Site.K_ROPE)
SCORES = (Site.ATTN_SCORES, Site.ATTN_PROBS)


def scenario_fault(
    name: str,
    mechanism: str,
    reference: str,
    where: str,
    needs: str,
    cause: str,
    way: Way,
    sites: tuple[Site, ...] = CACHE,
    applies: Applies = needs_cache,
    find_layer: FindLayer | None = None,
) -> Fault:
    """Return a `Fault` planted by `way`, which the scenario `needs` commits."""
    return Fault(
        name=name,
        mechanism=mechanism,
        reference=reference,
        where=where,
        sites=sites,
        cause=cause,
        plant=planted(way),
        needs=needs,
        applies=applies,
        find_layer=find_layer,
    )
