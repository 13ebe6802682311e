"""Scenarios of caches that quantise their rows: each against the same rows, honestly quantised."""

from __future__ import annotations

from collections.abc import Callable

from kvdrift.replay.quantisation import RESIDUAL
from kvdrift.scenarios.model import Scenario
from kvdrift.scenarios.stage import Stage

# Decode steps: the unquantised rows are filled and quantised once, and some steps more read the result.
_STEPS = RESIDUAL + 3
_PROMPT = 8


def _decode_on(*kinds: str) -> Callable[[Stage], None]:
    def steps(stage: Stage) -> None:
        for kind in kinds:
            stage.need_cache(kind)
        tokens = stage.text(max(len(stage.tokens), _PROMPT + _STEPS))
        for kind in kinds:
            with stage.rows(name=kind.removeprefix("quantised-"), length=len(tokens), cache=kind) as row:
                row.extend(tokens[:-_STEPS])
                for token in tokens[-_STEPS:]:
                    row.extend([token], compare=True)

    return steps


QUANTISED = (
    Scenario(
        "quantised_cache",
        "what a cache of 4 and of 2 bits does beyond honest quantisation: scales, zero points, groups, rows kept",
        _decode_on("quantised-int4", "quantised-int2"),
        "models whose layers all see all tokens; needs optimum-quanto",
    ),
    Scenario(
        "float8_cache",
        "what a float8 cache does beyond honest quantisation: scale, rows",
        _decode_on("quantised-fp8"),
        "models whose layers all see all tokens",
    ),
)
