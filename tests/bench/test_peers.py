"""Every peer's rule, against values that were worked out by hand, and against what it must never do."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from kvdrift.vocabulary.sites import Site
from kvdrift_bench.peers import statistics as stat
from kvdrift_bench.peers.rules import RULES, Rule, judge_by_peers
from kvdrift_bench.peers.tensors import PairedTensor

RULE = {rule.name: rule for rule in RULES}


def tensor(prefill: Any, decode: Any, reference: Any = None, **options: Any) -> PairedTensor:
    """Return a tensor at the logits, float32 unless `dtype` says otherwise."""
    dtype = options.pop("dtype", np.float32)
    settings: dict[str, Any] = {"prompt": "p", "position": 3, "layer": None, "site": Site.LOGITS, "next_token": 0}
    return PairedTensor(
        prefill=np.asarray(prefill, dtype=dtype),
        decode=np.asarray(decode, dtype=dtype),
        reference=None if reference is None else np.asarray(reference, dtype=np.float64),
        **settings | options,
    )


def outcome(rule: str, *tensors: PairedTensor) -> tuple[bool, PairedTensor | None]:
    """Return whether a rule flags, and the first tensor that it flags."""
    result = judge_by_peers(tensors, ["p", "q"], [RULE[rule]])[0]
    return result.flagged, result.first


def gross() -> PairedTensor:
    """A difference that no rule may overlook."""
    rng = np.random.default_rng(0)
    prefill = rng.normal(size=64).astype(np.float32)
    reference = prefill.astype(np.float64) + rng.normal(size=64) * 1e-7
    return tensor(prefill, -50.0 * prefill[::-1], reference, next_token=int(prefill.argmax()))


def identical() -> PairedTensor:
    values = np.random.default_rng(1).normal(size=64).astype(np.float32)
    return tensor(values, values.copy(), values.astype(np.float64) + 1e-9)


@pytest.mark.parametrize("name", RULE)
def test_a_gross_difference_is_flagged(name: str) -> None:
    wrong = gross()

    assert outcome(name, wrong) == (True, wrong)


@pytest.mark.parametrize("name", RULE)
def test_identical_tensors_are_not_flagged(name: str) -> None:
    assert outcome(name, identical()) == (False, None)


@pytest.mark.parametrize("name", RULE)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_only_one_side_lacks_is_flagged(name: str, bad: float) -> None:
    broken = tensor([1.0, 2.0, 3.0], [1.0, bad, 3.0], [1.0, 2.0, 3.0])

    assert outcome(name, broken) == (True, broken)


@pytest.mark.parametrize("name", RULE)
def test_keys_that_one_side_lost_are_flagged(name: str) -> None:
    lost = tensor([1.0, 2.0], [1.0, 2.0], [1.0, 2.0], n_lost=1)

    assert outcome(name, lost)[0]


@pytest.mark.parametrize("name", RULE)
def test_scores_that_both_sides_mask_are_no_difference(name: str) -> None:
    values = [1.0, -math.inf, 3.0]

    assert not outcome(name, tensor(values, values, values))[0]


def test_that_these_checks_can_fail() -> None:
    """A rule that never fires, and one that always does, would be noticed by the checks above."""
    never = Rule(name="never", source="", formula="", threshold=math.inf, statistic=stat.l2_distance)
    always = Rule(name="always", source="", formula="", threshold=-1.0, statistic=stat.l2_distance)

    assert not judge_by_peers([gross()], ["p"], [never])[0].flagged
    assert judge_by_peers([identical()], ["p"], [always])[0].flagged


def test_every_rule_has_a_name_a_source_and_one_statistic() -> None:
    assert len(RULE) == len(RULES) == 18
    for rule in RULES:
        assert rule.source
        assert rule.formula
        assert (rule.statistic is None) != (rule.over_group is None)


def test_the_statistics_against_hand_computed_values() -> None:
    # x = (3, 4), y = (3, 5): d = (0, 1), |x| = 5, |y| = sqrt 34, x.y = 29
    pair = tensor([3.0, 4.0], [3.0, 5.0])

    assert stat.bits_differ(pair) == 1.0
    assert stat.gretacore_gate(pair) == pytest.approx(1000.0)  # p99 = 1 against 1e-3
    assert stat.calc_diff(pair) == pytest.approx(1.0 - 2.0 * 29.0 / (25.0 + 34.0))
    assert stat.elementwise_1e_5(pair) == pytest.approx(1.0 / 5e-5)
    assert stat.l2_distance(pair) == pytest.approx(1.0)
    assert stat.cosine(pair) == pytest.approx(29.0 / (5.0 * math.sqrt(34.0)))
    assert stat.signal_to_noise(pair) == pytest.approx(10.0 * math.log10(25.0))
    assert stat.nmse(pair) == pytest.approx(0.04)
    assert stat.assert_close(pair) == pytest.approx(1.0 / (1e-5 + 1.3e-6 * 4.0))


def test_assert_close_takes_the_tolerance_of_the_dtype() -> None:
    x, y = [1.0, 2.0], [1.0, 2.03125]

    assert stat.assert_close(tensor(x, y, dtype=ml_dtypes.bfloat16)) == pytest.approx(0.03125 / (1e-5 + 1.6e-2 * 2.0))
    assert stat.assert_close(tensor(x, y, dtype=np.float16)) == pytest.approx(0.03125 / (1e-5 + 1e-3 * 2.0))


@pytest.mark.parametrize(
    ("prefill", "decode", "flagged"),
    [
        ([1.0, 0.0], [1.0, 0.1], False),  # cosine 0.995
        ([1.0, 0.0], [1.0, 0.2], True),  # cosine 0.981 and 0.2 off
        ([1e-4, 0.0], [1e-4, 2e-5], False),  # the same cosine, 2e-5 off
        ([1e-4, 0.0], [1e-4, 1e-4], True),  # cosine 0.71
        ([100.0, 0.0], [101.5, 0.0], True),  # 1.5 off
    ],
)
def test_the_three_arms_of_msprobe(prefill: list[float], decode: list[float], flagged: bool) -> None:
    assert outcome("msprobe", tensor(prefill, decode))[0] is flagged


def test_same_of_dynamo_allows_a_multiple_of_the_error_of_prefill() -> None:
    reference = np.zeros(2000) + 1.0
    prefill = reference + 1e-3

    def decode(error: float) -> PairedTensor:
        return tensor(prefill, reference + error, reference)

    assert not outcome("dynamo_same", decode(-1.9e-3))[0]
    assert outcome("dynamo_same", decode(-2.2e-3))[0]
    small = tensor(prefill[:10], (reference - 2.2e-3)[:10], reference[:10])  # three times below 1000 elements
    assert not outcome("dynamo_same", small)[0]
    assert stat.dynamo_same(decode(1e-3 + 5e-5)) == 0.0  # allclose


def test_the_three_times_rule_and_its_floor() -> None:
    close = tensor([1.0, 2.0], [1.0, 2.0 + 2.0**-18], [1.0, 2.0])

    assert stat.three_times(close) == 0.0  # 4e-6 is below 1e-5
    wrong = tensor([1.0, 2.0 + 2.0**-10], [1.0, 2.0 + 2.0**-8], [1.0, 2.0])
    assert stat.three_times(wrong) == pytest.approx((2.0**-8 - 1e-5) / 2.0**-10)
    assert outcome("flash_attention_3x", wrong)[0]


def test_the_module_test_of_neuron_pools_the_inputs_of_a_module() -> None:
    rng = np.random.default_rng(2)
    reference = rng.normal(size=(10, 4000))
    noise = rng.normal(size=(2, 10, 4000)) * 1e-3
    bfloat = [
        tensor(r + a, r + b, r, dtype=np.float64, position=i)
        for i, (r, a, b) in enumerate(zip(reference, *noise, strict=True))
    ]
    value, _ = stat.neuron_module(bfloat)
    assert value < 1.0

    loud = [
        tensor(r + a, r + 4.0 * b, r, dtype=np.float64, position=i)
        for i, (r, a, b) in enumerate(zip(reference, *noise, strict=True))
    ]
    value, _ = stat.neuron_module(loud)
    assert value == pytest.approx(4.0, rel=0.2)  # sigma 4, BC far off: the spread decides


def test_the_logit_test_of_neuron_passes_by_any_of_its_routes() -> None:
    reference = np.linspace(10.0, 1.0, 200)
    shift = np.zeros(200)
    shift[:20] = 0.5  # 5 % of the largest logit; 1.1 % are allowed among the top 5
    wrong = tensor(reference, reference - shift, reference, dtype=np.float64)
    assert outcome("neuron_logits", wrong)[0]

    rescued = tensor(reference + 2.0 * shift, reference - shift, reference, dtype=np.float64)
    assert not outcome("neuron_logits", rescued)[0]  # sigma = 1/2


def test_k3_is_the_mean_over_tokens_with_a_known_successor() -> None:
    # log-probabilities ln 1/2 and ln 1/4 of token 0: l = ln 2, K3 = 2 - 1 - ln 2
    pair = tensor([0.0, 0.0], [0.0, math.log(3.0)], dtype=np.float64)
    assert stat.k3(pair) == pytest.approx(1.0 - math.log(2.0))

    same = tensor([0.0, 0.0], [0.0, 0.0], dtype=np.float64, position=4)
    last = tensor([0.0, 0.0], [0.0, 9.0], dtype=np.float64, position=5, next_token=None)
    scored = RULE["sglang_k3"].scores([pair, same, last])
    assert [score.value for score in scored] == [pytest.approx((1.0 - math.log(2.0)) / 2.0)]


def test_top_n_looks_at_the_first_other_choice_of_each_prompt_only() -> None:
    ladder = np.arange(10.0, 0.0, -1.0)
    swapped = ladder.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    sixth = ladder.copy()
    sixth[5] = 11.0  # what decode chooses stands sixth in prefill
    near, far = tensor(ladder, swapped, position=3), tensor(ladder, sixth, position=4)

    assert not outcome("vllm_top_n", near, far)[0]
    assert outcome("vllm_top_n", far) == (True, far)


def test_the_gate_of_gretacore_wants_the_same_choice_of_token() -> None:
    near_tie = tensor([1.0, 1.0 + 1e-4], [1.0 + 1e-4, 1.0])

    assert stat.gretacore_gate(near_tie) < 1.0
    assert outcome("gretacore_gate", near_tie) == (True, near_tie)


def test_the_first_flagged_tensor_is_first_in_forward_order() -> None:
    def at(layer: int, site: Site, prompt: str, position: int) -> PairedTensor:
        return tensor([1.0], [2.0], layer=layer, site=site, prompt=prompt, position=position)

    first = at(0, Site.K_CACHE, "p", 4)
    others = [
        at(1, Site.LAYER_IN, "p", 3),
        at(0, Site.ATTN_OUT, "p", 3),
        at(0, Site.K_CACHE, "q", 3),
        at(0, Site.K_CACHE, "p", 5),
    ]

    assert outcome("gretacore_hash", *others, first) == (True, first)


def test_the_steps_give_the_first_flagged_tensor_at_any_threshold() -> None:
    sizes = [0.2, 0.1, 0.5, 0.4, 0.9]
    tensors = [tensor([1.0], [1.0 + size], layer=layer, site=Site.MLP_OUT) for layer, size in enumerate(sizes)]
    steps = judge_by_peers(tensors, ["p"], [RULE["polygraphy_l2"]])[0].steps
    assert steps is not None

    assert [step.layer for step, _ in steps] == [0, 2, 4]
    for threshold in (0.05, 0.15, 0.3, 0.45, 0.6, 1.0):
        by_hand = next((layer for layer, size in enumerate(sizes) if size > threshold), None)
        assert next((step.layer for step, alarm in steps if alarm > threshold), None) == by_hand


def test_rules_that_need_a_reference_are_not_applied_without_one() -> None:
    for rule in RULES:
        applied = judge_by_peers([tensor([1.0], [2.0])], ["p"], [rule])[0].steps is not None
        assert applied is not rule.needs_reference
