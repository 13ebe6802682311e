"""Bits, path proof, freshness and the positive control: what each says, and when each refuses to speak."""

import math
from collections.abc import Mapping
from dataclasses import replace

import msgspec
import pytest

from kvdrift.instruments.bits import compare_bits
from kvdrift.instruments.control import judge_control, planted_size
from kvdrift.instruments.freshness import check_freshness
from kvdrift.instruments.route import Route, prove_route
from kvdrift.pairing.drift import DriftTable
from kvdrift.trace.model import PassPair, Trace
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.facts import Call, Plant
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.sites import Site
from tests.support.traces import drift_row

MODE = "kv_aligned"
PREFILL = Call(0, 5, 0, 5, "sdpa", ())
DECODE = Call(4, 1, 4, 5, "sdpa", ())


def route(prefill: list[Call], decode: list[Call]) -> Route:
    pair = PassPair(
        Mode.KV_ALIGNED,
        Trace("p", "prefill", "full", "float32", (1, 2, 3, 4, 5), prefill),
        Trace("p", "decode", MODE, "float32", (1, 2, 3, 4, 5), decode),
        (4,),
    )
    return prove_route(pair)


# --------------------------------------------------------------------------------------------------------- path proof


def test_one_call_without_and_one_with_a_cache_are_a_proof() -> None:
    found = route([PREFILL], [DECODE])
    assert found.is_proof
    assert (found.mode, found.rung, found.prompt) == (MODE, "float32", "p")


def test_an_attention_that_was_not_seen_is_no_objection() -> None:
    assert route([PREFILL], [msgspec.structs.replace(DECODE, kv_len=None)]).is_proof


@pytest.mark.parametrize(
    ("prefill", "decode", "problem"),
    [
        ([], [DECODE], "a pass made no forward call"),
        ([PREFILL], [], "a pass made no forward call"),
        ([msgspec.structs.replace(PREFILL, cache_len_before=2)], [DECODE], "prefill ran on a cache of 2 tokens"),
        ([PREFILL], [msgspec.structs.replace(DECODE, q_len=5, kv_len=9)], "decode fed 5 tokens at once"),
        ([PREFILL], [msgspec.structs.replace(DECODE, cache_len_before=0)], "decode ran on an empty cache"),
        ([PREFILL], [msgspec.structs.replace(DECODE, kv_len=1)], "decode at position 4 read 1 keys, so no cached one"),
        ([msgspec.structs.replace(PREFILL, q_len=1)], [DECODE], "prefill never fed more than one token"),
        ([PREFILL], [DECODE, msgspec.structs.replace(DECODE, cache_len_before=0)], "decode ran on an empty cache"),
    ],
)
def test_a_route_that_proves_nothing_says_why(prefill: list[Call], decode: list[Call], problem: str) -> None:
    found = route(prefill, decode)
    assert not found.is_proof
    assert any(text.startswith(problem) for text in found.problems)


# --------------------------------------------------------------------------------------------------------------- bits

GOOD = route([PREFILL], [DECODE])
BAD = route([PREFILL], [msgspec.structs.replace(DECODE, q_len=5, kv_len=9)])


def bits_table(*equal: bool) -> DriftTable:
    return DriftTable.of(
        [drift_row(MODE, "bfloat16", address=Address("p", i, 0, Site.Q_PROJ), equal=e) for i, e in enumerate(equal)]
    )


def test_all_bits_equal_on_proven_routes_speak_for_h0() -> None:
    evidence = compare_bits(bits_table(True, True), MODE, "bfloat16", [GOOD])
    assert (evidence.statistic, evidence.supports, evidence.valid) == (1.0, "H0", True)


def test_one_pair_of_other_bits_abstains() -> None:
    evidence = compare_bits(bits_table(True, False), MODE, "bfloat16", [GOOD])
    assert (evidence.statistic, evidence.supports, evidence.valid) == (0.5, None, True)


@pytest.mark.parametrize("routes", [[], [BAD], [GOOD, BAD], [replace(GOOD, mode="as_designed")]])
def test_equal_bits_without_path_proof_say_nothing(routes: list[Route]) -> None:
    evidence = compare_bits(bits_table(True, True), MODE, "bfloat16", routes)
    assert (evidence.supports, evidence.valid) == (None, False)
    assert evidence.reason


def test_no_pair_at_all_says_nothing() -> None:
    evidence = compare_bits(bits_table(), MODE, "bfloat16", [GOOD])
    assert (evidence.statistic, evidence.valid, evidence.reason) == (None, False, "nothing was compared")


# ---------------------------------------------------------------------------------------------------------- freshness

TOKENS = {"a": (1, 2), "b": (3, 4), "c": (5, 6)}


def cache_row(prompt: str, sha256: str, layer: int = 1, site: Site = Site.K_CACHE, mode: str = MODE):  # type: ignore[no-untyped-def]
    return drift_row(
        mode, "bfloat16", address=Address(prompt, 2, layer, site), sha256_prefill=sha256.encode().hex().ljust(64, "0")
    )


def freshness(*rows: object, tokens: Mapping[str, tuple[int, ...]] = TOKENS):  # type: ignore[no-untyped-def]
    return check_freshness(DriftTable.of(list(rows)), "bfloat16", [MODE], tokens)  # type: ignore[arg-type]


def test_hashes_that_vary_speak_for_the_run() -> None:
    key, value = freshness(cache_row("a", "x"), cache_row("b", "y"))
    assert (key.supports, key.valid, key.statistic) == ("H0", True, 2.0)
    assert (value.supports, value.valid, value.statistic) == (None, True, 0.0)


