"""Directories of traces as another program writes them: a chain of sites of a few layers, with edits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvdrift.trace import Writer
from kvdrift.vocabulary.sites import Site

# The sites of a layer in forward order, with the shape of a row.
LAYER = {
    "layer_in": (16,),
    "attn_norm_out": (16,),
    "q_proj": (16,),
    "k_proj": (8,),
    "v_proj": (8,),
    "attn_ctx": (2, 8),
    "attn_out": (16,),
    "resid_attn": (16,),
    "mlp_out": (16,),
    "layer_out": (16,),
}
OUTSIDE = {"embed_out": (16,), "final_norm_out": (16,), "logits": (40,)}
PROMPTS = {"p": 6, "q": 9}
Values = np.ndarray[Any, Any]
# Given pass, layer, site and position, returns the values to record, None for nothing.
Edit = Callable[[str, int | None, str, int, Values], Values | None]


def keep(name: str, layer: int | None, site: str, position: int, values: Values) -> Values:
    """Record everything as it is."""
    return values


def write_chain(
    folder: Path, edit: Edit = keep, *, n_layers: int = 3, span: int = 2, dtype: Any = np.float32, seed: int = 0
) -> Path:
    """Write two prompts whose passes have the same bits, except where `edit` says otherwise."""
    writer = Writer(folder, engine="e", model="m", dtype=np.dtype(dtype).name, n_layers=n_layers)
    for prompt, n in PROMPTS.items():
        tokens, positions = list(range(1, n + 1)), list(range(n - span, n))
        for name in ("prefill", "decode"):
            rng = np.random.default_rng([seed, n])
            with writer.prefill(prompt, tokens) if name == "prefill" else writer.decode(prompt, tokens) as out:
                for start, q_len in [(0, n)] if name == "prefill" else [(p, 1) for p in positions]:
                    out.call(start, q_len, start)
                for layer, site, shape in _places(n_layers):
                    rows = {p: rng.normal(size=shape).astype(dtype) for p in positions}
                    kept = {p: edit(name, layer, site, p, row) for p, row in rows.items()}
                    found = {p: row for p, row in kept.items() if row is not None}
                    if found:
                        out.rows(site, np.stack(list(found.values())), positions=list(found), layer=layer)
    writer.finish()
    return folder


def _places(n_layers: int) -> Sequence[tuple[int | None, str, tuple[int, ...]]]:
    inside = [(layer, site, shape) for layer in range(n_layers) for site, shape in LAYER.items()]
    outside = [(None, site, shape) for site, shape in OUTSIDE.items()]
    return [outside[0], *inside, *outside[1:]]


assert {*LAYER, *OUTSIDE} <= {str(site) for site in Site}
