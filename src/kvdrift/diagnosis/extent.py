"""Which part of a value differs: some heads, a run of neighbouring elements, one element."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvdrift.diagnosis.model import Bools
from kvdrift.vocabulary.shapes import Extent

# A run in which fewer than this share of the elements differ is not one.
_DENSE = 0.75


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of rows [head, element].

    Attributes:
        extent: what it is called.
        heads: heads that it lies in, empty for all.
        elements: first and last of its elements, in a head or in the flattened row; None for all.
        is_flat: whether `elements` count through all heads.
        mask: [head, element], what belongs to it.
    """

    extent: Extent
    heads: tuple[int, ...]
    elements: tuple[int, int] | None
    is_flat: bool
    mask: Bools


def part_of(differs: Bools) -> Stretch:
    """Return the part of a row [head, element] that covers all elements that differ, as few others as possible.

    At least one element must differ.
    """
    n_heads, n_elements = differs.shape
    heads = np.flatnonzero(differs.any(axis=1))
    within = np.flatnonzero(differs.any(axis=0))
    flat = np.flatnonzero(differs.ravel())
    box = np.zeros_like(differs)
    box[heads[:, None], np.arange(within[0], within[-1] + 1)[None]] = True
    run = np.zeros(differs.size, dtype=bool)
    run[flat[0] : flat[-1] + 1] = True
    is_flat = n_heads > 1 and int(run.sum()) < int(box.sum())
    mask = run.reshape(differs.shape) if is_flat else box
    named = () if is_flat or len(heads) == n_heads else tuple(int(head) for head in heads)
    if int(differs.sum()) < _DENSE * int(mask.sum()):
        return Stretch(Extent.SCATTERED, named, None, False, differs)
    first, last = (flat[0], flat[-1]) if is_flat else (within[0], within[-1])
    extent = _called(int(first), int(last), differs.size if is_flat else n_elements, bool(named))
    whole = extent in (Extent.ALL, Extent.HEADS)
    return Stretch(extent, named, None if whole else (int(first), int(last)), is_flat, mask)


def _called(first: int, last: int, n_elements: int, in_some_heads: bool) -> Extent:
    length = last - first + 1
    if length == n_elements:
        return Extent.HEADS if in_some_heads else Extent.ALL
    if length == 1:
        return Extent.ELEMENT
    if last == n_elements - 1:
        return Extent.TAIL
    return Extent.BLOCK if is_block(first, last) else Extent.TILE


def is_block(first: int, last: int) -> bool:
    """Return whether a run is as long as a power of two and begins at a multiple of that."""
    length = last - first + 1
    return length > 1 and length & (length - 1) == 0 and first % length == 0


def tell_part(part: Stretch, n_differ: int, shape: tuple[int, int], what: str) -> str:
    """Return where an error is, in words; `what` is the word for elements, and `shape` that of a row."""
    n_heads, n_elements = shape
    total = n_heads * n_elements
    in_heads = ""
    if part.heads:
        in_heads = f"head {part.heads[0]}" if len(part.heads) == 1 else f"heads {_listed(part.heads)}"
        in_heads += f" of {n_heads}"
    if part.extent is Extent.ALL:
        return f"in all {total} {what}s"
    if part.extent is Extent.HEADS:
        return f"in {in_heads} alone"
    if part.extent is Extent.SCATTERED:
        return f"in {n_differ} scattered {what}s of {total}" + (f", all in {in_heads}" if in_heads else "")
    assert part.elements is not None
    first, last = part.elements
    length = last - first + 1
    of = total if part.is_flat or n_heads == 1 else n_elements
    run = f"{what} {first}" if length == 1 else f"{what}s {first} to {last}"
    kind = {Extent.ELEMENT: "", Extent.TAIL: ", the tail", Extent.BLOCK: f", one block of {length}"}.get(
        part.extent, f", a tile of {length}"
    )
    if part.extent is Extent.TAIL and is_block(first, last):
        kind += f" and one block of {length}"
    where = "" if part.is_flat or n_heads == 1 else (f" in {in_heads}" if in_heads else " in every head")
    return f"in {run} of {of}{kind}{where}"


def _listed(numbers: tuple[int, ...]) -> str:
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers[:8])) + (" ..." if len(numbers) > 8 else "")
