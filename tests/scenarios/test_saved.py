"""A run with scenarios that kept its traces is judged again, to the same report; one that was cut is an error."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

import kvdrift
from kvdrift.errors import TraceError
from kvdrift.pipeline.judge import judge_directory
from tests.support.tiny import tiny_model

PROMPTS = {"long": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12], "b": [4, 3, 2, 1, 9, 8, 7, 6, 5]}


def judged_again(directory: Path) -> str:
    return judge_directory(directory)[0].to_json()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("saved") / "run"
    audit = kvdrift.audit(
        tiny_model("gemma2"),
        prompts=PROMPTS,
        span=2,
        out=out,
        scenarios=["verify", "batch_padded", "export_import", "recurrent_state"],
    )
    return out, audit.to_json()


def test_a_run_with_scenarios_is_judged_to_the_same_report(run: tuple[Path, str]) -> None:
    directory, report = run

    assert judged_again(directory) == report
    assert (directory / "report.json").read_text() == report


def test_with_decode_as_well(tmp_path: Path) -> None:
    audit = kvdrift.audit(
        tiny_model("llama"), prompts=PROMPTS, span=2, out=tmp_path / "run", scenarios="decode,second_call"
    )

    assert judged_again(tmp_path / "run") == audit.to_json()


def edited(directory: Path, tmp_path: Path, change: Any) -> Path:
    """Return a copy of the run with another manifest; trace files are linked."""
    copy = tmp_path / "run"
    for path in directory.rglob("*"):
        target = copy / path.relative_to(directory)
        if path.is_dir():
            target.mkdir(parents=True)
        elif path.name == "manifest.json":
            manifest = msgspec.json.decode(path.read_bytes())
            change(manifest)
            target.write_bytes(msgspec.json.encode(manifest))
        else:
            target.hardlink_to(path)
    return copy


def drop_pair(manifest: dict[str, Any]) -> None:
    manifest["pairs"] = [p for p in manifest["pairs"] if not (p["scenario"] == "verify" and p["rung"] == "float64")]


def drop_controls(manifest: dict[str, Any]) -> None:
    manifest["pairs"] = [p for p in manifest["pairs"] if p["role"] != "control"]


def double_pair(manifest: dict[str, Any]) -> None:
    manifest["pairs"].append(next(p for p in manifest["pairs"] if p["scenario"] == "verify"))


def move_pair(manifest: dict[str, Any]) -> None:
    pairs = [p for p in manifest["pairs"] if p["scenario"] == "batch_padded" and p["role"] == "pair"]
    pairs[0]["decode"], pairs[1]["decode"] = pairs[1]["decode"], pairs[0]["decode"]


def drop_position(manifest: dict[str, Any]) -> None:
    next(p for p in manifest["pairs"] if p["scenario"] == "verify")["positions"].pop()


def rename_scenario(manifest: dict[str, Any]) -> None:
    manifest["scenarios"][0]["name"] = "something_else"


@pytest.mark.parametrize("change", [drop_pair, drop_controls, double_pair, move_pair, drop_position, rename_scenario])
def test_a_run_that_was_changed_is_an_error(run: tuple[Path, str], tmp_path: Path, change: Any) -> None:
    with pytest.raises(TraceError, match="not consistent"):
        judge_directory(edited(run[0], tmp_path, change))


def test_that_the_copy_itself_is_fine(run: tuple[Path, str], tmp_path: Path) -> None:
    assert judged_again(edited(run[0], tmp_path, lambda manifest: None)) == run[1]
