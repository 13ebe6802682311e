"""Scenarios of lengths at which a model does something else: windows, position schedules, the last positions."""

from __future__ import annotations

from kvdrift.errors import NotApplicable
from kvdrift.scenarios.model import Scenario
from kvdrift.scenarios.stage import Stage


def window_edge(stage: Stage) -> None:
    """Prefills of W-1, W, W+1 and 2W+3 tokens, each followed by decode steps; and step by step over the edge."""
    window = stage.facts.window
    if window is None:
        raise NotApplicable("no layer has a sliding window")
    tokens = stage.text(2 * window + 5)
    for length in (window - 1, window, window + 1, 2 * window + 3):
        with stage.rows(name=f"window {window}, prefill of {length}", length=length + 2) as row:
            row.extend(tokens[:length])
            row.extend(tokens[length : length + 1], compare=True)
            row.extend(tokens[length + 1 : length + 2], compare=True)
    with stage.rows(name=f"window {window}, in threes", length=len(tokens)) as row:
        row.extend(tokens[: max(1, window - 2)])
        for start in range(max(1, window - 2), window + 4, 3):
            row.extend(tokens[start : start + 3], compare=True)


def long_context(stage: Stage) -> None:
    """Some decode steps behind 300 tokens: positions that no half-precision number holds."""
    length = 300
    if stage.max_positions is not None and stage.max_positions < length:
        raise NotApplicable(f"needs {length} positions, and the model takes {stage.max_positions}")
    tokens = stage.text(length)
    with stage.rows(name="behind 297 tokens", length=length) as row:
        row.extend(tokens[:-3])
        row.extend(tokens[-3:-2], compare=True)
        row.extend(tokens[-2:], compare=True)


def rope_switch(stage: Stage) -> None:
    """Decode over the length at which positions begin to be encoded by another table."""
    switch = stage.facts.switch
    if switch is None:
        raise NotApplicable("positions are encoded by one table at every length")
    tokens = stage.text(switch + 3)
    with stage.rows(name=f"over {switch}", length=len(tokens)) as row:
        row.extend(tokens[: switch - 2])
        for position in range(switch - 2, switch + 3):
            row.extend([tokens[position]], compare=position >= switch - 1)


def last_positions(stage: Stage) -> None:
    """Decode up to the last position that the model has."""
    last = stage.max_positions
    if last is None:
        raise NotApplicable("the model names no largest position")
    tokens = stage.text(last)
    with stage.rows(name=f"up to {last}", length=last) as row:
        row.extend(tokens[:-3])
        for token in tokens[-3:]:
            row.extend([token], compare=True)


LENGTHS = (
    Scenario(
        "window_edge",
        "windows that are one token too wide or too narrow, or lose rows when they move",
        window_edge,
        "models with a sliding window of 250 tokens or less, or prompts that long",
    ),
    Scenario(
        "long_context", "positions and sums that lose digits in long texts", long_context, "models of 300 positions"
    ),
    Scenario(
        "rope_switch",
        "a cache of keys of one position table that is read with queries of another",
        rope_switch,
        "models with longrope or dynamic NTK",
    ),
    Scenario(
        "last_positions",
        "the last positions that a table or cache has room for",
        last_positions,
        "models of at most 512 positions, or prompts that long",
    ),
)
