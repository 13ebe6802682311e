"""What llama.cpp rounds to at float32 is measured: the layer inputs of whole prompts are changed a little."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from kvdrift.engines.llamacpp.calls import Fed
from kvdrift.engines.llamacpp.engine import LlamaCppEngine
from kvdrift.engines.llamacpp.faults import Faultless
from kvdrift.engines.llamacpp.ggml import Tensor
from kvdrift.engines.llamacpp.graph import Role
from kvdrift.pipeline.audit import Audit, audit_engine
from kvdrift.trace.model import Trace
from kvdrift.vocabulary.evidence import Evidence, Verdict
from kvdrift.vocabulary.plan import AuditPlan
from kvdrift.vocabulary.sites import Site
from kvdrift_bench.models.tiny_gguf import write_tiny_gguf

PROMPTS = {"a": (3, 9, 17, 22, 41, 7, 60, 12, 33), "b": (5, 80, 2)}
TOKENS = PROMPTS["a"]
Floats = NDArray[np.float32]
Change = Callable[[Any], Floats]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "llama.gguf", "llama")


@dataclass
class AtMlp(Faultless):
    """What the feed-forward part of layer 1 hands on is changed, in decode steps or in every call."""

    change: Change
    in_every_call: bool = False

    def after(self, node: Tensor, role: Role | None, call: Fed) -> None:
        here = role is not None and (role.layer, role.site) == (1, Site.MLP_OUT)
        if here and (self.in_every_call or len(call.members) == 1):
            node.write(self.change(node.values()))


def to_bf16(values: Any) -> Floats:
    return np.asarray(values.astype(ml_dtypes.bfloat16).astype(np.float32))


def audit(path: Path, fault: Faultless | None = None, kv_type: str = "f32") -> Audit:
    with LlamaCppEngine(path, threads=1, kv_type=kv_type, fault=fault) as engine:
        return audit_engine(engine, AuditPlan(span=3), PROMPTS, engine.encode, out=None)


def evidence(audit: Audit, name: str) -> Evidence:
    (found,) = (item for item in audit.evidence if (item.instrument, item.mode) == (name, "kv_aligned"))
    return found


def fed(engine: LlamaCppEngine, replace: Any = None) -> Trace:
    found = Trace("p", "prefill", "x", "float32", TOKENS, inputs={})
    sequence = engine.new_sequence(len(TOKENS))
    sequence.extend(TOKENS, probe=(4, 8), sink=found, replace=replace)
    sequence.close()
    return found


def logits(found: Trace) -> Any:
    return np.concatenate([row.values for row in found.rows if row.site is Site.LOGITS])


@pytest.mark.parametrize("n_batch", [512, 4])
def test_the_inputs_of_all_layers_are_read_and_replaced_for_every_token(path: Path, n_batch: int) -> None:
    """llama.cpp computes what leaves the last layer for the wanted tokens alone."""
    with LlamaCppEngine(path, threads=1, n_batch=n_batch) as engine:
        plain = fed(engine)
        inputs = plain.inputs
        assert inputs is not None
        assert {key: rows.shape for key, rows in inputs.items()} == dict.fromkeys(range(3), (len(TOKENS), 64))
        assert [bool(np.isfinite(row).all()) for row in inputs[2]] == [at in (4, 8) for at in range(len(TOKENS))]
        np.testing.assert_array_equal(logits(fed(engine, inputs)), logits(plain))
        # Tokens that are not probed are replaced as well: later ones attend to them.
        other = inputs[1].copy()
        other[0] = other[1]
        moved = logits(fed(engine, {1: other}))
        assert np.abs(moved - logits(plain)).max() > 1e-3


def test_what_enters_the_first_layer_is_shifted_by_the_same_draw_at_either_sign(path: Path) -> None:
    with LlamaCppEngine(path, threads=1) as engine:
        plain = fed(engine)
        with engine.shifted(2.0**-6):
            up = fed(engine)
        with engine.shifted(-(2.0**-6)):
            down = fed(engine)
    x, above, below = (np.asarray(found.inputs[0], dtype=np.float64) for found in (plain, up, down) if found.inputs)
    np.testing.assert_allclose((above + below) / 2, x, rtol=1e-6)
    relative = np.std((above - x) / x)
    assert 0.9 * 2.0**-6 < relative < 1.1 * 2.0**-6
    assert not np.array_equal(logits(up), logits(plain))


@pytest.mark.parametrize("kv_type", ["f32", "f16"])
def test_a_clean_model_is_held_to_noise_that_was_measured(path: Path, kv_type: str) -> None:
    found = audit(path, kv_type=kv_type)
    assert found.verdict in (Verdict.STRUCTURAL_DRIFT, Verdict.EXACT), found.decision.reasons
    assert {"ASSUMED_NOISE", "PINNED"}.isdisjoint({caveat.code for caveat in found.caveats})
    ladder, noise = evidence(found, "ladder"), evidence(found, "noise")
    assert ladder.statistic is not None
    assert ladder.statistic < 0.25  # measured: 0.06
    assert noise.supports is None
    assert noise.statistic is not None
    assert 2.0**-25 < noise.statistic < 2.0**-17  # sums of float32, a few roundings


def test_a_fault_just_above_the_noise_is_found_where_it_is(path: Path) -> None:
    """One and a half times the stated minimum."""
    stated = evidence(audit(path), "ladder").minimum_detectable
    assert stated is not None
    assert stated < 1e-4  # measured: 2.9e-5, of attn_probs with three keys
    found = audit(path, AtMlp(lambda values: values * np.float32(1.0 + 1.5 * stated)))
    assert found.verdict is Verdict.MISMATCH
    assert found.first_failure is not None
    assert (found.first_failure.layer, found.first_failure.site) == (1, Site.MLP_OUT)
    assert evidence(found, "ladder").supports == "H1"


def test_a_step_that_rounds_more_coarsely_than_anything_in_play_is_a_mismatch(path: Path) -> None:
    """bfloat16 in decode alone, of a model whose weights and cache are float32: its own noise does not excuse it."""
    found = audit(path, AtMlp(to_bf16))
    assert found.verdict is Verdict.MISMATCH
    assert found.first_failure is not None
    assert (found.first_failure.layer, found.first_failure.site) == (1, Site.MLP_OUT)
    assert evidence(found, "noise").supports == "H1"
    assert "decode alone" in evidence(found, "noise").text


def test_both_passes_that_round_alike_pass_and_the_minimum_says_so(path: Path) -> None:
    found = audit(path, AtMlp(to_bf16, in_every_call=True))
    assert found.verdict in (Verdict.STRUCTURAL_DRIFT, Verdict.EXACT), (found.first_failure, found.decision.reasons)
    (pinned,) = (caveat.text for caveat in found.caveats if caveat.code == "PINNED")
    assert "mlp_out of layer 1 in both passes" in pinned
    plain = evidence(audit(path), "ladder").minimum_detectable
    raised = evidence(found, "ladder").minimum_detectable
    assert plain is not None
    assert raised is not None
    assert raised > 100 * plain


class SeesLaterTokens(Faultless):
    """In a call of several tokens each sees those behind it."""

    def before(self, node: Tensor, call: Fed) -> None:
        mask = node.source(1) if node.op == "SOFT_MAX" and len(call.members) > 1 else None
        if mask is not None:
            values = mask.values().copy()
            values[..., : len(call.members), : len(call.members)] = 0.0
            mask.write(values)


def test_a_prefill_that_depends_on_later_tokens_is_told(path: Path) -> None:
    found = audit(path, SeesLaterTokens())
    assert found.verdict is Verdict.MISMATCH
    assert "PREFILL_UNSTABLE" in {caveat.code for caveat in found.caveats}
    assert found.diagnosis is not None
    assert found.diagnosis.cause == "not_causal"
