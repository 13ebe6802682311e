"""The ladder judges by measured noise: what is coarser than it is told passes by name, and a fault does not."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvdrift
from kvdrift.capture.modes import capture_prompt
from kvdrift.capture.noise import capture_noise
from kvdrift.engines.hf.engine import HFEngine
from kvdrift.instruments.ladder import measured_bounds
from kvdrift.pairing.floors import FloorTable
from kvdrift.pipeline.audit import Audit
from kvdrift.pipeline.judge import judge_directory
from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.facts import Prompt
from kvdrift.vocabulary.plan import Mode, PairRole
from kvdrift.vocabulary.sites import STATE_SITES, Site
from kvdrift_bench.models.tiny import lively_model
from kvdrift_bench.planted.kernels import correct_kernels
from kvdrift_bench.planted.torch import corpus_for
from kvdrift_bench.planted.torch.model import Plant
from kvdrift_bench.planted.torch.own import additive, context, handed, repeated, scores_of, softmax_of
from kvdrift_bench.planted.torch.parts import wide
from kvdrift_bench.planted.torch.ways import AttentionCall, in_attention, planted
from tests.support.matrix import further
from tests.support.tiny import tiny_model

PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12, 71, 23], "q": [99, 23, 4, 50, 66, 91, 2, 17, 18, 3]}
PASSED = (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)
KERNELS = {kernel.name: kernel for kernel in correct_kernels()}
FAULTS = {fault.name: fault for fault in corpus_for(3)}
pytestmark = pytest.mark.xdist_group("measured noise")


@contextmanager
def instead(module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Change what a module returns: `change(input, output)`."""
    handle = module.register_forward_hook(lambda module, args, output: change(args[0], output), prepend=True)
    try:
        yield
    finally:
        handle.remove()


def down_of(model: Any, layer: int = 1) -> nn.Module:
    found: nn.Module = model.model.layers[layer].mlp.down_proj
    return found


