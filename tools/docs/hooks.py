"""What mkdocs is told beside mkdocs.yml: pages made of the code, pages from the root, links that leave docs/."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
# Files of the root that are pages of the site.
FROM_ROOT = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md"}
# What a block is for, which tests read: the name of its file, or that it is a check.
_FENCE = re.compile(r"^```(\w+) (?:file|expected)=(\S+)$", re.MULTILINE)
_CHECK = re.compile(r"^```(\w+) check$", re.MULTILINE)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^()\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/."""
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tools" / "docs")]
    from reference import api_page, cli_page, schemas_page

    made = {
        "reference/cli.md": cli_page(),
        "reference/api.md": api_page(),
        "reference/schemas.md": schemas_page(),
        **{page: (ROOT / name).read_text(encoding="utf-8") for name, page in FROM_ROOT.items()},
    }
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    gallery = ROOT / "build" / "gallery"
    for path in sorted(gallery.glob("*.html")):
        files.append(File.generated(config, f"gallery/{path.name}", content=path.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links to what is not in the site into names, and those to pages from the root into links to them."""
    here = page.file.src_uri
    origin = next((name for name, made in FROM_ROOT.items() if made == here), f"docs/{here}")

    def link(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or ":" in path:
            return match[0]
        whole = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
        inside = FROM_ROOT.get(whole, whole.removeprefix("docs/") if whole.startswith("docs/") else None)
        if inside is not None and files.get_file_from_path(inside) is not None:
            found = posixpath.relpath(inside, posixpath.dirname(here) or ".")
            return f"{image}[{text}]({found}{'#' + anchor if anchor else ''})"
        return f"{text} (`{whole}`)"

    return _LINK.sub(link, _CHECK.sub(r"```\1", _FENCE.sub(r'```\1 title="\2"', markdown)))
