"""The examples in docstrings are true."""

import doctest
import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

import kvdrift

SOURCES = Path(kvdrift.__file__).parents[1]
EXAMPLE = re.compile(r"^ *>>> ", re.MULTILINE)


def modules_with_an_example() -> list[str]:
    """Return the modules that hold an example. To import all the others takes longer than the examples do."""
    found = [path for path in SOURCES.rglob("*.py") if EXAMPLE.search(path.read_text(encoding="utf-8"))]
    return sorted(".".join(path.relative_to(SOURCES).with_suffix("").parts) for path in found)


@pytest.mark.parametrize("name", modules_with_an_example())
def test_examples_of_a_module_are_true(name: str) -> None:
    tried = doctest.testmod(importlib.import_module(name))

    assert tried.failed == 0
    assert tried.attempted > 0


def test_there_are_examples_to_run() -> None:
    names = modules_with_an_example()

    assert len(names) >= 10
    assert "kvdrift.vocabulary.address" in names


def test_that_a_wrong_example_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    module = ModuleType("wrong", ">>> 1 + 1\n3\n")
    assert doctest.testmod(module).failed == 1
    assert "Expected" in capsys.readouterr().out
