"""A row that decode writes wrongly at the native dtype alone is found, however many right ones are read beside it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kvdrift
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.sites import Site
from kvdrift_bench.models.tiny import lively_model
from tests.support.matrix import further
from tests.support.own_decoder import Core, Decoder, Layer, engine, plain

LENGTH = 60
PROMPTS = {name: [(step * i * i + 3) % 61 + 2 for i in range(LENGTH)] for name, step in (("p", 7), ("q", 5))}


def writing(change: Callable[[Tensor], Tensor]) -> Core:
    """Attention whose decode steps change the newest key [1, kv head, 1, dim], at bfloat16 alone."""

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        if decoding and query.dtype == torch.bfloat16:
            keys = torch.cat([keys[:, :, :-1], change(keys[:, :, -1:])], dim=2)
        return plain(query, keys, values, start, decoding)

    return core


def audited(change: Callable[[Tensor], Tensor]) -> Audit:
    return kvdrift.audit(
        engine(Decoder([Layer(0), Layer(1, writing(change))]), torch.bfloat16), prompts=PROMPTS, span=2
    )


def one_element(key: Tensor) -> Tensor:
    factor = torch.ones(key.shape[-1], dtype=key.dtype)
    factor[3] = 1.5
    return key * factor


def one_head(key: Tensor) -> Tensor:
    return torch.cat([key[:, :1], key[:, 1:] * 1.05], dim=1)


@pytest.mark.parametrize("change", [lambda key: key * 1.05, *further(one_head, one_element)])
def test_a_new_key_that_is_off_at_bfloat16_alone_is_found_among_many(change: Callable[[Tensor], Tensor]) -> None:
    audit = audited(change)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.kind == "precision"
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == (1, Site.K_CACHE)


def rounded_once_more(key: Tensor) -> Tensor:
    """The next number of bfloat16, of all elements of the row."""
    return torch.nextafter(key, torch.full_like(key, torch.inf))


@pytest.mark.parametrize("change", [lambda key: key, rounded_once_more])
def test_a_new_key_within_rounding_passes(change: Callable[[Tensor], Tensor]) -> None:
    audit = audited(change)
    found = [item for item in audit.evidence if item.instrument == "new_rows"]

    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), (audit.first_failure, audit.decision.reasons)
    assert [item.supports for item in found] == ["H0"]
    assert found[0].minimum_detectable is not None
    assert found[0].minimum_detectable < 0.03, "a promise that does not depend on the length"


def test_where_what_enters_the_cache_is_recorded_its_copy_is_judged() -> None:
    audit = kvdrift.audit(lively_model("llama", torch.bfloat16), prompts={"p": PROMPTS["p"][:12]}, span=2)

    assert not [item for item in audit.evidence if item.instrument == "new_rows"]
