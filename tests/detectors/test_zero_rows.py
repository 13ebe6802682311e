"""A token that embeds as all zeros, such as padding: what its row is changed by where noise is measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kvdrift
from kvdrift.engines.hf.engine import HFEngine
from kvdrift.trace.model import Trace
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.sites import Site
from kvdrift_bench.models.tiny import lively_model

PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12, 71, 23], "q": [99, 23, 4, 50, 66, 91, 2, 17, 18, 3]}


@pytest.mark.parametrize("zero", [PROMPTS["p"][-1], PROMPTS["q"][-1], None], ids=["prompt", "prompts", "generated"])
def test_a_norm_makes_no_noise_of_a_row_of_zeros(zero: int | None) -> None:
    """A norm turns any change of a zero row into one as large as the row, in the keys that later tokens read."""
    model = lively_model("gemma3", torch.float32, tie_word_embeddings=False)
    with torch.no_grad():
        token = int(model(torch.tensor([PROMPTS["p"]])).logits[0, -1].argmax()) if zero is None else zero
        model.model.embed_tokens.weight[token] = 0.0
    audit = kvdrift.audit(model, prompts=PROMPTS, span=2)

    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), audit.decision.reasons
    floors = audit.suite.judged.measured.floors
    for mode in ("as_designed", "kv_aligned"):
        found = floors.of(mode)
        assert {place.layer for place in found} >= {0, 1, 2}
        assert max(floor.largest for floor in found.values()) < 1e-11
        assert not floors.unmoved(mode)


def test_a_row_of_zeros_is_changed_where_the_engine_itself_changes_inputs() -> None:
    """As scenarios and comparisons of engines have it: by as much as the rows of the call, or of the call before."""
    model, size = lively_model("llama", torch.float32, tie_word_embeddings=False), 2.0**-9
    tokens = (5, 9, 17, 3)
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = 0.0
        others = model.model.embed_tokens.weight[[5, 17, 3]].double()
    with HFEngine(model) as engine, engine.at("float64"), engine.shifted(size):
        sequence = engine.new_sequence(8)
        prefill, decode = (Trace("p", name, "as_designed", "float64", (*tokens, 9)) for name in ("prefill", "decode"))
        sequence.extend(tokens, probe=(1,), sink=prefill)
        sequence.extend((9,), probe=(4,), sink=decode)
        sequence.close()

    entered = size * float(others.square().mean().sqrt())  # what enters the first layer at that row
    norm = model.model.layers[0].input_layernorm
    left = (
        entered
        / np.sqrt(entered**2 + norm.variance_epsilon)
        * float(norm.weight.detach().double().square().mean().sqrt())
    )
    for trace in (prefill, decode):
        (row,) = (row for row in trace.rows if (row.layer, row.site) == (0, Site.ATTN_NORM_OUT))
        assert float(np.sqrt(np.mean(row.values.astype(np.float64) ** 2))) == pytest.approx(left, rel=0.4)
