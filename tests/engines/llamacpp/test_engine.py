"""Sequences of llama.cpp: what is read is what the graph computed, and every way to reach a token is open."""

from typing import Any

import numpy as np
import pytest

from kvdrift.engines.llamacpp.calls import Fed
from kvdrift.engines.llamacpp.engine import LlamaCppEngine
from kvdrift.engines.llamacpp.faults import Faultless
from kvdrift.engines.llamacpp.ggml import Tensor
from kvdrift.engines.llamacpp.sequence import Feed, extend_together
from kvdrift.errors import UsageError
from kvdrift.replay.attention import Operands, attend
from kvdrift.trace.model import Trace
from kvdrift.vocabulary.facts import OUTSIDE, Plant
from kvdrift.vocabulary.sites import EXPECTED_SITES, Site
from tests.support.gguf import demo_gguf

TOKENS = (504, 3575, 282, 4649, 314, 7042)
OTHER = (9, 17, 33)


def trace(tokens: tuple[int, ...]) -> Trace:
    return Trace("p", "prefill", "test", "native", tokens)


def rows(found: Trace, layer: int | None, site: Site) -> Any:
    (record,) = [r for r in found.rows if (r.layer, r.site) == (layer, site)]
    return record.values


def prefilled(engine: LlamaCppEngine, tokens: tuple[int, ...] = TOKENS) -> Trace:
    found = trace(tokens)
    sequence = engine.new_sequence(len(tokens))
    sequence.extend(tokens, probe=range(len(tokens)), sink=found)
    sequence.close()
    return found


def test_every_site_of_a_plain_decoder_is_offered_by_every_layer(engine: LlamaCppEngine) -> None:
    inside = {site for site in EXPECTED_SITES if site not in (Site.EMBED_OUT, Site.FINAL_NORM_OUT, Site.LOGITS)}
    for layer in range(engine.info.n_layers):
        assert inside <= set(engine.info.sites[str(layer)])
    assert set(engine.info.sites[OUTSIDE]) == {Site.EMBED_OUT, Site.FINAL_NORM_OUT, Site.LOGITS}


def test_the_sites_are_what_their_names_say(engine: LlamaCppEngine) -> None:
    """Residual sums, the order of keys in the cache, and attention itself, worked out again from other sites."""
    found = prefilled(engine)
    layer = 3
    layer_in, attn_out = rows(found, layer, Site.LAYER_IN), rows(found, layer, Site.ATTN_OUT)
    middle, mlp, out = (rows(found, layer, s) for s in (Site.RESID_ATTN, Site.MLP_OUT, Site.LAYER_OUT))
    np.testing.assert_array_equal(layer_in + attn_out, middle)
    np.testing.assert_array_equal(middle + mlp, out)
    np.testing.assert_array_equal(out, rows(found, layer + 1, Site.LAYER_IN))
    reads = {(read.layer, read.site): read for read in found.cache_reads()}
    keys, values = reads[layer, Site.K_CACHE], reads[layer, Site.V_CACHE]
    assert list(keys.slots) == list(range(len(TOKENS)))
    stored = rows(found, layer, Site.K_ROPE).astype(np.float16)
    np.testing.assert_array_equal(keys.rows.reshape(len(TOKENS), -1), stored)
    np.testing.assert_array_equal(
        values.rows.reshape(len(TOKENS), -1), rows(found, layer, Site.V_PROJ).astype(np.float16)
    )
    position = len(TOKENS) - 1
    dim = keys.rows.shape[2]
    query = rows(found, layer, Site.Q_ROPE)[position].astype(np.float64).reshape(-1, dim)
    operands = Operands(
        query,
        keys.rows.astype(np.float64),
        values.rows.astype(np.float64),
        keys.slots,
        position,
        found.attention[layer],
    )
    attended = attend(operands)
    context = rows(found, layer, Site.ATTN_CTX)[position].reshape(attended.context.shape)
    np.testing.assert_allclose(context, attended.context, atol=2.0**-9 * float(attended.magnitude.max()))
    np.testing.assert_allclose(rows(found, layer, Site.ATTN_SCORES)[position], attended.raw, atol=2e-2)
    np.testing.assert_allclose(rows(found, layer, Site.ATTN_PROBS)[position], attended.probs, atol=2e-3)


