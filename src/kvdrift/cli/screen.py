"""What stdout can show: its width, its characters and its colours.

A terminal gets frames, colours and the characters of its encoding. Everything else (a pipe, a file, TERM=dumb) gets
plain ASCII. NO_COLOR takes the colours away and leaves the rest. No line is longer than the width, but for plain lines
that go into a pipe: each is one fact, so that `grep` finds it whole. COLUMNS breaks them there too.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, RenderableType

# Frames cannot be drawn in less, and lines are hard to read in more.
_NARROWEST, _WIDEST = 20, 110

# What stands for a character that ASCII lacks; of all others the accents are dropped or the code is written out.
_ASCII = {
    "–": "-", "—": "-", "−": "-", "…": "...", "×": "x", "·": ".", "≈": "~", "≠": "!=", "≤": "<=", "≥": ">=",
    "→": "->", "✓": "yes", "✗": "no", "‖": "||", "“": '"', "”": '"', "‘": "'", "’": "'", "\u00a0": " ", "°": " deg",
    "λ": "lambda", "α": "alpha", "•": "*",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Screen:
    """Attributes:
    width: columns of a line, at least `_NARROWEST`.
    framed: whether it is a terminal that a reader sits at.
    unicode: whether it shows more than ASCII.
    coloured: whether it may be sent colours.
    wraps: whether plain lines are broken at the width.
    """

    width: int = 80
    framed: bool = False
    unicode: bool = False
    coloured: bool = False
    wraps: bool = True

    @classmethod
    def of_stdout(cls, environ: Mapping[str, str] = os.environ) -> Screen:
        """Return what stdout is. COLUMNS says the width of what is no terminal; without it, it is 80."""
        framed = sys.stdout.isatty() and environ.get("TERM", "") != "dumb"
        encoding = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "")
        width = shutil.get_terminal_size(fallback=(80, 24)).columns
        return cls(
            width=max(_NARROWEST, min(width, _WIDEST)),
            framed=framed,
            unicode=framed and encoding == "utf8",
            coloured=framed and not environ.get("NO_COLOR"),
            wraps=framed or bool(environ.get("COLUMNS")),
        )

    def text(self, value: object) -> str:
        """Return a value as characters that may be shown: no control characters, and ASCII where nothing else is.

        >>> Screen().text("a ≤ b\\x1b[2J é")
        'a <= b[2J e'
        """
        kept = "".join(c for c in str(value) if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
        if self.unicode:
            return kept
        mapped = "".join(_ASCII.get(c, c) for c in kept)
        plain = "".join(c for c in unicodedata.normalize("NFKD", mapped) if not unicodedata.combining(c))
        return plain.encode("ascii", "backslashreplace").decode("ascii")

    def lines(self, texts: Iterable[str]) -> str:
        r"""Return plain lines, each broken at the width where it is too long; what follows a break is indented.

        >>> Screen(width=20).lines(["report: a b", "  worse: layer 1 / mlp_out drifts"])
        'report: a b\n  worse: layer 1 /\n    mlp_out drifts\n'
        """
        found = (line for text in texts for line in self.text(text).expandtabs(4).split("\n"))
        return "".join(f"{part}\n" for line in found for part in (self._broken(line) if self.wraps else [line]))

    def _broken(self, line: str) -> list[str]:
        if cell_len(line) <= self.width:
            return [line]
        indent = line[: min(len(line) - len(line.lstrip()), self.width // 3)]
        parts, now = [], indent
        for word in line.split():
            while cell_len(now) + bool(now.strip()) + cell_len(word) > self.width:
                if now.strip():
                    parts.append(now)
                    now = f"{indent}  "
                else:  # the word alone is wider than what is left
                    head, word = _split_at(word, self.width - cell_len(now))
                    parts.append(now + head)
                    now = f"{indent}  "
            now += f" {word}" if now.strip() else word
        return [*parts, now]

    def render(self, *parts: RenderableType) -> str:
        """Return `parts` as the text that stdout is sent; lines end where their last character does."""
        out = io.StringIO()
        console = Console(
            file=out,
            width=self.width,
            force_terminal=self.coloured,
            color_system="standard" if self.coloured else None,
            no_color=not self.coloured,
            legacy_windows=False,
            highlight=False,
            markup=False,
            emoji=False,
        )
        console.print(*parts, sep="\n")
        lines = out.getvalue().split("\n")
        return "\n".join(line if self.coloured else line.rstrip() for line in lines)


def _split_at(word: str, width: int) -> tuple[str, str]:
    """Part a word so that its head is at most `width` columns wide, and at least a character."""
    n = 1
    while n < len(word) and cell_len(word[: n + 1]) <= width:
        n += 1
    return word[:n], word[n:]