def test_the_same_hash_for_two_prompts_is_a_stale_capture() -> None:
    key, _ = freshness(cache_row("a", "x"), cache_row("b", "y"), cache_row("c", "x"))
    assert not key.valid
    assert key.supports is None
    assert key.reason == "the prompts a and c have the same k_cache: the capture is stale"


def test_prompts_of_the_same_tokens_may_have_the_same_keys() -> None:
    key, _ = freshness(cache_row("a", "x"), cache_row("b", "x"), tokens={"a": (1, 2), "b": (1, 2)})
    assert key.valid


def test_keys_chosen_from_a_beginning_that_two_prompts_share_may_be_the_same() -> None:
    rows, tokens = [cache_row("a", "x"), cache_row("b", "x")], {"a": (1, 2, 3), "b": (1, 2, 3, 4, 5)}

    def check(reads: dict[tuple[str, int], int]) -> bool:
        return check_freshness(DriftTable.of(rows), "bfloat16", [MODE], tokens, reads)[0].valid

    assert check({("a", 2): 1, ("b", 2): 1})
    assert not check({("a", 2): 2, ("b", 2): 4})  # the last key of the one is of a token that the other has not
    assert not check({("a", 2): 1, ("b", 2): 2})  # not the same keys, and the same bytes
    assert not check({})


def test_the_first_layer_may_repeat_and_the_deepest_may_not() -> None:
    rows = [cache_row("a", "x", layer=0), cache_row("b", "x", layer=0)]
    assert freshness(*rows, cache_row("a", "y"), cache_row("b", "z"))[0].valid
    assert not freshness(*rows, cache_row("a", "y"), cache_row("b", "y"))[0].valid


def test_values_are_checked_as_keys_are() -> None:
    _, value = freshness(cache_row("a", "x", site=Site.V_CACHE), cache_row("b", "x", site=Site.V_CACHE))
    assert not value.valid
    assert "v_cache" in str(value.reason)


def test_one_prompt_cannot_vary() -> None:
    key, _ = freshness(cache_row("a", "x"))
    assert (key.supports, key.valid) == (None, True)
    assert "nothing can vary" in key.text


# ---------------------------------------------------------------------------------------------------- positive control

PLANTED = Plant(1, Site.Q_ROPE, 1.0 + 2.0**-32)
BOUNDS = dict.fromkeys([*(Place(layer, Site.Q_ROPE) for layer in range(3)), Place(1, Site.ATTN_SCORES)], 1e-11)


def control_table(*seen: tuple[int, Site, float]) -> DriftTable:
    return DriftTable.of(
        [drift_row("control", address=Address("p", 3, layer, site), rel_l2=size) for layer, site, size in seen]
    )


@pytest.mark.parametrize("bound", [1e-15, 2.5e-12, 3.1e-11, 1e-6])
def test_the_planted_fault_is_a_power_of_two_above_sixteen_bounds(bound: float) -> None:
    size = planted_size(bound)
    assert 16 * bound <= size < 32 * bound
    assert math.frexp(size)[0] == 0.5


def test_a_fault_found_where_it_was_planted_proves_sight() -> None:
    table = control_table((0, Site.Q_ROPE, 0.0), (1, Site.Q_ROPE, 2e-10), (1, Site.ATTN_SCORES, 2e-10))
    evidence = judge_control(table, BOUNDS, PLANTED)
    assert evidence.valid
    assert evidence.supports is None
    assert evidence.statistic == pytest.approx(20)
    assert evidence.minimum_detectable == 2.0**-32


def test_a_fault_that_was_not_seen_makes_the_audit_blind() -> None:
    evidence = judge_control(control_table((1, Site.Q_ROPE, 1e-12)), BOUNDS, PLANTED)
    assert not evidence.valid
    assert "was not seen" in str(evidence.reason)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_fault_found_elsewhere_makes_the_audit_blind(layer: int) -> None:
    evidence = judge_control(control_table((layer, Site.Q_ROPE, 2e-10)), BOUNDS, PLANTED)
    assert not evidence.valid
    assert f"was found at layer {layer} / q_rope" in str(evidence.reason)


def test_a_fault_found_earlier_too_makes_the_audit_blind() -> None:
    table = control_table((0, Site.Q_ROPE, 2e-10), (1, Site.Q_ROPE, 2e-10))
    assert not judge_control(table, BOUNDS, PLANTED).valid


def test_a_nan_at_the_planted_place_counts_as_seen_and_never_as_within() -> None:
    evidence = judge_control(control_table((1, Site.Q_ROPE, math.inf)), BOUNDS, PLANTED)
    assert evidence.valid


def test_a_fault_behind_what_is_wrong_without_it_proves_sight() -> None:
    table = control_table((0, Site.Q_ROPE, 2e-10), (1, Site.Q_ROPE, 2e-10))
    assert judge_control(table, BOUNDS, PLANTED, known={Place(0, Site.Q_ROPE)}).valid
    assert not judge_control(table, BOUNDS, PLANTED, known={Place(0, Site.Q_ROPE), Place(1, Site.Q_ROPE)}).valid


def test_no_planted_fault_makes_the_audit_blind() -> None:
    evidence = judge_control(control_table(), BOUNDS, None)
    assert (evidence.valid, evidence.reason) == (False, "no fault was planted")


def test_bounds_that_are_not_known_make_the_audit_blind() -> None:
    assert not judge_control(control_table((1, Site.Q_ROPE, 1.0)), {}, PLANTED).valid
