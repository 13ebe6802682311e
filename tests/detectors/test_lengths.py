"""Faults that begin at a length are found by a sweep, and the length or position at which they begin is named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import kvdrift
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.evidence import Verdict
from kvdrift_bench.planted.torch import corpus_for
from kvdrift_bench.planted.torch.model import Plant
from kvdrift_bench.planted.torch.own import repeated, scores_of, softmax_of
from kvdrift_bench.planted.torch.ways import AttentionCall, Rotation, in_attention, in_rotation, planted
from tests.support.carriers import one_thread
from tests.support.command import SMALL
from tests.support.matrix import further
from tests.support.tiny import tiny_model

FROM_KEYS = 97  # the kernel of the planted faults takes another path from so many keys on
FROM_POSITION = 64


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def lose_a_key(call: AttentionCall) -> bool:
    if call.key.shape[2] < FROM_KEYS:
        return False
    call.key, call.value = call.key[:, :, 1:], call.value[:, :, 1:]
    call.mask = None if call.mask is None else call.mask[..., 1:]
    return True


def read_keys_as_fp8(call: AttentionCall) -> bool:
    if call.key.shape[2] < FROM_KEYS:
        return False
    call.key = call.key.to(torch.float8_e4m3fn).to(call.key.dtype)
    return True


def other_kernel(call: AttentionCall) -> Tensor | None:
    """Attention as it should be, in another order and with probabilities that are rounded."""
    if call.key.shape[2] < FROM_KEYS:
        return None
    keys, values = repeated(call)
    rows = softmax_of(call, scores_of(call, keys)).to(call.query.dtype)
    return (rows @ values.to(rows.dtype)).transpose(1, 2).contiguous()


def rounded_tables(call: Rotation) -> tuple[Tensor, Tensor] | None:
    if call.commits.past < FROM_POSITION:
        return None
    cos, sin = (table.to(torch.bfloat16).to(table.dtype) for table in (call.cos, call.sin))
    return call.rotate(call.q, call.k, cos, sin)


def swept(plant: Plant | None, lengths: list[int], *, span: int = 2, **options: Any) -> Audit:
    dtype = options.pop("dtype", torch.bfloat16)
    model = tiny_model("llama", dtype=dtype, **SMALL, **options.pop("model", {}))
    with plant(model) if plant else nullcontext():
        return kvdrift.audit(model, span=span, lengths=lengths, **options)


def places(audit: Audit, change: str) -> list[tuple[str, int, int, bool]]:
    found = [item for item in audit.view["lengths"]["boundaries"] if item["change"] == change]
    return [(item["axis"], item["before"], item["after"], item["rises"]) for item in found]


def verdicts(audit: Audit) -> dict[int, str]:
    return {row["length"]: row["verdict"] for row in audit.view["lengths"]["rows"]}


@pytest.mark.parametrize("change", [lose_a_key, *further(read_keys_as_fp8)])
@pytest.mark.parametrize("mode", ["both", *further("as_designed")])
def test_a_kernel_that_is_wrong_from_a_number_of_keys_on(change: Any, mode: Any) -> None:
    audit = swept(planted(in_attention(change)), [64, 93, 95, 98], mode=mode)

    assert audit.verdict is Verdict.MISMATCH
    assert places(audit, "mismatch") == [("position", 95, 96, True)]
    assert audit.first_failure is not None
    assert (audit.first_failure.prompt, audit.first_failure.position) == ("length_95", 96)
    assert {length: verdict == "MISMATCH" for length, verdict in verdicts(audit).items()} == {
        64: False,
        93: False,
        95: True,
        98: True,
    }
    assert "INCONCLUSIVE" not in verdicts(audit).values()
    text = audit.view["lengths"]["boundaries"][0]["text"]
    assert text.startswith("from position 96 on decode differs from prefill beyond rounding (in ")
    assert text.endswith("; at position 95 it does not")


def test_a_rotary_table_that_is_rounded_from_a_position_on() -> None:
    audit = swept(planted(in_rotation(rounded_tables)), [30, 62, 64])

    assert places(audit, "mismatch") == [("position", 63, 64, True)]
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site.value) == (0, "q_rope")


def test_a_boundary_in_a_gap_comes_with_the_lengths_that_narrow_it_down() -> None:
    audit = swept(planted(in_attention(lose_a_key)), [40, 120])

    (boundary,) = [item for item in audit.view["lengths"]["boundaries"] if item["change"] == "mismatch"]
    assert (boundary["axis"], boundary["before"], boundary["after"], boundary["exact"]) == ("position", 41, 120, False)
    assert boundary["narrow"] == "41-111:10,120"
    assert "between position 41 and position 120 it begins that decode differs" in boundary["text"]
    assert "--lengths 41-111:10,120 narrows it down" in audit.to_markdown()

    closer = swept(planted(in_attention(lose_a_key)), [*range(41, 112, 10), 120])

    (boundary,) = [item for item in closer.view["lengths"]["boundaries"] if item["change"] == "mismatch"]
    assert (boundary["before"], boundary["after"], boundary["narrow"]) == (92, 101, "92-100:2,101")


def test_a_fault_at_one_length_begins_and_ends() -> None:
    """As one that happens when a page is full: decode reads so many keys at one position, whatever the prompt is."""

    def at_a_full_page(call: AttentionCall) -> bool:
        if call.key.shape[2] != FROM_POSITION + 1:
            return False
        call.scale *= 1.01
        return True

    audit = swept(planted(in_attention(at_a_full_page)), [63, 64, 65], span=1)

    assert places(audit, "mismatch") == [("position", 63, 64, True)]
    (told,) = [item for item in audit.view["lengths"]["boundaries"] if item["change"] == "mismatch"]
    assert told["ends"] == 64
    assert verdicts(audit)[64] == "MISMATCH"
    assert "t position 64 alone decode differs from prefill" in audit.to_markdown()
    assert told["text"].endswith("; at 63 and 65 it does not")


@pytest.fixture
def prefill_from_66() -> Iterator[str]:
    """Attention that is wrong in calls of 66 tokens or more: a prompt of 64 with a span of 2."""

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        if query.shape[2] >= 66:
            options["scaling"] = 1.01 * (options.get("scaling") or query.shape[-1] ** -0.5)
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    name = "wrong_from_66_tokens"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    yield name
    AttentionInterface._global_mapping.pop(name)
    AttentionMaskInterface._global_mapping.pop(name)


def test_where_the_same_position_behaves_in_two_ways_the_length_is_named(prefill_from_66: str) -> None:
    audit = swept(None, [62, 63, 64, 65], model={"attention": prefill_from_66})

    assert places(audit, "mismatch") == [("length", 63, 64, True)]
    assert "From length 64 on decode differs from prefill beyond rounding" in audit.to_markdown()


@pytest.mark.parametrize("dtype", [torch.bfloat16, *further(torch.float32)])
def test_the_clean_model_has_no_boundary_of_mismatch(dtype: torch.dtype) -> None:
    audit = swept(None, [64, 93, 95, 98], dtype=dtype)

    assert audit.exit_code == 0
    assert places(audit, "mismatch") == []
    assert set(verdicts(audit).values()) <= {"EXACT", "STRUCTURAL_DRIFT"}


def test_another_right_kernel_is_named_by_its_bits_and_is_no_mismatch() -> None:
    audit = swept(planted(in_attention(other_kernel)), [89, 91, 93, 95, 97, 99, 101, 103], span=2)

    assert audit.verdict is Verdict.STRUCTURAL_DRIFT
    assert places(audit, "mismatch") == []
    assert ("position", 95, 96, True) in places(audit, "bits")
    (boundary,) = [item for item in audit.view["lengths"]["boundaries"] if "attn_ctx" in item["sites"]]
    assert boundary["modes"] == ["kv_aligned"]


def test_what_only_all_lengths_together_show_is_put_at_none_of_them() -> None:
    fault = next(item for item in corpus_for(2) if item.name == "all_scales_1.001")
    audit = swept(fault.plant, list(range(20, 56, 3)), ladder="off", mode="as_designed")

    assert audit.verdict is Verdict.MISMATCH
    assert audit.view["lengths"]["pooled"]
    assert set(verdicts(audit).values()) == {"INCONCLUSIVE"}
    assert places(audit, "mismatch") == []
    assert "was found over all lengths together; it does not say at which it begins" in audit.to_markdown()
