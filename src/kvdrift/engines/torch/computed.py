"""The dtype that is really computed in, where it is not that of the parameters: under autocast, say."""

from __future__ import annotations

from collections.abc import Callable, Collection

import msgspec
import torch

from kvdrift.engines.base import EngineSequence
from kvdrift.engines.torch.precision import DTYPES, dtype_name
from kvdrift.trace.model import Trace
from kvdrift.vocabulary.facts import EngineFacts
from kvdrift.vocabulary.precision import UNIT_ROUNDOFF, Roundoffs
from kvdrift.vocabulary.sites import ROW_WISE, Site


def with_dtypes(
    facts: EngineFacts, seen: Collection[torch.dtype], new_sequence: Callable[[int], EngineSequence], n_tokens: int
) -> EngineFacts:
    """Return the facts with the dtype that is really computed in, if it is coarser than that of the parameters.

    `seen` are the dtypes of what modules returned; `n_tokens` are fed to see which sites have which.
    """
    coarse = coarser_dtype(facts.dtype, seen)
    if coarse is None:
        return facts
    tokens = tuple(token % (facts.vocab_size or n_tokens + 1) for token in range(1, n_tokens + 1))
    trace = Trace("survey", "prefill", "survey", facts.dtype, tokens)
    sequence = new_sequence(n_tokens)
    sequence.extend(tokens, probe=(n_tokens - 1,), sink=trace)
    sequence.close()
    caveats = {**facts.caveats, "COMPUTED_IN": computed_in(trace, coarse, facts.dtype)}
    return msgspec.structs.replace(facts, roundoffs=roundoffs_of(trace, coarse, facts.dtype), caveats=caveats)


def coarser_dtype(native: str, seen: Collection[torch.dtype]) -> str | None:
    """Return the coarsest dtype that modules computed in, None if it is as fine as that of the parameters."""
    known = [dtype_name(dtype) for dtype in seen if dtype in DTYPES.values()]
    coarsest = max(known, key=UNIT_ROUNDOFF.__getitem__, default=native)
    return coarsest if UNIT_ROUNDOFF[coarsest] > UNIT_ROUNDOFF[native] else None


def roundoffs_of(trace: Trace, coarse: str, native: str) -> Roundoffs:
    """Return how coarsely each kind of operation rounds in a pass whose products are computed in `coarse`."""
    row_wise = {record.values.dtype.name for record in trace.rows if record.site in ROW_WISE}
    unit = UNIT_ROUNDOFF[coarse]
    return Roundoffs(
        row_wise=max(UNIT_ROUNDOFF.get(name, unit) for name in (*row_wise, native)),
        product=unit,
        cache=unit,
        attention=unit,
    )


def computed_in(trace: Trace, coarse: str, native: str) -> str:
    """Say which sites of a pass were computed in `coarse`, and what that means."""
    sites = {record.site for record in trace.rows if record.values.dtype.name == coarse}
    sites |= {record.site for record in trace.cache if record.rows.dtype.name == coarse}
    named = ", ".join(site for site in Site if site in sites) or "products inside of modules"
    return (
        f"computed in {coarse}: the parameters are {native}, and {named} came out in {coarse}, as under "
        f"torch.autocast; what is called {native} here rounds as {coarse} does, and bounds follow that"
    )
