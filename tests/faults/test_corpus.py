"""The corpus itself: what it covers, what each fault does to a model, and that nothing stays behind."""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvdrift.scenarios.catalogue import SCENARIOS
from kvdrift.vocabulary.sites import forward_rank
from kvdrift_bench.planted.facts import ALL_DTYPES
from kvdrift_bench.planted.torch import Fault, clean_twins, corpus_for, measured
from kvdrift_bench.planted.torch.model import CleanTwin, Commits, differs
from kvdrift_bench.planted.torch.size import decoded
from tests.support.carriers import N_LAYERS, PROMPT, carrier_of, lively, one_thread
from tests.support.matrix import first_of_each
from tests.support.tiny import ARCHITECTURES

CORPUS = corpus_for(N_LAYERS)
TWINS = clean_twins()
BY_NAME = {fault.name: fault for fault in CORPUS}
RUNNABLE = [fault.name for fault in CORPUS if fault.needs is None]
KEYED = [fault.name for fault in CORPUS if fault.keyed_to_dtype]
EVERYTHING: list[Fault | CleanTwin] = [*CORPUS, *TWINS]
SPAN = 2
TOKENS = [*PROMPT, 99, 23]


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def test_the_corpus_is_large_and_covers_every_class() -> None:
    classes = Counter(fault.mechanism for fault in CORPUS)

    assert len(CORPUS) >= 80
    assert set(classes) == {f"M{number:02}" for number in range(1, 26)}
    assert len(RUNNABLE) >= 80
    assert len(TWINS) >= 30


def test_names_are_unique() -> None:
    names = [planted.name for planted in EVERYTHING]

    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_references_name_a_repository_and_a_thread() -> None:
    pattern = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+#\d+")

    assert [planted.reference for planted in EVERYTHING if not pattern.fullmatch(planted.reference)] == []


def test_every_fault_says_where_it_is_and_what_causes_it() -> None:
    for fault in CORPUS:
        assert re.fullmatch(r"[a-z0-9_]+", fault.cause), fault.name
        assert re.fullmatch(r"[A-Z].*\.", fault.where), fault.name
        ranks = [forward_rank(fault.layer, site) for site in fault.sites]
        assert fault.sites, fault.name
        assert ranks == sorted(ranks) or fault.name == "residual_in_bf16", fault.name
        assert set(fault.dtypes) <= set(ALL_DTYPES), fault.name
        assert fault.size == {}, "sizes are measured, not typed in"


def test_faults_keyed_to_a_dtype_claim_no_effect_beyond_half_precision() -> None:
    for name in KEYED:
        assert set(BY_NAME[name].dtypes) <= {"bfloat16", "float16"}


def test_faults_of_a_scenario_name_one_of_the_known() -> None:
    assert {fault.needs for fault in CORPUS if fault.needs is not None} <= {scenario.name for scenario in SCENARIOS}


@cache
def clean(architecture: str, dtype: str) -> dict[str, list[Tensor]]:
    return decoded(lively(architecture, dtype), TOKENS, SPAN)[0]


@pytest.mark.parametrize(
    "dtype",
    first_of_each(ALL_DTYPES, lambda dtype: dtype in ("bfloat16", "float16")),  # half precision, and wider
)
def test_a_fault_has_an_effect_at_the_dtypes_that_it_claims_and_at_no_other(dtype: str) -> None:
    wrong = {}
    for name in RUNNABLE:
        fault = BY_NAME[name]
        architecture, model = carrier_of(fault, dtype)
        found, commits = decoded(model, TOKENS, SPAN, fault.plant)
        assert commits is not None
        changed = any(differs(value, found[key]) for key, value in clean(architecture, dtype).items())
        committed = commits.count > 0
        if changed != (dtype in fault.dtypes) or committed != (changed or not fault.keyed_to_dtype):
            wrong[name] = f"changed {changed}, committed {commits.count}, claims {fault.dtypes}"

    assert wrong == {}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", KEYED)
def test_a_fault_keyed_to_the_dtype_vanishes_on_the_ladder(name: str, dtype: str) -> None:
    """A model that runs in half precision natively, moved to another rung: the fault is not there at all."""
    from kvdrift.engines.torch.precision import at_dtype

    fault = BY_NAME[name]
    native = fault.dtypes[0]
    _, model = carrier_of(fault, native)

    with at_dtype(model, getattr(torch, dtype)):
        _, commits = decoded(model, TOKENS, SPAN, fault.plant)

    assert commits is not None
    assert (commits.count, commits.changed) == (0, 0)


