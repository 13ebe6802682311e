"""Two passes are paired strictly, and every way to lack a partner is counted."""

import math

import numpy as np
import pytest

from kvdrift.errors import AlignmentError
from kvdrift.pairing.align import Aligner, Pair, Unpaired
from kvdrift.pairing.drift import DriftTable
from kvdrift.pairing.rows import DriftRow
from kvdrift.trace.model import Array, PassPair, Slots, Trace
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.facts import Call
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.sites import Site

TOKENS = (11, 12, 13, 14)
WIDE = np.arange(8.0, dtype=np.float32).reshape(2, 4)


def a_trace(pass_name: str, *, tokens: tuple[int, ...] = TOKENS, prompt: str = "p", rung: str = "float32") -> Trace:
    return Trace(prompt, "prefill" if pass_name == "prefill" else "decode", "full", rung, tokens)


def both(positions: tuple[int, ...] = (2, 3)) -> PassPair:
    """Two passes with the same embedding and the same projection at positions 2 and 3."""
    pair = PassPair(Mode.KV_ALIGNED, a_trace("prefill"), a_trace("decode"), positions)
    for trace in (pair.prefill, pair.decode):
        trace.add_rows(None, Site.EMBED_OUT, (2, 3), WIDE)
        trace.add_rows(0, Site.Q_PROJ, (2, 3), WIDE)
    return pair


def walk(pair: PassPair) -> tuple[list[Pair], list[Unpaired]]:
    aligner = Aligner(pair)
    return list(aligner.pairs()), aligner.unpaired


def places(pairs: list[Pair]) -> set[tuple[int | None, Site, int]]:
    return {(pair.layer, pair.site, position) for pair in pairs for position in pair.positions}


def lost(unpaired: list[Unpaired]) -> list[tuple[int | None, Site, int, str]]:
    return [(item.layer, item.site, item.position, item.only_in) for item in unpaired]


def test_whole_passes_leave_nothing_over() -> None:
    pairs, unpaired = walk(both())
    assert unpaired == []
    assert places(pairs) == {
        (layer, site, position) for layer, site in ((None, Site.EMBED_OUT), (0, Site.Q_PROJ)) for position in (2, 3)
    }


def test_values_are_paired_by_position_and_not_by_order() -> None:
    pair = both()
    pair.decode.rows.clear()
    for position in (3, 2):
        pair.decode.add_rows(None, Site.EMBED_OUT, (position,), WIDE[position - 2 : position - 1])
        pair.decode.add_rows(0, Site.Q_PROJ, (position,), WIDE[position - 2 : position - 1])
    pairs, unpaired = walk(pair)
    assert unpaired == []
    assert all(np.array_equal(values.prefill, values.decode) for values in pairs)


def test_positions_that_were_not_asked_for_are_left_alone() -> None:
    pairs, unpaired = walk(both(positions=(3,)))
    assert unpaired == []
    assert {position for _, _, position in places(pairs)} == {3}


# -------------------------------------------------------------------------------------------------- without a partner


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_site_missing_in_one_pass_is_counted(side: str) -> None:
    pair = both()
    del getattr(pair, side).rows[1]
    other = "decode" if side == "prefill" else "prefill"
    assert lost(walk(pair)[1]) == [(0, Site.Q_PROJ, 2, other), (0, Site.Q_PROJ, 3, other)]


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_layer_missing_in_one_pass_is_counted(side: str) -> None:
    pair = both()
    other = "decode" if side == "prefill" else "prefill"
    getattr(pair, other).add_rows(1, Site.Q_PROJ, (2, 3), WIDE)
    assert lost(walk(pair)[1]) == [(1, Site.Q_PROJ, 2, other), (1, Site.Q_PROJ, 3, other)]


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_position_missing_in_one_pass_is_counted(side: str) -> None:
    pair = both()
    rows = getattr(pair, side).rows
    del rows[1]
    getattr(pair, side).add_rows(0, Site.Q_PROJ, (2,), WIDE[:1])
    other = "decode" if side == "prefill" else "prefill"
    assert lost(walk(pair)[1]) == [(0, Site.Q_PROJ, 3, other)]


