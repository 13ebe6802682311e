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


def carry_out(page: Page, folder: Path) -> subprocess.CompletedProcess[str]:
    """Do what a page tells in a copy of the sources in `folder`, and run its check there."""
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
    return subprocess.run(
        [sys.executable, "check.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "src"), str(folder)])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_there_are_pages() -> None:
    assert PAGES


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_tells_what_works(tmp_path: Path, path: Path) -> None:
    done = carry_out(read_page(path.read_text(encoding="utf-8")), tmp_path)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_check_fails_without_what_the_page_adds(tmp_path: Path, path: Path) -> None:
    page = read_page(path.read_text(encoding="utf-8"))

    assert carry_out(Page((), (), page.check), tmp_path).returncode != 0


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

    done = carry_out(page, tmp_path)

    assert done.returncode == 1
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
