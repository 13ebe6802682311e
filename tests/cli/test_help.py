"""The help texts: examples, exit codes and every option of the command."""

import pytest
from typer.testing import CliRunner

from kvdrift import __version__
from kvdrift.cli.app import app
from kvdrift.errors import CaptureError, EngineUnavailable, TraceError, UsageError
from kvdrift.pipeline.readers import NAMES
from kvdrift.scenarios.catalogue import SCENARIOS
from kvdrift.vocabulary.evidence import Verdict
from tests.support.command import kvdrift

CODES = (
    "Exit codes: 0 EXACT or STRUCTURAL_DRIFT, 1 MISMATCH, 2 usage, 3 engine unavailable, 4 capture failed, "
    "5 bad trace, 6 INCONCLUSIVE, 130 interrupted."
)
OPTIONS = (
    "--mode --prompt --prompts --span --dtype --attn --cache --device --scenario --layers --lengths --alpha --seed "
    "--out --no-traces"
)


def help_of(*command: str) -> str:
    done = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"})
    assert done.exit_code == 0
    return " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("command", "example"),
    [
        ((), "kvdrift audit"),
        (("audit",), "kvdrift audit Qwen/Qwen2.5-0.5B --dtype bf16 --attn sdpa --out audit-qwen"),
        (("judge",), "kvdrift judge kvdrift-runs/20260207-101500"),
    ],
)
def test_help_has_an_example_and_the_exit_codes(command: tuple[str, ...], example: str) -> None:
    text = help_of(*command)

    assert example in text
    assert CODES in text


def test_help_of_show() -> None:
    text = help_of("show")

    assert "kvdrift show kvdrift-runs/20260207-101500 | less" in text
    assert "Exit codes: 0 printed, 2 usage, 5 no readable report." in text


def test_help_of_audit_has_every_option() -> None:
    text = help_of("audit")

    for option in OPTIONS.split():
        assert f"{option} " in text
    assert "default: kvdrift-runs/TIME" in text


def test_the_list_of_scenarios_names_every_one_with_what_it_finds() -> None:
    done = kvdrift("scenarios")

    assert done.code == 0
    assert done.out.startswith("decode ")
    for scenario in SCENARIOS:
        assert f"\n{scenario.name} " in done.out
        assert scenario.finds in done.out
        assert f"for {scenario.where}\n" in done.out


def test_a_misspelt_scenario_is_told_before_a_model_is_loaded() -> None:
    done = kvdrift("audit", "--scenario", "rewinds")

    assert done.code == 2
    assert "unknown scenario 'rewinds'; --scenario (scenarios=[...]) takes all, decode, chunked_prefill" in done.err


def test_the_exit_codes_are_those_of_the_code() -> None:
    errors = [UsageError, EngineUnavailable, CaptureError, TraceError]
    assert [error.exit_code for error in errors] == [
        2,
        3,
        4,
        5,
    ]
    assert {str(verdict): verdict.exit_code for verdict in Verdict} == {
        "EXACT": 0,
        "STRUCTURAL_DRIFT": 0,
        "MISMATCH": 1,
        "INCONCLUSIVE": 6,
    }


def test_the_version() -> None:
    assert kvdrift("--version").out == f"kvdrift {__version__}\n"


def test_every_format_of_traces_is_in_the_help_of_judge() -> None:
    text = help_of("judge")
    assert NAMES[0] == "auto"
    assert [name for name in NAMES if name not in text] == []
