"""The passes of a plan on an engine: its modes, and the rungs at which they run."""

from __future__ import annotations

from collections.abc import Sequence

from kvdrift.vocabulary.facts import EngineFacts, Prompt
from kvdrift.vocabulary.plan import AuditPlan, Mode
from kvdrift.vocabulary.precision import UPPER


def modes_of(plan: AuditPlan, facts: EngineFacts) -> tuple[Mode, ...]:
    """Return the modes of the plan that the engine can run."""
    return tuple(mode for mode in plan.modes if mode is not Mode.KV_ALIGNED or facts.can_rewind)


def rungs_of(plan: AuditPlan, facts: EngineFacts) -> tuple[str, ...]:
    """Return the rungs of a run, in the order in which they run; the control is planted at the last one.

    The fine rung comes last, even if it is the native one: its bounds and the positive control need the coarse rung.
    Where noise is measured at the fine rung, no coarse one is run.
    """
    if plan.ladder == "off":
        return (facts.dtype,)
    lower, upper = facts.ladder.lower, facts.ladder.upper
    if facts.perturbable:
        return tuple(dict.fromkeys((facts.dtype, upper)))
    return (*dict.fromkeys(rung for rung in (facts.dtype, lower) if rung != upper), upper)


def unobserved_prompt(prompts: Sequence[Prompt]) -> Prompt:
    """Return the prompt that also runs while nothing watches: the longest, the first of several."""
    return max(prompts, key=lambda prompt: len(prompt.tokens))


def is_specified(plan: AuditPlan, facts: EngineFacts) -> bool:
    """Return whether a specification runs, which separates the errors of the two passes.

    It needs a float64 rung, aligned inputs, and a native dtype below float64.
    """
    return rungs_of(plan, facts)[-1] == UPPER != facts.dtype and Mode.KV_ALIGNED in modes_of(plan, facts)
