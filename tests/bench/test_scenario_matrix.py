"""Which scenario finds a fault, and which finds it alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvdrift.errors import UsageError
from kvdrift.scenarios.catalogue import DECODE, SCENARIOS
from kvdrift_bench.cli.faults import app
from kvdrift_bench.cli.scenarios import MatrixOptions, bench_scenarios
from kvdrift_bench.figures.markers import Markers
from kvdrift_bench.figures.render import render_scenarios
from kvdrift_bench.figures.scenario_figures import Matrix, build_matrix, finders
from kvdrift_bench.planted.torch import corpus_for
from kvdrift_bench.run import scenario_runs
from kvdrift_bench.run.records import RecordFile
from kvdrift_bench.run.scenario_runs import Cell, MatrixRow, choose_runs

PASSED = Cell(verdict="STRUCTURAL_DRIFT")
ABSENT = Cell(verdict=None, reason="no layer has a sliding window")
HERE, THERE = "p / pos 3 / layer 0 / k_cache", "p / pos 4 / layer 1 / v_cache"


def mismatch(address: str = HERE, *, right: bool | None = True) -> Cell:
    return Cell(verdict="MISMATCH", address=address, right=right)


def row(name: str = "f", needs: str = "one", **cells: Cell) -> MatrixRow:
    return MatrixRow(kind="fault", name=name, model="m", needs=needs, mechanism="M11", cells=cells)


def clean(**cells: Cell) -> MatrixRow:
    return MatrixRow(kind="clean", name="clean", model="m", cells=cells)


def test_a_fault_that_two_scenarios_find_is_found_alone_by_neither() -> None:
    matrix = build_matrix(
        [
            clean(decode=PASSED, one=PASSED, two=PASSED),
            row("a", decode=PASSED, one=mismatch(), two=PASSED),
            row("b", decode=PASSED, one=mismatch(), two=mismatch(THERE, right=False)),
            row("c", decode=mismatch(), one=mismatch(), two=PASSED),
        ]
    )

    assert matrix.scenarios["one"].found == ["a", "b", "c"]
    assert matrix.scenarios["one"].alone == ["a"]
    assert matrix.scenarios["two"].found == ["b"]
    assert matrix.scenarios["two"].alone == []
    assert [item.name for item in matrix.wanting] == ["decode", "one", "two"]


def test_what_a_model_shows_without_the_fault_finds_no_fault() -> None:
    without = clean(one=PASSED, moved=mismatch(right=None))
    same = row(one=mismatch(), moved=mismatch(right=False))
    other = row(one=mismatch(), moved=mismatch(THERE))

    assert finders(same, without) == ["one"]
    assert finders(other, without) == ["one", "moved"]
    assert finders(same, None) == ["one", "moved"]


def test_a_fault_found_elsewhere_or_not_at_all_is_missed_by_its_scenario() -> None:
    matrix = build_matrix(
        [
            clean(one=PASSED, two=PASSED),
            row("elsewhere", one=mismatch(THERE, right=False), two=PASSED),
            row("not_at_all", one=PASSED, two=mismatch()),
            row("unsure", one=Cell(verdict="INCONCLUSIVE"), two=PASSED),
            MatrixRow(kind="fault", name="broken", model="m", needs="one", error="RuntimeError: no"),
            row("found", one=mismatch(), two=PASSED),
        ]
    )

    assert matrix.scenarios["one"].missed == ["elsewhere", "not_at_all", "unsure", "broken"]
    assert matrix.scenarios["one"].made_for[-1] == "found"
    text = render_scenarios(matrix, "kvdrift-bench scenarios", {"cores": "2"})
    assert "broken on m: RuntimeError: no" in text
    assert "made for: elsewhere, not_at_all, unsure, broken." in text


def test_clean_models_are_passed_alarmed_or_left_out_with_a_reason() -> None:
    figures = build_matrix([clean(one=PASSED, two=mismatch(right=None), three=ABSENT)]).scenarios

    assert figures["one"].clean == ["m"]
    assert figures["two"].alarms == {"m": "MISMATCH"}
    assert figures["three"].does_not_apply == {"no layer has a sliding window": ["m"]}
    assert not figures["three"].applies


def test_the_tables_have_a_mark_for_each_verdict() -> None:
    without = clean(a=PASSED, b=PASSED, c=mismatch(THERE, right=None), d=PASSED, e=ABSENT)
    planted = row(
        "f", "a", a=mismatch(), b=mismatch(right=False), c=mismatch(THERE), d=Cell(verdict="INCONCLUSIVE"), e=ABSENT
    )

    text = render_scenarios(build_matrix([without, planted]), "kvdrift-bench scenarios", {"cores": "2"})

    assert "| f | **X** | x | o | ? |  |" in text
    assert "| m | · | · | **M** | · |  |" in text
    assert "1 a, 2 b, 3 c, 4 d, 5 e." in text
    assert "| e | no layer has a sliding window | m |" in text


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Matrix, Path]:
    """Two faults and nothing, planted in one model that really runs. Scenarios that find neither are left out."""
    names = ("batch", "duplicate_rows", "select_rows")
    path = tmp_path_factory.mktemp("matrix")
    options = MatrixOptions(
        faults=("rows_rolled", "twin_rows_share_a_block_unwritten"),
        models=(),
        out=path / "rows.jsonl",
        markdown=path / "matrix.md",
        json=path / "matrix.json",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenario_runs, "ALL", f"{DECODE},{','.join(names)}")
        return bench_scenarios(options, lambda text: None), path


def test_a_run_tells_what_one_scenario_alone_finds(measured: tuple[Matrix, Path]) -> None:
    figures = measured[0].scenarios

    assert figures["batch"].found == ["rows_rolled"]
    assert set(figures["duplicate_rows"].found) == {"rows_rolled", "twin_rows_share_a_block_unwritten"}
    assert figures["duplicate_rows"].alone == ["twin_rows_share_a_block_unwritten"]
    assert figures["batch"].alone == figures[DECODE].found == []
    assert all(item.missed == [] for item in figures.values())
    assert all(item.clean == ["llama"] for item in figures.values())


def test_the_document_names_the_command(measured: tuple[Matrix, Path]) -> None:
    text = (measured[1] / "matrix.md").read_text()
    markers = Markers.of("kvdrift-bench scenarios")

    assert text.startswith(markers.begin)
    assert text.endswith(f"{markers.end}\n")
    command = "kvdrift-bench scenarios --faults rows_rolled,twin_rows_share_a_block_unwritten --model none"
    assert f"Command: `{command}`" in text
    assert "| twin_rows_share_a_block_unwritten | · | · |" in text


def test_what_was_run_is_not_run_again(measured: tuple[Matrix, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenario_runs, "_measure", lambda trial: pytest.fail("it was run again"))
    options = MatrixOptions(faults=("rows_rolled",), models=(), out=measured[1] / "rows.jsonl")

    assert [item.name for item in bench_scenarios(options, lambda text: None).faults] == ["rows_rolled"]
    assert len(RecordFile(options.out, MatrixRow).records) == 3


@pytest.mark.parametrize("names", [{"faults": ("rows",)}, {"models": ("lama",)}])
def test_an_unknown_name_is_a_usage_error(names: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(UsageError, match="there is no"):
        choose_runs(**{"faults": (), "models": (), **names})


def test_nothing_to_run_is_a_usage_error() -> None:
    result = CliRunner().invoke(app, ["scenarios", "--faults", "none", "--model", "none"])

    assert result.exit_code == 2
    assert "nothing is left to run" in result.output


# What cannot run without an accelerator has no faults: none could be shown.
ELSEWHERE = {"offloaded_cache"}
# Theirs are planted in llama.cpp: tests/engines/llamacpp/test_scenarios.py.
ELSEWHERE |= {"context_shift", "draft_rounds", "ring_cache"}


def test_every_scenario_has_two_faults_of_its_own() -> None:
    made_for = [fault.needs for fault in corpus_for(3)]

    assert [item.name for item in SCENARIOS if item.name not in ELSEWHERE and made_for.count(item.name) < 2] == []
