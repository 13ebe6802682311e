"""`kvdrift-bench kernels`: what is run, what is kept, what is counted."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from kvdrift.errors import UsageError
from kvdrift_bench.cli.faults import app
from kvdrift_bench.cli.kernels import KernelOptions, bench_kernels
from kvdrift_bench.figures.kernel_figures import summarise_kernels
from kvdrift_bench.run.kernel_runs import Grid, KernelRun, draw_trials
from kvdrift_bench.run.records import read_records

WORDS = ["kernels", "--kernels", "tiled_cpp,one_logit_wrong", "--dtype", "bf16", "--ladder", "off", "--draws", "1"]


def run(**fields: object) -> KernelRun:
    """A run that was not made, with some of its fields."""
    settings = {"model": "tiny:llama", "dtype": "bfloat16", "passes": "decode", "ladder": "model", "span": 2, "seed": 0}
    return msgspec.convert({"kind": "kernel", "name": "k", "lengths": [5], **settings, **fields}, KernelRun)


def test_the_command_audits_kernels_faults_and_draws_and_goes_on_where_it_was(tmp_path: Path) -> None:
    out, page = tmp_path / "runs.jsonl", tmp_path / "page.md"
    page.write_text("# Kernels\n")

    done = CliRunner().invoke(app, [*WORDS, "--out", str(out), "--markdown", str(page)])

    assert done.exit_code == 0, done.output
    runs = read_records(out, KernelRun)
    assert [(each.kind, each.name, each.passes) for each in runs[:3]] == [
        ("kernel", "tiled_cpp", "decode"),
        ("kernel", "tiled_cpp", "both"),
        ("fault", "one_logit_wrong", "decode"),
    ]
    assert [each.kind for each in runs[3:]] == ["draw"]
    assert all(each.error is None and each.committed > 0 for each in runs[:3])
    text = page.read_text()
    assert text.startswith("# Kernels\n")
    assert "Command: `kvdrift-bench kernels --kernels tiled_cpp,one_logit_wrong" in text
    assert "A running maximum is taken off all scores" in text

    again = CliRunner().invoke(app, [*WORDS, "--out", str(out)])

    assert again.exit_code == 0
    assert len(read_records(out, KernelRun)) == len(runs), "nothing was measured again"


def test_alarms_are_told_from_what_was_not_judged() -> None:
    figures = summarise_kernels(
        [
            run(verdict="EXACT"),
            run(verdict="MISMATCH", address="here"),
            run(verdict="INCONCLUSIVE", reasons=["too few"]),
            run(error="ValueError: no"),
            run(kind="draw", verdict="MISMATCH", lengths=[500], span=32),
            run(kind="fault", verdict="MISMATCH", right=False),
            run(kind="fault", verdict="MISMATCH", right=True),
        ]
    )

    tally = figures.whole["kernel", "with the ladder"]
    assert (tally.passed, tally.alarms, tally.unsure) == (1, 1, 2)
    assert tally.reasons == {"too few": 1, "ValueError: no": 1}
    assert len(figures.unwanted) == 2
    assert [each.right for each in figures.missed] == [False]
    assert {"a prompt of 500 tokens", "span 32", "bfloat16"} <= set(figures.by_draw)


def test_draws_are_always_the_same_and_hold_long_prompts() -> None:
    first = [trial.run for trial in draw_trials(49, ["bfloat16", "float32"], ["model", "off"])]

    assert [trial.run for trial in draw_trials(49, ["bfloat16", "float32"], ["model", "off"])] == first
    assert {max(each.lengths) for each in first} >= {500, 2000}
    assert {each.span for each in first} >= {1, 32}
    assert {each.passes for each in first} == {"decode", "both"}
    assert {each.ladder for each in first} == {"model", "off"}


def test_a_kernel_coarser_than_the_model_is_drawn_and_gridded_in_both_passes_alone() -> None:
    grid = Grid(models=["tiny:llama"], dtypes=["float32"], ladders=["off"], names=["bfloat16_only_cpp"])

    assert [trial.run.passes for trial in grid.trials()] == ["both"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kernels": ("flash",)}, "there is no kernel 'flash'"),
        ({"dtypes": ("int8",)}, "unknown dtype 'int8'; use --dtype"),
        ({"ladder": "high"}, "unknown ladder 'high'; use --ladder"),
        ({"draws": -1}, "--draws is -1"),
        ({"kernels": ()}, "nothing is left to run"),
        ({"models": ("gpt2",)}, "'gpt2' is no model of this benchmark; use --model"),
    ],
)
def test_what_cannot_be_run_is_said(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        bench_kernels(KernelOptions(**fields), lambda text: None)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)