def test_from_the_first_position_of_another_token_on_nothing_is_compared() -> None:
    pair = both()
    pair.decode.tokens = (11, 12, 99, 14)
    pairs, unpaired = walk(pair)
    assert pairs == []
    assert [(item.position, item.why) for item in unpaired] == [
        (2, "the tokens differ at position 2: 13 in prefill, 99 in decode"),
        (3, "the tokens differ at position 2: 13 in prefill, 99 in decode"),
    ]


def test_another_token_after_a_position_does_not_concern_it() -> None:
    pair = both()
    pair.decode.tokens = (11, 12, 13, 99)
    pairs, unpaired = walk(pair)
    assert {position for _, _, position in places(pairs)} == {2}
    assert [item.position for item in unpaired] == [3]


def test_a_position_beyond_the_tokens_is_counted() -> None:
    pair = both(positions=(2, 3, 4))
    assert [item.position for item in walk(pair)[1]] == [4]


@pytest.mark.parametrize(
    "other",
    [WIDE[:, :3], WIDE.reshape(2, 2, 2), WIDE.astype(np.float64), WIDE.astype(np.float16)],
    ids=["fewer", "reshaped", "float64", "float16"],
)
def test_another_shape_or_dtype_is_counted_and_never_broadcast(other: Array) -> None:
    pair = both()
    del pair.decode.rows[1]
    pair.decode.add_rows(0, Site.Q_PROJ, (2, 3), other)
    pairs, unpaired = walk(pair)
    assert (0, Site.Q_PROJ) not in {(layer, site) for layer, site, _ in places(pairs)}
    assert lost(unpaired) == [(0, Site.Q_PROJ, 2, "both"), (0, Site.Q_PROJ, 3, "both")]
    assert "shapes" in unpaired[0].why


@pytest.mark.parametrize("change", [{"prompt": "q"}, {"rung": "float64"}])
def test_traces_of_different_runs_are_an_error(change: dict[str, str]) -> None:
    pair = both()
    pair.decode = a_trace("decode", **change)  # type: ignore[arg-type]
    with pytest.raises(AlignmentError, match="traces of different runs"):
        walk(pair)


def test_what_is_left_over_is_listed_in_forward_order() -> None:
    pair = both()
    for layer, site in ((1, Site.Q_PROJ), (0, Site.ATTN_OUT), (None, Site.LOGITS), (0, Site.K_PROJ)):
        pair.prefill.add_rows(layer, site, (2,), WIDE[:1])
    assert [(item.layer, item.site) for item in walk(pair)[1]] == [
        (0, Site.K_PROJ),
        (0, Site.ATTN_OUT),
        (1, Site.Q_PROJ),
        (None, Site.LOGITS),
    ]


# ------------------------------------------------------------------------------------------------------ attention rows


def scores(n_keys: int, hidden: tuple[int, ...] = ()) -> Array:
    """Scores [position 1, head 2, key] with masked keys."""
    values = np.arange(2.0 * n_keys, dtype=np.float32).reshape(1, 2, n_keys)
    values[..., list(hidden)] = -np.inf
    return values


def attention(first: Array, second: Array, site: Site = Site.ATTN_SCORES, *slots: Slots) -> PassPair:
    pair = PassPair(Mode.KV_ALIGNED, a_trace("prefill"), a_trace("decode"), (3,))
    keys = slots or (np.arange(first.shape[-1]), np.arange(second.shape[-1]))
    pair.prefill.add_rows(0, site, (3,), first, keys[0])
    pair.decode.add_rows(0, site, (3,), second, keys[1])
    return pair


def row_of(pair: PassPair) -> DriftRow:
    table = DriftTable()
    table.add(pair, "kv_aligned", with_hashes=True)
    assert table.unpaired == []
    (row,) = table
    return row


