"""What binds the functions that plant something in an engine to the lines of the catalogue, by their names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Generic, TypeVar

Line = TypeVar("Line")
Planting = TypeVar("Planting")
PARTLY = True  # until every list of faults has become functions


class Registry(Generic[Line, Planting]):
    """Lines of the catalogue, and what is planted for each.

    Args:
        lines: the lines of one engine by name, in the order of its corpus.
        load: imports the modules whose functions register themselves; called before the first look.
    """

    def __init__(self, lines: Mapping[str, Line], load: Callable[[], None] = lambda: None) -> None:
        self._lines = lines
        self._load = load
        self._planted: dict[str, Planting] = {}

    def bind(self, name: str, planting: Planting) -> None:
        """Say what is planted for the line `name`.

        Raises:
            LookupError: the catalogue has no such line for this engine, or something is planted for it already.
        """
        if name not in self._lines:
            raise LookupError(f"{name} is planted, and the catalogue has no line for it in this engine")
        if name in self._planted:
            raise LookupError(f"{name} is planted twice")
        self._planted[name] = planting

    def bound(self) -> Iterator[tuple[str, Line, Planting]]:
        """Yield name, line and what is planted, in the order of the catalogue.

        Raises:
            LookupError: a line of the catalogue has no function.
        """
        self._load()
        missing = [name for name in self._lines if name not in self._planted]
        if missing and not PARTLY:
            raise LookupError(f"in the catalogue, and planted by no function: {', '.join(missing)}")
        for name, line in self._lines.items():
            if name in self._planted:
                yield name, line, self._planted[name]


def load_modules_beside(package: str) -> None:
    """Import every module of a package, so that what they plant is registered."""
    for module in iter_modules(import_module(package).__path__):
        import_module(f"{package}.{module.name}")
