"""Every verb of the command line, and a call of each that ends soon: what holds for all of them is tested on these."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

from kvdrift.cli.app import app
from tests.support.command import SMALL, kvdrift, save, write_prompts
from tests.support.logprobs import simulate, write_all
from tests.support.tiny import tiny_model


def verbs() -> dict[str, Any]:
    """Return the commands by what is typed, "trace check" for one of a group."""
    found: dict[str, Any] = {}
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found |= {name: command} if inner is None else {f"{name} {key}": each for key, each in inner.items()}
    return found


VERBS = tuple(verbs())

# A call of each verb in the folder that `prepare` fills, and the schema of its --json.
CALLS: dict[str, tuple[tuple[str, ...], str]] = {
    "audit": (("llama", "--prompts", "p.jsonl", "--span", "1", "--scenario", "decode,rewind", "--no-traces"), "report"),
    "judge": (("run",), "report"),
    "show": (("run",), "report"),
    "compare": (("run", "other"), "engines"),
    "diff": (("run", "other"), "diff"),
    "gate": (("run", "--baseline", "other"), "report"),
    "sweep": (("s.toml", "--out"), "sweep"),
    "zoo": (("--model-type", "xlnet", "--rows", "zoo.jsonl"), "zoo"),
    "determinism": (("llama", "--prompts", "p.jsonl", "--runs", "2"), "determinism"),
    "trace check": (("run",), "inventory"),
    "scenarios": ((), "scenarios"),
    "schema": ((), "schemas"),
}
# More calls of a verb whose --json has another schema.
OTHER_CALLS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("show", ("compared",), "engines"),
    ("show", ("dumps",), "logprobs"),
    ("compare", ("files/sampler.jsonl", "files/trainer.jsonl"), "logprobs"),
    ("sweep", ("status", "nothing"), "sweep"),
)


def prepare(folder: Path) -> None:
    """Fill the working directory with a model, prompts, runs of it, a spec, dumps and rows."""
    save(tiny_model("llama", dtype=torch.bfloat16, **SMALL), folder / "llama")
    write_prompts(folder / "p.jsonl", {"p": [5, 9, 17]})
    for name in ("run", "other"):
        assert kvdrift("audit", "llama", "--prompts", "p.jsonl", "--span", "1", "--out", name).code == 0
    assert kvdrift("compare", "run", "other", "--out", "compared").code == 0
    (folder / "files").mkdir()
    dumps = write_all(folder / "files", simulate())
    kvdrift("compare", dumps["sampler"], dumps["trainer"], "--out", "dumps")
    # No cell of it applies, and the type of the row has no decode step, so that no worker starts.
    (folder / "s.toml").write_text("[matrix]\nmodels = ['llama']\ncaches = ['q8_0']\n")
    kvdrift("sweep", "s.toml", "--out", "nothing")
    row = {"type": "xlnet", "scenarios": [], "transformers": version("transformers"), "state": "NOT_APPLICABLE"}
    (folder / "zoo.jsonl").write_text(json.dumps(row) + "\n")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the calls of all verbs need."""
    folder = tmp_path_factory.mktemp("verbs")
    with contextlib.chdir(folder):
        prepare(folder)
    return folder


def arguments_of(verb: str, number: Callable[[], int]) -> list[str]:
    """Return what is typed for the call of a verb; `number` gives places that nothing stands in yet."""
    arguments, _ = CALLS[verb]
    typed = [*verb.split(), *arguments]
    if verb == "sweep":
        typed.append(f"sweep-{number()}")
    return typed