def at_decode(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: change(x, y) if x.shape[1] == 1 else y


def audited(model: Any, **options: Any) -> Audit:
    return kvdrift.audit(model, prompts=PROMPTS, span=2, **options)


def minimum(audit: Audit, mode: str = "kv_aligned") -> float:
    (found,) = (item for item in audit.evidence if item.instrument == "ladder" and item.mode == mode)
    assert found.minimum_detectable is not None
    return found.minimum_detectable


def said(audit: Audit, code: str) -> str:
    return next((caveat.text for caveat in audit.caveats if caveat.code == code), "")


@cache
def under_float32(fault: float = 0.0) -> Audit:
    """Decode attention in float32 outside Python, prefill in torch, with a fault in one projection."""
    model = lively_model("llama", torch.bfloat16)
    with (
        KERNELS["tiled_cpp"].plant(model, "decode"),
        instead(down_of(model), at_decode(lambda x, y: y * (1.0 + fault))),
    ):
        return audited(model)


def test_noise_of_one_pass_passes_by_name_and_raises_the_stated_minimum() -> None:
    audit = under_float32()

    assert audit.verdict in PASSED, (audit.kind, audit.first_failure)
    assert "attn_ctx of 3 layers in decode" in said(audit, "PINNED")
    assert f"seen from {minimum(audit):.1e} on" in said(audit, "PINNED")
    assert 1e-7 < minimum(audit) < 1e-3


def test_under_such_noise_a_fault_of_one_and_a_half_times_the_stated_minimum_is_found() -> None:
    found = under_float32(1.5 * minimum(under_float32()))

    assert found.verdict is Verdict.MISMATCH
    assert found.first_failure is not None
    assert (found.first_failure.layer, found.first_failure.site) == (1, Site.MLP_OUT)


@pytest.mark.parametrize("dtype", ["bfloat16", *further("float32")])
def test_a_fault_of_a_hundred_thousandth_is_found_at_float64(dtype: str) -> None:
    model = lively_model("llama", getattr(torch, dtype))
    with instead(down_of(model), at_decode(lambda x, y: y * (1.0 + 1e-5))):
        audit = audited(model)

    assert (audit.verdict, audit.kind) == (Verdict.MISMATCH, "semantic")
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == (1, Site.MLP_OUT)
    assert minimum(audit) == 2.0**-40, "no floor was measured here, and the minimum is that of float64"
    assert said(audit, "PINNED") == ""
    assert audit.view["coverage"]["rungs"] == sorted({dtype, "float64"})


def cancelling(dtype: torch.dtype) -> Any:
    """A model whose feed-forward parts are zero in exact arithmetic."""
    model = lively_model("llama", dtype)
    for layer in model.model.layers:
        down, half = layer.mlp.down_proj.weight.data, layer.mlp.down_proj.weight.shape[1] // 2
        down[:, half:] = -down[:, :half]
        for same in (layer.mlp.gate_proj, layer.mlp.up_proj):
            same.weight.data[half:] = same.weight.data[:half]
    return model


def test_a_sum_that_cancels_is_not_a_fault_without_a_ladder_either() -> None:
    """Its own size says nothing of its rounding; the size of its terms does, and a fault of that size is found."""
    model = cancelling(torch.bfloat16)
    clean = kvdrift.audit(model, prompts=PROMPTS, span=2, ladder="off")
    with instead(down_of(model), at_decode(lambda x, y: y + 0.05 * x[..., : y.shape[-1]])):
        faulty = kvdrift.audit(model, prompts=PROMPTS, span=2, ladder="off")

    assert clean.verdict in PASSED, (clean.first_failure, clean.view["reasons"])
    assert faulty.verdict is Verdict.MISMATCH
    assert (faulty.first_failure.layer, faulty.first_failure.site) == (1, Site.MLP_OUT)  # type: ignore[union-attr]


def test_a_sum_that_cancels_is_not_a_fault() -> None:
    audit = audited(cancelling(torch.float32))

    assert audit.verdict in PASSED, (audit.kind, audit.first_failure)
    assert "mlp_out of 3 layers in both passes" in said(audit, "PINNED")
    assert minimum(audit, "as_designed") < 1e-10, "what is computed from the sum is not blurred by it"


@pytest.mark.parametrize(
    ("dtype", "share", "size"),
    [("float32", 1.0, 0.3), ("bfloat16", 1.0, 3.0), pytest.param("float32", 1e-3, 3.0, marks=pytest.mark.matrix)],
)
def test_a_place_that_drowns_in_noise_of_both_passes_is_not_a_pass(dtype: str, share: float, size: float) -> None:
    """Noise that follows from the bits of a row, so that equal inputs have equal noise. At the native dtype it follows
    from a grid of eighths: the passes agree there, whatever kernels this processor has."""

    def noisy(x: Tensor, y: Tensor) -> Tensor:
        rows, values = x.detach().double().flatten(0, -2), y.flatten(0, -2).clone()
        rows = rows if x.dtype == torch.float64 else (8.0 * rows).round()
        for row, value in zip(rows, values, strict=True):
            drawn = torch.Generator().manual_seed(zlib.crc32(row.numpy().tobytes()))
            value *= share * (1.0 + size * torch.randn(value.shape, generator=drawn)).to(y.dtype)
        return values.reshape(y.shape)

    model = lively_model("llama", getattr(torch, dtype))
    with instead(down_of(model), noisy):
        audit = audited(model)

    assert audit.verdict is Verdict.INCONCLUSIVE, (audit.kind, audit.first_failure)
    assert any(reason.startswith("layer 1 / mlp_out drowns in noise at float64") for reason in audit.decision.reasons)


def test_a_decode_step_that_adds_noise_does_not_excuse_itself() -> None:
    def noise(x: Tensor, y: Tensor) -> Tensor:
        drawn = torch.Generator().manual_seed(hash(x.double().numpy().tobytes()) % (1 << 31))
        return y * (1.0 + 0.02 * torch.randn(y.shape, generator=drawn)).to(y.dtype)

    model = lively_model("llama", torch.float32)
    with instead(down_of(model), at_decode(noise)):
        audit = audited(model)

    assert (audit.verdict, audit.kind) == (Verdict.MISMATCH, "precision")
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == (1, Site.MLP_OUT)
    (found,) = (item for item in audit.evidence if (item.instrument, item.mode) == ("noise", "kv_aligned"))
    assert found.supports == "H1"
    assert found.text.startswith("decode alone has noise of")


def looks_away(model: Any) -> Any:
    """Let a decode step return what it returned for an input that was nearly the same: right if nothing changes."""
    known: list[tuple[Tensor, Tensor]] = []

    def remember(x: Tensor, y: Tensor) -> Tensor:
        for before, then in known:
            if before.dtype == x.dtype and torch.allclose(before, x, rtol=0.02, atol=0.02):
                return then
        known.append((x, y))
        return y

    return instead(model.model.layers[1].mlp, at_decode(remember))


def is_named(audit: Audit) -> bool:
    """Whether the products of float32 show what belongs to another input, and the noise that something looks away."""
    assert (audit.verdict, audit.kind) == (Verdict.MISMATCH, "precision")
    assert (audit.first_failure.layer, audit.first_failure.site) == (1, Site.MLP_OUT)  # type: ignore[union-attr]
    unmoved = audit.suite.judged.measured.floors.unmoved("kv_aligned")
    return any(item.sides == ("decode",) and item.place.layer == 1 for item in unmoved)


def test_a_decode_step_that_does_not_look_at_its_input_is_never_a_pass() -> None:
    model = lively_model("llama", torch.float32)
    with looks_away(model):
        audit = audited(model)

    assert is_named(audit)


def with_zero_row(fault: Callable[[Any], Any] = lambda model: nullcontext()) -> Audit:
    """A model with a fault whose first generated token, after the text p, embeds as all zeros."""
    model = lively_model("llama", torch.float32, tie_word_embeddings=False)
    with torch.no_grad():
        first = int(model(torch.tensor([PROMPTS["p"]])).logits[0, -1].argmax())
        assert first not in PROMPTS["p"]
        model.model.embed_tokens.weight[first] = 0.0
    with fault(model):
        return audited(model)


def test_noise_is_measured_where_a_token_embeds_as_zeros() -> None:
    audit = with_zero_row()

    assert audit.verdict in PASSED, audit.decision.reasons
    assert not said(audit, "UNMOVED")
    assert minimum(audit, "as_designed") < 1e-3, "scores of zeros have noise of their own size, and hide nothing behind"


def test_what_ignores_its_input_is_named_although_a_token_embeds_as_zeros() -> None:
    assert is_named(with_zero_row(looks_away))


@pytest.mark.parametrize(
    ("fault", "layer", "site"),
    [
        ("all_scales_1.0001", 0, Site.ATTN_SCORES),
        *further(("slot_stale", 2, Site.K_CACHE), ("v_scale_1.001", 0, Site.V_CACHE)),
    ],
)
def test_a_fault_is_found_although_a_token_embeds_as_zeros(fault: str, layer: int, site: Site) -> None:
    """Scores of a row of zeros are zeros, so that as designed their noise has no size to be relative to; other
    instruments, and the passes with aligned inputs, see what the noise does not bound."""
    audit = with_zero_row(FAULTS[fault].plant)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == (layer, site)


def test_the_verdict_is_the_same_from_the_traces_and_by_layer(tmp_path: Path) -> None:
    model = lively_model("llama", torch.bfloat16)
    with KERNELS["gemv_cpp"].plant(model, "decode"):
        audit = audited(model, out=tmp_path / "run")
        by_layer = audited(model, ladder="layer")
    judged, _ = judge_directory(tmp_path / "run")

    assert audit.verdict in PASSED
    assert "of 3 layers in decode" in said(audit, "PINNED")
    assert (judged.verdict, judged.evidence, judged.caveats) == (audit.verdict, audit.evidence, audit.caveats)
    assert by_layer.verdict == audit.verdict
    assert said(by_layer, "PINNED") == said(audit, "PINNED")


def batched_in_float32(model: Any) -> Any:
    """Attention in float32 below Python where there is more than one row."""
    stack = ExitStack()
    for layer in model.model.layers:

        def change(x: Tensor, y: Tensor, weight: Tensor = layer.self_attn.o_proj.weight) -> Tensor:
            if x.shape[0] == 1:
                return y
            product = (
                x.detach().double().numpy().astype("float32") @ weight.detach().double().numpy().astype("float32").T
            )
            return torch.from_numpy(product).to(y.dtype)

        stack.enter_context(instead(layer.self_attn.o_proj, change))
    return stack


def test_a_scenario_with_noise_of_its_own_has_it_measured(tmp_path: Path) -> None:
    model = lively_model("llama", torch.bfloat16)
    with batched_in_float32(model):
        audit = audited(model, scenarios=["decode", "batch", "rewind"], out=tmp_path / "run")
    judged, _ = judge_directory(tmp_path / "run")

    assert audit.verdict in PASSED, audit.first_failure
    assert judged.verdict == audit.verdict
    caveats = {
        outcome.name: {caveat.code for caveat in outcome.judged.decision.caveats}
        for outcome in audit.suite.outcomes
        if outcome.judged is not None
    }
    assert {name for name, codes in caveats.items() if "PINNED" in codes} == {"batch"}


def test_perturbed_passes_leave_the_clean_ones_alone() -> None:
    """The same capture with and without them."""
    prompt = Prompt("p", (5, 9, 17, 3), (44, 2))
    with HFEngine(lively_model("llama", torch.float32)) as engine, engine.at("float64"):
        kept: dict[int, Any] = {}
        items = list(capture_prompt(engine, prompt, tuple(Mode), "float64", kept=kept))
        pairs = {item.pair.mode: item.pair for item in items if item.role is PairRole.PAIR}
        perturbed = list(capture_noise(engine, prompt, pairs, kept))
        again = list(capture_prompt(engine, prompt, tuple(Mode), "float64", kept={}))

    def bits(item: Any) -> list[bytes]:
        return [row.values.tobytes() for row in (*item.pair.prefill.rows, *item.pair.decode.rows)]

    assert [bits(item) for item in items] == [bits(item) for item in again]
    assert [(item.role, item.pair.mode, item.shift) for item in perturbed] == [
        (PairRole.PERTURBED, mode, shift) for mode in reversed(Mode) for shift in (2.0**-26, -(2.0**-26))
    ]


def test_the_noise_of_a_recurrent_state_is_measured_in_both_passes() -> None:
    """Prefill shows a state at its last token alone, which lies behind the first decode steps."""
    prompt = Prompt("p", (5, 9, 17, 3), (44, 2, 8, 61))
    floors = FloorTable()
    with HFEngine(tiny_model("mamba2")) as engine, engine.at("float64"):
        kept: dict[int, Any] = {}
        items = list(capture_prompt(engine, prompt, (Mode.AS_DESIGNED,), "float64", kept=kept))
        pairs = {item.pair.mode: item.pair for item in items if item.role is PairRole.PAIR}
        for item in capture_noise(engine, prompt, pairs, kept):
            floors.remember(item.pair, item.shift)
        floors.complete(pairs[Mode.AS_DESIGNED])

    found, bounds = floors.of(Mode.AS_DESIGNED), measured_bounds(floors, Mode.AS_DESIGNED)
    for layer in range(3):
        for site in STATE_SITES:
            place = Place(layer, site)
            assert 0.0 < found[place].prefill < 1e-12, place
            assert 0.0 < found[place].decode < 1e-12, place
            assert bounds[place] < 1e-11, "a fault in a state is not hidden by what a guess would have allowed"


def eager_in(dtype: torch.dtype) -> Plant:
    """Attention of a kernel that knows one dtype of 16 bits, with the softmax in float32: right where it is as fine as
    the model's dtype."""

    def attention(call: AttentionCall) -> Tensor:
        query, keys, values = (tensor.to(dtype) for tensor in (call.query, *repeated(call)))
        scores, mask = query @ keys.transpose(2, 3) * call.scale, additive(call, dtype)
        weights = torch.softmax(scores if mask is None else scores + mask, dim=-1, dtype=torch.float32)
        return (weights.to(dtype) @ values).to(call.query.dtype).transpose(1, 2).contiguous()

    return planted(in_attention(attention))


def in_prefill(way: Callable[[AttentionCall], Tensor]) -> Plant:
    """The same in prefill alone: planted everywhere, and asleep where there is one token."""
    return planted(in_attention(lambda call: way(call) if call.query.shape[2] > 1 else None), everywhere=True)


def softmax_of_16_bits(dtype: torch.dtype) -> Callable[[AttentionCall], Tensor]:
    """A softmax in `dtype` between products in the dtype of the model."""
    return lambda call: context(call, softmax_of(call, scores_of(call), dtype=dtype))


def scores_of_16_bits(call: AttentionCall) -> Tensor:
    """The same without a softmax that could be seen: scores in bfloat16, all else as wide as the model."""
    scores = wide(scores_of(call).to(torch.bfloat16)).to(wide(call.query).dtype)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return handed(call, weights / weights.sum(-1, keepdim=True) @ wide(repeated(call)[1]))


@pytest.mark.parametrize(
    ("native", "dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        pytest.param(torch.bfloat16, torch.float16, marks=pytest.mark.matrix),
        pytest.param(torch.float16, torch.float16, marks=pytest.mark.matrix),
    ],
)
def test_scores_rounded_as_a_right_kernel_rounds_them_pass_by_name(native: torch.dtype, dtype: torch.dtype) -> None:
    """It rounds all its operands, and noise of its scores is as large as that of a softmax in 16 bits."""
    model = tiny_model("llama", dtype=native)
    with eager_in(dtype)(model):
        audit = kvdrift.audit(model, prompts={"p": PROMPTS["p"][:11]}, span=3)

    assert audit.verdict in PASSED, (audit.kind, audit.first_failure)
    assert "attn_scores" in said(audit, "PINNED")
    assert said(audit, "COARSER_PASS").startswith("decode alone computes in fewer bits than float64")


@pytest.mark.parametrize(
    ("native", "dtype", "guilty"),
    [
        (torch.bfloat16, torch.bfloat16, "decode"),
        (torch.bfloat16, torch.float16, "prefill"),
        pytest.param(torch.bfloat16, torch.float16, "decode", marks=pytest.mark.matrix),
        pytest.param(torch.bfloat16, torch.bfloat16, "prefill", marks=pytest.mark.matrix),
        pytest.param(torch.float16, torch.float16, "decode", marks=pytest.mark.matrix),
    ],
)
def test_a_softmax_of_16_bits_in_one_pass_is_a_mismatch_in_a_model_of_16_bits(
    native: torch.dtype, dtype: torch.dtype, guilty: str
) -> None:
    """Its scores are rounded and its operands are not: the size of the noise does not tell, what is rounded does."""
    model, way = tiny_model("llama", dtype=native), softmax_of_16_bits(dtype)
    with (planted(in_attention(way)) if guilty == "decode" else in_prefill(way))(model):
        audit = kvdrift.audit(model, prompts={"p": PROMPTS["p"][:11]}, span=3)

    assert (audit.verdict, audit.kind) == (Verdict.MISMATCH, "precision")
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == (0, Site.ATTN_SCORES)
    assert audit.diagnosis is not None
    assert audit.diagnosis.text.startswith(f"{guilty} computes its softmax in {str(dtype).removeprefix('torch.')}")


@pytest.mark.parametrize("guilty", ["decode", pytest.param("prefill", marks=pytest.mark.matrix)])
def test_rounded_scores_in_a_kernel_that_shows_none_are_named(guilty: str) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    with (planted(in_attention(scores_of_16_bits)) if guilty == "decode" else in_prefill(scores_of_16_bits))(model):
        audit = kvdrift.audit(model, prompts={"p": PROMPTS["p"][:11]}, span=3)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.diagnosis is not None
    assert audit.diagnosis.text.startswith(f"{guilty} rounds the scores of its attention to bfloat16")


def test_a_softmax_of_16_bits_in_both_passes_is_not_a_difference() -> None:
    model, way = tiny_model("llama", dtype=torch.bfloat16), softmax_of_16_bits(torch.bfloat16)
    with planted(in_attention(way), everywhere=True)(model):
        audit = kvdrift.audit(model, prompts={"p": PROMPTS["p"][:11]}, span=3)

    assert audit.verdict in PASSED, (audit.kind, audit.first_failure)
    assert said(audit, "COARSER_PASS") == ""


@pytest.mark.parametrize(
    ("native", "fault"),
    [
        ("float32", "softmax_in_bf16"),
        *further(("float32", "softmax_in_fp16"), ("float16", "softmax_in_bf16")),
    ],
)
def test_scores_rounded_more_coarsely_than_the_model_rounds_are_a_mismatch(native: str, fault: str) -> None:
    model = tiny_model("llama", dtype=getattr(torch, native))
    with FAULTS[fault].plant(model):
        audit = audited(model)

    assert (audit.verdict, audit.kind) == (Verdict.MISMATCH, "precision")
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (0, "attn_scores")
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause == "softmax_dtype", audit.diagnosis.text
    assert f"softmax in {'bfloat16' if fault.endswith('bf16') else 'float16'}" in audit.diagnosis.text


def test_a_kernel_of_the_head_for_one_row_is_not_taken_for_noise_of_prefill() -> None:
    """A perturbed prefill gives its head as many rows as the clean one does."""
    model = lively_model("llama", torch.float32)

    def scaled(x: Tensor, y: Tensor) -> Tensor:
        y = y.clone()
        y[..., 17] *= 1.1 if x.shape[-2] == 1 else 1.0
        return y

    with instead(model.lm_head, scaled):
        audit = audited(model)

    assert (audit.verdict, audit.kind) == (Verdict.MISMATCH, "semantic")
    assert audit.first_failure is not None
    assert audit.first_failure.site is Site.LOGITS
    assert not said(audit, "PINNED")
