"""How the modules of a model of mlx-lm are found and watched.

An object of mlx stays what it is: only its class is another one while it is watched, whose call is the original one
with a look before and after it. So no path in the model changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn

from kvdrift.vocabulary.sites import Site

# What the parts of a layer are called in mlx-lm, by the site of their output.
PARTS: dict[Site, tuple[str, ...]] = {
    Site.ATTN_NORM_OUT: ("input_layernorm", "attention_norm", "ln_1", "norm1", "operator_norm"),
    Site.ATTN_OUT: ("self_attn", "attention", "attn", "linear_attn", "mixer"),
    Site.MLP_OUT: ("mlp", "feed_forward", "block_sparse_moe", "ffn"),
}
_FFN_NORMS = ("pre_feedforward_layernorm", "pre_mlp_layernorm", "ffn_norm", "ln_2", "post_attention_layernorm")
_ROUTERS = ("gate", "router")
_INSIDE: dict[Site, tuple[str, ...]] = {
    Site.Q_PROJ: ("q_proj", "wq"),
    Site.K_PROJ: ("k_proj", "wk"),
    Site.V_PROJ: ("v_proj", "wv"),
    Site.Q_NORM: ("q_norm", "q_layernorm", "query_norm"),
    Site.K_NORM: ("k_norm", "k_layernorm", "key_norm"),
}


def child_of(module: Any, names: Sequence[str]) -> Any:
    return next((found for name in names if callable(found := getattr(module, name, None))), None)


def parts_of(layer: Any) -> Iterator[tuple[Any, Site]]:
    """Yield the modules of a layer whose outputs are sites."""
    for site, names in PARTS.items():
        if (module := child_of(layer, names)) is not None:
            yield module, site
    if (norm := child_of(layer, _FFN_NORMS)) is not None:
        yield norm, Site.FFN_NORM_OUT
    attention = child_of(layer, PARTS[Site.ATTN_OUT])
    for site, names in _INSIDE.items():
        if attention is not None and (module := child_of(attention, names)) is not None:
            yield module, site
    router = child_of(child_of(layer, PARTS[Site.MLP_OUT]), _ROUTERS)
    if isinstance(router, nn.Linear | nn.QuantizedLinear):  # modules of its own kind give what they chose
        yield router, Site.ROUTER


@contextmanager
def watched(
    module: Any,
    before: Callable[[Any], Any] | None,
    after: Callable[[Any], Any] | None,
    method: str = "__call__",
) -> Iterator[None]:
    """Call a module, or a method of it, with a look at its first argument and at its output while the context is
    open."""
    original = type(module)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if before is not None and args:
            args = (before(args[0]), *args[1:])
        elif before is not None:
            first = next(iter(kwargs))
            kwargs[first] = before(kwargs[first])
        out = getattr(original, method)(self, *args, **kwargs)
        return out if after is None else after(out)

    module.__class__ = type(original.__name__, (original,), {method: call})
    try:
        yield
    finally:
        module.__class__ = original


@contextmanager
def patched(place: Any, name: str, through: Callable[..., Any]) -> Iterator[None]:
    """Call a function of a module through another one while the context is open."""
    original = getattr(place, name)
    setattr(place, name, lambda *args, **kwargs: through(original, args, kwargs))
    try:
        yield
    finally:
        setattr(place, name, original)


__all__ = ["PARTS", "child_of", "parts_of", "patched", "watched"]
