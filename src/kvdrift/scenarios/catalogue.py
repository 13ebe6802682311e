"""The scenarios that come with kvdrift, and how they are chosen by name."""

from __future__ import annotations

from collections.abc import Sequence

from kvdrift.errors import UsageError
from kvdrift.scenarios.batches import BATCHES
from kvdrift.scenarios.calls import CALLS
from kvdrift.scenarios.lengths import LENGTHS
from kvdrift.scenarios.loops import LOOPS
from kvdrift.scenarios.model import Scenario
from kvdrift.scenarios.quantised import QUANTISED
from kvdrift.scenarios.steps import STEPS

DECODE = "decode"
DECODE_FINDS = "faults of a plain decode step; the two modes of the audit itself"
ALL = "all"

SCENARIOS: tuple[Scenario, ...] = (*STEPS, *CALLS, *QUANTISED, *BATCHES, *LENGTHS, *LOOPS)


def choose_scenarios(chosen: str | Sequence[str | Scenario] | None) -> tuple[bool, tuple[Scenario, ...]]:
    """Return whether plain decode is among the chosen scenarios, and the others, each once.

    Args:
        chosen: names, with commas in a string; "all"; or scenarios of the caller's own. None means plain decode.

    Raises:
        UsageError: a name is unknown, nothing is chosen, or two scenarios have one name.
    """
    if chosen is None:
        return True, ()
    items: Sequence[str | Scenario] = chosen.split(",") if isinstance(chosen, str) else chosen
    known = {scenario.name: scenario for scenario in SCENARIOS}
    found: dict[str, Scenario] = {}
    with_decode = False
    for item in items:
        name = item.strip() if isinstance(item, str) else item.name
        if isinstance(item, Scenario):
            if name == DECODE or found.get(name, item) is not item or known.get(name, item) is not item:
                raise UsageError(f"two scenarios are called {name!r}; give yours another name")
            found[name] = item
        elif name == ALL:
            with_decode = True
            found.update(known)
        elif name == DECODE:
            with_decode = True
        elif name in known:
            found[name] = known[name]
        else:
            names = ", ".join([ALL, DECODE, *known])
            raise UsageError(f"unknown scenario {name!r}; --scenario (scenarios=[...]) takes {names}")
    if not with_decode and not found:
        raise UsageError("no scenario is chosen; use --scenario decode (scenarios=None) or --scenario all")
    return with_decode, tuple(found.values())
