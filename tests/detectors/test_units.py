"""Equal token sequences are one unit: what is asked again and again does not become surer."""

from __future__ import annotations

import pytest
import torch

import kvdrift
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.facts import Prompt
from kvdrift.vocabulary.units import repeated_units
from kvdrift_bench.models.tiny import lively_model
from tests.support.kernels import attend, attention_of, float32_decode

WORDS = [(37 * i + 11) % 120 + 3 for i in range(23)]
OTHER = [(53 * i + 29) % 120 + 3 for i in range(18)]


def audited(prompts: dict[str, list[int]], kernel: object = float32_decode, span: int = 4) -> Audit:
    model = lively_model("llama", torch.bfloat16)
    with attention_of(model, kernel):  # type: ignore[arg-type]
        return kvdrift.audit(model, prompts=prompts, span=span, ladder="off")


def smaller_values(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Decode reads values that are 2 % too small: less than a bound of sixteen roundings sees."""
    return attend(query, key, value if query.shape[2] > 1 else value * 0.98, scale)


def directed(audit: Audit) -> list[kvdrift.Evidence]:
    return [item for item in audit.evidence if item.instrument == "directed"]


@pytest.mark.parametrize(("n_names", "span"), [(4, 4), (13, 1)])
def test_one_prompt_under_many_names_is_one_prompt(n_names: int, span: int) -> None:
    audit = audited({f"name_{i}": WORDS for i in range(n_names)}, span=span)

    assert audit.verdict is kvdrift.Verdict.STRUCTURAL_DRIFT
    assert [item.detail["n_units"] for item in directed(audit)] == [span, span]
    assert all(item.minimum_detectable is None and not item.valid for item in directed(audit))
    codes = {caveat.code: caveat.text for caveat in audit.caveats}
    assert codes["REPEATED_UNITS"].startswith(f"{(n_names - 1) * span} of {n_names * span} ")
    assert f"{span} distinct (prompt, position) units" in codes["FEW_UNITS"]
    missing = -(-(12 - span) // span)
    assert any(
        line.startswith(f"Add {missing} prompts of other text, 8 tokens long or longer") and "--span 12" in line
        for line in audit.view["recommendations"]
    )


def test_too_few_prompts_state_no_minimum_and_those_that_are_asked_for_find_the_fault() -> None:
    few = audited({"words": WORDS, "other": OTHER}, smaller_values)
    enough = audited({"words": WORDS, "other": OTHER, "third": WORDS[::-1]}, smaller_values)

    if few.verdict is not kvdrift.Verdict.MISMATCH:
        assert all(item.minimum_detectable is None for item in directed(few))
        assert any(line.startswith("Add 1 prompt of other text") for line in few.view["recommendations"])
    assert enough.verdict is kvdrift.Verdict.MISMATCH


def test_positions_with_equal_tokens_before_them_are_one_whatever_their_prompts_are_called() -> None:
    whole, cut = Prompt("whole", (5, 6, 7), (8, 9)), Prompt("cut", (5, 6), (7, 8, 10))

    assert repeated_units([whole, cut]) == {("cut", 3)}
    assert repeated_units([Prompt("first", (5, 6), (7, 8)), whole]) == {("whole", 3)}


def test_tokens_that_nobody_recorded_are_not_taken_for_equal() -> None:
    assert repeated_units([Prompt(name, (5, -1), (7,)) for name in ("a", "b")]) == frozenset()
