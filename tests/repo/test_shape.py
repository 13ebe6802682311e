"""Functions stay short, take few parameters, and names say one thing; `__all__` is sorted and complete.

The lists of exceptions only shrink: an entry that is no longer needed fails a test, so that it goes.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

MAX_LINES = 60
MAX_PARAMETERS = 8

LONG: set[str] = set()
MANY_PARAMETERS: set[str] = {"kvdrift.pipeline.audit.audit"}  # decision 35
TWICE: set[str] = set()


@dataclass(frozen=True)
class Function:
    """A function as it is written: lines from `def` to its end, and parameters without `self` and `cls`."""

    name: str
    lines: int
    parameters: int
    is_command: bool


# The tests look at the same modules, and change no tree.
parsed = cache(ast.parse)


def modules(folder: Path) -> Iterator[tuple[str, ast.Module]]:
    """Yield the dotted name and the syntax tree of every module under `folder`."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), parsed(path.read_text(encoding="utf-8"))


def is_command(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether typer makes a command of it: then its parameters are the options of the command line."""
    called = [each.func for each in node.decorator_list if isinstance(each, ast.Call)]
    return any(isinstance(each, ast.Attribute) and each.attr in ("command", "callback") for each in called)


def functions(folder: Path) -> Iterator[Function]:
    """Yield every function under `folder`, methods and functions inside of functions as well."""
    for module, tree in modules(folder):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = node.args
                named = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
                parameters = [each for each in named if each is not None and each.arg not in ("self", "cls")]
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                yield Function(f"{module}.{node.name}", lines, len(parameters), is_command(node))


def class_names(folder: Path) -> dict[str, list[str]]:
    """Return the modules in which each class name of a package is defined, by `package.name`."""
    found = defaultdict(list)
    for module, tree in modules(folder):
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found[f"{module.partition('.')[0]}.{node.name}"].append(module)
    return found


def too_long(folder: Path) -> set[str]:
    return {each.name for each in functions(folder) if each.lines > MAX_LINES and not each.is_command}


def with_many_parameters(folder: Path) -> set[str]:
    return {each.name for each in functions(folder) if each.parameters > MAX_PARAMETERS and not each.is_command}


def exported(tree: ast.Module) -> list[str] | None:
    """Return what `__all__` lists, or None if the module has none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == "__all__" for target in node.targets):
            names: list[str] = ast.literal_eval(node.value)
            return names
    return None


def public_names(tree: ast.Module) -> set[str]:
    """Return the functions and classes of a module that do not begin with an underscore."""
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in tree.body if isinstance(node, defined) and not node.name.startswith("_")}


def wrong_exports(folder: Path) -> dict[str, str]:
    """Return, by module, what is wrong with its `__all__`."""
    wrong = {}
    for module, tree in modules(folder):
        names = exported(tree)
        if names is None:
            continue
        # ruff's order: constants, then classes, then the rest.
        order = sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
        if names != order or len(set(names)) != len(names):
            wrong[module] = f"sorted: {order}"
        elif missing := sorted(public_names(tree) - set(names)):
            wrong[module] = f"missing: {missing}"
    return wrong


def test_no_function_has_more_than_60_lines(root: Path) -> None:
    assert too_long(root / "src") == LONG


def test_no_function_has_more_than_8_parameters(root: Path) -> None:
    assert with_many_parameters(root / "src") == MANY_PARAMETERS


def test_no_class_name_stands_twice_in_a_package(root: Path) -> None:
    assert {name for name, places in class_names(root / "src").items() if len(places) > 1} == TWICE


def test_every_list_of_exports_is_sorted_and_complete(root: Path) -> None:
    assert wrong_exports(root / "src") == {}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package that breaks every rule once, and keeps each of them once at its limit."""
    folder = tmp_path / "package"
    folder.mkdir()
    fit, unfit = "    pass\n" * (MAX_LINES - 1), "    pass\n" * MAX_LINES
    eight = ", ".join("abcdefgh")
    (folder / "one.py").write_text(
        f"def fit():\n{fit}\ndef unfit():\n{unfit}\n"
        "class Same:\n"
        f"    def eight(self, {eight}): ...\n"
        f"    def nine(self, {eight}, *, i): ...\n"
        f"@app.command(epilog='x')\ndef command({eight}, i, j): ...\n"
        "__all__ = ['Same', 'command', 'fit', 'unfit']\n"
    )
    (folder / "two.py").write_text("class Same: ...\nclass Other: ...\n__all__ = ['Same']\n")
    (folder / "three.py").write_text("A = b = 1\nclass C: ...\n__all__ = ['b', 'C', 'A']\n")
    (folder / "four.py").write_text("class C: ...\ndef _own(): ...\n")
    return tmp_path


def test_that_the_checks_can_fail(package: Path) -> None:
    assert too_long(package) == {"package.one.unfit"}
    assert with_many_parameters(package) == {"package.one.nine"}
    assert {name for name, places in class_names(package).items() if len(places) > 1} == {"package.Same", "package.C"}
    assert wrong_exports(package) == {
        "package.two": "missing: ['Other']",
        "package.three": "sorted: ['A', 'C', 'b']",
    }