@pytest.mark.parametrize("kv_type", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_scores_of_flash_attention_are_those_of_its_own_operands(kv_type: str) -> None:
    with LlamaCppEngine(demo_gguf(), flash=True, kv_type=kv_type, layers=(3,), threads=1) as flash:
        found = prefilled(flash)
        reads = {(read.layer, read.site): read for read in found.cache_reads()}
        assert reads[3, Site.K_CACHE].rows.dtype.name == {
            "f32": "float16", "f16": "float16", "bf16": "bfloat16"
        }.get(kv_type, "float32")  # fmt: skip
        attended = attend(
            Operands(
                rows(found, 3, Site.Q_ROPE)[-1].astype(np.float64).reshape(-1, 64),
                reads[3, Site.K_CACHE].rows.astype(np.float64),
                reads[3, Site.V_CACHE].rows.astype(np.float64),
                reads[3, Site.K_CACHE].slots,
                len(TOKENS) - 1,
                found.attention[3],
            )
        )
        np.testing.assert_allclose(rows(found, 3, Site.ATTN_SCORES)[-1], attended.raw, rtol=1e-6, atol=1e-6)
        context = rows(found, 3, Site.ATTN_CTX)[-1].reshape(attended.context.shape)
        # Queries are packed into 8-bit blocks for a packed cache; what the audit allows for it is 16 roundings of 2^-8.
        unit = 2.0**-7 if kv_type in ("f32", "f16", "bf16") else 16 * 2.0**-8
        np.testing.assert_allclose(context, attended.context, atol=unit * float(attended.magnitude.max()))


def test_a_quantised_cache_holds_the_keys_that_went_in_up_to_its_own_rounding() -> None:
    with LlamaCppEngine(demo_gguf(), flash=True, kv_type="q8_0", layers=(3,), threads=1) as packed:
        found = prefilled(packed)
    (read,) = [read for read in found.cache_reads() if read.site is Site.K_CACHE]
    stored = rows(found, 3, Site.K_ROPE)
    error = np.abs(np.asarray(read.rows, dtype=np.float32).reshape(stored.shape) - stored)
    assert 0.0 < error.max() <= np.abs(stored).max() / 127  # half a step of 1/127, and the scale in float16


def test_rewind_and_feeding_again_gives_the_same_cache(engine: LlamaCppEngine) -> None:
    first, second = trace(TOKENS), trace(TOKENS)
    sequence = engine.new_sequence(len(TOKENS))
    for _ in range(2):
        sequence.extend(TOKENS[:4])
        sequence.rewind(4)  # a second call on the same object
    sequence.extend(TOKENS[:5])
    sequence.extend(TOKENS[5:], probe=(5,), sink=first)
    sequence.rewind(2)
    assert sequence.length == 4
    shorter = trace(TOKENS)
    sequence.extend(TOKENS[4:5], probe=(4,), sink=shorter)
    sequence.extend(TOKENS[5:], probe=(5,), sink=second)
    sequence.close()
    for before, after in zip(first.cache_reads(), second.cache_reads(), strict=True):
        np.testing.assert_array_equal(before.rows, after.rows)
        assert list(after.slots) == list(range(6))
    assert all(list(read.slots) == list(range(5)) for read in shorter.cache_reads())  # what was dropped is gone
    assert second.calls[0].cache_len_before == 5
    assert second.calls[0].kv_len == 6


def test_sequences_fed_together_compute_what_they_compute_alone(engine: LlamaCppEngine) -> None:
    alone = {tokens: prefilled(engine, tokens) for tokens in (TOKENS, OTHER)}
    together: dict[tuple[int, ...], Trace] = {tokens: trace(tokens) for tokens in (TOKENS, OTHER)}
    batch = engine.new_batch(2, len(TOKENS))
    extend_together(
        [
            Feed(sequence, tokens, range(len(tokens)), together[tokens])
            for sequence, tokens in zip(batch, (TOKENS, OTHER), strict=True)
        ]
    )
    for tokens in (TOKENS, OTHER):
        for site in (Site.K_PROJ, Site.ATTN_CTX, Site.LAYER_OUT):
            np.testing.assert_allclose(rows(together[tokens], 2, site), rows(alone[tokens], 2, site), atol=2e-2)
        (read,) = [r for r in together[tokens].cache_reads() if (r.layer, r.site) == (0, Site.K_CACHE)]
        assert list(read.slots) == list(range(len(tokens)))  # its own tokens alone
        assert rows(together[tokens], 2, Site.ATTN_SCORES).shape[-1] == len(tokens)
    for sequence in batch:
        sequence.close()


class SeesAll(Faultless):
    """Every token sees every cell that holds one."""

    def before(self, node: Tensor, call: Fed) -> None:
        mask = node.source(1) if node.op == "SOFT_MAX" else None
        if mask is not None:
            values = mask.values().copy()
            values[..., :9] = 0.0
            mask.write(values)


def test_a_cell_of_another_sequence_that_is_seen_has_a_slot_of_its_own() -> None:
    with LlamaCppEngine(demo_gguf(), layers=(0,), threads=1, fault=SeesAll()) as engine:
        found = trace(TOKENS)
        first, second = engine.new_batch(2, len(TOKENS))
        extend_together([Feed(first, TOKENS, (5,), found), Feed(second, OTHER)])
        (record,) = [r for r in found.rows if r.site is Site.ATTN_SCORES]
        assert record.slots is not None
        assert list(record.slots[:6]) == list(range(6))
        assert len(record.slots) == 9
        assert record.slots[6:].min() >= first.context.n_cells
        first.close()
        second.close()


def test_layer_inputs_are_replaced(engine: LlamaCppEngine) -> None:
    """Fed with the layer inputs of another token, a decode step goes on as that token, exactly so at float32."""
    with engine.at("float32"):
        other = prefilled(engine, (*TOKENS[:5], OTHER[0]))
        replace = {0: rows(other, 0, Site.LAYER_IN)[5:]}
        found, plain = trace(TOKENS), trace(TOKENS)
        sequence = engine.new_sequence(len(TOKENS))
        sequence.extend(TOKENS[:5])
        sequence.extend(TOKENS[5:], probe=(5,), sink=plain)
        sequence.rewind(1)
        sequence.extend(TOKENS[5:], probe=(5,), sink=found, replace=replace)
        sequence.close()
    np.testing.assert_array_equal(rows(found, 0, Site.LAYER_IN), rows(other, 0, Site.LAYER_IN)[5:])
    assert not np.array_equal(rows(found, None, Site.EMBED_OUT), rows(other, None, Site.EMBED_OUT)[5:])
    np.testing.assert_allclose(rows(found, None, Site.LOGITS), rows(other, None, Site.LOGITS)[5:], atol=1e-3)
    assert np.abs(rows(plain, None, Site.LOGITS) - rows(found, None, Site.LOGITS)).max() > 2.0


def test_the_input_of_the_final_norm_is_replaced(engine: LlamaCppEngine) -> None:
    zero = np.zeros((1, 576), dtype=np.float32)
    found = trace(TOKENS)
    sequence = engine.new_sequence(len(TOKENS))
    sequence.extend(TOKENS[:5])
    sequence.extend(TOKENS[5:], probe=(5,), sink=found, replace={engine.info.n_layers: zero})
    sequence.close()
    assert not rows(found, None, Site.FINAL_NORM_OUT).any()
    assert rows(found, engine.info.n_layers - 1, Site.LAYER_OUT).any()


@pytest.mark.parametrize("site", [Site.Q_ROPE, Site.ATTN_OUT, Site.LAYER_OUT])
def test_a_planted_factor_shows_at_its_site(engine: LlamaCppEngine, site: Site) -> None:
    clean, spoilt = trace(TOKENS), trace(TOKENS)
    sequence = engine.new_sequence(len(TOKENS))
    sequence.extend(TOKENS[:5])
    sequence.extend(TOKENS[5:], probe=(5,), sink=clean)
    sequence.rewind(1)
    sequence.extend(TOKENS[5:], probe=(5,), sink=spoilt, plant=Plant(4, site, 1.5))
    sequence.close()
    np.testing.assert_array_equal(rows(spoilt, 4, site), rows(clean, 4, site) * np.float32(1.5))
    np.testing.assert_array_equal(rows(spoilt, 3, Site.LAYER_OUT), rows(clean, 3, Site.LAYER_OUT))


def test_batches_cover_a_longer_prompt(engine: LlamaCppEngine) -> None:
    whole = prefilled(engine)
    with LlamaCppEngine(demo_gguf(), n_batch=4, threads=1) as small:
        found = prefilled(small)
    assert [record.positions for record in found.rows if (record.layer, record.site) == (1, Site.Q_PROJ)] == [
        (0, 1, 2, 3),
        (4, 5),
    ]
    joined = np.concatenate([r.values for r in found.rows if (r.layer, r.site) == (1, Site.Q_PROJ)])
    np.testing.assert_allclose(joined, rows(whole, 1, Site.Q_PROJ), atol=1e-2)
    assert [(call.q_len, call.cache_len_before) for call in found.calls] == [(6, 0)]
    assert "n_batch 4" in found.calls[0].kernels


def test_misuse_is_refused(engine: LlamaCppEngine) -> None:
    first, second = engine.new_sequence(8), engine.new_sequence(8)
    with pytest.raises(UsageError, match=r"probe \[3\] is not inside the fed positions 0\.\.1"):
        first.extend((1, 2), probe=(3,), sink=trace((1, 2)))
    with pytest.raises(UsageError, match="must come from one new_batch"):
        extend_together([Feed(first, (1,)), Feed(second, (2,))])
    with pytest.raises(UsageError, match="for all the tokens that are fed to one sequence"):
        first.extend((1, 2), replace={0: np.zeros((1, 576), dtype=np.float32)})
    with pytest.raises(UsageError, match="cannot drop 1 of 0 tokens"):
        first.rewind(1)
    first.close()
    second.close()


def test_the_clean_configurations_differ_from_the_shipped_one(engine: LlamaCppEngine) -> None:
    shipped = prefilled(engine)
    found = {}
    for rung in ("float16", "float32"):
        with engine.at(rung):
            found[rung] = prefilled(engine)
    kinds = {rung: next(t.cache_reads()).rows.dtype.name for rung, t in found.items()}
    assert kinds == {"float16": "float16", "float32": "float32"}
    first, second = (rows(found[rung], None, Site.LOGITS) for rung in ("float16", "float32"))
    assert 0.0 < np.abs(first - second).max() < 0.1
    assert np.abs(rows(shipped, None, Site.LOGITS) - second).max() > 0.1  # activations in 8-bit blocks
    np.testing.assert_array_equal(rows(prefilled(engine), None, Site.LOGITS), rows(shipped, None, Site.LOGITS))
    with pytest.raises(UsageError, match="unknown configuration 'float64'"), engine.at("float64"):
        pass
