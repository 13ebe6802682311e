"""What binds the functions that plant something in an engine to the lines of the catalogue, by their names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Generic, TypeVar

from kvdrift_bench.planted.facts import anywhere

Line = TypeVar("Line")
# What is planted, in which kind of host, and a value that a family of faults differs by.
What = TypeVar("What", bound=Callable[..., object])
Host = TypeVar("Host")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Planting(Generic[What, Host]):
    """What is planted for one line of the catalogue.

    Attributes:
        what: what is planted.
        applies: says why a host cannot carry it, None if it can.
        first: finds the first layer that it touches, where that depends on the host.
    """

    what: What
    applies: Callable[[Host], str | None]
    first: Callable[[Host], int] | None


class Registry(Generic[Line, What, Host]):
    """Lines of the catalogue, and what is planted for each.

    Args:
        lines: the lines of one engine by name, in the order of its corpus.
        package: its modules are imported before the first look, so that their functions register themselves; None
            where all that is planted stands where the registry does.
    """

    def __init__(self, lines: Mapping[str, Line], package: str | None = None) -> None:
        self._lines = lines
        self._package = package
        self._planted: dict[str, Planting[What, Host]] = {}

    def plant(
        self,
        applies: Callable[[Host], str | None] = anywhere,
        *,
        name: str | None = None,
        first: Callable[[Host], int] | None = None,
    ) -> Callable[[What], What]:
        """Return the decorator that registers what is planted, under the name of the function.

        Args:
            applies: says why a host cannot carry it, None if it can.
            name: of its line in the catalogue, where that is not a name of a function.
            first: finds the first layer that it touches, where that depends on the host.

        The decorator raises:
            LookupError: the catalogue has no such line for this engine, or its function is there already.
        """

        def register(what: What) -> What:
            bound = what.__name__ if name is None else name
            self._bind(bound, Planting(what, applies, first))
            return what

        return register

    def family(
        self, values: Mapping[str, Value], applies: Callable[[Host], str | None] = anywhere
    ) -> Callable[[Callable[[Value], What]], Callable[[Value], What]]:
        """Return the decorator of a function from a value to what is planted; it registers each name in `values`."""

        def register(make: Callable[[Value], What]) -> Callable[[Value], What]:
            for name, value in values.items():
                self._bind(name, Planting(make(value), applies, None))
            return make

        return register

    def _bind(self, name: str, planting: Planting[What, Host]) -> None:
        if name not in self._lines:
            raise LookupError(f"{name!r} is planted, and the catalogue has no line for it in this engine")
        if name in self._planted:
            raise LookupError(f"{name!r} is planted twice")
        self._planted[name] = planting

    def bound(self) -> Iterator[tuple[str, Line, Planting[What, Host]]]:
        """Yield name, line and what is planted, in the order of the catalogue.

        Raises:
            LookupError: a line of the catalogue has no function.
        """
        if self._package is not None:
            for module in iter_modules(import_module(self._package).__path__):
                import_module(f"{self._package}.{module.name}")
        missing = [name for name in self._lines if name not in self._planted]
        if missing:
            raise LookupError(f"in the catalogue, and planted by no function: {', '.join(missing)}")
        for name, line in self._lines.items():
            yield name, line, self._planted[name]
