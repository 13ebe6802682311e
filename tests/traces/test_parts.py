"""Tensors that ranks record in parts: joined where they say how, refused where not, and the guilty rank is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvdrift.errors import TraceError, UsageError
from kvdrift.pipeline.audit import Audit
from kvdrift.pipeline.judge import judge_directory
from kvdrift.trace import Writer
from tests.support.written import Values

Change = Callable[[str, int, Values], Values]  # of pass and rank
Add = Callable[[str, list[Values]], Values]  # of pass and addends
HALF = {0: (0, 2), 1: (2, 4)}


def keep(name: str, rank: int, values: Values) -> Values:
    return values


def total(name: str, addends: list[Values]) -> Values:
    return addends[0] + addends[1]


def only_decode(rank: int, factor: float) -> Change:
    return lambda name, of, values: values * np.float32(factor) if (name, of) == ("decode", rank) else values


def write(
    folder: Path, change: Change = keep, *, add: Add = total, spans: dict[int, tuple[int, int]] | None = None
) -> Path:
    """Two ranks: half the heads of a context each, and an output that is the sum of theirs."""
    writer = Writer(folder, engine="tp", model="m", dtype="float32", n_layers=1)
    for prompt, n in (("a", 10), ("b", 8)):
        tokens, p = list(range(1, n + 1)), n - 1
        for name in ("prefill", "decode"):
            rng = np.random.default_rng(n)
            with writer.prefill(prompt, tokens) if name == "prefill" else writer.decode(prompt, tokens) as out:
                out.call(0 if name == "prefill" else p, n if name == "prefill" else 1, 0 if name == "prefill" else p)

                def rows(
                    site: str, values: Values, layer: int | None = 0, out: Any = out, p: int = p, **part: Any
                ) -> None:
                    out.rows(site, values, positions=[p], layer=layer, **part)

                rows("embed_out", rng.normal(size=(1, 32)).astype("f4"), None)
                context = rng.normal(size=(1, 4, 8)).astype("f4")
                for rank, span in HALF.items():
                    part = change(name, rank, context[:, span[0] : span[1]])
                    rows("attn_ctx", part, rank=rank, heads=(spans or HALF)[rank])
                addends = [rng.normal(size=(1, 32)).astype("f4") for _ in HALF]
                for rank, addend in enumerate(addends):
                    rows("attn_out", addend, rank=rank)
                rows("attn_out", add(name, addends))
                for rank in HALF:
                    rows("layer_out", np.ones((1, 16), "f4"), rank=rank, columns=(16 * rank, 16 * rank + 16))
                rows("logits", np.ones((1, 40), "f4"), None)
    writer.finish()
    return folder


def judged(folder: Path) -> Audit:
    return judge_directory(folder)[0]


def test_parts_that_say_how_they_join_are_joined_and_pass(tmp_path: Path) -> None:
    result = judged(write(tmp_path / "t"))
    assert result.exit_code == 0, result.decision.reasons
    assert any(item.instrument == "collective" and item.supports == "H0" for item in result.evidence)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_of_one_rank_is_found_and_the_rank_is_named(tmp_path: Path, rank: int) -> None:
    result = judged(write(tmp_path / "t", only_decode(rank, 3.0)))
    assert (result.exit_code, str(result.first_failure)) == (1, "b / pos 7 / layer 0 / attn_ctx")
    (text,) = [caveat.text for caveat in result.caveats if caveat.code == "RANK"]
    assert text.startswith(f"attn_ctx of layer 0 differs on rank {rank} (heads {2 * rank}-{2 * rank + 1})")


@pytest.mark.parametrize(("factor", "how"), [(0.0, "is missing from the sum"), (2.0, "is in the sum twice")])
def test_a_sum_that_is_not_that_of_its_parts_names_the_rank(tmp_path: Path, factor: float, how: str) -> None:
    def lost(name: str, addends: list[Values]) -> Values:
        return addends[0] + np.float32(factor if name == "decode" else 1.0) * addends[1]

    result = judged(write(tmp_path / "t", add=lost))
    assert (result.exit_code, str(result.first_failure)) == (1, "b / pos 7 / layer 0 / attn_out")
    assert f"the part of rank 1 {how}" in result.to_markdown()


def test_a_sum_that_is_wrong_in_both_passes_is_no_pass(tmp_path: Path) -> None:
    result = judged(write(tmp_path / "t", add=lambda name, addends: addends[0] + addends[1] * np.float32(0.5)))
    assert result.exit_code == 6
    assert "is not that of its parts in both passes" in result.decision.reasons[0]


def test_a_second_record_of_one_place_is_refused_on_writing_and_on_reading(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "t", engine="e", model="m", dtype="float32", n_layers=1)
    out = writer.prefill("p", [1, 2])
    half = np.ones((1, 2, 8), np.float32)
    out.rows("attn_ctx", half, positions=[1], layer=0)
    with pytest.raises(UsageError, match="attn_ctx of layer 0 at position 1 is recorded a second time; if each rank"):
        out.rows("attn_ctx", half, positions=[1], layer=0)
    out._recorded.clear()
    out.rows("attn_ctx", half, positions=[1], layer=0)
    out.close()
    with writer.decode("p", [1, 2]) as decode:
        decode.rows("attn_ctx", half, positions=[1], layer=0)
    writer.finish()
    with pytest.raises(TraceError, match=r"records attn_ctx of layer 0 at \[1\] twice; if ranks hold a part each"):
        judged(tmp_path / "t")


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ({0: (0, 2), 1: (3, 5)}, "heads 2-2 are missing"),
        ({0: (0, 2), 1: (1, 3)}, "heads overlap"),
        ({0: (1, 3), 1: (3, 5)}, "heads 0-0 are missing"),
        ({0: (0, 2), 1: (2, 5)}, r"rank 1 \(heads 2-4\) has the shape \[1, 2, 8\]"),
    ],
)
def test_parts_that_do_not_join_are_refused(tmp_path: Path, spans: dict[int, tuple[int, int]], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        judged(write(tmp_path / "t", spans=spans))


def test_the_heads_of_a_cache_are_joined(tmp_path: Path) -> None:
    from kvdrift.trace.readers.written import WrittenManifest, _entry
    from kvdrift.trace.store import read_json, read_trace

    rows = np.arange(3 * 4 * 2, dtype=np.float32).reshape(3, 4, 2)
    writer = Writer(tmp_path / "t", engine="e", model="m", dtype="float32", n_layers=1)
    with writer.prefill("p", [1, 2, 3]) as out:
        for rank, (first, stop) in HALF.items():
            out.cache(
                "k_cache", rows[:, first:stop], position=2, layer=0, slots=[2, 0, 1], rank=rank, heads=(first, stop)
            )
    writer.finish()
    manifest = read_json(tmp_path / "t" / "manifest.json", WrittenManifest, 1)
    (read,) = read_trace(tmp_path / "t", _entry(manifest.traces[0])).cache_reads()
    assert (read.rows.tobytes(), read.slots.tolist()) == (rows.tobytes(), [2, 0, 1])
