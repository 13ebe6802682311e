"""What README.md and docs/ promise of themselves: length, complete lists, examples that run, figures with a command."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import kvdrift
from kvdrift_bench.figures.markers import Markers
from tests.support.tiny import tiny_model

PROMPT = [5, 9, 17, 3, 44, 2, 8]
# Folders whose README lists their own pages.
LISTED_BY_THEIR_README = ("accuracy", "adr", "findings")


def links(page: Path) -> set[Path]:
    """The files of this clone that a page links to."""
    found = re.findall(r"\]\(([^()\s#]+)", page.read_text(encoding="utf-8"))
    return {(page.parent / link).resolve() for link in found if ":" not in link}


def unlisted(page: Path, wanted: list[Path]) -> list[str]:
    """The names of the wanted pages that `page` does not link to."""
    return [path.name for path in wanted if path.resolve() not in links(page)]


def test_the_readme_is_short(root: Path) -> None:
    assert len((root / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_index_lists_every_page(root: Path) -> None:
    docs = root / "docs"
    pages = [page for page in docs.rglob("*.md") if page.relative_to(docs).parts[0] not in LISTED_BY_THEIR_README]
    pages += [docs / folder / "README.md" for folder in LISTED_BY_THEIR_README]

    assert unlisted(docs / "index.md", [page for page in pages if page.name != "index.md"]) == []


@pytest.mark.parametrize("folder", LISTED_BY_THEIR_README)
def test_a_folder_lists_its_pages(root: Path, folder: str) -> None:
    pages = [page for page in (root / "docs" / folder).glob("*.md") if page.name != "README.md"]

    assert pages
    assert unlisted(root / "docs" / folder / "README.md", pages) == []


def test_where_code_goes_links_every_page_about_adding(root: Path) -> None:
    assert unlisted(root / "CONTRIBUTING.md", [*(root / "docs" / "adding").glob("*.md")]) == []


def test_the_architecture_gives_a_reason_for_every_contract(root: Path) -> None:
    contracts = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    page = (root / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([\w-]+)`", row.split("|")[1])}

    assert len(contracts) > 5
    assert named == {contract["id"] for contract in contracts}


def test_that_a_page_which_is_not_listed_is_seen(tmp_path: Path) -> None:
    for name in ("a.md", "b.md"):
        (tmp_path / name).touch()
    (tmp_path / "README.md").write_text("[a](a.md#top)", encoding="utf-8")

    assert unlisted(tmp_path / "README.md", [tmp_path / "a.md", tmp_path / "b.md"]) == ["b.md"]


def test_the_example_of_the_readme_runs(root: Path) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```$", (root / "README.md").read_text(encoding="utf-8"), re.S | re.M)
    names: dict[str, Any] = {"model": tiny_model("llama", dtype=torch.bfloat16), "tokenizer": lambda text: PROMPT}

    exec(compile(example, "README.md", "exec"), names)

    (named,) = re.findall(r"kvdrift\.Verdict\.(\w+)", example)
    assert names["audit"].exit_code == kvdrift.Verdict[named].exit_code == 0


def test_the_figures_of_time_and_memory_have_their_command(root: Path) -> None:
    text = (root / "docs" / "performance.md").read_text(encoding="utf-8")
    markers = Markers.of("./run bench")
    begin, end = text.index(markers.begin), text.index(markers.end)
    command = re.match(r"\s*`(\./run bench [^`]+)`:\n", text[begin + len(markers.begin) : end])

    assert command is not None
    assert "--document" in shlex.split(command[1])