def test_a_fault_is_committed_on_decode_steps_only() -> None:
    committed = {}
    for name in RUNNABLE:
        fault = BY_NAME[name]
        _, model = carrier_of(fault, "float32")
        with fault.plant(model) as commits, torch.no_grad():
            model(torch.tensor([PROMPT]), use_cache=True)
        if commits.count:
            committed[name] = commits.count

    assert committed == {}


def test_the_counter_tells_a_commit_from_an_effect() -> None:
    commits = Commits()
    rows = torch.ones(2, 3)

    assert commits.take(rows, rows * 2) is not None
    commits.take(rows, rows.clone())

    assert (commits.count, commits.changed) == (2, 1)


def test_size_is_measured() -> None:
    _, model = carrier_of(BY_NAME["all_scales_1.001"])

    sizes = {
        name: measured(BY_NAME[name], model, TOKENS).size["logits"]
        for name in ("all_scales_1.0001", "all_scales_1.001", "position_zero")
    }

    assert 0.0 < sizes["all_scales_1.0001"] < sizes["all_scales_1.001"] / 5 < sizes["position_zero"] / 50


def test_a_fault_of_one_layer_leaves_the_layers_below_alone() -> None:
    fault = BY_NAME["one_layer_scale_1.01"]
    _, model = carrier_of(fault)

    size = measured(fault, model, TOKENS).size

    assert (size["layer 0"], size["layer 1"]) == (0.0, 0.0)
    assert size["layer 2"] > 0.0


def test_the_reason_why_a_model_cannot_carry_a_fault_is_given() -> None:
    llama = lively("llama", "float32")

    assert BY_NAME["sink_missing"].applies(llama) == "no attention sinks"
    assert BY_NAME["window_minus_one"].applies(llama) == "no layer has a sliding window"
    assert BY_NAME["heads_tiled"].applies(lively("gpt2", "float32")) == "no query heads share one of several kv heads"
    assert BY_NAME["slot_zero"].applies(lively("mamba2", "float32")) == "no layer keeps keys and values"


def seams(model: nn.Module) -> dict[str, Any]:
    """Everything through which faults are planted, as it is now."""
    from transformers import AttentionInterface
    from transformers.cache_utils import Cache, DynamicCache

    found: dict[str, Any] = {
        "interface": dict(AttentionInterface.__dict__),
        "cache": dict(Cache.__dict__),
        "dynamic": dict(DynamicCache.__dict__),
        "registry": {name: AttentionInterface._global_mapping[name] for name in AttentionInterface._global_mapping},
        "config": dict(model.config.__dict__),
    }
    for name, module in model.named_modules():
        source = sys.modules[type(module).__module__]
        found[f"{name} rotation"] = getattr(source, "apply_rotary_pos_emb", None)
        for key, value in module.__dict__.items():
            if key in ("_parameters", "_buffers"):
                found.update({f"{name}.{key}.{k}": (id(v), None if v is None else v.clone()) for k, v in value.items()})
            elif "hooks" in key and isinstance(value, dict):
                found[f"{name}.{key}"] = list(value)
            elif not key.startswith("_modules"):
                found[f"{name}.{key}"] = repr(value)
    return found


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [key for key in before.keys() | after.keys() if _differ(before.get(key), after.get(key))]


def _differ(before: Any, after: Any) -> bool:
    if isinstance(before, dict) and isinstance(after, dict):
        return before.keys() != after.keys() or any(before[key] is not after[key] for key in before)
    return differs(before, after)


@pytest.mark.parametrize(
    "planted",
    first_of_each(EVERYTHING, lambda planted: planted.mechanism if isinstance(planted, Fault) else "twin"),
    ids=lambda planted: planted.name,
)
def test_nothing_is_left_behind(planted: Fault | CleanTwin) -> None:
    _, model = carrier_of(planted)
    decoded(model, TOKENS, 1)  # some models make their tables in their first call
    before = seams(model)

    decoded(model, TOKENS, SPAN, planted.plant)

    assert changes(before, seams(model)) == []


def test_the_check_for_remains_sees_remains() -> None:
    model = lively("llama", "float32")
    before = seams(model)
    handle = model.register_forward_hook(lambda module, args, output: None)
    after = seams(model)
    handle.remove()

    assert changes(before, after) == ["._forward_hooks"]


def test_every_fault_has_a_carrier() -> None:
    for planted in EVERYTHING:
        architecture, _ = carrier_of(planted)
        assert architecture.partition(" for ")[0] in ARCHITECTURES
