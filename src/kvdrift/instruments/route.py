"""Path proof: that the two passes really took two routes, from what was observed inside the engine."""

from __future__ import annotations

from dataclasses import dataclass

from kvdrift.trace.model import PassPair
from kvdrift.vocabulary.facts import Call


@dataclass(frozen=True, slots=True)
class Route:
    """The calls of one pair of passes, and what is wrong with them as a proof (nothing, if it is one)."""

    mode: str
    rung: str
    prompt: str
    prefill: tuple[Call, ...]
    decode: tuple[Call, ...]
    problems: tuple[str, ...]

    @property
    def is_proof(self) -> bool:
        """Whether the calls prove that the two passes took two routes."""
        return not self.problems


def prove_route(pair: PassPair) -> Route:
    """Check that prefill computed the probed tokens without a cache and decode one by one on top of one.

    An exact zero between two passes means nothing if both ran the same code on the same input.
    """
    prefill, decode = tuple(pair.prefill.calls), tuple(pair.decode.calls)
    problems = []
    if not prefill or not decode:
        problems.append("a pass made no forward call")
    for call in prefill:
        if call.cache_len_before != 0:
            problems.append(f"prefill ran on a cache of {call.cache_len_before} tokens")
    for call in decode:
        if call.q_len != 1:
            problems.append(f"decode fed {call.q_len} tokens at once")
        if call.cache_len_before == 0:
            problems.append("decode ran on an empty cache")
        elif call.kv_len is not None and call.kv_len <= call.q_len:
            problems.append(f"decode at position {call.start} read {call.kv_len} keys, so no cached one")
    longest = max((call.q_len for call in prefill), default=0)
    if longest < 2:
        problems.append("prefill never fed more than one token, so it is the decode route")
    return _route(pair, problems)


def prove_scenario_route(pair: PassPair) -> Route:
    """Check that prefill computed its tokens alone and without a cache, and that each compared call of the other route
    read a cache or was one of several rows."""
    problems = []
    if not pair.prefill.calls or not pair.decode.calls:
        problems.append("a pass made no forward call")
    for call in pair.prefill.calls:
        if call.cache_len_before != 0 or call.n_rows != 1:
            problems.append(f"prefill ran on a cache of {call.cache_len_before} tokens, as one of {call.n_rows} rows")
    for call in pair.decode.calls:
        if call.cache_len_before == 0 and call.n_rows == 1:
            problems.append(f"the {call.q_len} tokens from position {call.start} were a plain prefill themselves")
        elif call.cache_len_before and call.kv_len is not None and call.kv_len <= call.q_len:
            problems.append(f"the call at position {call.start} read {call.kv_len} keys, so no cached one")
    seen = {position for call in pair.decode.calls for position in range(call.start, call.start + call.q_len)}
    if not set(pair.positions) <= seen:
        problems.append("a compared position was fed by no recorded call")
    return _route(pair, problems)


def prove_honest_route(pair: PassPair) -> Route:
    """Check that the reference fed several tokens at once on rows that were honestly quantised or moved, and the other
    route one by one on those that the engine has quantised or moved. Rows as they are, as a plain prefill reads them,
    cannot be the reference."""
    problems = []
    if not pair.prefill.calls or not pair.decode.calls:
        problems.append("a pass made no forward call")
    for name, calls in (("the reference", pair.prefill.calls), ("decode", pair.decode.calls)):
        for call in calls:
            if call.cache_len_before == 0:
                problems.append(f"{name} ran on an empty cache, so it read no quantised or moved row")
            elif call.kv_len is not None and call.kv_len <= call.q_len:
                problems.append(f"{name} at position {call.start} read {call.kv_len} keys, so no cached one")
    if max((call.q_len for call in pair.prefill.calls), default=0) < 2:
        problems.append("the reference never fed more than one token, so it is the decode route")
    if any(call.q_len != 1 for call in pair.decode.calls):
        problems.append("decode fed several tokens at once")
    return _route(pair, problems)


def _route(pair: PassPair, problems: list[str]) -> Route:
    return Route(
        pair.mode,
        pair.prefill.rung,
        pair.prefill.prompt,
        tuple(pair.prefill.calls),
        tuple(pair.decode.calls),
        tuple(dict.fromkeys(problems)),
    )
