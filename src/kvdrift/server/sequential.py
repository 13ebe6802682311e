"""Whether decode does anything but the steps that can be asked for one by one: a test that may stop at every text.

Decode alone and the same tokens forced, one a request on the prefix cache, run the same rows through the same kernels
on the same cache. A server that repeats itself answers both alike in every digit, whatever its rounding is; so what
differs here is what decode adds: which token is fed at which position, and what its cache holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvdrift.server.betting import capital, fewest_units
from kvdrift.server.plan import ServerPlan
from kvdrift.server.rounding import DIGITS, MARGIN, rounding_of
from kvdrift.server.values import FORCED_REPEAT, GENERATION, Captured, ServerFacts

# What each test may use of alpha: the sign flips of prefill routes, those of decode routes, and this one. It gets
# little, because each further text can double its evidence, while 12 prompts reach no p-value below 0.488 * 0.001.
FAMILY_SHARE, SEQUENTIAL_SHARE = 0.49, 0.02


@dataclass(frozen=True, slots=True)
class SequentialTest:
    """The state of the test, in nats.

    Attributes:
        bound: what decode may differ by from forced tokens: 4 times what a forced token differs by from itself.
        sizes: the largest difference in each text, in the order in which they were decoded; no text is there twice.
        against: capital of betting on more texts above the bound than below it.
        for_it: the same for below.
        wanted: the capital that convicts, one over this test's share of alpha.
        enough: the capital that acquits, if no text is above the bound.
    """

    bound: float
    sizes: dict[str, float]
    against: float
    for_it: float
    wanted: float
    enough: float

    @property
    def beyond(self) -> bool:
        return self.against >= self.wanted

    @property
    def within(self) -> bool:
        return self.for_it >= self.enough and not self.differing

    @property
    def differing(self) -> list[str]:
        """The texts above the bound."""
        return [name for name, size in self.sizes.items() if size > self.bound]

    @property
    def decided(self) -> bool:
        return self.beyond or self.within


def generation_of(captured: Captured, plan: ServerPlan) -> SequentialTest:
    """Return what the texts that were decoded until now say. A difference that is NaN or infinite is above."""
    repeats = [p.size for p in captured.pairs if p.route == FORCED_REPEAT and math.isfinite(p.size)]
    noise = math.sqrt(sum(size**2 for size in repeats) / len(repeats)) if repeats else 0.0
    bound = MARGIN * max(noise, DIGITS)
    sizes: dict[str, float] = {}
    for pair in captured.pairs:
        if pair.route == GENERATION:
            size = pair.size if math.isfinite(pair.size) else math.inf
            sizes[pair.prompt] = max(sizes.get(pair.prompt, 0.0), size)
    above = [size > bound for size in sizes.values()]
    return SequentialTest(
        bound,
        sizes,
        capital(above),
        capital([not a for a in above]),
        1.0 / (SEQUENTIAL_SHARE * plan.alpha),
        1.0 / plan.alpha,
    )


def power_of(facts: ServerFacts, plan: ServerPlan, n_prompts: int, *, forces: bool) -> str:
    """Say before the first request what can be seen at this number of prompts and requests, in nats."""
    rounding, _ = rounding_of(facts)
    text = (
        f"{n_prompts} prompts, at most {plan.max_requests} requests: errors of decode beyond {MARGIN * rounding:.2g} "
        "nats (rms) will be seen, or beyond 4 times what the server turns out to differ from itself by"
    )
    if forces:
        fewest = fewest_units(1.0 / (SEQUENTIAL_SHARE * plan.alpha))
        text += (
            f"; if its single steps repeat themselves in every digit, any error beyond {MARGIN * DIGITS:.2g} nats in "
            f"what decode adds to them, after {fewest} texts that all show it"
        )
    return text
