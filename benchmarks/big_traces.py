"""Directories of traces of any size that take little of a disk: files with holes, in which nearly all values are zero.

One value of every row is not, and it drifts by one rounding in decode, so that no pair has equal bits and every
instrument computes on all of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

_BYTES = 2  # of a bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is recorded of each prompt: every layer's rows at the last positions, and all that attention read there."""

    n_tokens: int
    n_positions: int
    n_layers: int = 4
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128

    def sites(self) -> dict[str, tuple[int, ...]]:
        """The sites of a layer with the shape of one row."""
        whole, query = (self.hidden,), (self.heads, self.dim)
        rows = ("layer_in", "attn_norm_out", "attn_out", "resid_attn", "ffn_norm_out", "mlp_out", "layer_out")
        return {**dict.fromkeys(rows, whole), "q_rope": query, "k_rope": (self.kv_heads, self.dim), "attn_ctx": query}


@dataclass(slots=True)
class _File:
    """A pass in the making: what its header and the manifest say, and the values that are not zero."""

    header: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    values: list[tuple[int, bytes]] = field(default_factory=list)
    size: int = 0

    def add(self, site: str, layer: int | None, positions: list[int], shape: list[int], value: float) -> None:
        """Add a tensor whose rows begin with `value`, a little more in each further row."""
        name = f"{len(self.records)}.{site}"
        n_bytes = math.prod(shape) * _BYTES
        step = n_bytes // shape[0]
        first = np.array(value * (1.0 + np.arange(shape[0]) / 64), dtype=ml_dtypes.bfloat16)
        self.values += [(self.size + i * step, first[i].tobytes()) for i in range(shape[0])]
        self.header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [self.size, self.size + n_bytes]}
        self.records.append({"tensor": name, "site": site, "layer": layer, "positions": positions})
        self.size += n_bytes

    def write(self, path: Path) -> None:
        """Write the header and the values that are not zero; the rest of the file is a hole."""
        head = json.dumps(self.header).encode()
        head += b" " * (-len(head) % 8)
        with path.open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            start = file.tell()
            file.truncate(start + self.size)
            for at, data in self.values:
                _put(file, start + at, data)


def _put(file: IO[bytes], at: int, data: bytes) -> None:
    file.seek(at)
    file.write(data)


def write_big(folder: Path, shape: Shape, n_prompts: int) -> int:
    """Write traces of so many prompts, and return the bytes of their files."""
    folder.mkdir(parents=True)
    traces = [item for number in range(n_prompts) for item in _passes(folder, shape, number)]
    engine = {"engine": "bench", "model": "zeros", "dtype": "bfloat16", "n_layers": shape.n_layers}
    manifest = {"format": "kvdrift-trace", "format_version": 1, "engine": engine, "traces": traces}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _passes(folder: Path, shape: Shape, number: int) -> Iterator[dict[str, Any]]:
    tokens = [(7 * number + i) % 1000 for i in range(shape.n_tokens)]
    first = shape.n_tokens - shape.n_positions
    steps = [[0, first, 0], *([at, 1, at] for at in range(first, shape.n_tokens))]
    for kind, calls in (("prefill", [[0, shape.n_tokens, 0]]), ("decode", steps)):
        file = _File()
        drift = 1.0 + 2.0**-7 * (kind == "decode")
        _record(file, shape, list(range(first, shape.n_tokens)), 1.0 + number / 128, drift)
        name = f"p{number}.{kind}"
        file.write(folder / f"{name}.safetensors")
        yield {
            "name": name,
            "file": f"{name}.safetensors",
            "prompt": f"p{number}",
            "pass_name": kind,
            "rung": "bfloat16",
            "tokens": tokens,
            "calls": [dict(zip(("start", "q_len", "cache_len_before"), call, strict=True)) for call in calls],
            "attention": [{"layer": layer, "scale": shape.dim**-0.5} for layer in range(shape.n_layers)],
            "records": file.records,
        } | ({"mode": "as_designed"} if kind == "decode" else {})


def _record(file: _File, shape: Shape, positions: list[int], value: float, drift: float) -> None:
    n = len(positions)
    file.add("embed_out", None, positions, [n, shape.hidden], value)
    for layer in range(shape.n_layers):
        for site, row in shape.sites().items():
            file.add(site, layer, positions, [n, *row], value * (drift if layer or site != "layer_in" else 1.0))
        for position in positions:
            for site in ("k_cache", "v_cache"):
                file.add(site, layer, [position], [position + 1, shape.kv_heads, shape.dim], value * drift)
    file.add("logits", None, positions, [n, shape.hidden], value * drift)
