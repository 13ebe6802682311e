"""Compiled models: the eager code is recorded and judged, and the compiled code runs unobserved."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import kvdrift
from kvdrift.engines.torch.unwatched import may_compile
from kvdrift.pipeline.audit import Audit
from kvdrift_bench.models.tiny import lively_model
from tests.support.own_decoder import PROMPTS as OWN_PROMPTS
from tests.support.own_decoder import Decoder, Layer, engine

SLOW = (pytest.mark.matrix, pytest.mark.slow)
PROMPTS = {"a": [5, 9, 17, 3, 44, 2, 8]}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def wrong(graph: Any, inputs: Any) -> Callable[..., Any]:
    """A backend whose code is off by half of every floating-point output."""

    def run(*args: Any) -> Any:
        return tuple(x * 1.5 if torch.is_floating_point(x) else x for x in graph(*args))

    return run


def compiled(way: str, backend: Any) -> Any:
    model = lively_model("llama", torch.float32)
    match way:
        case "model":
            return torch.compile(model, backend=backend, dynamic=True)
        case "in place":
            model.compile(backend=backend, dynamic=True)
        case "forward":
            model.forward = torch.compile(model.forward, backend=backend, dynamic=True)
        case "layers":
            layers = model.model.layers
            for index, layer in enumerate(layers):
                layers[index] = torch.compile(layer, backend=backend, dynamic=True)
        case "mlp":
            for layer in model.model.layers:
                layer.mlp.forward = torch.compile(layer.mlp.forward, backend=backend, dynamic=True)
    return model


def audited(way: str, backend: Any) -> Audit:
    return kvdrift.audit(compiled(way, backend), prompts=PROMPTS, span=1)


@pytest.mark.parametrize(
    "way", ["mlp", *(pytest.param(w, marks=SLOW) for w in ("model", "layers", "in place", "forward"))]
)
def test_a_compiled_model_is_audited_and_says_so(way: str) -> None:
    audit = audited(way, "eager")
    assert audit.exit_code == 0, audit.decision.reasons
    (text,) = [caveat.text for caveat in audit.caveats if caveat.code == "COMPILED"]
    assert "eager code was recorded" in text
    assert [e.supports for e in audit.evidence if e.instrument == "unobserved"] == ["H0"]


def test_compiled_code_that_computes_something_else_is_found() -> None:
    audit = audited("mlp", wrong)
    assert audit.verdict is kvdrift.Verdict.MISMATCH
    assert "while nothing watches" in audit.decision.reasons[0]
    assert {"COMPILED", "OBSERVED_DIFFERS"} <= {caveat.code for caveat in audit.caveats}


def test_an_eager_model_has_no_such_caveat() -> None:
    model = lively_model("llama", torch.float32)
    model.train()
    audit = kvdrift.audit(model, prompts=PROMPTS, span=1)
    assert {caveat.code for caveat in audit.caveats} & {"COMPILED", "EVAL_MODE"} == {"EVAL_MODE"}
    assert model.training


def test_a_step_that_calls_compiled_code_is_recorded_as_the_eager_code() -> None:
    model = Decoder([Layer(0), Layer(1)])
    given = engine(model)
    compiled = torch.compile(model, backend="eager", dynamic=True)
    given.step = lambda ids, cache, start: compiled(ids, cache, start)
    audit = kvdrift.audit(given, prompts=OWN_PROMPTS, span=2)

    assert audit.exit_code == 0, audit.decision.reasons
    assert "compiled in step= is compiled (torch.compile)" in next(
        c.text for c in audit.caveats if c.code == "COMPILED"
    )


def test_a_compiled_function_that_a_model_holds_is_recorded_as_the_eager_code() -> None:
    model = Decoder([Layer(0), Layer(1)])
    object.__setattr__(model, "quick", torch.compile(model.forward, backend="aot_eager", dynamic=True))
    given = engine(model)
    given.step = lambda ids, cache, start: vars(model)["quick"](ids, cache, start)
    audit = kvdrift.audit(given, prompts=OWN_PROMPTS, span=2)

    assert audit.exit_code == 0, audit.decision.reasons
    assert "the model is compiled" in next(c.text for c in audit.caveats if c.code == "COMPILED")


def lazily_compiled(backend: Any) -> Any:
    """A model that compiles its decode step when it makes the first one, and keeps it in a closure."""
    model = lively_model("llama", torch.float32)
    honest: Callable[..., Any] = model.forward
    kept: list[Callable[..., Any]] = []

    def forward(input_ids: Any = None, **options: Any) -> Any:
        if input_ids.shape[1] > 1:
            return honest(input_ids, **options)
        if not kept:
            kept.append(torch.compile(honest, backend=backend, dynamic=True))
        return kept[0](input_ids, **options)

    model.forward = forward
    return model


def test_a_step_that_is_compiled_when_it_is_first_made_is_recorded_as_the_eager_code() -> None:
    audit = kvdrift.audit(lazily_compiled("aot_eager"), prompts=PROMPTS, span=1)

    assert audit.exit_code == 0, audit.decision.reasons
    (text,) = [caveat.text for caveat in audit.caveats if caveat.code == "COMPILED"]
    assert text.startswith("a function that the model compiles when it runs is compiled")


@pytest.mark.matrix
def test_a_step_that_is_compiled_to_something_else_when_it_is_first_made_is_found() -> None:
    audit = kvdrift.audit(lazily_compiled(wrong), prompts=PROMPTS, span=1)

    assert audit.verdict is kvdrift.Verdict.MISMATCH
    assert "while nothing watches" in audit.decision.reasons[0]


def test_a_step_of_ones_own_may_be_compiled_when_it_is_first_made() -> None:
    model = Decoder([Layer(0), Layer(1)])
    given, kept = engine(model), dict[str, Any]()

    def step(ids: Any, cache: Any, start: Any) -> Any:
        if ids.shape[1] > 1:
            return model(ids, cache, start)
        if "step" not in kept:
            kept["step"] = torch.compile(model.forward, backend="aot_eager", dynamic=True)
        return kept["step"](ids, cache, start)

    given.step = step
    audit = kvdrift.audit(given, prompts=OWN_PROMPTS, span=2)

    assert audit.exit_code == 0, audit.decision.reasons
    assert "COMPILED" in {caveat.code for caveat in audit.caveats}


class _Stepper:
    """An engine whose step is a method, and compiles in another one."""

    def step(self, ids: Any) -> Any:
        return self._made(ids)

    def _made(self, ids: Any) -> Any:
        return torch.compile(self.step)(ids)


def _helper(ids: Any) -> Any:
    return torch.compile(_plain_step)(ids)


def _plain_step(ids: Any) -> Any:
    return ids + 1


def _around(stepper: Any) -> Callable[[Any], Any]:
    return lambda ids: stepper.step(ids)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (_Stepper().step, True),
        (_around(_Stepper()), True),
        (functools.partial(_around(_Stepper())), True),
        (lambda ids: _helper(ids), True),
        (_plain_step, False),
        (lambda ids: _plain_step(ids), False),
    ],
    ids=["method", "closure", "partial", "global", "plain", "calls a plain one"],
)
def test_code_that_may_compile_is_told_by_what_it_names(source: Any, found: bool) -> None:
    assert may_compile(lively_model("llama", torch.float32), source) is found


def test_modules_of_ones_own_are_looked_at_and_those_of_libraries_are_not() -> None:
    class Compiling(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.compile(torch.relu)(x)

    assert may_compile(torch.nn.Sequential(torch.nn.Linear(2, 2), Compiling()))
    assert not may_compile(torch.nn.Sequential(torch.nn.Linear(2, 2)), Decoder([Layer(0)]))


def test_a_compiled_function_that_calls_no_module_is_watched_as_it_is() -> None:
    """As a compiled kernel of attention is: hooks need not see into it."""
    model = lively_model("llama", torch.float32)
    act = torch.compile(torch.nn.functional.silu, backend="aot_eager", dynamic=True)
    for layer in model.model.layers:
        layer.mlp.act_fn = type("Act", (torch.nn.Module,), {"forward": lambda self, x: act(x)})()
    audit = kvdrift.audit(model, prompts=PROMPTS, span=1)

    assert audit.exit_code == 0, audit.decision.reasons
    assert "COMPILED" not in {caveat.code for caveat in audit.caveats}
