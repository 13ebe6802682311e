"""`import kvdrift` is cheap: it brings in no inference engine."""

import inspect
import pydoc
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

import kvdrift

HEAVY = {"torch", "transformers", "llama_cpp", "ray", "httpx"}


def loaded_after(statement: str) -> set[str]:
    """Return the names of all modules that a fresh interpreter holds after `statement`."""
    code = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement", ["import kvdrift", "import kvdrift.cli.app", "import kvdrift.vocabulary.evidence"]
)
def test_importing_kvdrift_imports_no_engine(statement: str) -> None:
    assert not loaded_after(statement) & HEAVY


def test_importing_kvdrift_registers_nothing_outside_itself() -> None:
    assert "kvdrift.engines.hf" not in loaded_after("import kvdrift")


def test_importing_kvdrift_leaves_the_audit_until_it_is_asked_for() -> None:
    assert "kvdrift.pipeline.audit" not in loaded_after("import kvdrift")
    assert "kvdrift.pipeline.audit" in loaded_after("from kvdrift import *; audit")


def test_help_shows_the_signature_and_what_the_arguments_are() -> None:
    text = pydoc.plain(pydoc.render_doc(kvdrift.audit))
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(kvdrift.audit).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }

    assert "audit(model: 'Any', tokenizer: 'Any' = None, *, prompts:" in " ".join(text.split())
    assert "Audit a torch `PreTrainedModel`" in text
    assert all(f"\n        {name}: " in text for name in inspect.signature(kvdrift.audit).parameters)
    assert defaults == {
        "tokenizer": None,
        "prompts": None,
        "mode": "both",
        "span": 4,
        "alpha": 1e-3,
        "out": None,
        "layers": None,
        "cache": "dynamic",
        "ladder": "model",
        "seed": 0,
        "scenarios": None,
        "lengths": None,
        "inputs": None,
    }


def test_names_that_are_not_there_stay_errors() -> None:
    assert "audit" in dir(kvdrift)
    with pytest.raises(AttributeError, match="module 'kvdrift' has no attribute 'adit'"):
        _ = kvdrift.adit


def test_that_the_check_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ray.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    assert loaded_after("import ray") & HEAVY == {"ray"}


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Return the sets of modules that import each other around a circle (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in imports[module]:
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            start = stack.index(module)
            if len(stack) - start > 1:
                found.append(sorted(stack[start:]))
            del stack[start:]

    for module in imports:
        if module not in index:
            visit(module)
    return found


def test_no_files_import_each_other_around_a_circle() -> None:
    graph = grimp.build_graph("kvdrift", "kvdrift_bench", cache_dir=None)
    imports = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    # `import kvdrift` binds names of its parts, which is no use of the parts by it.
    imports["kvdrift"] = set()

    assert len(imports) > 200
    assert circles(imports) == []


def test_a_circle_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_the_root_of_the_package_holds_three_files(root: Path) -> None:
    folder = root / "src" / "kvdrift"
    assert {path.name for path in folder.iterdir() if path.is_file()} == {"__init__.py", "errors.py", "py.typed"}
