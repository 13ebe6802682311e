"""Parameters that are part of the matrix: what they show is shown by another one already."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import pytest
from _pytest.mark import ParameterSet

Value = TypeVar("Value")


def further(*values: object) -> list[ParameterSet]:
    """Return a parameter for each value (a tuple: for all arguments of a test), all of them part of the matrix."""
    return [_parameter(value, marked=True) for value in values]


def first_of_each(values: Iterable[Value], kind: Callable[[Value], object]) -> list[ParameterSet]:
    """Return a parameter for each value; the first of each kind is not part of the matrix, and the others are."""
    kinds: set[object] = set()
    found = []
    for value in values:
        found.append(_parameter(value, marked=kind(value) in kinds))
        kinds.add(kind(value))
    return found


def _parameter(value: object, *, marked: bool) -> ParameterSet:
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=[pytest.mark.matrix] if marked else [])
