"""From the nodes of a llama.cpp graph to sites: which node plays which role, and how its rows are read.

llama.cpp names its nodes as its `build_*` functions call them, with the layer behind a dash: `Qcur-3`. One name may
belong to several nodes (a projection, the same reshaped, the same rotated), so the operation is looked at too. What
attention reads is taken from the operands of the attention operations themselves, whatever those are called.
Knows nodes and sites; knows nothing of sequences.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvdrift.engines.llamacpp.ggml import Tensor
from kvdrift.errors import CaptureError
from kvdrift.trace.model import Array
from kvdrift.vocabulary.facts import AttentionSpec
from kvdrift.vocabulary.sites import Site

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]

# Names whose node is one site, whatever its operation. Later nodes of one site take the place of earlier ones.
_NAMED = {
    "attn_norm": Site.ATTN_NORM_OUT,
    "Qcur_normed": Site.Q_NORM,
    "Kcur_normed": Site.K_NORM,
    "kqv_out": Site.ATTN_CTX,
    "attn_out": Site.ATTN_OUT,
    "ffn_inp": Site.RESID_ATTN,
    "sa_out": Site.RESID_ATTN,
    "ffn_norm": Site.FFN_NORM_OUT,
    "ffn_moe_logits": Site.ROUTER,
    "ffn_out": Site.MLP_OUT,
    "ffn_moe_out": Site.MLP_OUT,
    "l_out": Site.LAYER_OUT,
    "result_norm": Site.FINAL_NORM_OUT,
    "result_output": Site.LOGITS,
}
# Names that stand for a projection until it is rotated.
_PROJECTED = {"Qcur": Site.Q_PROJ, "Kcur": Site.K_PROJ, "Vcur": Site.V_PROJ}
_PROJECTING = frozenset({"MUL_MAT", "ADD", "VIEW", "CLAMP", "CONT"})
# Matrices whose product is a site also in graphs that do not name the node.
_WEIGHTS = {"attn_output": Site.ATTN_OUT, "ffn_down": Site.MLP_OUT}
_WEIGHT = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
# What enters the first layer, the last of these that a graph has: the embedding, scaled, with positions, or normed.
_FIRST_INPUTS = frozenset({"embd", "inp_scaled", "inp_embd", "inp_embd_scaled", "inpL"})
_FIRST_NORM = "inp_norm"
_CACHE = re.compile(r"cache_([kv])_l(\d+)")
_TABLES = frozenset({"GELU", "GELU_QUICK", "GEGLU", "GEGLU_QUICK"})
_SCORES = frozenset({"kq", "kq_tanh", "kq_scaled", "kq_scaled_1", "kq_scaled_2"})


@dataclass(frozen=True, slots=True)
class Role:
    """What a node is: `kind` is site, first_input, rotated_query, store_keys, scores, softmax, values or flash."""

    kind: str
    layer: int | None
    site: Site | None = None


def role_of(node: Tensor) -> Role | None:
    """Return what a node is, None if nothing is read from it."""
    op = node.op
    if op == "FLASH_ATTN_EXT":
        keys = node.source(1)
        layer = None if keys is None else cache_layer(keys)
        return None if layer is None else Role("flash", layer, Site.ATTN_CTX)
    name = node.name
    if op == "SET_ROWS":
        found = _CACHE.match(name)
        return Role("store_keys", int(found[2])) if found and found[1] == "k" else None
    base, dash, number = name.rpartition("-")
    if not dash or not number.isdigit():
        if name in _FIRST_INPUTS:
            return Role("first_input", None, Site.EMBED_OUT if name == "embd" else None)
        site = _NAMED.get(name)
        return Role("site", None, site) if site is not None else _product(node, op)
    layer = int(number)
    if base == _FIRST_NORM:
        return Role("first_input", None)
    if base in _PROJECTED:
        if op == "ROPE":
            return Role("rotated_query", layer) if base == "Qcur" else None
        return Role("site", layer, _PROJECTED[base]) if op in _PROJECTING else None
    if base in _SCORES:
        return Role("scores", layer)
    if base == "kq_soft_max":
        return Role("softmax", layer)
    if base == "kqv":
        return Role("values", layer, Site.ATTN_CTX)
    site = _NAMED.get(base)
    return Role("site", layer, site) if site is not None else _product(node, op)


def _product(node: Tensor, op: str) -> Role | None:
    """The role of a node that has no known name, from the weights that it multiplies with."""
    weights = node.source(0) if op == "MUL_MAT" else None
    found = None if weights is None else _WEIGHT.fullmatch(weights.name)
    site = _WEIGHTS.get(found[2]) if found else None
    return None if found is None or site is None else Role("site", int(found[1]), site)


def is_table(node: Tensor) -> bool:
    """Whether a node is an activation that ggml's CPU backend looks up in a table of float16 values.

    Two inputs that differ in their last float32 bit may then give outputs that differ by a float16 rounding.
    """
    return node.op in ("UNARY", "GLU") and node.description in _TABLES


def cache_layer(tensor: Tensor) -> int | None:
    """Return the layer whose cache a tensor is a view or a cast of, None if it is of no cache."""
    found = _cached(tensor)
    return None if found is None else int(found[2])


def is_latent(values: Tensor) -> bool:
    """Whether attention reads its values from the cache of the keys: one latent row is both, and what attention gives
    is multiplied up to the width of values only then."""
    found = _cached(values)
    return found is not None and found[1] == "k"


def _cached(tensor: Tensor) -> re.Match[str] | None:
    """Return the name of the cache that a tensor is a view or a cast of."""
    current: Tensor | None = tensor
    for _ in range(8):
        if current is None:
            return None
        found = _CACHE.match(current.name)
        if found:
            return found
        current = current.view_source or current.source(0)
    return None


def cache_operand(node: Tensor, kind: str, site: Site) -> tuple[Tensor, bool] | None:
    """Return the keys or values that an attention operation of a role `kind` reads, and whether their cells are on the
    fastest axis; None if the node does not read that side of the cache."""
    if site is Site.K_CACHE:
        index = 1 if kind == "flash" else 0 if kind == "scores" and node.name.startswith("kq-") else None
    else:
        index = 2 if kind == "flash" else 0 if kind == "values" else None
    found = None if index is None else node.source(index)
    return None if found is None else (found, kind == "values")


def token_rows(node: Tensor, n_tokens: int, n_outputs: int, rows: Indices, output_rows: Indices) -> Array | None:
    """Return [probed token, element] of a node that has one vector per token.

    After the last attention llama.cpp goes on with the tokens alone whose logits were asked for: `rows` index the fed
    tokens, `output_rows` the same ones among those. None if the node has another number of rows. Always a copy: the
    memory is used again by the nodes that follow.
    """
    values = node.values()
    for count, index in ((n_tokens, rows), (n_outputs, output_rows)):
        if values.shape[0] == 1 and values.shape[1] == count and count > 1:
            return np.ascontiguousarray(values[0][index]).reshape(len(index), values.shape[2] * values.shape[3])
        if values.shape[:2] == (1, 1) and values.shape[2] == count:
            return np.ascontiguousarray(values[0, 0][index])
        if count == 1 and values.shape[:2] == (1, 1):  # one token, its heads on an axis of their own
            return values.flatten()[np.newaxis]
    return None


def _require_one_stream(node: Tensor) -> None:
    if node.shape[0] != 1:
        raise CaptureError(f"{node.name} holds {node.shape[0]} cache streams; only a unified cache can be read")


def _one_stream(node: Tensor) -> Array:
    _require_one_stream(node)
    return np.asarray(node.values()[0])


def head_rows(node: Tensor, cells: Indices) -> Array:
    """Return a copy of some cells, [cell, kv head, dim], of keys, or of values that are not transposed."""
    _require_one_stream(node)
    return np.ascontiguousarray(node.rows_at(2, cells)[0].transpose(1, 0, 2))


def transposed_rows(node: Tensor, cells: Indices) -> Array:
    """Return a copy of some cells, [cell, kv head, dim], of values that are kept with the cells on the fastest axis."""
    _require_one_stream(node)
    return np.ascontiguousarray(node.rows_at(3, cells)[0].transpose(2, 0, 1))


def rows_by_head(node: Tensor, rows: Indices) -> Array:
    """Return a copy of some rows, [row, head, ...], of what attention reads or computes: queries, scores, weighted
    values. NaN included."""
    one = _one_stream(node)
    return np.ascontiguousarray(one[rows] if node.op == "FLASH_ATTN_EXT" else one[:, rows].transpose(1, 0, 2))


def attention_spec(
    scale: float,
    slopes: Floats | None,
    softcap: float | None,
    sinks: Tensor | None,
    seen: list[int],
    position: int,
) -> AttentionSpec | None:
    """Return how a layer attends, as its operation was called; None if replay knows no such attention.

    `slopes` [head] are those of ALiBi. `seen` are the positions that the mask leaves visible to the token at
    `position`.
    """
    if not seen or (softcap is not None and softcap <= 0.0):
        return None
    first, last = min(seen), max(seen)
    if last != position or len(seen) != last - first + 1:
        return None
    values = None if sinks is None else tuple(float(value) for value in sinks.values().ravel())
    window = None if first == 0 else position - first + 1
    return AttentionSpec(scale, softcap, window, values, None if slopes is None else tuple(slopes.tolist()))


def alibi_slopes(max_bias: float, n_heads: int) -> Floats | None:
    """Return the ALiBi slopes [head] of an operation with this parameter, None where it is 0.

    ggml-cpu ops.cpp, soft_max: powers of 2^(-max_bias / n) for the n heads up to the largest power of two, and of the
    root of that, odd ones, for the others.
    """
    if max_bias == 0.0:
        return None
    n = 2 ** (n_heads.bit_length() - 1)
    head = np.arange(n_heads)
    first = 2.0 ** (-max_bias / n * (head + 1))
    return np.asarray(np.where(head < n, first, 2.0 ** (-max_bias / 2.0 / n * (2 * (head - n) + 1))))


def scores_again(queries: Array, keys: Array, scale: float, softcap: float | None) -> Floats:
    """Return the scores [row, head, cell] that a fused attention does not show, in float64.

    `queries` [row, head, dim] and `keys` [cell, kv head, dim] are the operation's own operands. A NaN in one of them
    makes its scores NaN. No mask is applied.
    """
    groups = queries.shape[1] // keys.shape[1]
    wide = np.repeat(keys.astype(np.float64), groups, axis=1)
    scores = scale * np.einsum("rhd,chd->rhc", queries.astype(np.float64), wide)
    return np.asarray(scores if softcap is None else softcap * np.tanh(scores / softcap))


def softmax(scores: Floats, sinks: Tensor | None) -> Floats:
    """Return the probabilities [row, head, cell] of scores of that shape.

    A sink is one more logit per head, which has no value. A row whose scores are all -inf has probabilities of 0. A NaN
    or an infinite score makes its row 0, because no total is above 0 then.
    """
    top = scores.max(axis=-1, keepdims=True)
    extra = np.full((1, scores.shape[1], 1), -np.inf)
    if sinks is not None:
        extra = sinks.values().astype(np.float64).reshape(1, -1, 1)
    top = np.maximum(top, extra)
    top = np.where(np.isneginf(top), 0.0, top)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True) + np.exp(extra - top)
    return np.asarray(np.divide(weights, total, out=np.zeros_like(weights), where=total > 0.0))