def test_a_masked_key_and_a_missing_one_are_the_same() -> None:
    row = row_of(attention(scores(5, hidden=(4,)), scores(5)[..., :4]))
    assert (row.n_lost, row.n_elements, row.equal) == (0, 8, True)


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_key_that_only_one_pass_sees_is_a_lost_key_and_no_rounding(side: str) -> None:
    whole, less = scores(4), scores(4, hidden=(0,))
    row = row_of(attention(less, whole) if side == "prefill" else attention(whole, less))
    assert row.n_lost == 1
    assert row.rel_l2 == math.inf
    assert not row.equal


def test_a_key_that_one_head_alone_lost_is_lost() -> None:
    less = scores(4)
    less[0, 1, 2] = -np.inf
    row = row_of(attention(scores(4), less))
    assert (row.n_lost, row.rel_l2) == (1, math.inf)


def test_a_nan_score_is_not_a_masked_one() -> None:
    broken = scores(4)
    broken[0, :, 2] = np.nan
    row = row_of(attention(scores(4), broken))
    assert row.n_elements == 8
    assert row.n_nonfinite == 2
    assert row.rel_l2 == math.inf


def test_keys_are_paired_by_slot_and_not_by_column() -> None:
    first = scores(4)
    order = np.array([2, 0, 3, 1])
    row = row_of(attention(first, first[..., order], Site.ATTN_SCORES, np.arange(4), order))
    assert (row.equal, row.n_lost) == (True, 0)


def test_probabilities_of_keys_that_none_sees_are_left_out() -> None:
    probs = np.array([[[0.5, 0.5, 0.0], [0.25, 0.75, 0.0]]], dtype=np.float32)
    row = row_of(attention(probs, probs[..., :2], Site.ATTN_PROBS))
    assert (row.n_elements, row.equal, row.n_lost) == (4, True, 0)


def test_scores_of_two_dtypes_are_compared_in_the_narrower_and_never_called_equal() -> None:
    first = scores(4)  # small whole numbers: the same in float16
    pair = attention(first, first.astype(np.float16))
    assert walk(pair)[1] == []
    row = row_of(pair)
    assert (row.dtype, row.rel_l2, row.equal) == ("float16", 0.0, False)
    assert row_of(attention(first, first.copy())).equal


@pytest.mark.parametrize("wide", [np.float32, np.float64])
def test_scores_of_16_bits_that_one_pass_keeps_wider_are_never_called_equal(wide: type) -> None:
    narrow = scores(4).astype(np.float16)
    pair = PassPair(Mode.KV_ALIGNED, a_trace("prefill", rung="float16"), a_trace("decode", rung="float16"), (3,))
    pair.prefill.add_rows(0, Site.ATTN_SCORES, (3,), narrow, np.arange(4))
    pair.decode.add_rows(0, Site.ATTN_SCORES, (3,), narrow.astype(wide), np.arange(4))
    row = row_of(pair)
    assert (row.dtype, row.rel_l2, row.equal) == ("float16", 0.0, False)


def logits_of(first: Array, second: Array) -> PassPair:
    """Two passes with logits [vocabulary] at position 3."""
    pair = PassPair(Mode.KV_ALIGNED, a_trace("prefill"), a_trace("decode"), (3,))
    for trace, values in ((pair.prefill, first), (pair.decode, second)):
        trace.add_rows(None, Site.LOGITS, (3,), values[None])
    return pair


def test_logits_of_two_dtypes_are_compared_in_the_narrower_and_never_called_equal() -> None:
    whole = np.arange(6, dtype=np.float32)
    assert row_of(logits_of(whole, whole.copy())).equal
    row = row_of(logits_of(whole.astype(np.float16), whole))
    assert (row.dtype, row.rel_l2, row.equal) == ("float16", 0.0, False)
    assert row_of(logits_of(whole.astype(np.float16), whole * 1.5)).rel_l2 > 0.3


