"""Settings of two models that differ, and which of them are about a site."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvdrift.vocabulary.sites import Site

_NORMS = (Site.ATTN_NORM_OUT, Site.FFN_NORM_OUT, Site.FINAL_NORM_OUT, Site.Q_NORM, Site.K_NORM)
_SUMS = (Site.LAYER_IN, Site.RESID_ATTN, Site.LAYER_OUT)
_READS = (Site.K_CACHE, Site.V_CACHE, Site.ATTN_CTX)
# A setting is about these sites if a word of its name begins so.
_ABOUT: Mapping[str, tuple[Site, ...]] = {
    "rope": (Site.Q_ROPE, Site.K_ROPE),
    "rotary": (Site.Q_ROPE, Site.K_ROPE),
    "eps": _NORMS,
    "norm": _NORMS,
    "act": (Site.MLP_OUT,),
    "hidden_act": (Site.MLP_OUT,),
    "window": _READS,
    "layer_types": (*_READS, Site.Q_ROPE, Site.K_ROPE),
    "softcap": (Site.ATTN_CTX, Site.LOGITS),
    "scal": (Site.Q_ROPE, Site.ATTN_CTX, Site.MLP_OUT, Site.LOGITS, Site.EMBED_OUT, *_SUMS),
    "multiplier": (Site.ATTN_CTX, Site.MLP_OUT, Site.LOGITS, Site.EMBED_OUT, *_SUMS),
    "expert": (Site.ROUTER, Site.MLP_OUT),
    "topk": (Site.ROUTER, Site.MLP_OUT),
    "routed": (Site.ROUTER, Site.MLP_OUT),
    "head": (Site.Q_PROJ, Site.ATTN_CTX),
    "bias": (Site.Q_PROJ, Site.K_PROJ, Site.V_PROJ, Site.ATTN_OUT, Site.MLP_OUT),
}
# As many are named in a sentence; the report has them all.
_NAMED = 4


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, by name, with both values; of a list the first entry that does.

    A part of a nested setting that one side lacks (`rope_parameters.factor`) counts as None there. Other names that one
    side lacks are left out: programs name their settings differently.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(a.keys() | b.keys()):
        if not (key in a and key in b) and not (_has_parts(a, key) and _has_parts(b, key)):
            continue
        one, two = a.get(key), b.get(key)
        if one == two:
            continue
        if isinstance(one, list | tuple) and isinstance(two, list | tuple):
            found.update(_entries(key, one, two))
        else:
            found[key] = (one, two)
    return found


def _has_parts(settings: Mapping[str, Any], key: str) -> bool:
    parent, dot, _ = key.partition(".")
    return bool(dot) and any(name.startswith(parent + dot) for name in settings)


def _entries(key: str, one: Sequence[Any], two: Sequence[Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    if len(one) != len(two):
        yield f"the length of {key}", (len(one), len(two))
        return
    at = next(index for index, pair in enumerate(zip(one, two, strict=True)) if pair[0] != pair[1])
    yield f"{key}[{at}]", (one[at], two[at])


def about(differ: Mapping[str, tuple[Any, Any]], site: Site) -> str:
    """Return those of the differing settings that are about `site`, in words; empty where none is."""
    return in_words({key: pair for key, pair in differ.items() if any(site in sites for sites in _sites_of(key))})


def in_words(differ: Mapping[str, tuple[Any, Any]]) -> str:
    """Return differing settings in words, the first few by name."""
    named = [f"{key} {one!r} in A, {two!r} in B" for key, (one, two) in list(differ.items())[:_NAMED]]
    return ", ".join(named) + (f", and {len(differ) - _NAMED} more" if len(differ) > _NAMED else "")


def _sites_of(key: str) -> Iterator[tuple[Site, ...]]:
    words = re.split(r"[^a-z0-9]+", key.lower())
    for word, sites in _ABOUT.items():
        if key.lower().startswith(word) if "_" in word else any(each.startswith(word) for each in words):
            yield sites
