"""Models of mlx-lm while nothing watches, and what float64 and windows are to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama
from mlx_lm.utils import load_model

import kvdrift
from kvdrift.engines.mlx.engine import MLXModel
from kvdrift.errors import UsageError
from kvdrift.pipeline.audit import Audit
from kvdrift.trace.model import Trace
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.plan import AuditPlan
from kvdrift_bench.run.mlx_files import as_before_transformers_5
from kvdrift_bench.run.versus_mlx import KINDS, against_mlx
from tests.engines.test_mlx import PASSES, audited, tiny


class Shy(llama.MLP):  # type: ignore[misc]
    """Computes another thing while somebody looks: its class is then another one."""

    def __call__(self, x: Any) -> Any:
        out = super().__call__(x)
        return out if type(self) is Shy else out * 1.02


def shy() -> Any:
    model = tiny()
    model.layers[1].mlp.__class__ = Shy
    return model


def codes(audit: Audit) -> set[str]:
    return {item["code"] for item in audit.view["caveats"]}


def test_what_nobody_watches_is_what_was_judged() -> None:
    audit = audited(tiny(), mode="as_designed")
    unobserved = [item for item in audit.view["instruments"] if item["instrument"] == "unobserved"]

    assert audit.verdict in PASSES
    assert "OBSERVED_DIFFERS" not in codes(audit)
    assert unobserved


def test_a_model_that_computes_another_thing_while_it_is_watched_does_not_pass() -> None:
    audit = audited(shy(), mode="as_designed")

    assert audit.verdict not in PASSES
    assert "OBSERVED_DIFFERS" in codes(audit)


def test_classes_and_functions_are_those_of_mlx_while_nothing_watches() -> None:
    model = tiny()
    before = (type(model.layers[0]), mx.fast.scaled_dot_product_attention)
    with MLXModel(model).opened(AuditPlan()) as opened:
        engine: Any = opened.engine
        watched = (type(model.layers[0]), mx.fast.scaled_dot_product_attention)
        with engine.unobserved() as told:
            trace = Trace("p", "prefill", "", "float32", (1, 2, 3))
            free = (type(model.layers[0]), mx.fast.scaled_dot_product_attention)
            assert not told.draws
            np.array(mx.random.normal((2,)))
            assert told.draws
            with pytest.raises(UsageError, match="gives the logits of its last token"):
                engine.new_sequence(8).extend([1, 2, 3], probe=(0,), sink=trace)
        again = (type(model.layers[0]), mx.fast.scaled_dot_product_attention)
        with engine.at("float64"), pytest.raises(kvdrift.NotApplicable), engine.unobserved():
            pass

    assert free == before
    assert watched[0] is not before[0]
    assert again[1] is not before[1]
    assert audited(model, mode="as_designed").verdict is not Verdict.MISMATCH


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("olmo3", ""),  # windows: a ring holds fewer rows than prefill reads
        pytest.param("phi", "", marks=pytest.mark.matrix),  # layer norms, which mlx computes in float32 alone
        ("gemma", "its configuration says gelu_pytorch_tanh, and mlx-lm computes gelu by the error function"),
    ],
)
def test_transformers_and_mlx_agree_once_mlx_does_what_the_configuration_says(kind: str, why: str) -> None:
    (found,) = against_mlx({kind: KINDS[kind]})

    assert found.error == ""
    assert found.rung == "float64"
    assert found.is_explained
    assert (found.verdict, found.why) == ("MISMATCH" if why else "STRUCTURAL_DRIFT", why)
    assert found.place == ("layer 0 / mlp_out" if why else "")
    assert found.apart is not None
    assert 1e-9 < found.apart[0] < 1e-6
    assert found.apart[1] < 1e-14 or found.left


def test_settings_of_rope_are_written_where_mlx_reads_them(tmp_path: Path) -> None:
    """transformers 5 writes a base of 10000 where mlx-lm does not look, and mlx-lm takes a million in its place."""
    from kvdrift.zoo.build import build

    model = build("qwen2")
    model.save_pretrained(tmp_path)
    found: Any = kvdrift.compare(model, MLXModel(load_model(tmp_path)[0]), prompts={"p": [5, 9, 17, 3, 22]})
    written = as_before_transformers_5(model.config.to_dict())

    assert str(found.decision.first.place) == "layer 0 / q_rope"
    assert found.decision.cause[1] == "the base of RoPE is 10000 in A and 1e+06 in B"
    assert (written["rope_theta"], written["rope_scaling"], written["head_dim"]) == (10000.0, None, 16)
