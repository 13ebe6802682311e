"""What a verdict says first: what it is about, and which side is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import kvdrift
from kvdrift.pipeline.audit import Audit
from kvdrift.pipeline.judge import judge_directory
from kvdrift_bench.models.tiny import lively_model
from tests.support.kernels import attend, attention_of
from tests.support.tiny import tiny_model

PROMPTS = {"p": [5, 17, 42, 9, 77, 31, 8, 64, 23, 90, 12], "one": [7]}
ABOUT = "plain decode: 1 row in the batch, 2 to 13 keys, 4 decode steps, "


def first_sentence(audit: Audit) -> str:
    return str(audit.view["hypotheses"]["conclusion"]).split(". ")[0]


@contextmanager
def changed(module: Any, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """Change what a module returns; None leaves it as it is."""
    handle = module.register_forward_hook(lambda _, __, out: change(out))
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    target = tmp_path_factory.mktemp("run") / "run"
    return kvdrift.audit(lively_model("qwen3", torch.bfloat16), prompts=PROMPTS, span=2, out=target)


def test_a_pass_of_plain_decode_says_what_it_is_about_and_what_was_not_run(clean: Audit) -> None:
    assert clean.verdict is kvdrift.Verdict.STRUCTURAL_DRIFT
    assert ABOUT in first_sentence(clean)
    assert first_sentence(clean).endswith("computed in bfloat16")
    assert ABOUT in clean.to_markdown()
    assert ABOUT in repr(clean)
    assert "no fix is needed" not in clean.to_markdown()
    (line,) = [line for line in clean.view["recommendations"] if line.startswith("Not run: ")]
    assert "batch_padded" in line
    assert 'kvdrift.audit(model, tokenizer, scenarios="all")' in line


def test_a_pass_is_handed_through_in_one_line(clean: Audit) -> None:
    assert clean.check() is clean
    assert repr(clean).startswith("<Audit: STRUCTURAL_DRIFT; plain decode: ")
    assert "\n" not in repr(clean)
    assert len(repr(clean)) < 300


def test_saved_traces_say_the_same(clean: Audit) -> None:
    assert clean.path is not None
    again, _ = judge_directory(Path(clean.path))
    assert first_sentence(again) == first_sentence(clean)


def test_scenarios_that_were_run_are_named_with_their_rows(tmp_path: Path) -> None:
    audit = kvdrift.audit(lively_model("llama", torch.bfloat16), prompts=PROMPTS, span=2, scenarios="decode,batch")

    assert "plain decode, batch: 1 to 3 rows in the batch, " in first_sentence(audit)
    (line,) = [line for line in audit.view["recommendations"] if line.startswith("Not run: ")]
    assert "batch_padded" in line
    assert " batch," not in line


def test_a_mismatch_is_raised_with_its_address_and_cause() -> None:
    model = lively_model("llama", torch.bfloat16)
    with changed(model.model.layers[1].mlp, lambda out: out * 1.25 if out.shape[1] == 1 else None):
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2)

    assert repr(audit).startswith(f"<Audit: MISMATCH, semantic at {audit.first_failure}, cause ")
    with pytest.raises(kvdrift.VerdictError) as caught:
        audit.check(allow_inconclusive=True)
    assert caught.value.exit_code == 1
    assert str(audit.first_failure) in str(caught.value)
    assert audit.diagnosis is not None
    assert f"Cause: {audit.diagnosis.cause}" in str(caught.value)


def test_an_audit_that_could_not_tell_is_no_pass_unless_that_is_allowed() -> None:
    audit = kvdrift.audit(tiny_model("bloom", dtype=torch.bfloat16), prompts=PROMPTS, span=2, ladder="off")

    assert audit.verdict is kvdrift.Verdict.INCONCLUSIVE
    with pytest.raises(kvdrift.VerdictError, match="INCONCLUSIVE: Neither H0 nor H1 in plain decode") as caught:
        audit.check()
    assert caught.value.exit_code == 6
    assert audit.check(allow_inconclusive=True) is audit


def sees_ahead(out: torch.Tensor) -> torch.Tensor | None:
    """Every token of a prefill gets a little of the last one."""
    return out + 0.1 * out[:, -1:] if out.shape[1] > 1 else None


def test_a_prefill_that_depends_on_later_tokens_is_named_first() -> None:
    model = lively_model("llama", torch.bfloat16)
    with changed(model.model.layers[1].mlp, sees_ahead):
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2)

    assert audit.exit_code != 0
    assert "prefill is not a reference here: its values depend on later tokens" in first_sentence(audit)


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_the_side_whose_attention_is_off_is_named_first_where_it_is_prefill(side: str) -> None:
    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        is_off = (query.shape[2] > 1) == (side == "prefill")
        return attend(query, key, value * 1.5 if is_off else value, scale)

    model = lively_model("llama", torch.bfloat16)
    with attention_of(model, kernel):
        audit = kvdrift.audit(model, prompts={"p": PROMPTS["p"]}, span=2)

    assert audit.verdict is kvdrift.Verdict.MISMATCH
    assert ("prefill is the side that is off" in first_sentence(audit)) == (side == "prefill")


def test_rows_of_a_batch_are_as_long_as_the_prompt_and_the_report_says_how_long() -> None:
    """A kernel that is wrong at 33 keys, in a batch alone, is met by a prompt of 31 tokens."""

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        is_off = query.shape[0] > 1 and query.shape[2] == 1 and key.shape[2] == 33
        return plain(query, key, value * 1.5 if is_off else value, scale)

    def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        return attend(query, key, value, scale)

    model = lively_model("llama", torch.bfloat16)
    with attention_of(model, kernel):
        audit = kvdrift.audit(model, prompts={"p": [(37 * i + 11) % 120 + 3 for i in range(31)]}, scenarios="batch")

    assert audit.verdict is kvdrift.Verdict.MISMATCH
    assert "batch: 2 to 3 rows in the batch, 32 to 33 keys, " in first_sentence(audit)
    assert "up to 256 tokens" in audit.to_markdown()
