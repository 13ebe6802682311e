"""Two engines: one function or two, where they part, and which of them is off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import kvdrift
from kvdrift.versus.compare import EngineComparison
from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.facts import Prompt
from kvdrift.vocabulary.sites import Site
from kvdrift_bench.models.tiny import lively_model
from kvdrift_bench.models.tiny_gguf import write_tiny_gguf

PROMPTS = {"p": [5, 9, 17, 3, 22, 41, 7, 11]}


def tiny(**options: Any) -> Any:
    return lively_model("llama", torch.float32, num_hidden_layers=2, **options)


def compared(a: Any, b: Any, **options: Any) -> EngineComparison:
    found = kvdrift.compare(a, b, prompts=PROMPTS, **options)
    assert isinstance(found, EngineComparison)
    return found


@contextmanager
def changed(module: torch.nn.Module, change: Callable[[Any], Any], *, when: str) -> Iterator[None]:
    """Change what a module returns in prefill, in decode or in both."""

    def hook(_module: Any, inputs: Any, output: Any) -> Any:
        several = inputs[0].shape[1] > 1
        return change(output) if when == "both" or (when == "prefill") == several else None

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_one_function_in_two_settings_passes(tmp_path: Path) -> None:
    one, two = tiny().to(torch.bfloat16), tiny().to(torch.bfloat16)
    two.set_attn_implementation("eager")
    found = compared(one, two, out=tmp_path / "run")

    assert found.verdict == "STRUCTURAL_DRIFT"
    assert found.guilty is None
    assert found.decision.native is not None
    assert found.decision.native > 0.0
    assert found.decision.minimum < 1e-9
    assert "A and B compute one function" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize(
    ("options", "place", "cause", "words"),
    [
        ({"rms_norm_eps": 1e-3}, "layer 0 / attn_norm_out", "eps", "about 1e-06 in A, 0.001 in B"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
            "layer 0 / q_rope",
            "rope_base",
            "10000 in A and 5000 in B",
        ),
        ({"hidden_act": "gelu"}, "layer 0 / mlp_out", "settings", "hidden_act 'silu' in A, 'gelu' in B"),
    ],
)
def test_two_functions_are_told_apart(options: dict[str, Any], place: str, cause: str, words: str) -> None:
    found = compared(tiny(), tiny(**options))

    assert found.verdict == "MISMATCH"
    assert found.guilty is None
    assert "both are consistent, and they compute different functions" in found.decision.conclusion
    assert found.decision.first is not None
    assert str(found.decision.first.place) == place
    assert found.decision.cause is not None
    assert found.decision.cause[0] == cause
    assert words in found.decision.cause[1]


def test_another_scale_of_attention_is_named() -> None:
    other = tiny()
    for layer in other.model.layers:
        layer.self_attn.scaling *= 1.01
    found = compared(tiny(), other)

    assert found.decision.first is not None
    assert str(found.decision.first.place) == "layer 0 / attn_ctx"
    assert found.decision.cause == ("scale", "attention has the scale 0.25 in A and 0.2525 in B")


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("when", ["prefill", "decode", "both"])
def test_the_guilty_engine_and_its_pass_are_named(side: str, when: str) -> None:
    bad, good = tiny(), tiny()
    with changed(bad.model.layers[1].self_attn.v_proj, lambda y: y * 1.001, when=when):
        found = compared(*((bad, good) if side == "A" else (good, bad)))

    assert found.verdict == "MISMATCH"
    assert found.guilty == side
    assert found.decision.guilty_pass == (None if when == "both" else when)
    assert found.decision.first is not None
    assert str(found.decision.first.place) == "layer 1 / v_proj"


def test_an_attention_that_is_not_what_it_read_is_off() -> None:
    def attention(*args: Any, **options: Any) -> Any:
        context, weights = sdpa_attention_forward(*args, **options)
        return context * 1.001, weights

    AttentionInterface.register("a_little_off", attention)
    AttentionMaskInterface.register("a_little_off", sdpa_mask)
    bad = tiny()
    bad.set_attn_implementation("a_little_off")  # in both passes: the engine agrees with itself
    found = compared(bad, tiny())

    assert found.verdict == "MISMATCH"
    assert found.guilty == "A"
    assert "its attention is not that of the queries, keys and values it read" in found.decision.conclusion


def test_llamacpp_against_transformers_with_other_rotary_pairs(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    clean = compared(model, f"llamacpp:{file}")

    assert clean.verdict == "STRUCTURAL_DRIFT"
    assert any("rotary pairs of B" in caveat.text for caveat in clean.decision.caveats)
    assert clean.view["environment"]["sides"]["A"]["rung"] == "float32"
    with changed(model.model.layers[1].self_attn.v_proj, lambda y: y * 1.01, when="decode"):
        found = compared(model, f"llamacpp:{file}")
    assert (found.guilty, found.decision.guilty_pass) == ("A", "decode")
    assert found.decision.first is not None
    assert found.decision.first.layer == 1


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    other = lively_model("llama", torch.float32, num_hidden_layers=3)
    for b, message in (
        (other, "A has 2 layers and B 3"),
        (tiny(vocab_size=150), "A has a vocabulary of 128 and B of 150"),
        (tiny(intermediate_size=96, hidden_size=32), "these are not one model"),
    ):
        with pytest.raises(kvdrift.KvdriftError, match=message):
            compared(tiny(), b, out=tmp_path / "run")
    with pytest.raises(kvdrift.AlignmentError, match="the weights of B are those of A rounded to bfloat16"):
        compared(tiny(), tiny().to(torch.bfloat16), out=tmp_path / "run")
    with pytest.raises(kvdrift.UsageError, match="third is not for an engine"):
        compared(tiny(), tiny(), third="x.jsonl")
    with pytest.raises(kvdrift.UsageError, match="A is an engine and B is a dump of logprobs"):
        compared(tiny(), "b.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_tokenizers_that_differ_are_refused() -> None:
    from kvdrift.engines.base import OpenEngine
    from kvdrift.engines.hf.engine import HFEngine

    texts = {"p": "abc"}
    with HFEngine(tiny()) as a, HFEngine(tiny()) as b:
        one, two = OpenEngine(a, lambda text: [len(text), 5]), OpenEngine(b, lambda text: [1, len(text), 5])
        with pytest.raises(kvdrift.AlignmentError, match="2 tokens in A and 3 in B, which part at token 0"):
            kvdrift.compare(one, two, prompts=texts)


def test_traces_are_compared_as_engines_are(tmp_path: Path) -> None:
    bad, good = tiny(), tiny()
    with changed(bad.model.layers[1].self_attn.v_proj, lambda y: y * 1.001, when="decode"):
        kvdrift.audit(bad, prompts=PROMPTS, out=tmp_path / "bad")
    for name in ("good", "other"):
        kvdrift.audit(good, prompts=PROMPTS, out=tmp_path / name)
    found, clean = (kvdrift.compare(tmp_path / name, tmp_path / "good") for name in ("bad", "other"))

    assert isinstance(clean, EngineComparison)
    assert clean.verdict == "STRUCTURAL_DRIFT"
    assert clean.decision.minimum < 1e-9
    assert isinstance(found, EngineComparison)
    assert (found.guilty, found.decision.guilty_pass) == ("A", "decode")
    assert found.decision.first is not None
    assert str(found.decision.first.place) == "layer 1 / v_proj"
    with pytest.raises(kvdrift.UsageError, match="was given twice"):
        kvdrift.compare(tmp_path / "bad", tmp_path / "bad")


def test_what_one_side_alone_has_does_not_pass() -> None:
    """Neither a prompt of one side, nor logits that stand at no position in common."""
    from kvdrift.engines.hf.engine import HFEngine
    from kvdrift.versus.judge import judge
    from kvdrift.versus.record import record_side

    prompts = [Prompt(name, tuple(PROMPTS["p"][:6]), (41, 7)) for name in ("p", "q")]
    with HFEngine(tiny()) as engine:
        a, b, fewer = (record_side(name, engine, prompts, "float64") for name in ("A", "B", "B"))
    del fewer.prompts["q"]
    clean, alone = judge(a, b), judge(a, fewer)
    last = Place(None, Site.LOGITS)
    for item in b.prompts.values():
        item.prefill.rows[last] = {at + 100: row for at, row in item.prefill.rows[last].items()}
        item.decode.rows[last] = {at + 100: row for at, row in item.decode.rows[last].items()}
    apart = judge(a, b)

    assert clean.verdict == "STRUCTURAL_DRIFT"
    assert (alone.verdict, alone.reasons) == (
        "INCONCLUSIVE",
        ("q was recorded of A alone; record the same prompts of both",),
    )
    assert apart.verdict == "INCONCLUSIVE"
    assert apart.reasons == ("no logits of p, q stand at one position in both; record the same positions",)
