"""The five shapes of faults that a stated minimum is tried with, and what one trial of it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TIMES = 1.5
# The share of planted faults that a promise finds at least.
KEPT = 0.95
_LENGTHS = (14, 18, 23)
Shape = Callable[[Tensor, torch.Generator], Tensor]


def _unit(row: Tensor) -> Tensor:
    return torch.nn.functional.normalize(row, dim=-1)


def _one_element(row: Tensor, generator: torch.Generator) -> Tensor:
    at = int(torch.randint(row.shape[-1], (1,), generator=generator))
    return torch.eye(row.shape[-1])[at].expand_as(row)


def _one_block(row: Tensor, generator: torch.Generator) -> Tensor:
    width = max(1, row.shape[-1] // 4)
    added = torch.zeros_like(row)
    start = width * int(torch.randint(row.shape[-1] // width, (1,), generator=generator))
    added[..., start : start + width] = torch.randn(row[..., :width].shape, generator=generator)
    return _unit(added)


def _at_random(row: Tensor, generator: torch.Generator) -> Tensor:
    return _unit(torch.randn(row.shape, generator=generator))


def _direction(row: Tensor, generator: torch.Generator) -> Tensor:
    fixed = torch.Generator().manual_seed(generator.initial_seed())
    return _unit(torch.randn(row.shape[-1], generator=fixed)).expand_as(row)


def _factor(row: Tensor, generator: torch.Generator) -> Tensor:
    return _unit(row)


# By name: rows [..., feature] and a generator -> what is added to each, of length 1.
SHAPES: dict[str, Shape] = {
    "one element": _one_element,
    "one block": _one_block,
    "all at random": _at_random,
    "one direction": _direction,
    "a common factor": _factor,
}


@dataclass(frozen=True, slots=True)
class PromiseCell:
    """One place and shape: the stated minimum, and how many planted faults of `TIMES` it were found at their place."""

    place: str
    shape: str
    minimum: float
    found: int
    trials: int

    @property
    def is_kept(self) -> bool:
        """Whether enough of them were found; nothing that was not tried is kept."""
        return self.trials > 0 and self.found >= KEPT * self.trials


def prompts_of(seed: int) -> dict[str, list[int]]:
    """Return three prompts of 14 to 23 tokens."""
    generator = np.random.default_rng(seed)
    return {f"p{n}": [int(token) for token in generator.integers(0, 128, n)] for n in _LENGTHS}


def table(cells: Sequence[PromiseCell]) -> str:
    """Return the cells as a Markdown table: a row for each place, a column for each shape."""
    rows: dict[str, dict[str, PromiseCell]] = {}
    for cell in cells:
        own = cell.shape if cell.shape in SHAPES else ""
        rows.setdefault(cell.place if own else f"{cell.place}, {cell.shape}", {})[own or "a common factor"] = cell
    lines = ["| place | stated minimum | " + " | ".join(SHAPES) + " |", "|---|---|" + "---|" * len(SHAPES)]
    for place, found in rows.items():
        shown = [f"{found[s].found} of {found[s].trials}" if s in found else "" for s in SHAPES]
        largest = max(cell.minimum for cell in found.values())
        lines.append(f"| {_code(place)} | {_size(largest)} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def _code(place: str) -> str:
    *before, site = place.split(" / ")
    return "".join(f"{part} / " for part in before) + f"`{site}`"


def _size(size: float) -> str:
    return f"{size:.2%}" if size >= 1e-4 else f"{size:.1e}"


__all__ = ["KEPT", "SHAPES", "TIMES", "PromiseCell", "prompts_of", "table"]
