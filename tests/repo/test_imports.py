"""`import kvdrift` is cheap: it brings in no inference engine."""

import inspect
import pydoc
import subprocess
import sys
from pathlib import Path

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
    }


def test_names_that_are_not_there_stay_errors() -> None:
    assert "audit" in dir(kvdrift)
    with pytest.raises(AttributeError, match="module 'kvdrift' has no attribute 'adit'"):
        _ = kvdrift.adit


def test_that_the_check_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ray.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    assert loaded_after("import ray") & HEAVY == {"ray"}
