"""Sites that a model does not have, as whoever recorded it says: told apart from sites that were not recorded."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import msgspec

from kvdrift.errors import TraceError
from kvdrift.vocabulary.facts import EngineFacts, sites_by_layer
from kvdrift.vocabulary.sites import AFTER_LAYERS, BEFORE_LAYERS, Site

# What every decoder computes, and a verdict rests on: it may be missing from a recording, and not from a model.
_ALWAYS = frozenset({Site.EMBED_OUT, Site.LAYER_IN, Site.ATTN_CTX, Site.ATTN_OUT, Site.LAYER_OUT, Site.LOGITS})


def absent_sites(names: Iterable[str], where: object) -> frozenset[Site]:
    """Return the sites of these names.

    Raises:
        TraceError: one is unknown, or is one that every model has.
    """
    found = []
    for name in names:
        if name not in Site.__members__.values():
            raise TraceError(f"{where}: absent names the unknown site {name!r}; docs/trace-format.md lists the sites")
        if name in _ALWAYS:
            raise TraceError(f"{where}: absent names {name!r}, which every model has; leave out what was not recorded")
        found.append(Site(name))
    return frozenset(found)


def without(facts: EngineFacts, absent: Collection[Site], recorded: Collection[Site], where: object) -> EngineFacts:
    """Return the facts of a model that lacks some sites in all layers; nothing changes where none is named.

    Raises:
        TraceError: one of them was recorded.
    """
    if both := sorted(set(absent) & set(recorded)):
        raise TraceError(
            f"{where}: absent names {both[0]!s}, and values of it are recorded; leave out the one or the other"
        )
    if not absent:
        return facts
    outside = BEFORE_LAYERS | AFTER_LAYERS
    inside = [site for site in Site if site not in outside and site not in absent]
    layers: dict[int | None, list[Site]] = dict.fromkeys(range(facts.n_layers), inside)
    layers[None] = [site for site in Site if site in outside and site not in absent]
    return msgspec.structs.replace(facts, sites=sites_by_layer(layers))