def test_a_row_in_which_no_key_is_visible_is_counted_and_no_crash() -> None:
    pair = attention(scores(3, hidden=(0, 1, 2)), scores(3, hidden=(0, 1, 2)))
    pairs, unpaired = walk(pair)
    assert pairs == []
    assert [item.why for item in unpaired] == ["no key is visible in either"]


# -------------------------------------------------------------------------------------------------------- cache reads


def rows_at(slots: Slots, dtype: type = np.float32) -> Array:
    """Rows [slot, head 2, dim 3] whose values are those of their slots."""
    return (100.0 * slots[:, None, None] + np.arange(6.0).reshape(2, 3)).astype(dtype)


def cached(prefill: Slots, decode: Slots, position: int = 3, changed: dict[int, float] | None = None) -> PassPair:
    pair = PassPair(Mode.KV_ALIGNED, a_trace("prefill"), a_trace("decode"), (position,))
    pair.prefill.add_cache_read(0, Site.K_CACHE, (position,), prefill, rows_at(prefill))
    rows = rows_at(decode)
    for slot, value in (changed or {}).items():
        rows[list(decode).index(slot)] += value
    pair.decode.add_cache_read(0, Site.K_CACHE, (position,), decode, rows)
    return pair


def test_equal_caches_are_equal_whatever_the_order_of_slots() -> None:
    for order in ([0, 1, 2, 3], [2, 3, 0, 1], [3, 0, 2, 1]):
        for pair in (cached(np.arange(4), np.array(order)), cached(np.array(order), np.arange(4))):
            row = row_of(pair)
            assert (row.equal, row.n_lost, row.n_bad_slots, row.worst_slot) == (True, 0, 0, -1)
            assert row.n_elements == 24


def test_one_wrong_slot_is_named() -> None:
    for order in ([0, 1, 2, 3], [2, 3, 0, 1]):
        row = row_of(cached(np.arange(4), np.array(order), changed={2: 1.0}))
        assert (row.equal, row.worst_slot, row.n_bad_slots) == (False, 2, 1)


def test_the_worst_of_several_wrong_slots_is_named() -> None:
    row = row_of(cached(np.arange(4), np.arange(4), changed={1: 0.5, 3: 250.0}))
    assert (row.worst_slot, row.n_bad_slots) == (3, 2)


def test_a_slot_that_decode_lacks_is_lost() -> None:
    row = row_of(cached(np.arange(4), np.array([0, 1, 3])))
    assert (row.n_lost, row.rel_l2, row.equal) == (1, math.inf, False)


def test_slots_after_the_position_do_not_concern_it() -> None:
    assert row_of(cached(np.arange(4), np.arange(3), position=2)).n_lost == 0


def test_one_read_of_several_positions_is_paired_up_to_each_of_them() -> None:
    """Two prefills read all slots at once, and each position sees those up to its own."""
    pair = PassPair(Mode.AS_DESIGNED, a_trace("prefill"), a_trace("decode"), (1, 2, 3))
    for trace in (pair.prefill, pair.decode):
        trace.add_cache_read(0, Site.K_CACHE, (1, 2, 3), np.arange(4), rows_at(np.arange(4)))

    pairs, unpaired = walk(pair)

    assert not unpaired
    assert {values.positions: values.slots.tolist() for values in pairs if values.slots is not None} == {
        (1,): [0, 1],
        (2,): [0, 1, 2],
        (3,): [0, 1, 2, 3],
    }


def windowed(decode: Slots) -> PassPair:
    """Prefill holds five keys and sees the last three of them, as a window of three does."""
    pair = cached(np.arange(4), decode)
    values = scores(4, hidden=(0,))
    pair.prefill.add_rows(0, Site.ATTN_SCORES, (3,), values, np.arange(4))
    pair.decode.add_rows(0, Site.ATTN_SCORES, (3,), values[..., 1:], np.arange(1, 4))
    return pair


