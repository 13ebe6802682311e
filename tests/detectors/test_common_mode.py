"""Faults that prefill and decode share: replay sees those inside attention, and the report says what nothing sees."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

import kvdrift
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.sites import Site
from tests.support.carriers import PROMPTS, one_thread
from tests.support.matrix import further
from tests.support.tiny import tiny_model

Change = Callable[..., dict[str, Any]]


def right(query: torch.Tensor, **options: Any) -> dict[str, Any]:
    return options


def wrong_scale(query: torch.Tensor, **options: Any) -> dict[str, Any]:
    return {**options, "scaling": 3.0 * options["scaling"]}


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def registered(change: Change) -> str:
    """Register eager attention whose options `change` rewrites, in prefill and in decode alike; return its name."""
    from transformers.models.llama.modeling_llama import eager_attention_forward

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        return eager_attention_forward(module, query, key, value, mask, **change(query, **options))

    name = f"shared_{change.__name__}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    return name


def test_unwritten_slots_that_both_passes_see_are_no_keys_of_the_model() -> None:
    """They are slots of the cache, and replay does not abstain as it does where a model adds keys of its own."""
    model = tiny_model("llama", attention="eager")

    def uncover(module: Any, args: Any, options: dict[str, Any]) -> Any:
        mask, positions = options["attention_mask"].clone(), options["position_ids"]
        mask[..., int(positions.max()) + 1 :] = 0.0
        return args, {**options, "attention_mask": mask}

    handles = [layer.self_attn.register_forward_pre_hook(uncover, with_kwargs=True) for layer in model.model.layers]
    audit = kvdrift.audit(model, prompts=PROMPTS, span=2, cache="static")
    for handle in handles:
        handle.remove()

    assert audit.verdict is Verdict.MISMATCH
    replay = next(item for item in audit.evidence if item.instrument == "replay")
    assert replay.supports == "H1"


@pytest.mark.parametrize("dtype", [torch.bfloat16, *further(torch.float32)])
def test_attention_that_is_wrong_in_both_passes_is_found(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype, attention=registered(wrong_scale))
    audit = kvdrift.audit(model, prompts=PROMPTS, span=2)
    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == (0, Site.ATTN_CTX)
    ladder = [item for item in audit.evidence if item.instrument == "ladder"]
    assert {item.supports for item in ladder} == {"H0"}
    replay = next(item for item in audit.evidence if item.instrument == "replay")
    assert int(str(replay.detail["n_shared"])) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, *further(torch.float32)])
def test_attention_of_the_same_kind_that_is_right_passes(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype, attention=registered(right))
    audit = kvdrift.audit(model, prompts=PROMPTS, span=2)
    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)
    caveat = next(item for item in audit.caveats if item.code == "COMMON_MODE")
    assert "attention was replayed" in caveat.text


def test_a_bias_that_nobody_specified_is_not_replayed_and_no_mismatch() -> None:

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        from transformers.models.llama.modeling_llama import eager_attention_forward

        return eager_attention_forward(module, query, key, value, mask, **options)

    def mask(*args: Any, **options: Any) -> torch.Tensor:
        made: torch.Tensor = ALL_MASK_ATTENTION_FUNCTIONS["eager"](*args, **options)
        keys = torch.arange(made.shape[-1], dtype=made.dtype)
        return made.masked_fill(made == 0, 0.0) + torch.where(made == 0, 0.05 * keys, 0.0).to(made.dtype)

    AttentionInterface.register("biased", attention)
    AttentionMaskInterface.register("biased", mask)
    model = tiny_model("llama", dtype=torch.float32, attention="biased")
    audit = kvdrift.audit(model, prompts=PROMPTS, span=2)
    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)
    caveat = next(item for item in audit.caveats if item.code == "COMMON_MODE")
    assert "attention was replayed" not in caveat.text
