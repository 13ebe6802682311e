"""Samples of GRETA StageTrace files: one rung, no dtype named, a part of every tensor. Faults and their clean twins."""

import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from kvdrift.pipeline.greta import analyse_traces
from kvdrift.pipeline.judge import judge_directory
from kvdrift.trace.readers.greta.records import fnv1a
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.plan import Mode
from tests.support.carriers import one_thread
from tests.support.greta import Record, write_traces
from tests.support.tiny import tiny_model

PROMPTS = {"p0_short": [5, 9, 17, 3, 44, 2, 8, 61], "p6_len_6": [1, 22, 93, 14, 15, 6]}
POINTS = ["q_pre_rope", "k_proj", "v_proj", "attn_out", "wo_out", "mlp_out", "residual_post_attn", "residual_post_mlp"]
SITES = {"q_pre_rope": "Q_PROJ", "attn_out": "ATTN_CTX", "wo_out": "ATTN_OUT", "residual_post_attn": "RESID_ATTN"}
SITES |= {"residual_post_mlp": "LAYER_OUT"}
SPARSE = ("x_in", "attn_out", "mlp_out", "residual_post_mlp")


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Samples of both modes of a model of four layers in bfloat16; nothing names the dtype."""
    with one_thread():
        model = tiny_model("llama", dtype=torch.bfloat16, num_hidden_layers=4)
        yield write_traces(tmp_path_factory.mktemp("clean"), model, PROMPTS, modes=tuple(Mode), sample=24)


def edited(clean: Path, folder: Path, change: Callable[[Record], Record | None]) -> Path:
    """Return a copy of the files with every record of a decode step as `change` returns it; None drops it."""
    shutil.copytree(clean, folder)
    for path in folder.glob("*_decode_trace.jsonl"):
        found = [change(json.loads(line)) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(record) + "\n" for record in found if record is not None))
    return folder


def wrong(point: str, layer: int, change: Callable[[Any], Any]) -> Callable[[Record], Record]:
    """Return an edit that changes the values of one point in one layer, in bfloat16."""

    def edit(record: Record) -> Record:
        if (record["point"], record["layer"]) != (point, layer):
            return record
        values = np.asarray(change(np.array(record["sample"]))).astype(ml_dtypes.bfloat16).astype(np.float32)
        sample = [float(f"{value:.6g}") for value in values]
        return {**record, "sample": sample, "hash": fnv1a(values)}

    return edit


def only(folder: Path, points: tuple[str, ...]) -> Path:
    """Leave only these points in the files."""
    for path in folder.glob("*.jsonl"):
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["point"] in points]
        path.write_text("".join(line + "\n" for line in lines))
    return folder


def verdict(folder: Path, *scope: str) -> tuple[Verdict, str]:
    result = judge_directory(folder, scope=scope)[0]
    first = result.first_failure
    return result.verdict, "" if first is None else f"{first.layer} {first.site}"


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("layer", [0, 2])
def test_five_percent_of_one_site_are_a_mismatch_in_a_sample_without_a_dtype(
    clean: Path, tmp_path: Path, point: str, layer: int
) -> None:
    folder = edited(clean, tmp_path / "t", wrong(point, layer, lambda values: values * 1.05))

    result = analyse_traces(folder, tmp_path / "r.md", "both")

    site = SITES.get(point, point.upper())
    assert (result.exit_code, str(result.verdict)) == (1, "MISMATCH")
    assert f"**Root cause**: {site}_DRIFT" in (tmp_path / "r.md").read_text()
    assert result.first_failure is not None
    assert (result.first_failure.layer, str(result.first_failure.site).upper()) == (layer, site)


@pytest.mark.parametrize("size", [0.05, 0.3])
def test_a_fault_is_found_where_few_points_were_recorded(clean: Path, tmp_path: Path, size: float) -> None:
    """Layers 0 and 1 and what enters layer 2 are equal to the bit; keys, values and the cache are not in the files."""
    rng = np.random.default_rng(5)
    edit = wrong("attn_out", 2, lambda values: values * (1 + size * rng.choice([-1.0, 1.0], len(values))))
    folder = only(edited(clean, tmp_path / "t", edit), SPARSE)
    assert verdict(folder) == (Verdict.MISMATCH, "2 attn_ctx")
    assert verdict(folder, "sampled") == (Verdict.MISMATCH, "2 attn_ctx")


def test_a_clean_sample_gets_one_next_step_and_passes_in_the_scope_that_was_named(clean: Path, tmp_path: Path) -> None:
    without = analyse_traces(clean, tmp_path / "r.md", "both")
    named = analyse_traces(clean, tmp_path / "s.md", "both", scope=["sampled"])

    assert (without.exit_code, len(without.decision.reasons)) == (6, 1)
    assert without.decision.reasons[0].endswith(": --scope sampled")
    assert (named.exit_code, str(named.verdict)) == (0, "EXACT")
    assert "**Scope**: sampled, one rung, and nothing beyond it" in (tmp_path / "s.md").read_text()
    assert named.view["scope"] == "sampled, one rung"
    assert "Of this scope alone, sampled, one rung: H0" in named.view["hypotheses"]["conclusion"]


def test_few_clean_points_get_one_next_step_too(clean: Path, tmp_path: Path) -> None:
    folder = only(edited(clean, tmp_path / "t", lambda record: record), SPARSE)
    result = judge_directory(folder)[0]
    assert (result.exit_code, len(result.decision.reasons)) == (6, 1)
    assert "the verdict holds up to layer 3 / layer_out: logits was not compared" in result.decision.reasons[0]
    assert verdict(folder, "sampled") == (Verdict.EXACT, "")


def test_drift_of_the_size_of_rounding_passes_in_the_scope_and_states_its_minimum(clean: Path, tmp_path: Path) -> None:
    """From layer 1 on everything is off by a rounding or two, as another correct kernel makes it."""

    def drift(record: Record) -> Record:
        point, layer = record["point"], record["layer"]
        if layer < 1 or "sample" not in record or (point, layer) == ("x_in", 1):
            return record
        place = ("residual_post_mlp", layer - 1) if point == "x_in" else (point, layer)
        rng = np.random.default_rng(zlib.crc32(repr(place).encode()))
        return wrong(point, layer, lambda v: v * (1 + 2.0**-8 * rng.uniform(-1, 1, len(v))))(record)

    folder = edited(clean, tmp_path / "t", drift)
    result = judge_directory(folder, scope=["sampled"])[0]
    assert (str(result.verdict), result.exit_code) == ("STRUCTURAL_DRIFT", 0), result.decision.reasons
    carried = next(item for item in result.evidence if item.instrument == "carried")
    assert carried.minimum_detectable is not None
    assert 0.05 < carried.minimum_detectable < 1.0
    assert verdict(folder)[0] is Verdict.INCONCLUSIVE


def test_what_drifting_inputs_do_not_explain_is_no_pass_in_the_scope_either(clean: Path, tmp_path: Path) -> None:
    """A context that is wrong altogether, behind projections that drift by one rounding: nothing bounds it for sure."""

    def both(record: Record) -> Record:
        record = wrong("x_in", 2, lambda values: values * (1 + 2.0**-8))(record)
        for point in ("q_pre_rope", "k_proj", "v_proj", "attn_norm_out"):
            record = wrong(point, 2, lambda values: values * (1 + 2.0**-7))(record)
        return wrong("attn_out", 2, lambda values: -values)(record)

    assert verdict(edited(clean, tmp_path / "t", both), "sampled")[0] is not Verdict.STRUCTURAL_DRIFT


@pytest.mark.parametrize("dtype", ["float16", "float32", "bf16"])
def test_facts_json_names_the_dtype(clean: Path, tmp_path: Path, dtype: str) -> None:
    folder = edited(clean, tmp_path / "t", wrong("mlp_out", 2, lambda values: values * 1.05))
    (folder / "facts.json").write_text(json.dumps({"dtype": dtype, "n_layers": 4}))
    result = judge_directory(folder)[0]
    assert result.exit_code == 1
    assert "DTYPE_UNKNOWN" not in {caveat.code for caveat in result.caveats}
    assert f"beyond rounding at {'bfloat16' if dtype == 'bf16' else dtype}" in result.to_markdown()


def test_facts_that_disagree_are_an_error(clean: Path, tmp_path: Path) -> None:
    from kvdrift.errors import AlignmentError

    folder = edited(clean, tmp_path / "t", lambda record: record)
    (folder / "config.json").write_text('{"dtype": "bf16"}')
    (folder / "facts.json").write_text('{"dtype": "float32"}')
    with pytest.raises(AlignmentError, match="dtype is 'bfloat16' in the files of the engine and 'float32'"):
        judge_directory(folder)


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (torch.bfloat16, "the bits of its values are those of bfloat16"),
        (torch.float16, "the bits of its values are those of float16"),
        (torch.float32, "its values have bits of float32"),
    ],
)
def test_the_bits_tell_the_dtype(tmp_path: Path, dtype: torch.dtype, said: str) -> None:
    with one_thread():
        folder = write_traces(tmp_path / "t", tiny_model("llama", dtype=dtype), {"p": [5, 9, 17]}, sample=24, digits=9)
    result = judge_directory(folder)[0]
    assert said in next(caveat.text for caveat in result.caveats if caveat.code == "DTYPE_UNKNOWN")


def later(record: Record) -> Record:
    return {**record, "pos_id": record["pos_id"] + 1}


def test_a_position_off_by_one_is_a_mismatch_that_is_called_trace_offset(clean: Path, tmp_path: Path) -> None:
    result = analyse_traces(edited(clean, tmp_path / "t", later), tmp_path / "r.md", "both")

    assert (result.exit_code, str(result.verdict)) == (1, "MISMATCH")
    (reason,) = {reason for outcome in result.decision.outcomes for reason in outcome.reasons}
    assert reason.startswith("every token of decode stands 1 position after that of prefill (TRACE_OFFSET; p0_short")
    assert reason.endswith("differs beyond rounding, so the recorder may be what counts wrongly")
    assert result.diagnosis is not None
    assert result.diagnosis.cause == "trace_offset"
    assert "**Root cause**: TRACE_OFFSET" in (tmp_path / "r.md").read_text()
    assert verdict(tmp_path / "t", "sampled")[0] is Verdict.MISMATCH


def test_a_step_that_was_rotated_by_the_wrong_position_is_told_with_it(clean: Path, tmp_path: Path) -> None:
    turn = wrong("q_post_rope", 0, lambda values: values[::-1])

    result = analyse_traces(
        edited(clean, tmp_path / "t", lambda record: later(turn(record))), tmp_path / "r.md", "both"
    )

    assert result.exit_code == 1
    assert (result.first_failure.layer, str(result.first_failure.site)) == (0, "q_rope")  # type: ignore[union-attr]
    assert "values of the same tokens differ beyond rounding from" in result.to_markdown()


@pytest.mark.parametrize("known", [True, False])
def test_a_step_on_the_next_token_is_not_an_offset(clean: Path, tmp_path: Path, known: bool) -> None:
    """It stands one position later as well, with a token of its own, or with one that the files do not name."""

    def following(record: Record) -> Record:
        record = later(record)
        return record | {"token_id": 77} if known else {k: v for k, v in record.items() if k != "token_id"}

    result = judge_directory(edited(clean, tmp_path / "t", following))[0]

    assert result.exit_code == 6
    assert "record token_id in both passes" in result.decision.reasons[0]
