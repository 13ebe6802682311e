"""What stdout can show: its width, its characters and its colours.

A terminal gets frames, colours and the characters of its encoding. Everything else (a pipe, a file, TERM=dumb) gets
plain ASCII. NO_COLOR takes the colours away and leaves the rest. No line is longer than the width.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

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
    """

    width: int = 80
    framed: bool = False
    unicode: bool = False
    coloured: bool = False

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