def test_slots_outside_a_sliding_window_are_not_missed() -> None:
    pairs, unpaired = walk(windowed(np.array([1, 2, 3])))
    assert unpaired == []
    assert all(values.n_lost == 0 for values in pairs)


def test_slots_inside_a_sliding_window_are_missed() -> None:
    pairs, unpaired = walk(windowed(np.array([2, 3])))
    assert unpaired == []
    assert {values.site: values.n_lost for values in pairs}[Site.K_CACHE] == 1


def test_caches_without_a_slot_in_common_are_counted() -> None:
    pairs, unpaired = walk(cached(np.array([0, 1]), np.array([2, 3])))
    assert pairs == []
    assert lost(unpaired) == [(0, Site.K_CACHE, 3, "both")]


def test_rows_of_another_dtype_or_shape_are_counted() -> None:
    thirds = (rows_at(np.arange(4)).astype(np.float64) / 3.0).astype(np.float32)
    for rows in (thirds.astype(np.float16), thirds[:, :1]):
        assert lost(walk(reading(thirds, rows))[1]) == [(0, Site.K_CACHE, 3, "both")]


def test_rows_widened_or_copied_on_their_way_are_paired_as_they_were() -> None:
    rows = rows_at(np.arange(4), np.float16)
    widened = rows.astype(np.float32)
    copied = np.repeat(rows, 2, axis=1)
    for other in (widened, copied, np.repeat(widened, 2, axis=1)):
        for pair in (reading(rows, other), reading(other, rows)):
            (found,), unpaired = walk(pair)
            assert unpaired == []
            assert (found.n_heads, found.row_size) == (2, 6)
            assert found.prefill.dtype == found.decode.dtype == np.float16
            assert found.prefill.tobytes() == found.decode.tobytes() == rows.tobytes()
    unlike = copied.copy()
    unlike[2, 1] += 1  # no copy of the head beside it
    assert lost(walk(reading(rows, unlike))[1]) == [(0, Site.K_CACHE, 3, "both")]


def test_slots_in_another_order_are_put_in_order_if_values_and_context_agree() -> None:
    rng = np.random.default_rng(1)
    keys, values = rng.standard_normal((2, 4, 2, 8)).astype(np.float32)
    order = np.array([3, 0, 1, 2])

    def pair_of(values_order: Slots, context: float) -> PassPair:
        pair = PassPair(Mode.KV_ALIGNED, a_trace("prefill"), a_trace("decode"), (3,))
        for trace, at, of_values, factor in (
            (pair.prefill, np.arange(4), np.arange(4), 1.0),
            (pair.decode, order, values_order, context),
        ):
            trace.add_cache_read(0, Site.K_CACHE, (3,), np.arange(4), keys[at])
            trace.add_cache_read(0, Site.V_CACHE, (3,), np.arange(4), values[of_values])
            trace.add_rows(0, Site.ATTN_CTX, (3,), np.full((1, 4), factor, dtype=np.float32))
        return pair

    def equal(pair: PassPair) -> list[bool]:
        return [item.prefill.tobytes() == item.decode.tobytes() for item in walk(pair)[0] if item.slots is not None]

    assert equal(pair_of(order, 1.0)) == [True, True]
    assert equal(pair_of(np.arange(4), 1.0)) == [False, True], "values stand in another order"
    assert equal(pair_of(order, 1.5)) == [False, False], "the context is another one"


def reading(prefill: Array, decode: Array) -> PassPair:
    """Two passes of which each reads other rows of K."""
    pair = PassPair(Mode.KV_ALIGNED, a_trace("prefill"), a_trace("decode"), (3,))
    for trace, rows in ((pair.prefill, prefill), (pair.decode, decode)):
        trace.add_cache_read(0, Site.K_CACHE, (3,), np.arange(len(rows)), rows)
    return pair


