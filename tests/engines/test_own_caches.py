"""Caches of a caller's own: what one must have, and that its faults are found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import kvdrift
from kvdrift.engines.hf.caches import CacheAdapter
from kvdrift.errors import CaptureError, UsageError
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.evidence import Verdict
from tests.support.every_kind import PROMPTS, lively

SHARED = DynamicCache()
PASSES = (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)


class Inheriting(DynamicCache):  # type: ignore[misc]  # transformers has no types
    """Stores rows where its base class does."""


class Rows(Cache):  # type: ignore[misc]
    """Keeps nothing in layers: rows in dictionaries, and its own way back."""

    is_compileable = False

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self.rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, key: Any, value: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx in self.rows:
            before = self.rows[layer_idx]
            key, value = torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)
        self.rows[layer_idx] = key, value
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.rows[layer_idx][0].shape[2] if layer_idx in self.rows else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length(layer_idx) + query_length, 0

    def crop(self, tokens: int) -> None:
        self.rows = {layer: (key[:, :, :tokens], value[:, :, :tokens]) for layer, (key, value) in self.rows.items()}


class Forgetting(Rows):
    """Hands out zeros for its first value in layer 1, once a token comes alone."""

    def update(self, key: Any, value: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        is_alone = value.shape[2] == 1
        key, value = super().update(key, value, layer_idx)
        if layer_idx == 1 and is_alone:
            value = value.clone()
            value[:, :, 0] = 0.0
        return key, value

    crop = Rows.crop


class Refusing(Rows):
    """Says itself that it cannot go back."""

    update = Rows.update

    def crop(self, tokens: int) -> None:
        raise NotImplementedError("pages of this cache are written once")


class Sticking(Rows):
    """Goes back by one token too few in layer 1."""

    update = Rows.update

    def crop(self, tokens: int) -> None:
        kept = self.rows[1]
        super().crop(tokens)
        last = kept[0].shape[2] + tokens
        self.rows[1] = tuple(torch.cat([x[:, :, 1:last], x[:, :, last : last + 1]], dim=2) for x in kept)  # type: ignore[assignment]


def audited(cache: Any, **options: Any) -> Audit:
    return kvdrift.audit(lively(), prompts=PROMPTS, cache=cache, **{"span": 1, **options})


@pytest.mark.parametrize("cache", [Inheriting, lambda: Inheriting(), lambda: Rows()])
def test_a_cache_of_ones_own_is_audited(cache: Any) -> None:
    audit = audited(cache)

    assert audit.verdict in PASSES
    assert {mode["status"] for mode in audit.view["modes"].values()} == {"PASS"}
    assert audit.suite.judged.measured.info.cache in ("Inheriting", "Rows")


def test_scenarios_run_on_it() -> None:
    audit = audited(lambda: Inheriting(), scenarios="rewind,generate_greedy,batch_padded")

    assert all(row["verdict"] in ("EXACT", "STRUCTURAL_DRIFT") for row in audit.view["scenarios"])


def test_a_fault_in_it_is_found() -> None:
    audit = audited(lambda: Forgetting())

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (1, "v_cache")


def test_a_way_back_is_the_caches_own() -> None:
    """One that refuses is not applicable by its own words; one that goes back wrongly is a finding."""
    refusing = audited(lambda: Refusing(), scenarios="decode,rewind").view
    sticking = audited(lambda: Sticking(), scenarios="rewind", mode="as_designed")

    said = "Refusing refuses to go back: pages of this cache are written once"
    assert refusing["modes"]["kv_aligned"]["reasons"] == [f"not available: {said}"]
    assert refusing["scenarios"][1]["verdict"] is None
    assert refusing["scenarios"][1]["reasons"] == [said]
    assert sticking.verdict is Verdict.MISMATCH
    assert sticking.first_failure is not None
    assert sticking.first_failure.layer == 1


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        (DynamicCache(), "cache= is a DynamicCache object, and each sequence needs one of its own; pass a function"),
        (lambda: SHARED, "cache= returned the same DynamicCache twice; it must make a new one"),
        (lambda: None, "cache= returned a NoneType, which has no update and no get_seq_length; a cache of"),
        (lambda: 1 // 0, "failed: ZeroDivisionError: integer division or modulo by zero; it is called without"),
        (7, "unknown cache kind 7; use --cache with one of dynamic, static, or pass cache=lambda: MyCache()"),
    ],
)
def test_what_is_no_way_to_make_caches_is_told_in_one_line(cache: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        audited(cache)

    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cache_that_the_model_cannot_use_is_named_with_what_it_lacks() -> None:
    class Bare:
        def update(self, key: Any, value: Any, layer_idx: int, *args: Any) -> Any:
            return key, value

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return 0

    with pytest.raises(CaptureError, match=r"with a Bare cache: AttributeError: 'Bare' object has no attribute"):
        audited(Bare)


def test_rows_that_a_layer_shares_begin_where_those_of_its_kind_do() -> None:
    """Up to transformers 5.22 a cache ends before the layers that share rows."""
    kinds = ("sliding_attention", "full_attention", "sliding_attention", "full_attention")
    cache = DynamicCache()
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=4), DynamicLayer()]
    rows = torch.ones(1, 2, 9, 8)
    for layer in range(2):
        cache.update(rows, rows, layer)
    first = CacheAdapter(cache, kinds).slot_offsets(2)

    assert [first(layer, 6) for layer in range(4)] == [6, 0, 6, 0]
