"""Correct kernels by other means pass, and faults of such kernels are found where they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import kvdrift
from kvdrift.errors import EngineUnavailable
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.precision import UNIT_ROUNDOFF
from kvdrift_bench.catalogue import Passes, catalogue
from kvdrift_bench.planted.kernels import below, correct_kernels, faults_of_kernels
from kvdrift_bench.planted.kernels.products import PackedLinear
from kvdrift_bench.planted.torch.model import Commits
from tests.support.carriers import N_LAYERS, lively, one_thread
from tests.support.matrix import further

KERNELS = {kernel.name: kernel for kernel in correct_kernels()}
FAULTS = {fault.name: fault for fault in faults_of_kernels(N_LAYERS)}
PASSES: tuple[Passes, ...] = ("decode", "both")
PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12, 71, 23], "q": [99, 23, 4, 50, 66, 91, 2, 17, 18, 3]}
TOKENS = [*PROMPTS["p"], 99]  # no multiple of a tile, and an even number of keys
pytestmark = pytest.mark.filterwarnings("ignore:.*(jit|register_constant|opaque value):DeprecationWarning")
PASSED = (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)

# TorchInductor compiles for some twenty seconds.
COMPILED = [name for name in KERNELS if name.endswith("_inductor")] + ["compiled_scale_1.02"]

# One of each kind: float32 below Python in each part of a layer, 16 bits behind casts, a softmax over splits, operands
# that are other numbers, packed weights.
FEW = (
    "tiled_cpp",
    "split_k_softmax_torch",
    "bfloat16_only_cpp",
    "smoothed_keys",
    "query_prescaled",
    "gemv_cpp",
    "head_cpp",
    "weights_in_4_bits_cpp",
    "norm_cpp",
)

CORE = ("tiled_cpp", "bfloat16_only_cpp", "gemv_cpp", "weights_in_4_bits_cpp")

KNOWN_ALARMS: dict[tuple[str, str], str] = {}


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def logits(model: Any, planting: Any = None) -> tuple[Tensor, Commits]:
    """Return the logits of a prompt and of one decode step behind it, in float64, with something planted."""
    with torch.no_grad(), planting or nullcontext(Commits()) as commits:
        first = model(torch.tensor([TOKENS[:-1]]), use_cache=True)
        then = model(torch.tensor([TOKENS[-1:]]), past_key_values=first.past_key_values)
    return torch.cat([first.logits, then.logits], dim=1).double(), commits


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def marks_of(name: str) -> tuple[pytest.MarkDecorator, ...]:
    """Of kernels that are compiled the smallest is not part of the matrix."""
    if name not in COMPILED:
        return ()
    return (pytest.mark.slow,) if name == "norm_inductor" else (pytest.mark.slow, pytest.mark.matrix)


def marked(names: Iterator[str] | list[str]) -> list[Any]:
    return [pytest.param(name, marks=marks_of(name)) for name in names]


def audited() -> Iterator[Any]:
    """Yield the kernels that are audited, with the ladder and without, and what is known to alarm."""
    for name in FEW:
        for ladder in ("model", "off") if name in CORE else ("model",):
            reason = KNOWN_ALARMS.get((name, ladder))
            marks = [pytest.mark.xfail(reason=reason)] if reason else []
            yield pytest.param(
                name, ladder, marks=marks + ([] if name in CORE and ladder == "model" else [pytest.mark.matrix])
            )


def test_there_are_kernels_of_every_kind() -> None:
    assert len(KERNELS) >= 25
    for ending in ("_cpp", "_numba", "_inductor", "_only_sdpa"):
        assert any(name.endswith(ending) for name in KERNELS), ending
    assert {fault.under for fault in FAULTS.values()} <= set(KERNELS)
    assert all(re.fullmatch(r"[A-Z].*\.", line.where) for line in catalogue().kernel_faults.values())


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        pytest.param(name, passes, marks=marks_of(name) or (() if name in FEW else (pytest.mark.matrix,)))
        for name in KERNELS
        for passes in (PASSES if name not in COMPILED else PASSES[1:])
    ],
)
def test_a_kernel_computes_the_same_function(name: str, passes: Passes) -> None:
    model, kernel = lively("llama", "float32"), KERNELS[name]
    if passes not in kernel.passes:
        assert "not planted" in str(kernel.why_not(model, "float32", passes))
        return
    expected, _ = logits(unpacked(name) if name.startswith("weights_in_") else model)

    found, commits = logits(model, kernel.plant(model, passes))

    assert commits.count > 0
    # Three layers on, a rounding of the operands has grown; float32 leaves 1e-6, bfloat16 1e-1.
    assert distance(found, expected) < 32 * UNIT_ROUNDOFF[kernel.computes]
    assert torch.equal(logits(model)[0], logits(model)[0]), "nothing stays behind"


def unpacked(name: str) -> Any:
    """A model of the weights that packed ones stand for."""
    from kvdrift_bench.models.tiny import lively_model
    from kvdrift_bench.planted.kernels.products import linears

    other = lively_model("llama", torch.float32)
    with torch.no_grad():
        for linear in linears(other):
            assert isinstance(linear, torch.nn.Linear)
            linear.weight.copy_(PackedLinear(linear, 8 if "8_bits" in name else 4, Commits()).unpacked(torch.float32))
    return other


@pytest.mark.parametrize("name", marked(list(FAULTS)))
def test_a_fault_of_a_kernel_is_in_decode_steps_alone(name: str) -> None:
    model, fault = lively("llama", "float32"), FAULTS[name]
    kernel = KERNELS[fault.under]
    right, _ = logits(model, kernel.plant(model, "both" if kernel.passes == ("both",) else "decode"))

    wrong, commits = logits(model, fault.plant(model))

    assert commits.changed > 0
    assert distance(wrong[:, -1:], right[:, -1:]) > 1e-5  # float32 leaves 1e-6
    assert torch.equal(wrong[:, :-1], right[:, :-1])


@pytest.mark.parametrize(("name", "ladder"), list(audited()))
def test_an_audit_of_a_correct_kernel_passes(name: str, ladder: Any) -> None:
    model, kernel = lively("llama", "bfloat16"), KERNELS[name]
    passes: Passes = kernel.passes[0]
    assert kernel.why_not(model, "bfloat16", passes) is None

    with kernel.plant(model, passes) as commits:
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2, ladder=ladder)

    assert commits.count > 0
    assert audit.verdict in PASSED, f"{audit.verdict} {audit.kind} at {audit.first_failure}"


@pytest.mark.parametrize(
    "name",
    [
        "tile_tail_skipped",
        "one_output_wrong",
        "factor_of_another_group",
        *further(
            "last_page_of_the_table_stale", "one_logit_wrong", "softmax_over_fewer_splits", "last_pair_not_rotated"
        ),
    ],
)
def test_a_fault_of_a_kernel_is_found_where_it_is(name: str) -> None:
    model, fault = lively("llama", "bfloat16"), FAULTS[name]

    with fault.plant(model) as commits:
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2)

    assert commits.changed > 0
    assert audit.verdict == Verdict.MISMATCH
    first = audit.first_failure
    assert first is not None
    assert (first.layer, first.site) in fault.places(model), first


def test_a_decode_step_coarser_than_the_model_is_no_correct_kernel() -> None:
    kernel = KERNELS["bfloat16_only_cpp"]

    assert "coarser than float32" in str(kernel.why_not(lively("llama", "float32"), "float32", "decode"))
    assert kernel.why_not(lively("llama", "float32"), "float32", "both") is None


def test_a_kernel_is_compiled_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    below.library.cache_clear()
    try:
        below.library()
        (built,) = (tmp_path / "kvdrift" / "kernels").iterdir()
        when = built.stat().st_mtime_ns
        below.library.cache_clear()
        below.library()
        assert built.stat().st_mtime_ns == when
    finally:
        below.library.cache_clear()


def test_without_a_compiler_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    below.library.cache_clear()

    with pytest.raises(EngineUnavailable, match=r"install g\+\+ or name one in CXX"):
        below.library()
    assert "no C++ compiler" in str(KERNELS["tiled_cpp"].applies(lively("llama", "float32")))


def test_a_kernel_refuses_what_it_would_misread() -> None:
    with pytest.raises(TypeError, match=r"torch\.float64"):
        below.run("gated", torch.zeros(2, dtype=torch.float64), None, None, 2)
    with pytest.raises(TypeError, match="strides"):
        below.run("gated", torch.zeros(4, 4).T, None, None, 2)
