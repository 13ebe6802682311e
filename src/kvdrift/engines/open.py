"""The one table of engines, and how a model is opened in the engine that its name asks for.

To add an engine, add a folder with a module `start` beside this file and a line to `ENGINES`: docs/adding/engine.md
carries it out, from the first line to an audit.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from kvdrift.engines.base import OpenEngine
from kvdrift.errors import EngineUnavailable
from kvdrift.vocabulary.plan import AuditPlan
from kvdrift.vocabulary.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKind:
    """An engine that runs in this process.

    Attributes:
        name: the folder in `kvdrift.engines`, and what a trace calls the engine.
        runs: what runs in it, as messages say.
        prefix: what the name of a model begins with, "" for the engine of all other names.
        place: what follows the prefix, as messages show it.
    """

    name: str
    runs: str
    prefix: str = ""
    place: str = ""

    def open(
        self, place: str | None, plan: AuditPlan, progress: Progress, options: Mapping[str, Any]
    ) -> AbstractContextManager[OpenEngine]:
        """Return a context in which a model is open.

        Args:
            place: what follows the prefix in the name of the model; None for the engine's own model.
            plan: the layers to record, and how the upper rungs are to run.
            progress: hears what is being done.
            options: keyword arguments of the engine's `start`; what is left out has its default there.
        """
        start = importlib.import_module(f"kvdrift.engines.{self.name}.start").start
        return cast("AbstractContextManager[OpenEngine]", start(place, plan, progress, **options))


ENGINES = (
    EngineKind(name="hf", runs="models in torch"),
    EngineKind(name="llamacpp", runs="llama.cpp", prefix="llamacpp:", place="FILE.gguf"),
    EngineKind(name="mlx", runs="mlx", prefix="mlx:", place="PATH"),
)


def find_engine(model: str | None) -> tuple[EngineKind, str | None]:
    """Return the engine that the name of a model asks for, and the name without the prefix.

    >>> find_engine("llamacpp:a.gguf")[1], find_engine("a.gguf")[0].name
    ('a.gguf', 'hf')
    """
    for kind in ENGINES:
        if kind.prefix and model is not None and model.startswith(kind.prefix):
            return kind, model.removeprefix(kind.prefix)
    return next(kind for kind in ENGINES if not kind.prefix), model


def require_place(place: str | None) -> None:
    """Check that what is written as a path leads somewhere, before anything that is large is imported.

    Raises:
        EngineUnavailable: nothing is there.
    """
    is_path = place is not None and (place.startswith((".", "/", "~")) or place.endswith(".gguf"))
    if place is not None and is_path and not Path(place).exists():
        raise EngineUnavailable(f"there is no model at {place}; check the path")


__all__ = ["ENGINES", "EngineKind", "find_engine", "require_place"]
