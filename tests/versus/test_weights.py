"""Whether two engines hold the same numbers: layouts are undone, other numbers are told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvdrift
from kvdrift.engines.hf.engine import HFEngine
from kvdrift.engines.llamacpp.engine import LlamaCppEngine
from kvdrift.engines.mlx.engine import MLXModel
from kvdrift.trace.model import Array
from kvdrift.versus.weights import Numbers, digest_of, numbers_of, same_numbers, share_nothing, what_differs
from kvdrift.vocabulary.plan import AuditPlan
from kvdrift_bench.models.tiny import lively_model
from kvdrift_bench.models.tiny_gguf import write_tiny_gguf

RNG = np.random.default_rng(3)
Q, K, V, E = (RNG.normal(size=shape).astype(np.float32) for shape in ((8, 6), (4, 6), (4, 6), (9, 6)))
NORM = RNG.normal(size=6).astype(np.float32)
PLAIN = {"q": Q, "k": K, "v": V, "embedding": E, "norm": NORM, "bias": np.zeros(8, np.float32)}
LAYOUTS: dict[str, dict[str, Array]] = {
    "other names": {f"model.{name}": values for name, values in PLAIN.items()},
    "transposed": {**PLAIN, "q": Q.T, "v": V.T},
    "fused": {"qkv": np.concatenate([Q, K, V]), "embedding": E, "norm": NORM},
    "permuted": {**PLAIN, "q": Q.reshape(2, 2, 2, 6).swapaxes(1, 2).reshape(8, 6)},
    "tied": {**PLAIN, "head": E},
    "norm plus one": {**PLAIN, "norm": NORM + np.float32(1.0)},
    "another dtype": {name: values.astype(np.float64) for name, values in PLAIN.items()},
}
OTHERS: dict[str, tuple[dict[str, Array], str]] = {
    "one number": (
        {**PLAIN, "k": np.where(K[2, 3] == K, K + 1e-6, K)},
        "1 of the 4 matrices of A are not in B as they",
    ),
    "one sign": ({**PLAIN, "q": np.where(Q[1, 1] == Q, -Q, Q)}, "such as q"),
    "a norm": ({**PLAIN, "norm": 2 * NORM}, "their matrices are the same numbers, and norms or biases are not"),
    "one more": ({**PLAIN, "adapter": Q[:3]}, "B has 1 matrices that A does not have"),
}


class Holding:
    """As much of an engine as is asked for its weights."""

    def __init__(self, weights: Mapping[str, Array] | None) -> None:
        self._weights = weights

    def weight_values(self) -> Iterator[tuple[str, Array]] | None:
        return None if self._weights is None else iter(self._weights.items())


def numbers(weights: Mapping[str, Array]) -> Numbers:
    found = numbers_of(Holding(weights))  # type: ignore[arg-type]
    assert found is not None
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_undone(layout: str) -> None:
    one, two = numbers(PLAIN), numbers(LAYOUTS[layout])

    assert same_numbers(one, two)
    assert same_numbers(two, one)


@pytest.mark.parametrize("case", OTHERS)
def test_other_numbers_are_told(case: str) -> None:
    weights, said = OTHERS[case]
    one, two = numbers(PLAIN), numbers(weights)

    assert not same_numbers(one, two)
    assert said in what_differs(one, two)
    assert not share_nothing(one, two)


def test_what_shares_no_matrix_is_another_model() -> None:
    assert share_nothing(numbers(PLAIN), numbers({name: values + 1 for name, values in PLAIN.items()}))
    assert not share_nothing(numbers(PLAIN), numbers(LAYOUTS["fused"]))


def test_zeros_of_either_sign_and_nan_are_one_number_each() -> None:
    other_nan = np.array([0x7FF8000000000001], np.uint64).view(np.float64)[0]

    assert digest_of(np.array([0.0, np.nan])) == digest_of(np.array([other_nan, -0.0]))
    assert digest_of(np.array([0.0, 1.0])) != digest_of(np.array([0.0, 0.0]))


def test_weights_that_are_not_shown_stay_unknown() -> None:
    assert numbers_of(Holding(None)) is None  # type: ignore[arg-type]
    assert numbers_of(object()) is None  # type: ignore[arg-type]


def of_engine(engine: Any) -> Numbers:
    found = numbers_of(engine)
    assert found is not None
    return found


def test_llamacpp_and_transformers_hold_the_same_numbers_of_one_file(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    file = write_tiny_gguf(tmp_path / "tiny.gguf", "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    with HFEngine(model) as a, LlamaCppEngine(file) as b:
        one, two = of_engine(a), of_engine(b)

    assert same_numbers(one, two)
    assert one.matrices != two.matrices or one.n > 0


def test_mlx_and_transformers_hold_the_same_numbers_of_one_directory(tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    from kvdrift.zoo.build import build

    model = build("phi3")  # fused in both
    model.save_pretrained(tmp_path)
    with HFEngine(model) as a, MLXModel(load_model(tmp_path)[0]).opened(AuditPlan()) as b:
        assert same_numbers(of_engine(a), of_engine(b.engine))


def test_a_comparison_says_what_it_knows_of_the_weights(tmp_path: Path) -> None:
    prompts = {"p": [5, 9, 17, 3, 22]}

    def tiny() -> Any:
        return lively_model("llama", torch.float32, num_hidden_layers=2)

    def said(a: Any, b: Any) -> dict[str, str]:
        found: Any = kvdrift.compare(a, b, prompts=prompts)
        return {item.code: item.text for item in found.decision.caveats}

    changed, renamed = tiny(), tiny()
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight[0, 0] += 1.0
        renamed.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(renamed.config.hidden_size))
    other = lively_model("llama", torch.float32, num_hidden_layers=2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.7)

    assert "WEIGHTS" not in said(tiny(), tiny())
    assert "1 of the 16 matrices of A are not in B" in said(tiny(), changed)["WEIGHTS"]
    assert "numbers, transposed, fused, permuted or tied otherwise" in said(tiny(), renamed)["LAYOUT"]
    with pytest.raises(kvdrift.AlignmentError, match="none of the 16 matrices of A is in B; load both from the same"):
        kvdrift.compare(tiny(), other, prompts=prompts, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
