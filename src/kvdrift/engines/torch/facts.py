"""Facts about a model of torch: its weights by hash, and the sites that it offers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from kvdrift.engines.torch.roles import ModelRoles
from kvdrift.engines.torch.weights import values_of
from kvdrift.errors import CaptureError
from kvdrift.vocabulary.sites import Site

_CHUNK = 1 << 21  # elements taken at a time: the sum in float64 makes a wide copy of what it adds


def describe_versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of the packages that decide what a number looks like."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def hash_weights(model: nn.Module) -> str:
    """Return the SHA-256 of all parameters, names included, in name order.

    Raises:
        CaptureError: a weight is NaN or infinite: every pass would be, and two NaN never compare; or it has no values.
    """
    digest = hashlib.sha256()
    for name, parameter, values in values_of(model):
        digest.update(f"{name}:{parameter.dtype}:{tuple(parameter.shape)}".encode())
        for value in values:
            data = value.flatten()
            pieces = [data[start : start + _CHUNK] for start in range(0, data.numel(), _CHUNK)]
            if not all(_is_finite(piece) for piece in pieces):
                bad = int((~torch.isfinite(data)).sum())
                raise CaptureError(
                    f"{bad} of {data.numel()} weights of {name} are NaN or infinite; every pass would be too. "
                    "Check the checkpoint and the dtype that it was converted to."
                )
            for piece in pieces:
                digest.update(piece.contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _is_finite(data: Tensor) -> bool:
    """One reduction instead of an element-wise mask: a sum is finite only if every term is, bar overflow."""
    if not data.is_floating_point() or data.numel() == 0:
        return True
    return bool(torch.isfinite(data.sum(dtype=torch.float64)))


def sites_of(roles: ModelRoles, states: Iterable[tuple[int, Site, Any]]) -> dict[int | None, tuple[Site, ...]]:
    """Return the sites that the engine records, by layer; None for those outside the layers.

    `states` are the recurrent states of the cache: layer, site and whatever is in it.
    """
    held = [(layer, site) for layer, site, _ in states]
    sites: dict[int | None, tuple[Site, ...]] = {None: (*(tap.site for tap in roles.taps), Site.LOGITS)}
    for layer in roles.layers:
        found = {tap.site for tap in layer.taps}
        if layer.attention is not None:
            found |= {Site.K_CACHE, Site.V_CACHE, Site.ATTN_SCORES, Site.ATTN_PROBS}
            found |= {Site.K_ROPE} if layer.updates_cache else set()
            found |= {Site.Q_ROPE, Site.ATTN_CTX} if layer.has_interface else set()
        found |= {site for index, site in held if index == layer.index}
        sites[layer.index] = tuple(site for site in Site if site in found)
    return sites
