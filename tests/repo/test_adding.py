"""The pages of docs/adding tell how a part is added, and what they tell is carried out here.

A page consists of text and of fenced blocks, whose info string says what is done with them in a copy of `src`:

    ```python file=src/kvdrift/scenarios/twice.py      a new file with this content
    ```diff file=src/kvdrift/scenarios/catalogue.py    an edit: context, - and + lines; the context is found once
    ```python check                                    the check, one a page: a program that must end without an error

A file of another language (`toml file=...`) is written like one of Python. Other blocks of Python or diff are refused:
code that nobody runs grows old.
"""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "adding").glob("*.md"))
CHECK = "python check"


@dataclass(frozen=True)
class Page:
    """The blocks of a page that are carried out: files by path, edits by path, and the check."""

    files: tuple[tuple[str, str], ...]
    edits: tuple[tuple[str, str], ...]
    check: str


def read_page(text: str) -> Page:
    """Return the blocks of a page.

    Raises:
        ValueError: a block of code says not what it is for, or there is not one check that asserts something.
    """
    blocks = [(token.info.strip(), token.content) for token in MarkdownIt().parse(text) if token.type == "fence"]
    files: list[tuple[str, str]] = []
    edits: list[tuple[str, str]] = []
    checks: list[str] = []
    for info, content in blocks:
        language, _, what = info.partition(" ")
        if info == CHECK:
            checks.append(content)
        elif what.startswith("file="):
            (edits if language == "diff" else files).append((what.removeprefix("file="), content))
        elif language in ("python", "diff"):
            raise ValueError(f"a block of {language} names no file, and is not the check: {content[:60]!r}")
    if len(checks) != 1 or not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(checks[0]))):
        raise ValueError(f"a page has one check with an assertion, and this one has {len(checks)} checks")
    return Page(tuple(files), tuple(edits), checks[0])


def apply_edit(text: str, diff: str) -> str:
    """Return `text` after a diff of one hunk, whose context must be found exactly once.

    Raises:
        ValueError: the context is not there, or is there several times.
    """
    lines = [(line[:1], line[1:]) for line in diff.splitlines()]
    before = "".join(f"{line}\n" for sign, line in lines if sign != "+")
    after = "".join(f"{line}\n" for sign, line in lines if sign != "-")
    if before == after or text.count(before) != 1:
        raise ValueError(f"the context of an edit is found {text.count(before)} times:\n{before}")
    return text.replace(before, after)


# Runs the check of each folder in a process of its own, forked from one that has loaded torch and transformers: to
# import them takes longer than most checks. Nothing of kvdrift is loaded before the fork.
_DRIVER = """
import gc, os, runpy, sys
from importlib import import_module
for name in sys.argv[1].split(","):
    import_module(name)
assert not any(name.startswith("kvdrift") for name in sys.modules)
gc.freeze()  # a collection in a child would copy every page
for folder in sys.argv[2:]:
    if os.fork() == 0:
        os.chdir(folder)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
        sys.path[:0] = [folder + "/src", folder]
        sys.argv = ["check.py"]
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
        runpy.run_path("check.py", run_name="__main__")
        sys.stderr.flush()
        open("passed", "w").close()
        os._exit(0)
    os.wait()
"""


@dataclass(frozen=True)
class Done:
    """How a check ended, and what it wrote to stderr."""

    passed: bool
    stderr: str


def prepare(page: Page, folder: Path) -> Path:
    """Do what a page tells in a copy of the sources in `folder`."""
    shutil.copytree(ROOT / "src", folder / "src")
    for name, content in page.files:
        path = folder / name
        assert not path.exists(), f"{name} is there already"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    for name, diff in page.edits:
        path = folder / name
        path.write_text(apply_edit(path.read_text(encoding="utf-8"), diff), encoding="utf-8")
    (folder / "check.py").write_text(page.check, encoding="utf-8")
    return folder


def run_checks(folders: Sequence[Path], preload: str = "torch,transformers.models.llama.modeling_llama") -> list[Done]:
    """Run the check of each folder, one after the other, with the modules `preload` loaded."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    started = subprocess.run(
        [sys.executable, "-P", "-c", _DRIVER, preload, *map(str, folders)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert started.returncode == 0, started.stderr
    return [Done((folder / "passed").exists(), (folder / "stderr").read_text()) for folder in folders]


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Done]:
    """How the check of each page ended, by the page's name and whether what it tells was done."""
    folders: dict[tuple[str, bool], Path] = {}
    for path in PAGES:
        page = read_page(path.read_text(encoding="utf-8"))
        folders[path.stem, True] = prepare(page, tmp_path_factory.mktemp(path.stem))
        folders[path.stem, False] = prepare(Page((), (), page.check), tmp_path_factory.mktemp(path.stem))
    return dict(zip(folders, run_checks(list(folders.values())), strict=True))


def test_there_are_pages() -> None:
    assert PAGES


@pytest.mark.xdist_group("adding")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_tells_what_works(checks: dict[tuple[str, bool], Done], path: Path) -> None:
    done = checks[path.stem, True]

    assert done.passed, done.stderr


@pytest.mark.xdist_group("adding")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_check_fails_without_what_the_page_adds(checks: dict[tuple[str, bool], Done], path: Path) -> None:
    done = checks[path.stem, False]

    assert not done.passed
    assert 'File "check.py"' in done.stderr


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_code_of_a_page_passes_the_linter(tmp_path: Path, path: Path) -> None:
    page = read_page(path.read_text(encoding="utf-8"))
    for number, (name, content) in enumerate([*page.files, ("check.py", page.check)]):
        if name.endswith(".py"):
            (tmp_path / f"{number}_{Path(name).name}").write_text(content, encoding="utf-8")
    config = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    # A check stands in no package, so that kvdrift is a library there as numpy is.
    rules = ["--ignore", "I001,N999,INP001"]

    for command in (["check", *config, *rules], ["format", "--check", *config]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_check_that_fails_is_seen(tmp_path: Path) -> None:
    page = read_page("```python check\nimport kvdrift\n\nassert kvdrift.__file__ is None, kvdrift.__file__\n```\n")

    (done,) = run_checks([prepare(page, tmp_path)], preload="json")

    assert not done.passed
    assert f"AssertionError: {tmp_path / 'src' / 'kvdrift'}" in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\nprint(1)\n```\n", "names no file"),
        ("```diff\n+a\n```\n", "names no file"),
        ("```python file=a.py\n```\n", "this one has 0 checks"),
        ("```python check\nprint(1)\n```\n", "this one has 1 checks"),
        ("```python check\nassert a\n```\n```python check\nassert b\n```\n", "this one has 2 checks"),
    ],
)
def test_a_page_whose_code_nobody_would_run_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_page(text)


def test_an_edit() -> None:
    assert apply_edit("a\nb\nc\n", " a\n-b\n+d\n+e\n c\n") == "a\nd\ne\nc\n"
    for text in ("", "b\nb\n"):
        with pytest.raises(ValueError, match="the context of an edit is found"):
            apply_edit(text, " b\n+c\n")
