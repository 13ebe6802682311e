"""Sites that a caller names by the modules that make them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from kvdrift.engines.torch.roles import ModelRoles, Tap, When
from kvdrift.errors import UsageError
from kvdrift.vocabulary.sites import AFTER_LAYERS, BEFORE_LAYERS, CACHE_SITES, STATE_SITES, Site

Names = str | Sequence[str]

# Sites that are what a module reads; all others are what it gives.
_READ = frozenset({Site.LAYER_IN, Site.RESID_ATTN, Site.ATTN_CTX})
# Sites that are not the input or output of any module.
_INSIDE = CACHE_SITES | STATE_SITES | {Site.ATTN_SCORES, Site.ATTN_PROBS, Site.Q_ROPE, Site.LOGITS}


_FUSED = (Site.Q_PROJ, Site.K_PROJ, Site.V_PROJ)


@dataclass(frozen=True, slots=True)
class NamedSite:
    """One site of one module that a caller named; `layer` is None outside the layers."""

    path: str
    layer: int | None
    site: Site

    @property
    def when(self) -> When:
        return "in" if self.site in _READ else "out"


def named_sites(model: nn.Module, sites: Mapping[str, Names]) -> list[NamedSite]:
    """Return what `sites` names in a model: paths of modules, in which {i} stands for the number of a layer.

    Raises:
        UsageError: a site is unknown or not that of a module, or a path names no module of the model.
    """
    paths = [name for name, _ in model.named_modules(remove_duplicate=False)]
    return [found for pattern, names in sites.items() for found in _of_pattern(paths, pattern, names)]


def _of_pattern(paths: Sequence[str], pattern: str, names: Names) -> Iterator[NamedSite]:
    given = [names] if isinstance(names, str) else list(names)
    if unknown := [name for name in given if name not in Site.__members__.values()]:
        raise UsageError(f"sites= names {unknown[0]!r} for {pattern!r}, and the sites are {', '.join(Site)}")
    found = [Site(name) for name in given]
    if inside := [site for site in found if site in _INSIDE]:
        raise UsageError(
            f"sites= names {inside[0]} for {pattern!r}, and that is not the input or output of a module; leave it out: "
            "what attention reads and computes is watched in the calls of torch"
        )
    outside = [site for site in found if site in BEFORE_LAYERS | AFTER_LAYERS]
    if outside and "{i}" in pattern:
        raise UsageError(f"sites= names {outside[0]} for {pattern!r}, and it is outside the layers; leave {{i}} out")
    if "{i}" not in pattern and len(outside) < len(found):
        site = next(site for site in found if site not in outside)
        raise UsageError(f"sites= names {site} for {pattern!r}; write {{i}} where the number of the layer stands")
    matches = re.compile(re.escape(pattern).replace(r"\{i\}", r"(\d+)", 1).replace(r"\{i\}", r"\1"))
    places = [(path, match) for path in paths if (match := matches.fullmatch(path)) is not None]
    if not places:
        near = ", ".join([path for path in paths if path.count(".") == pattern.count(".")][:6])
        raise UsageError(f"sites= names {pattern!r}, and the model has no such module; it has {near or 'others'}, ...")
    for path, match in places:
        for site in found:
            yield NamedSite(path, int(match[1]) if match.groups() else None, site)


def _is_part(tap: Tap, module: nn.Module, site: Site) -> bool:
    return tap.site is site and tap.module is module and tap.pick is not None


def container_of(sites: Mapping[str, Names]) -> str | None:
    """Return the path of what holds the layers, as far as the names of sites tell; None if they do not."""
    found = {pattern.partition(".{i}")[0] for pattern in sites if ".{i}" in pattern}
    if len(found) > 1:
        raise UsageError(f"sites= has layers in {' and in '.join(sorted(found))}; the layers of a model are one list")
    return next(iter(found), None)


def with_named(roles: ModelRoles, model: nn.Module, named: Sequence[NamedSite]) -> None:
    """Read the named sites where the caller says, in the place of what was found of them.

    Raises:
        UsageError: a layer is named that the model does not have.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for item in named:
        if item.layer is not None and item.layer >= len(roles.layers):
            raise UsageError(f"sites= names {item.path!r}, and {len(roles.layers)} layers were found")
        taps = roles.taps if item.layer is None else roles.layers[item.layer].taps
        if item.site in _FUSED and any(_is_part(tap, modules[item.path], item.site) for tap in taps):
            continue  # one module makes queries, keys and values, and how was found
        taps[:] = [tap for tap in taps if tap.site is not item.site]
        module = modules[item.path]
        taps.append(Tap(module, item.site, item.when, 1))
        if item.site is Site.FINAL_NORM_OUT:
            roles.final_norm = module


__all__ = ["NamedSite", "Names", "container_of", "named_sites", "with_named"]
