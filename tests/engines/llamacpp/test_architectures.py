"""Graphs of other shapes: sites by the same names where they exist; softcap, window, sinks, experts, fused weights."""

from pathlib import Path

import numpy as np
import pytest

from kvdrift.engines.llamacpp.engine import LlamaCppEngine
from kvdrift.engines.llamacpp.faults import Faultless
from kvdrift.errors import CaptureError
from kvdrift.pipeline.audit import Audit, audit_engine
from kvdrift.trace.model import Trace
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.facts import AttentionSpec
from kvdrift.vocabulary.plan import AuditPlan
from kvdrift.vocabulary.sites import Site
from kvdrift_bench.models.tiny_gguf import ARCHITECTURES, write_tiny_gguf
from kvdrift_bench.planted.facts import Tally
from kvdrift_bench.planted.llamacpp import corpus_for, survey
from tests.support.matrix import further

# Longer than the window of 6 that some of them have.
PROMPTS = {"a": (3, 9, 17, 22, 41, 7, 60, 12, 33), "b": (5, 80, 2)}
LACKING = {"gpt-oss": {"ffn_norm_out"}, "phi3": {"resid_attn"}, "deepseek2": {"q_proj", "k_proj", "v_proj"}}
# A window and caps, sinks and experts, fused weights, no rotation, values from the cache of the keys, queries normed
# behind their rotation; the others lie between them.
CORE = ("llama", "gemma2", "gpt-oss", "phi3", "gpt2", "deepseek2", "hunyuan-dense")
KINDS = [*CORE, *further(*(kind for kind in ARCHITECTURES if kind not in CORE))]
UNROTATED = ("gpt2", "bloom")
EXTRA = {"qwen3": {Site.Q_NORM, Site.K_NORM}, "mixtral": {Site.ROUTER}, "gpt-oss": {Site.ROUTER}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def model(models: Path, kind: str) -> Path:
    path = models / f"{kind}.gguf"
    return path if path.exists() else write_tiny_gguf(path, kind)


def audit(path: Path, *, fault: Faultless | None = None, flash: bool = False, kv_type: str = "f16") -> Audit:
    with LlamaCppEngine(path, threads=1, flash=flash, kv_type=kv_type, fault=fault) as engine:
        return audit_engine(engine, AuditPlan(span=3), PROMPTS, engine.encode, out=None)


@pytest.mark.parametrize(
    ("flash", "kv_type"),
    [
        (False, "f16"),
        (True, "q8_0"),
        *(pytest.param(*pair, marks=pytest.mark.matrix) for pair in ((True, "f32"), (False, "bf16"), (True, "bf16"))),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_clean_model_passes(models: Path, kind: str, flash: bool, kv_type: str) -> None:
    if kind in ("phi3", "gpt2", "bloom") and kv_type == "q8_0":
        with pytest.raises(CaptureError, match="K cache type q8_0 with block size 32 does not divide"):
            audit(model(models, kind), flash=flash, kv_type=kv_type)
        return
    found = audit(model(models, kind), flash=flash, kv_type=kv_type)
    assert found.verdict in (Verdict.STRUCTURAL_DRIFT, Verdict.EXACT), (found.first_failure, found.decision.reasons)
    assert set(found.view["coverage"]["sites_not_offered"]) == LACKING.get(kind, set())
    evidence = {(item.instrument, item.mode): item for item in found.evidence}
    assert evidence["replay", "kv_aligned"].supports == "H0"
    # Attention comes out of its operands: where it does in neither pass, nothing is known of it.
    assert evidence["replay", "kv_aligned"].detail["n_shared"] == 0
    ladder = evidence["ladder", "kv_aligned"].statistic
    assert ladder is not None
    assert ladder < 0.5


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, "slot_aliased") for kind in CORE),
        ("llama", "position_plus_one"),
        *further(*((kind, "slot_aliased") for kind in ARCHITECTURES if kind not in CORE)),
        *further(*((kind, "position_plus_one") for kind in ARCHITECTURES if kind not in ("llama", *UNROTATED))),
    ],
)
def test_a_fault_is_found_at_its_address(models: Path, kind: str, name: str) -> None:
    path = model(models, kind)
    with LlamaCppEngine(path, threads=1) as engine:
        grounds = survey(engine)
    (fault,) = (fault for fault in corpus_for(2) if fault.name == name)
    assert fault.applies(grounds) is None
    found = audit(path, fault=fault.plant(Tally()))
    assert found.verdict is Verdict.MISMATCH
    assert found.first_failure is not None
    assert (found.first_failure.layer, found.first_failure.site) in fault.places(grounds)