@pytest.mark.parametrize("wrong", [None, 0, 1])
def test_a_layer_that_attends_twice_has_its_reads_paired_in_their_order(wrong: int | None) -> None:
    """Differential attention reads one half of the values after the other, at one site."""
    slots, pair = np.arange(4), PassPair(Mode.KV_ALIGNED, a_trace("prefill"), a_trace("decode"), (3,))
    for call in range(2):
        pair.prefill.add_cache_read(0, Site.V_CACHE, (3,), slots, rows_at(slots + call))
        rows = rows_at(slots + call)
        rows[1] += 1.0 if call == wrong else 0.0
        pair.decode.add_cache_read(0, Site.V_CACHE, (3,), slots, rows)

    pairs, unpaired = walk(pair)
    assert unpaired == []
    assert [values.prefill.tobytes() == values.decode.tobytes() for values in pairs] == [wrong != 0, wrong != 1]


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_cache_read_of_one_pass_alone_is_counted(side: str) -> None:
    pair = cached(np.arange(4), np.arange(4))
    getattr(pair, side).cache.clear()
    other = "decode" if side == "prefill" else "prefill"
    assert lost(walk(pair)[1]) == [(0, Site.K_CACHE, 3, other)]


# --------------------------------------------------------------------------------------------------- recurrent states


def with_states(prefill_ends: tuple[int, ...], decode_ends: tuple[int, ...]) -> PassPair:
    """A state at every end of a call: prefill feeds all tokens at once, decode one by one."""
    pair = PassPair(Mode.AS_DESIGNED, a_trace("prefill"), a_trace("decode"), (2, 3))
    for trace, ends in ((pair.prefill, prefill_ends), (pair.decode, decode_ends)):
        start = 0
        for end in ends:
            trace.calls.append(Call(start, end + 1 - start, start, None, "none", ()))
            start = end + 1
    return pair


@pytest.mark.parametrize("site", [Site.CONV_STATE, Site.SSM_STATE])
def test_states_are_compared_where_both_passes_end_a_call(site: Site) -> None:
    pair = with_states((3,), (1, 2, 3))
    pair.prefill.add_rows(0, site, (3,), WIDE[:1])
    for position in (2, 3):
        pair.decode.add_rows(0, site, (position,), WIDE[:1])
    pairs, unpaired = walk(pair)
    assert unpaired == []
    assert places(pairs) == {(0, site, 3)}


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_state_missing_where_both_passes_end_a_call_is_counted(side: str) -> None:
    pair = with_states((3,), (1, 2, 3))
    other = "decode" if side == "prefill" else "prefill"
    getattr(pair, other).add_rows(0, Site.SSM_STATE, (3,), WIDE[:1])
    assert lost(walk(pair)[1]) == [(0, Site.SSM_STATE, 3, other)]


def test_other_sites_are_compared_inside_calls_too() -> None:
    pair = with_states((3,), (1, 2, 3))
    pair.decode.add_rows(0, Site.Q_PROJ, (2,), WIDE[:1])
    assert lost(walk(pair)[1]) == [(0, Site.Q_PROJ, 2, "decode")]


# ---------------------------------------------------------------------------------------------------- the drift table


def test_unpaired_values_reach_the_table_with_mode_and_rung() -> None:
    pair = both()
    del pair.decode.rows[1]
    table = DriftTable()
    table.add(pair, "kv_aligned", with_hashes=False)
    assert [(mode, rung, item.only_in) for mode, rung, item in table.unpaired] == [
        ("kv_aligned", "float32", "prefill")
    ] * 2


def test_a_row_of_the_table_carries_its_address_token_and_hashes() -> None:
    table = DriftTable()
    table.add(both(), "kv_aligned", with_hashes=True)
    rows = table.select("kv_aligned", "float32")
    row = rows.row(rows.index(Address("p", 3, None, Site.EMBED_OUT)))  # type: ignore[arg-type]
    assert str(row.address) == "p / pos 3 / embed_out"
    assert row.token_id == 14
    assert row.sha256_prefill == row.sha256_decode
    assert len(str(row.sha256_prefill)) == 64
