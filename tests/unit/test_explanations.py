"""Explanations of contexts and of what is added: what they find, how many they try, and what they do not name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from kvdrift.diagnosis import splits
from kvdrift.diagnosis.inside import explain_attention
from kvdrift.diagnosis.model import Candidate, Suspect, Values, share
from kvdrift.diagnosis.plain import explain_plainly
from kvdrift.diagnosis.slots import explain_slots
from kvdrift.diagnosis.splits import (
    MOST_ENDS,
    MOST_MEETINGS,
    cuts_of,
    explain_merged_blocks,
    explain_merges,
    explain_splits,
)
from kvdrift.diagnosis.storage import explain_storage
from kvdrift.diagnosis.sums import explain_sums
from kvdrift.replay.attention import Attended, Operands, attend
from kvdrift.trace.model import CacheRead
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.facts import AttentionSpec
from kvdrift.vocabulary.sites import Site

Floats = NDArray[np.float64]
# Of a partial result [head, dim], its largest score [head, 1] and its sum of exponentials [head, 1]: their weights.
Weights = Callable[[list[Floats], list[Floats]], list[Floats]]


def _operands(n_keys: int, heads: int = 4, window: int | None = None) -> Operands:
    random = np.random.default_rng(n_keys)
    query, keys, values = (random.standard_normal(shape) for shape in ((heads, 8), (n_keys, 2, 8), (n_keys, 2, 8)))
    return Operands(query, keys, values, np.arange(n_keys), n_keys - 1, AttentionSpec(0.35, window=window))


def _merged(operands: Operands, cuts: tuple[int, ...], weights: Weights) -> Floats:
    """Partial results, each by the definition of attention on its own keys, with these weights."""
    results, peaks, sums = [], [], []
    for span in (slice(*ends) for ends in itertools.pairwise([None, *cuts, None])):
        keys, values, slots = operands.keys[span], operands.values[span], operands.slots[span]
        part = attend(operands.changed(keys=keys, values=values, slots=slots))
        results.append(part.context)
        peaks.append(np.where(part.probs > 0.0, part.raw, -np.inf).max(axis=1, keepdims=True))
        sums.append(1.0 / part.probs.max(axis=1, keepdims=True))
    return np.asarray(sum(w * r for w, r in zip(weights(peaks, sums), results, strict=True)))


def _by_logs(logs: list[Floats]) -> list[Floats]:
    total = np.logaddexp(*logs)
    return [np.exp(log - total) for log in logs]


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (lambda m, _: [np.ones_like(m[0])] * 2, "added without"),
        (lambda m, _: [np.full_like(m[0], 0.5)] * 2, "averaged without"),
        (lambda _, sums: _by_logs([np.log(s) for s in sums]), "largest scores"),
        (
            lambda m, sums: _by_logs([(p + np.log(s)) * np.log2(np.e) for p, s in zip(m, sums, strict=True)]),
            "log-sums of base 2",
        ),
    ],
)
def test_partial_results_merged_by_other_weights_are_told_with_where_they_meet(
    weights: Weights, words: str, window: int | None
) -> None:
    operands = _operands(13, window=window)
    best = max(explain_merges(operands, attend(operands), _merged(operands, (7,), weights)))
    assert best.cause == Cause.CHUNK_MERGE
    assert best.explained == pytest.approx(1.0, abs=1e-9)
    assert "first 7 keys" in best.text
    assert words in best.text


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (lambda m, _: [np.full_like(m[0], 1.0 / len(m))] * len(m), "averaged without"),
        (lambda _, sums: [s / sum(sums) for s in sums], "largest scores"),
    ],
)
def test_blocks_merged_by_other_weights_are_told_with_their_length(weights: Weights, words: str) -> None:
    operands = _operands(13)
    wrong = _merged(operands, (4, 8, 12), weights)
    best = max(explain_merged_blocks(operands, attend(operands), wrong))
    assert best.cause == Cause.CHUNK_MERGE
    assert best.explained == pytest.approx(1.0, abs=1e-9)
    assert "blocks of 4 keys" in best.text
    assert words in best.text
    assert max(explain_merged_blocks(operands, attend(operands), wrong + 0.3 * operands.query)).explained < 0.9


def test_rows_with_the_scale_of_another_row_are_told_by_a_factor_of_each_head() -> None:
    rows = np.random.default_rng(1).standard_normal((6, 2, 8))
    read, bad = rows.copy(), np.array([5])
    read[5] *= np.array([0.8, 1.1])[:, None]
    best = max(explain_storage("key", rows, read, bad, "float64"))
    assert (best.cause, round(best.explained, 9)) == (Cause.K_SCALE_LOST, 1.0)
    assert "0.8 to 1.1" in best.text
    read[5, 0] += 0.3 * np.random.default_rng(2).standard_normal(8)
    assert max(explain_storage("key", rows, read, bad, "float64")).explained < 0.99


def _vectors(prefill: Floats, decode: Floats) -> Suspect:
    """Queries [position, feature] of both passes."""
    positions = tuple(range(len(prefill)))
    first, second = (Values({(Site.Q_ROPE, p): rows[p] for p in positions}, {}, {}) for rows in (prefill, decode))
    return Suspect(Address("p", 0, 1, Site.Q_ROPE), "float64", positions, first, second, None)


@pytest.mark.parametrize(("hidden", "causes"), [(0, {Cause.KEY_LOST_FIRST}), (1, set())])
def test_a_row_is_lost_that_the_mask_of_prefill_shows_whatever_window_is_claimed(
    hidden: int, causes: set[Cause]
) -> None:
    """A mask may show one key more than the window of the configuration, and the ring of decode keeps that many."""
    position, n_keys = 8, 9
    rows = np.random.default_rng(1).standard_normal((n_keys, 2, 4))
    scores = np.zeros((2, n_keys))
    scores[:, :hidden] = -np.inf

    def side(first: int) -> Values:
        read = CacheRead(0, Site.K_CACHE, (position,), np.arange(first, n_keys), rows[first:])
        place = Site.ATTN_SCORES, position
        return Values({place: scores[:, first:]}, {place: read.slots}, {(Site.K_CACHE, position): read})

    spec = AttentionSpec(0.5, window=8)
    suspect = Suspect(Address("p", position, 0, Site.K_CACHE), "float64", (position,), side(0), side(1), spec)
    assert {candidate.cause for candidate in explain_slots(suspect) if candidate.explained == 1.0} == causes


def test_a_factor_of_each_position_is_told_where_it_leaves_nothing() -> None:
    right = np.random.default_rng(3).standard_normal((3, 32))
    suspect = _vectors(right, right * np.array([0.7, 0.8, 0.9])[:, None])
    best = max(explain_plainly(suspect))
    assert (best.cause, round(best.explained, 9)) == (Cause.SCALED, 1.0)
    assert "0.7 to 0.9" in best.text
    noisy = right * np.array([0.7, 0.8, 0.9])[:, None] + 0.1 * np.random.default_rng(4).standard_normal((3, 32))
    assert max(explain_plainly(_vectors(right, noisy))).explained < 0.99


def test_a_context_of_another_size_than_the_values_is_explained_by_nothing_inside_attention() -> None:
    """As that of latent values, which are expanded behind attention."""
    operands = _operands(5)
    reads = {
        (site, 4): CacheRead(1, site, (4,), operands.slots, rows)
        for site, rows in ((Site.K_CACHE, operands.keys), (Site.V_CACHE, operands.values))
    }
    sites = {(Site.Q_ROPE, 4): operands.query.ravel(), (Site.ATTN_CTX, 4): np.ones(16)}
    values = Values(sites, {}, reads)
    suspect = Suspect(Address("p", 4, 1, Site.ATTN_CTX), "float64", (4,), values, values, operands.attention)
    assert list(explain_attention(suspect)) == []


def test_a_span_that_is_lost_is_told_with_its_ends() -> None:
    operands = _operands(13)
    kept = np.r_[0:4, 9:13]
    wrong = attend(
        operands.changed(keys=operands.keys[kept], values=operands.values[kept], slots=operands.slots[kept])
    ).context
    best = max(explain_splits(operands, attend(operands), wrong))
    assert best.cause == Cause.SPLIT_LOST
    assert best.explained == pytest.approx(1.0, abs=1e-9)
    assert "slots 4 to 8" in best.text


@pytest.mark.parametrize("n_keys", [1, 2, 63, 64, 65, 2_000, 1_000_003])
@pytest.mark.parametrize("most", [MOST_ENDS, MOST_MEETINGS])
def test_there_are_no_more_cuts_than_stated(n_keys: int, most: int) -> None:
    cuts = cuts_of(n_keys, most)
    assert (cuts[0], cuts[-1]) == (0, n_keys)
    assert (np.diff(cuts) > 0).all()
    assert len(cuts) - 1 <= most
    assert len(cuts) - 1 == n_keys or len(cuts) - 1 > most / 2 - 1


@pytest.mark.parametrize("n_keys", [64, 2_000, 5_000])
def test_the_number_of_predictions_has_a_bound_that_keys_do_not_move(
    n_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each prediction has the size of the context, so that the work is this number, and one pass over the keys."""
    shapes: list[tuple[int, ...]] = []

    def counted(prefill: Floats, decode: Floats, predicted: Floats) -> float:
        shapes.append(predicted.shape)
        return share(prefill, decode, predicted)

    def of(explain: Callable[[Operands, Attended, Floats], Iterator[Candidate]]) -> tuple[int, list[tuple[int, ...]]]:
        shapes.clear()
        return len(list(explain(operands, clean, wrong))), list(shapes)

    monkeypatch.setattr(splits, "share", counted)
    operands = _operands(n_keys, heads=30)
    clean = attend(operands)
    wrong = clean.context + 0.1 * np.random.default_rng(0).standard_normal(clean.context.shape)
    for explain, bound, forms in (
        (explain_splits, 3 * MOST_ENDS * (MOST_ENDS + 1) // 2, 3),
        (explain_merges, 4 * MOST_MEETINGS, 4),
    ):
        n_candidates, tried = of(explain)
        assert 0 < len(tried) <= bound
        assert set(tried) == {clean.context.shape}
        assert n_candidates == forms


def _added(rows: Floats) -> Suspect:
    """Rows [position, feature] are added to random ones of the output of the feed-forward module."""
    right = np.random.default_rng(1).standard_normal(rows.shape)
    site, positions = Site.MLP_OUT, tuple(range(11, 11 + len(rows)))
    prefill, decode = (
        Values({(site, p): row for p, row in zip(positions, values, strict=True)}, {}, {})
        for values in (right, right + rows)
    )
    return Suspect(Address("p", 11, 0, site), "bfloat16", positions, prefill, decode, None)


def _as_an_adapter(rows: Floats) -> float:
    found = [item.explained for item in explain_sums(_added(rows)) if item.cause == Cause.ADAPTER_MISSING]
    assert found
    return max(found)


@pytest.mark.parametrize(("n_positions", "rank"), [(3, 1), (4, 1), (4, 2), (8, 4)])
def test_an_update_of_low_rank_is_told(n_positions: int, rank: int) -> None:
    random = np.random.default_rng(rank)
    rows = random.standard_normal((n_positions, rank)) @ random.standard_normal((rank, 64))
    assert _as_an_adapter(rows) > 0.999


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (9, 1, 1, 1), (1, 9, 1, 1), (1, 9, 9, 1)])
def test_rows_that_differ_in_size_alone_are_no_update_of_low_rank(sizes: tuple[int, ...]) -> None:
    """Two directions fitted to four rows of which two are large remove nearly all of them, whatever the rows are."""
    rows = np.random.default_rng(5).standard_normal((4, 64)) * np.array(sizes, dtype=np.float64)[:, None]
    assert _as_an_adapter(rows) < 0.3
