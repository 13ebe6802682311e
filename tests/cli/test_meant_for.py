"""The table that says for which engines an option of `audit` is meant."""

import importlib
import inspect

import pytest
from typer.main import get_command

from kvdrift.cli.app import app
from kvdrift.cli.options import MEANT_FOR, SERVER, for_start
from kvdrift.cli.server import server_plan
from kvdrift.engines.open import ENGINES, EngineKind, find_engine
from tests.support.command import kvdrift

ADDRESS = "http://127.0.0.1:9/v1"
# The options of `audit` that are not part of a plan and go to no engine.
AROUND = {"prompt", "prompts", "as_json", "out"}


def flags() -> dict[str, str]:
    """The flags of `audit` by the names of their parameters."""
    audit = get_command(app).commands["audit"]  # type: ignore[attr-defined]
    return {each.name: each.opts[0] for each in audit.params if each.param_type_name == "option"}


def test_the_table_has_every_option_of_the_command() -> None:
    assert MEANT_FOR.keys() == flags().keys() - {"help"}


@pytest.mark.parametrize("kind", ENGINES, ids=lambda kind: kind.name)
def test_what_is_meant_for_one_engine_is_what_its_start_takes(kind: EngineKind) -> None:
    start = importlib.import_module(f"kvdrift.engines.{kind.name}.start").start
    parameters = inspect.signature(start).parameters.values()
    keywords = {each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}

    assert for_start(dict.fromkeys(MEANT_FOR), kind.name).keys() == keywords


def test_what_is_meant_for_a_server_is_in_its_plan() -> None:
    meant = {name for name, engines in MEANT_FOR.items() if SERVER in engines} - AROUND
    values = {"served": "m", "dtype": "bf16", "span": 9, "max_requests": 7, "timeout": 5.0, "resolution": 0.5}
    values |= {"alpha": 0.25, "seed": 11, "against": "http://127.0.0.1:9/v1"}
    plan = server_plan(values)

    assert values.keys() == meant
    assert (plan.model, plan.dtype, plan.span, plan.max_requests) == ("m", "bfloat16", 9, 7)
    assert (plan.timeout_s, plan.resolution, plan.alpha, plan.seed) == (5.0, 0.5, 0.25, 11)
    assert plan.against == "http://127.0.0.1:9/v1"


@pytest.mark.parametrize("name", [name for name, engines in MEANT_FOR.items() if SERVER not in engines])
def test_what_is_not_meant_for_a_server_is_refused_there(name: str) -> None:
    """Left alone, it would be thought to count."""
    value = {"traces": (), "threads": ("1",), "n_batch": ("1",)}.get(name, ("x",))

    done = kvdrift("audit", ADDRESS, flags()[name], *value)

    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"kvdrift: {flags()[name]}")
    assert done.err.endswith("leave it out\n") or name == "lengths"


@pytest.mark.parametrize("name", [name for name, engines in MEANT_FOR.items() if engines == {SERVER}])
def test_what_is_meant_for_a_server_alone_is_refused_elsewhere(name: str) -> None:
    for model in ((), ("llamacpp:a.gguf",)):
        done = kvdrift("audit", *model, flags()[name], "5")

        assert done.err == (
            f"kvdrift: {flags()[name]} is for a running server; name its address: kvdrift audit http://HOST:PORT/v1\n"
        )
        assert (done.code, done.out) == (2, "")


def test_the_prefix_says_which_engine() -> None:
    names = {None: "hf", "": "hf", "a.gguf": "hf", "mine:load": "hf", "llamacpp:": "llamacpp", "llamacpp:a": "llamacpp"}

    assert {model: find_engine(model)[0].name for model in names} == names
    assert find_engine("llamacpp:llamacpp:a")[1] == "llamacpp:a"
    assert find_engine(None)[1] is None
    assert [kind.name for kind in ENGINES if not kind.prefix] == ["hf"]
