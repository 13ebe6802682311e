"""The examples in docstrings are true."""

import doctest
import importlib
import pkgutil
from types import ModuleType

import pytest

import kvdrift

# The modules that need no inference engine; the others are met by the tests of their engine.
NEED_AN_ENGINE = ("kvdrift.engines.", "kvdrift_bench.planted.torch")


def modules_without_an_engine() -> list[str]:
    names = [info.name for info in pkgutil.walk_packages(kvdrift.__path__, "kvdrift.", onerror=lambda name: None)]
    return [name for name in names if not name.startswith(NEED_AN_ENGINE)]


@pytest.mark.parametrize("name", modules_without_an_engine())
def test_examples_of_a_module_are_true(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples_to_run() -> None:
    tried = sum(doctest.testmod(importlib.import_module(name)).attempted for name in modules_without_an_engine())
    assert tried >= 3


def test_that_a_wrong_example_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    module = ModuleType("wrong", ">>> 1 + 1\n3\n")
    assert doctest.testmod(module).failed == 1
    assert "Expected" in capsys.readouterr().out
