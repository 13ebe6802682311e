"""The scenarios of a saved run: that its pairs are all there, and that each joins the right traces."""

from __future__ import annotations

from collections.abc import Sequence

from kvdrift.scenarios.runner import REFERENCE, renamed
from kvdrift.trace.manifest import PairEntry
from kvdrift.trace.model import PassPair
from kvdrift.verdict.suite import SHARED, Suite
from kvdrift.vocabulary.plan import CONTROL, SELF_NOISE, Mode

_PAIR = "pair"


def require_scenario_pairs(suite: Suite, pairs: Sequence[PairEntry]) -> None:
    """Check that the manifest lists every pair that the scenarios call for, once.

    A scenario that failed, or a rung that could not run, may lack pairs: the verdict says then that it is incomplete.

    Raises:
        ValueError: a pair is missing, listed twice, or belongs to nothing.
    """
    rungs = suite.base.rungs
    wanted: set[tuple[str, str, str]] = set()
    optional: set[tuple[str, str, str]] = set()
    for script in suite.scripts:
        name = script.scenario.name
        names = [segment.name for segment in script.segments]
        if len(set(names)) != len(names):
            raise ValueError(f"the scenario {name!r} has two rows of one name")
        for rung in rungs:
            found = {(name, segment, rung) for segment in names}
            missing_allowed = script.failure is not None or rung in suite.base.rung_failures
            (optional if missing_allowed else wanted).update(found)
    listed = [(str(pair.scenario), pair.prompt, pair.rung) for pair in pairs if pair.role == _PAIR]
    if missing := sorted(wanted - set(listed)):
        raise ValueError(f"{len(missing)} pairs of scenarios are missing, such as {' / '.join(missing[0])}")
    if len(set(listed)) != len(listed):
        raise ValueError("a pair of a scenario is listed twice")
    if surplus := [key for key in listed if key not in wanted | optional]:
        raise ValueError(f"{surplus[0]} is not part of the run")
    controls = [pair.scenario for pair in pairs if pair.role == CONTROL]
    planted = {name for name, run in suite.runs.items() if run.plant is not None}
    failed = {script.scenario.name for script in suite.scripts if script.failure is not None}
    if len(set(controls)) != len(controls) or set(controls) - planted or planted - set(controls) - failed:
        raise ValueError("the positive controls of the scenarios are not those that were planted")


def add_scenario_pair(suite: Suite, entry: PairEntry, pair: PassPair) -> None:
    """Compare one saved pair in the run of its scenario.

    Raises:
        ValueError: the pair joins traces of something else than it says.
    """
    reference = pair.prefill
    right = (
        reference.pass_name == "prefill"
        and reference.label == REFERENCE
        and reference is not pair.decode
        and pair.mode is Mode.AS_DESIGNED
        and {reference.rung, pair.decode.rung} == {entry.rung}
        and pair.decode.prompt == entry.prompt
    )
    if entry.scenario == SHARED and entry.role == SELF_NOISE:
        if not right or pair.decode.label != "prompt_alone" or entry.rung != suite.base.info.ladder[1]:
            raise ValueError("the self-noise of the scenarios joins traces of something else")
        suite.add_noise(pair)
        return
    name = str(entry.scenario)
    run = suite.runs.get(name)
    script = next((script for script in suite.scripts if script.scenario.name == name), None)
    segment = None if script is None else next((s for s in script.segments if s.name == entry.prompt), None)
    if run is None or segment is None or entry.role not in (_PAIR, CONTROL):
        raise ValueError(f"a pair is of {name!r} / {entry.prompt!r}, which the run does not have")
    control = entry.role == CONTROL
    right = right and (
        pair.decode.pass_name == "decode"
        and pair.decode.label == (f"{name}.control" if control else name)
        and reference.tokens == pair.decode.tokens == segment.tokens
        and pair.positions == ((segment.positions[-1],) if control else tuple(segment.positions))
        and (entry.rung == suite.base.info.ladder[1] or not control)
    )
    if not right:
        raise ValueError(f"the {entry.role} of {name} / {entry.prompt} at {entry.rung} joins traces of something else")
    if control:
        run.add_control(renamed(pair))
    else:
        run.add_pair(renamed(pair))
