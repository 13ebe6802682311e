"""Scenarios of a cache that serves more than one call, or of another kind of cache."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from kvdrift.errors import NotApplicable
from kvdrift.scenarios.model import Scenario
from kvdrift.scenarios.stage import Stage, StageRows


def _decode(row: StageRows, stage: Stage, n_tokens: int | None = None) -> None:
    """The prompt, then its continuation token by token, compared."""
    row.extend(stage.prompt)
    for token in stage.continuation[:n_tokens]:
        row.extend([token], compare=True)


def second_call(stage: Stage) -> None:
    """Another text first; then the cache is reset and serves the prompt."""
    stage.need("reset")
    other = stage.different(len(stage.tokens), salt=2)
    with stage.rows(name="after a reset", length=len(stage.tokens)) as row:
        row.extend(other[:-1])
        row.extend(other[-1:])
        row.reset()
        _decode(row, stage)


def shorter_call(stage: Stage) -> None:
    """A text twice as long first; then the prompt, on the same cache after a reset and on a new one."""
    stage.need("reset")
    n_tokens = 2 * len(stage.tokens)
    n_tokens = n_tokens if stage.max_positions is None else min(n_tokens, stage.max_positions)
    longer = stage.different(n_tokens, salt=3)
    with stage.rows(name="same cache", length=n_tokens) as row:
        row.extend(longer[:-1])
        row.extend(longer[-1:])
        row.reset()
        _decode(row, stage)
    with stage.rows(length=n_tokens) as first, stage.rows(name="new cache", length=n_tokens) as second:
        first.extend(longer[:-1])
        first.extend(longer[-1:])
        _decode(second, stage, 2)


def prefix_reuse(stage: Stage) -> None:
    """The cache of a prefix is copied; copy and original go on with different suffixes, in turns."""
    stage.need_tokens(4)
    stage.need("copy")
    half = len(stage.tokens) // 2
    suffix = stage.different(3, salt=4)
    for cache in (None, *stage.facts.branches):
        name = "original" if cache is None else f"original, {cache} cache"
        with stage.rows(name=name, length=len(stage.tokens), cache=cache) as original:
            original.extend(stage.tokens[:half])
            with original.copy("copy") as copy:
                copy.extend(suffix[:2], compare=True)
                original.extend(stage.tokens[half : half + 2], compare=True)
                copy.extend(suffix[2:], compare=True)
                original.extend(stage.tokens[half + 2 : half + 3], compare=True)


def export_import(stage: Stage) -> None:
    """The cache is exported and imported between two decode steps, in each way that the engine has."""
    stage.need("move")
    for way in stage.facts.exports:
        with stage.rows(name=f"moved, {way}" if way else "moved", length=len(stage.tokens)) as row:
            row.extend(stage.prompt)
            row.extend(stage.continuation[:1])
            row.move(way)
            for token in stage.continuation[1:]:
                row.extend([token], compare=True)


def context_shift(stage: Stage) -> None:
    """Old tokens are dropped from the front or from behind the first two, and the others move to their places."""
    stage.need("shift")
    tokens = stage.text(max(len(stage.tokens), 12))
    gone = stage.different(5, salt=7)
    for kept in (0, 2):
        name = f"dropped behind {kept}" if kept else "dropped from the front"
        with stage.rows(name=name, length=len(tokens) + len(gone)) as row:
            row.extend((*tokens[:kept], *gone, *tokens[kept:-3]))
            row.drop(kept, len(gone))
            for token in tokens[-3:]:
                row.extend([token], compare=True)


# A ring has as many cells as its window and 32 more, in steps of 256; this is enough for windows of 512 and 1,024.
LONGEST_RING = 2048


def ring_cache(stage: Stage) -> None:
    """Decode before and over the edge at which the cells of a window are written again, and several tokens over it."""
    stage.need_cache("ring")
    window, size = stage.facts.window, stage.facts.ring
    assert window is not None
    assert size is not None
    tokens = stage.text(size + 4, LONGEST_RING)
    with stage.rows(name=f"ring of {size}", length=len(tokens), cache="ring") as row:
        row.extend(tokens[: window + 1])
        row.extend(tokens[window + 1 : window + 2], compare=True)
        row.extend(tokens[window + 2 : size - 1])
        for token in tokens[size - 1 :]:
            row.extend([token], compare=True)
    with stage.rows(name=f"ring of {size}, four at once", length=len(tokens), cache="ring") as row:
        row.extend(tokens[: size - 2])
        row.extend(tokens[size - 2 : size + 2], compare=True)
        row.extend(tokens[size + 2 :], compare=True)


def _other_cache(kind: str) -> Callable[[Stage], None]:
    def steps(stage: Stage) -> None:
        stage.need_cache(kind)
        tokens = stage.text(max(len(stage.tokens), 8))
        window = stage.facts.window
        with stage.rows(name="decode", length=len(tokens), cache=kind) as row:
            row.extend(tokens[: -len(stage.continuation)])
            for token in tokens[-len(stage.continuation) :]:
                row.extend([token], compare=True)
        with stage.rows(name="two at once", length=len(tokens), cache=kind) as row:
            row.extend(tokens[:-3])
            row.extend(tokens[-3:-1], compare=True)
            row.extend(tokens[-1:], compare=True)
        if window is not None and window < len(tokens) - 1:
            with stage.rows(name=f"across window {window}", length=len(tokens), cache=kind) as row:
                row.extend(tokens[: window - 1])
                for position in range(window - 1, min(window + 3, len(tokens))):
                    row.extend([tokens[position]], compare=True)

    return steps


def shared_kv(stage: Stage) -> None:
    """Decode and several tokens at once where layers read the keys of a lower one, across its window; and the same with
    two sequences of one length in turns, as an engine serves two requests."""
    if not stage.facts.shares_kv:
        raise NotApplicable("no layer reads the keys and values of another")
    window = stage.facts.window or 8
    tokens = stage.text(window + 5)
    with stage.rows(name="step by step", length=len(tokens)) as row:
        row.extend(tokens[: window - 1])
        for position in range(window - 1, window + 2):
            row.extend([tokens[position]], compare=True)
        row.extend(tokens[window + 2 :], compare=True)
    other = stage.different(len(tokens), salt=5)
    with (
        stage.rows(name="first in turns", length=len(tokens)) as first,
        stage.rows(name="second in turns", length=len(tokens)) as second,
    ):
        turns = ((first, tokens), (second, other))
        for start, stop in pairwise((0, window - 1, window, window + 1, window + 2, len(tokens))):
            for sequence, text in turns:
                sequence.extend(text[start:stop], compare=start > 0)


CALLS = (
    Scenario("second_call", "rows, positions and tables left over from the call before", second_call),
    Scenario("shorter_call", "what a longer call leaves behind for a shorter one", shorter_call),
    Scenario(
        "prefix_reuse",
        "a shared prefix that one of its users overwrites",
        prefix_reuse,
        "prompts of 4 tokens or more",
    ),
    Scenario(
        "export_import",
        "what is lost when a cache is exported and imported",
        export_import,
        "dynamic caches of keys and values",
    ),
    Scenario(
        "context_shift",
        "keys that are moved by the wrong number of positions, or not at all, when old tokens are dropped",
        context_shift,
        "llama.cpp with rotated keys",
    ),
    Scenario(
        "ring_cache",
        "cells of a sliding window that are written again too early, or seen when they hold another token",
        ring_cache,
        "llama.cpp with a sliding window of 1,760 tokens or less, or prompts that long",
    ),
    Scenario(
        "static_cache",
        "slots, masks and windows of a cache of fixed size",
        _other_cache("static"),
        "models that have a static cache",
    ),
    Scenario(
        "offloaded_cache",
        "layers that come back from the host too late or not at all",
        _other_cache("offloaded"),
        "an accelerator",
    ),
    Scenario(
        "shared_kv",
        "layers that read the keys of the wrong layer, of another sequence, or too few of them",
        shared_kv,
        "models with cross-layer sharing of keys and values",
    ),
)
