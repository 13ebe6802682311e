"""Markdown on a terminal: headings, lists, code and tables, no line longer than the width.

A table that does not fit becomes a list of its rows, each a list of its cells with their names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kvdrift.cli.screen import Screen


def render_page(source: str, screen: Screen) -> str:
    """Return a text of Markdown as `screen` shows it."""
    tokens = MarkdownIt("commonmark", {"html": False}).enable("table").parse(source)
    return screen.render(*_Page(screen, tokens).blocks(screen.width))


@dataclass(slots=True)
class _Page:
    """The blocks of a page, taken from its tokens one after the other."""

    screen: Screen
    tokens: list[Token]
    at: int = 0

    def blocks(self, width: int, until: str = "") -> Iterator[RenderableType]:
        """Yield the blocks up to the token `until`, an empty line behind each."""
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            self.at += 1
            if token.type == until:
                return
            found = self._block(token, width)
            if found is not None:
                yield found
                if not token.hidden:
                    yield Text("")

    def _block(self, token: Token, width: int) -> RenderableType | None:
        match token.type:
            case "heading_open":
                return self._heading(int(token.tag[1:]), width)
            case "paragraph_open":
                text = self._inline()
                self.at += 1
                return text
            case "bullet_list_open" | "ordered_list_open":
                return self._list(token, width)
            case "blockquote_open":
                return Padding(Group(*self.blocks(width - 2, "blockquote_close")), (0, 0, 0, 2))
            case "table_open":
                return self._table(width)
            case "fence" | "code_block":
                return Padding(Text(self.screen.text(token.content.rstrip("\n")), overflow="fold"), (0, 0, 0, 4))
            case "hr":
                return None  # headings part the sections already
        return None

    def _heading(self, level: int, width: int) -> RenderableType:
        text = self._inline()
        self.at += 1
        text.stylize("bold")
        if level > 2:
            return text
        line = ("━" if level == 1 else "─") if self.screen.unicode else ("=" if level == 1 else "-")
        return Group(text, Text(line * min(width, cell_len(text.plain))))

    def _inline(self) -> Text:
        """Take the token of a line, with bold and code as styles."""
        token = self.tokens[self.at]
        self.at += 1
        text, styles = Text(overflow="fold"), [""]
        for child in token.children or ():
            match child.type:
                case "strong_open" | "em_open":
                    styles.append("bold" if child.type == "strong_open" else "italic")
                case "strong_close" | "em_close":
                    styles.pop()
                case "softbreak":
                    text.append(" ")
                case "hardbreak":
                    text.append("\n")
                case "code_inline":
                    text.append(self.screen.text(child.content), "cyan")
                case _:
                    text.append(self.screen.text(child.content), styles[-1] or None)
        return text

    def _list(self, opened: Token, width: int) -> RenderableType:
        closed = opened.type.replace("open", "close")
        number = int(opened.attrGet("start") or 1) if opened.type.startswith("ordered") else None
        items: list[RenderableType] = []
        while self.tokens[self.at].type != closed:
            self.at += 1  # list_item_open
            mark = ("•" if self.screen.unicode else "*") if number is None else f"{number}."
            number = None if number is None else number + 1
            grid = Table.grid(padding=(0, 1, 0, 0))
            grid.add_column(width=len(mark), no_wrap=True)
            grid.add_column(overflow="fold")
            grid.add_row(mark, Group(*self.blocks(width - len(mark) - 1, "list_item_close")))
            items.append(grid)
        self.at += 1
        return Group(*items)

    def _table(self, width: int) -> RenderableType:
        rows: list[list[Text]] = []
        while self.tokens[self.at].type != "table_close":
            token = self.tokens[self.at]
            self.at += 1
            if token.type == "tr_open":
                rows.append([])
            elif token.type in ("th_open", "td_open"):
                rows[-1].append(self._inline())
        self.at += 1
        head, body = rows[0], rows[1:]
        needed = sum(max(cell_len(row[i].plain) for row in rows) for i in range(len(head))) + 2 * (len(head) - 1)
        return self._records(head, body) if needed > width else self._grid(head, body)

    def _grid(self, head: list[Text], body: list[list[Text]]) -> RenderableType:
        grid = Table.grid(padding=(0, 2, 0, 0))
        for _ in head:
            grid.add_column(no_wrap=True)
        lines = ["─" if self.screen.unicode else "-"] * len(head)
        widths = [max(cell_len(row[i].plain) for row in [head, *body]) for i in range(len(head))]
        for text in head:
            text.stylize("bold")
        grid.add_row(*head)
        grid.add_row(*(line * width for line, width in zip(lines, widths, strict=True)))
        for row in body:
            grid.add_row(*row)
        return grid

    def _records(self, head: list[Text], body: list[list[Text]]) -> RenderableType:
        parts: list[RenderableType] = []
        for row in body:
            first = row[0]
            first.stylize("bold")
            parts.append(first)
            for name, cell in zip(head[1:], row[1:], strict=True):
                if cell.plain.strip():
                    line = Text.assemble((f"{name.plain}: ", "dim" if self.screen.coloured else ""), cell)
                    line.overflow = "fold"
                    parts.append(Padding(line, (0, 0, 0, 2)))
        return Group(*parts)
