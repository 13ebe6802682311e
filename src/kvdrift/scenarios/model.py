"""What a scenario is: a name, what it can find, and the steps that it takes on a stage."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvdrift.errors import UsageError

if TYPE_CHECKING:
    from kvdrift.scenarios.stage import Stage

_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")


@dataclass(frozen=True, slots=True)
class Scenario:
    """A route to tokens that must give what a plain full prefill gives.

    Attributes:
        name: lower-case words with underscores.
        finds: one line on the bugs that show on this route.
        steps: makes rows on the stage and drives them. It must take the same steps each time it is called, since it is
            run once on paper, to learn what will be compared, and then at every precision. Raises `NotApplicable`.
        where: one line on the models and caches that it applies to.
    """

    name: str
    finds: str
    steps: Callable[[Stage], None]
    where: str = "every model"

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UsageError(
                f"a scenario cannot be called {self.name!r}; use lower-case letters, digits and underscores, 40 at most"
            )
