"""The shell commands of README.md and docs/: those in blocks, and those that a sentence names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

PROGRAMS = ("kvdrift", "kvdrift-bench", "./run", "pip", "git", "python", "tools/")
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+?) -->")
# Written by a command, which stands in them as it was typed; it takes hours.
GENERATED = re.compile(r"<!-- (?P<what>kvdrift-bench \w+): begin.*?<!-- (?P=what): end -->", re.DOTALL)
# Two words at least: `kvdrift` alone is the name of the project, and `./run` that of the file.
SPAN = re.compile(r"(?<!`)`((?:kvdrift(?:-bench)?|\./run|pip install|python) [^`]+)`", re.DOTALL)
CHOICE = re.compile(r"[\w-]+(\|[\w-]+)+")
# Generated documents, scripts with tests of their own, pages that another test carries out, decisions of their time.
LEFT_OUT = {"accuracy", "findings", "adding", "adr"}
# What stands for whatever a reader adds.
OPEN = {"ARGS", "OPTIONS", "..."}


@dataclass(frozen=True)
class Command:
    """One command of a document: what is typed, and why it is not run, if it says so."""

    document: str
    line: int
    text: str
    reason: str | None = None

    @property
    def words(self) -> list[str]:
        """What a shell makes of it, without placeholders for more options."""
        return [word for word in shlex.split(self.text, comments=True) if word not in OPEN]

    def __str__(self) -> str:
        return f"{self.document}:{self.line}: {self.text}"


def commands_of(text: str, document: str) -> list[Command]:
    """Return the commands of one document in the order of its lines; `a|b` in one of them makes two."""
    # What was generated is blanked, and not cut, so that line numbers stay.
    text = GENERATED.sub(lambda match: re.sub(r"[^\n]", "", match.group()), text)
    found = [*_in_blocks(text, document), *_in_sentences(text, document)]
    return [each for command in sorted(found, key=lambda c: c.line) for each in _alternatives(command)]


def _in_blocks(text: str, document: str) -> Iterator[Command]:
    fence: str | None = None
    reason = None
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped.startswith("```"):
            fence = stripped.removeprefix("```") if fence is None else None
        elif marker := NOT_RUN.search(line):
            reason = marker["reason"]
        elif fence in ("", "sh", "console", "bash", "shell") or (fence is None and line.startswith("    ")):
            for part in re.split(r" && ", stripped.removeprefix("$ ")):
                if part.split(" ")[0].startswith(PROGRAMS) and not part.startswith("kvdrift."):
                    yield Command(document, number, part, reason)
        elif stripped and fence is None:
            reason = None  # the marker speaks of the block that follows it


def _in_sentences(text: str, document: str) -> Iterator[Command]:
    for match in SPAN.finditer(text):
        number = text.count("\n", 0, match.start()) + 1
        if not text.splitlines()[number - 1].startswith("    "):
            yield Command(document, number, " ".join(match[1].split()))


def _alternatives(command: Command) -> Iterator[Command]:
    choices = [
        word.split("|") if re.fullmatch(r"[\w-]+(\|[\w-]+)+", word) else [word] for word in command.text.split(" ")
    ]
    for words in product(*choices):
        yield Command(command.document, command.line, " ".join(words), command.reason)


def documents(root: Path) -> list[Path]:
    """Return README.md and the pages of docs/ that people wrote and that speak of today."""
    return [
        root / "README.md",
        *(p for p in sorted((root / "docs").rglob("*.md")) if not LEFT_OUT & {*p.parts, p.stem}),
    ]


def all_commands(root: Path) -> list[Command]:
    """Return every command of every document."""
    return [
        command
        for path in documents(root)
        for command in commands_of(path.read_text(encoding="utf-8"), str(path.relative_to(root)))
    ]