@pytest.mark.parametrize("kind", EXTRA)
def test_sites_of_its_own_are_recorded(models: Path, kind: str) -> None:
    with LlamaCppEngine(model(models, kind), threads=1) as engine:
        assert set(engine.info.sites["0"]) >= EXTRA[kind]


def specs(path: Path, *, flash: bool) -> list[AttentionSpec]:
    tokens = PROMPTS["a"]
    trace = Trace("a", "prefill", "full", "native", tokens)
    with LlamaCppEngine(path, threads=1, flash=flash) as engine:
        sequence = engine.new_sequence(len(tokens))
        sequence.extend(tokens, probe=(8,), sink=trace)
        sequence.close()
    return [trace.attention[layer] for layer in sorted(trace.attention)]


@pytest.mark.parametrize("flash", [False, True])
def test_how_a_layer_attends_is_read_from_its_operations(models: Path, flash: bool) -> None:
    first, second = specs(model(models, "gemma2"), flash=flash)
    assert {first.window, second.window} == {6, None}
    assert first.softcap == pytest.approx(5.0)
    first, second = specs(model(models, "gpt-oss"), flash=flash)
    assert {first.window, second.window} == {6, None}
    assert first.sinks is not None
    assert len(first.sinks) == 4
    (plain, _) = specs(model(models, "llama"), flash=flash)
    assert plain == AttentionSpec(pytest.approx(32**-0.5), None, None, None)  # type: ignore[arg-type]


def test_an_activation_from_a_table_is_known_to_be_pinned(models: Path) -> None:
    """ggml looks GELU up in a table of float16, whatever the rung; SiLU it computes in float32."""
    for kind, pinned in (("gemma2", 2.0**-11), ("llama", 0.0)):
        with LlamaCppEngine(model(models, kind), threads=1) as engine:
            assert engine.info.ladder.pinned == pinned
    codes = {caveat.code for caveat in audit(model(models, "gemma2")).caveats}
    assert "PINNED" in codes


def test_what_was_read_is_a_copy(models: Path) -> None:
    """The memory of a node is used again by those that follow, and by the next call."""
    tokens = PROMPTS["a"]
    with LlamaCppEngine(model(models, "qwen3"), threads=1) as engine:
        sequence, found = engine.new_sequence(16), Trace("a", "decode", "x", "native", tokens)
        sequence.extend(tokens[:8])
        sequence.extend(tokens[8:], probe=(8,), sink=found)
        before = [record.values.copy() for record in found.rows]
        sequence.extend((1, 2, 3))
        for record, values in zip(found.rows, before, strict=True):
            np.testing.assert_array_equal(record.values, values)
            assert record.values.flags.owndata or record.values.base is not None
        (norm,) = [r.values for r in found.rows if (r.layer, r.site) == (0, Site.Q_NORM)]
        (rotated,) = [r.values for r in found.rows if (r.layer, r.site) == (0, Site.Q_ROPE)]
        # Rotation keeps the length of every head, so a row that was overwritten would not have it.
        before_it, after_it = (np.linalg.norm(rows.reshape(4, 32), axis=1) for rows in (norm, rotated))
        np.testing.assert_allclose(after_it, before_it, rtol=1e-5)
        sequence.close()
