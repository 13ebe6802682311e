"""The command line as a test sees it: exit code, stdout, stderr, and what was left on the disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from kvdrift.cli.app import app
from tests.support.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]
MAIN = "import sys; sys.argv[0] = 'kvdrift'; from kvdrift.cli.app import main; main()"
SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str


@cache
def command() -> TyperGroup:
    """Return the command as `CliRunner.invoke` makes it anew for each call, which takes as long as to read a run."""
    made = get_command(app)
    assert isinstance(made, TyperGroup)
    return made


def kvdrift(*arguments: str | Path) -> Result:
    """Run the command in this process. An exception that is not a message fails the test with its traceback."""
    with CliRunner().isolation() as (out, err, _):
        try:
            command().main([str(argument) for argument in arguments], prog_name="kvdrift")
            raise AssertionError("the command returned, and did not exit")
        except SystemExit as end:
            code = end.code
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
        said = [stream.getvalue().decode().replace("\r\n", "\n") for stream in (out, err)]
    assert isinstance(code, int)
    return Result(code, *said)


def process(*arguments: str | Path, cwd: Path, program: str = MAIN, **options: Any) -> subprocess.Popen[str]:
    """Start the command as a process of its own, in `cwd`.

    Interrupts are not ignored there, even if they are here: a shell starts background jobs with them ignored.
    """
    return subprocess.Popen(
        [sys.executable, "-c", program, *(str(argument) for argument in arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), **options.pop("env", {})},
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


def refused(done: Result, code: int, message: str) -> None:
    """Assert that a command ended with exactly this message and code."""
    assert done.err == f"kvdrift: {message}\n"
    assert done.out == ""
    assert done.code == code


def names(folder: Path) -> set[str]:
    """Everything that lies in a folder, hidden files as well."""
    return set(os.listdir(folder))


def save(model: Any, folder: Path) -> Path:
    """Save a model without a tokenizer, quietly."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
    return folder


def write_prompts(path: Path, prompts: dict[str, Sequence[int]]) -> Path:
    """Write a .jsonl file of token ids."""
    path.write_text("".join(json.dumps({"id": k, "token_ids": list(v)}) + "\n" for k, v in prompts.items()))
    return path


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama of two layers, 128 positions and 128 token ids, without a tokenizer."""
    return save(tiny_model("llama", dtype=torch.bfloat16, **SMALL), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file with one prompt of three tokens."""
    (tmp_path / "files").mkdir()
    return write_prompts(tmp_path / "files" / "prompts.jsonl", {"p": [5, 9, 17]})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder
