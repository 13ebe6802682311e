"""The site: its pages are there, what is made of the code is complete, and the tutorial is carried out.

The site itself is built by `./run docs`, with warnings as errors.
"""

from __future__ import annotations

import importlib.util
import re
import runpy
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from markdown_it import MarkdownIt
from typer.main import get_command

import kvdrift
from kvdrift.cli.app import app
from kvdrift.pipeline.audit import Audit
from kvdrift.report.schema import SCHEMAS
from tests.repo.test_adding import apply_edit
from tests.support.command import ROOT

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """The module that makes pages of the code."""
    spec = importlib.util.spec_from_file_location("docs_reference", ROOT / "tools" / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_of_the_navigation_is_there() -> None:
    named = re.findall(r"^ {6}- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    made = {"readme.md", "contributing.md", "reference/cli.md", "reference/api.md", "reference/schemas.md"}

    assert len(named) > 20
    assert [page for page in named if page not in made and not (DOCS / page).exists()] == []
    assert made <= set(named)


def test_the_reference_of_the_command_line_has_every_verb_and_option(reference: ModuleType) -> None:
    page = reference.cli_page()
    command: Any = get_command(app)

    assert [verb for verb in command.commands if f"## kvdrift {verb}" not in page] == []
    for option in command.commands["audit"].params:
        assert all(f"`{name}`" in page for name in option.opts if name.startswith("--")), option.name
    assert "## kvdrift trace check" in page


def test_the_other_references_name_everything(reference: ModuleType) -> None:
    assert all(f"## {name}\n" in reference.schemas_page() for name in SCHEMAS)
    page = reference.api_page()
    assert page.count("\n::: ") == len([name for name in kvdrift.__all__ if name != "__version__"])
    assert "::: kvdrift.pipeline.audit.audit\n" in page


def test_the_picture_of_the_readme_is_a_small_png() -> None:
    data = (DOCS / "images" / "report.png").read_bytes()

    assert data.startswith(b"\x89PNG")
    assert struct.unpack(">II", data[16:24]) == (1080, 860)
    assert len(data) < 60_000


def test_the_tutorial_is_carried_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files are written, edits are made, and a program with an expected output is run where that output stands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    ran = []
    for token in MarkdownIt().parse((DOCS / "tutorial.md").read_text(encoding="utf-8")):
        if token.type != "fence":
            continue
        language, _, what = token.info.partition(" ")
        kind, _, name = what.partition("=")
        if kind == "expected":
            monkeypatch.delitem(sys.modules, "mymodel", raising=False)
            runpy.run_path(name, run_name="__main__")
            assert capsys.readouterr().out == token.content
            ran.append(name)
        elif language == "diff":
            Path(name).write_text(apply_edit(Path(name).read_text(), token.content))
        else:
            assert kind == "file", token.info
            Path(name).write_text(token.content)

    assert ran == ["audit.py", "again.py"]
    assert (tmp_path / "before" / "report.html").is_file()

    def audited(*arguments: Any, **options: Any) -> Audit:
        return kvdrift.audit(*arguments, **options).check()

    runpy.run_path("test_cache.py")["test_decode_computes_what_prefill_computes"](audited)
