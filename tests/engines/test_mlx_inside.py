"""What lies inside layers of mlx-lm: rows of latent caches, which both passes have in one form, and routers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import kvdrift
from kvdrift.engines.mlx.engine import MLXEngine, MLXModel
from kvdrift.pipeline.audit import Audit
from kvdrift.trace.model import Trace
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.zoo.build_mlx import build_mlx

PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 31, 12, 4], "q": [7, 1, 70, 22, 13, 14, 15, 60, 61, 62, 11, 3]}
LAYER = 2


def _audited(model: Any) -> Audit:
    return kvdrift.audit(MLXModel(model), prompts=PROMPTS, span=2)


def _norm_lost(attention: Any) -> None:
    """A step caches the latent row before its norm."""
    _when_alone(attention.kv_a_layernorm, lambda kind, self, x: x, axis=1)


def _turned_further(attention: Any) -> None:
    """A step rotates the part of its key that is rotated as of the next position."""
    _when_alone(attention.rope, lambda kind, self, x, offset: kind.__call__(self, x, offset + 1), axis=2)


def _when_alone(module: Any, change: Any, axis: int) -> None:
    """Let `change` take the place of a module's call when one token comes, of one head where there are heads."""
    kind = type(module)

    def call(self: Any, x: Any, *rest: Any) -> Any:
        is_step = x.shape[axis] == 1 and (axis == 1 or x.shape[1] == 1)
        return change(kind, self, x, *rest) if is_step else kind.__call__(self, x, *rest)

    module.__class__ = type(kind.__name__, (kind,), {"__call__": call})


def test_rows_of_a_latent_cache_are_compared_and_pass() -> None:
    audit = _audited(build_mlx("deepseek_v3"))

    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)
    measured = audit.suite.judged.measured
    for mode in ("as_designed", "kv_aligned"):
        places = {(place.layer, str(place.site)) for place in measured.table.select(mode, measured.info.dtype).places}
        assert {(LAYER, "k_cache"), (LAYER, "v_cache")} <= places


@pytest.mark.parametrize(("change", "site"), [(_norm_lost, "k_cache"), (_turned_further, "v_cache")])
def test_a_wrong_row_of_a_latent_cache_is_found_where_it_is_kept(change: Any, site: str) -> None:
    model = build_mlx("deepseek_v3")
    change(model.layers[LAYER].self_attn)
    audit = _audited(model)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (LAYER, site)


def test_a_router_that_chooses_other_experts_is_found_at_the_router() -> None:
    model = build_mlx("mixtral")
    clean = _audited(model)
    gate = model.layers[1].block_sparse_moe.gate
    _when_alone(gate, lambda kind, self, x: -kind.__call__(self, x), axis=1)
    audit = _audited(model)

    assert clean.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)
    assert "router" in {str(site) for site in clean.suite.judged.measured.info.sites["1"]}
    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (1, "router")


def _gelu(kind: Any, mlp: Any, x: Any) -> Any:
    return mlp.down_proj(nn.gelu(mlp.gate_proj(x)) * mlp.up_proj(x))


def _other_matrix(kind: Any, linear: Any, x: Any) -> Any:
    return x @ (1.5 * linear.weight - 0.5 * linear.weight[::-1]).T


@pytest.mark.parametrize(
    ("change", "name", "cause"),
    [(_gelu, None, "between_products"), (_other_matrix, "up_proj", "product_wrong")],
)
def test_what_is_wrong_inside_a_feed_forward_part_has_a_cause(change: Any, name: str | None, cause: str) -> None:
    model = build_mlx("llama")
    mlp = model.layers[LAYER].mlp
    _when_alone(mlp if name is None else getattr(mlp, name), change, axis=1)
    audit = _audited(model)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (LAYER, "mlp_out")
    assert audit.diagnosis is not None
    assert str(audit.diagnosis.cause) == cause, audit.diagnosis


@pytest.mark.parametrize("bits", [None, 4])
def test_products_of_a_clean_model_err_as_rounding_does(bits: int | None) -> None:
    model = build_mlx("llama")
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits)
    model.set_dtype(mx.bfloat16)
    audit = _audited(model)

    (seen,) = (each for each in audit.evidence if (each.instrument, each.mode) == ("products", "kv_aligned"))
    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)
    assert seen.supports == "H0"
    assert seen.statistic is not None
    assert seen.statistic < 0.6
    assert seen.detail["n_products"] == 7 * len(model.layers) + 1  # four of attention, three behind it, and the head
    assert seen.detail["without"] == []


def test_what_changes_a_row_on_its_way_into_a_product_is_part_of_it() -> None:
    model = build_mlx("llama")
    attention = model.layers[LAYER].self_attn
    odd = 1.0 + 0.2 * (mx.arange(attention.q_proj.weight.shape[1]) % 2)
    _when_alone(attention, lambda kind, self, x, *rest: kind.__call__(self, x * odd, *rest), axis=1)
    audit = _audited(model)

    (seen,) = (each for each in audit.evidence if (each.instrument, each.mode) == ("products", "kv_aligned"))
    assert audit.verdict is Verdict.MISMATCH
    assert (seen.supports, seen.detail["guilty"]) == ("H1", "decode")


def test_products_of_float32_may_err_as_their_partial_sums_do() -> None:
    model, spreads = build_mlx("llama"), {}
    tokens = PROMPTS["p"]
    for dtype in (mx.float32, mx.bfloat16):
        model.set_dtype(dtype)
        trace = Trace("p", "prefill", "test", str(dtype).rpartition(".")[2], tuple(tokens))
        with MLXEngine(model, name="llama", cache="default", layers=None) as engine, engine.exact_products():
            engine.new_sequence(len(tokens)).extend(tokens, probe=(len(tokens) - 1,), sink=trace)
        spreads[dtype] = {
            item.name: float(np.linalg.norm(np.asarray(item.spread, dtype=np.float64)))
            for item in trace.products
            if item.layer == 0 and item.spread is not None
        }

    assert set(spreads[mx.float32]) == set(spreads[mx.bfloat16])
    n_terms = model.layers[0].self_attn.q_proj.weight.shape[1]
    assert all(
        spreads[mx.float32][name] > 0.5 * (n_terms / 3) ** 0.5 * size for name, size in spreads[mx.bfloat16].items()
    )


def test_a_wrong_head_in_half_is_found_without_the_ladder() -> None:
    model = build_mlx("llama")
    model.set_dtype(mx.bfloat16)
    embedding = model.model.embed_tokens
    kind = type(embedding)

    def as_linear(self: Any, x: Any) -> Any:
        logits = kind.as_linear(self, x)
        wrong = mx.concatenate([logits[..., :5] + 1.0, logits[..., 5:]], axis=-1)
        return wrong if x.shape[1] == 1 else logits

    embedding.__class__ = type(kind.__name__, (kind,), {"as_linear": as_linear})
    audit = kvdrift.audit(MLXModel(model), prompts=PROMPTS, span=2, ladder="off")

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert str(audit.first_failure.site) == "logits"


def test_a_rotation_in_half_is_named_by_the_grid_that_it_leaves() -> None:
    model = build_mlx("qwen2")

    rope = model.layers[LAYER].self_attn.rope
    kind = type(rope)

    def call(self: Any, x: Any, offset: int = 0) -> Any:
        if x.shape[2] > 1:
            return kind.__call__(self, x, offset)
        return kind.__call__(self, x.astype(mx.float16), offset).astype(x.dtype)

    rope.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    audit = _audited(model)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (LAYER, "q_rope")
    assert audit.diagnosis is not None
    assert str(audit.diagnosis.cause) == "rounded_to_float16", audit.diagnosis
