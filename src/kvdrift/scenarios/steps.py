"""Scenarios of one sequence: chunks, several tokens on a filled cache, and going back."""

from __future__ import annotations

from kvdrift.errors import NotApplicable
from kvdrift.scenarios.model import Scenario
from kvdrift.scenarios.stage import Stage

_PAGE = 16  # slots of a page in the engines that have pages


def chunked_prefill(stage: Stage) -> None:
    """The whole text in chunks of 1, 2, 7 and half of it; the last two chunks are compared."""
    stage.need_tokens(4)
    tokens = stage.tokens
    for size in dict.fromkeys((1, 2, 7, (len(tokens) + 1) // 2)):
        if size >= len(tokens):
            continue
        with stage.rows(name=f"chunks of {size}", length=len(tokens)) as row:
            starts = list(range(0, len(tokens), size))
            for start in starts:
                row.extend(tokens[start : start + size], compare=start > 0 and start in starts[-2:])


def verify(stage: Stage) -> None:
    """2, 4 and 8 tokens at once on a filled cache, as drafts are verified, and then one more."""
    stage.need_tokens(4)
    tokens = stage.text(max(len(stage.tokens), 14))
    for n_tokens in (2, 4, 8):
        with stage.rows(name=f"{n_tokens} at once", length=len(tokens)) as row:
            row.extend(tokens[: len(tokens) - n_tokens - 1])
            row.extend(tokens[len(tokens) - n_tokens - 1 : -1], compare=True)
            row.extend(tokens[-1:], compare=True)


def rewind(stage: Stage) -> None:
    """Drafts are fed and dropped again, all of them or the last two, and other tokens come in their place; then the way
    back leads into the prompt, as when a question is asked anew."""
    stage.need("rewind")
    drafts = stage.different(4)
    tokens = stage.tokens
    n_prompt = len(stage.prompt)
    with stage.rows(name="all rejected", length=len(tokens) + 4, keep_past=True) as row:
        row.extend(stage.prompt)
        row.extend(drafts)
        row.rewind(4)
        for token in stage.continuation[:3]:
            row.extend([token], compare=True)
    with stage.rows(name="some rejected", length=len(tokens) + 4, keep_past=True) as row:
        row.extend(stage.prompt)
        row.extend([tokens[n_prompt], *drafts[1:3]])
        row.rewind(2)
        row.extend(stage.different(2, salt=1), compare=True)
    if n_prompt >= 4:
        with stage.rows(name="into the prompt", length=len(tokens), keep_past=True) as row:
            row.extend(stage.prompt)
            row.extend(stage.continuation[:1])
            row.rewind(1 + n_prompt // 2)
            row.extend(stage.different(2, salt=2), compare=True)


def draft_rounds(stage: Stage) -> None:
    """Three rounds of drafts, each verified in one call with two right tokens before them, and rejected."""
    stage.need("rewind")
    tokens = stage.text(max(len(stage.tokens), 12))
    wrong = stage.different(6, salt=8)
    start = len(tokens) - 7
    with stage.rows(name="rounds", length=len(tokens) + 2, keep_past=True) as row:
        row.extend(tokens[:start])
        for drafts in (wrong[:2], wrong[2:4], wrong[4:]):
            row.extend([*tokens[start : start + 2], *drafts], compare=True)
            row.rewind(2)
            start += 2
        row.extend(tokens[start:], compare=True)


def rewind_edge(stage: Stage) -> None:
    """Back over the edge of the sliding window, or of a page of 16 slots, and on over it again."""
    stage.need("rewind")
    window = stage.facts.window
    edge = _PAGE if window is None else window
    tokens = stage.text(edge + 6)
    with stage.rows(name=f"edge {edge}", length=edge + 8, keep_past=True) as row:
        row.extend(tokens[: edge - 2])
        row.extend(stage.different(4, salt=6))  # other tokens than those that a short text is filled up with
        row.rewind(4)
        for position in range(edge - 2, edge + 3):
            row.extend([tokens[position]], compare=True)


def recurrent_state(stage: Stage) -> None:
    """Several tokens at once on a filled recurrent state, and between single steps; the states are compared too."""
    if not stage.facts.recurrent:
        raise NotApplicable("no layer keeps a recurrent state")
    tokens = stage.text(max(len(stage.tokens), 12))
    for n_tokens in (1, 2, 5):
        with stage.rows(name=f"{n_tokens} on a state", length=len(tokens)) as row:
            row.extend(tokens[:-n_tokens])
            row.extend(tokens[-n_tokens:], compare=True)
    with stage.rows(name="steps and chunks in turns", length=len(tokens)) as row:
        row.extend(tokens[:-7])
        for start, stop in ((-7, -6), (-6, -3), (-3, -2), (-2, None)):
            row.extend(tokens[start:stop], compare=True)


STEPS = (
    Scenario(
        "chunked_prefill",
        "slots, masks and states that are wrong from the second chunk on",
        chunked_prefill,
        "prompts of 4 tokens or more",
    ),
    Scenario(
        "verify",
        "causal masks and positions of several tokens on a filled cache (speculative decoding)",
        verify,
        "prompts of 4 tokens or more",
    ),
    Scenario(
        "rewind",
        "rows of rejected drafts that are still read, rows lost in going back",
        rewind,
        "caches that can go back",
    ),
    Scenario(
        "draft_rounds",
        "rows of drafts that are rejected in one call and still there in the next",
        draft_rounds,
        "caches that can go back",
    ),
    Scenario(
        "rewind_edge",
        "rows that do not come back when the way back crosses a window or a page",
        rewind_edge,
        "caches that can go back",
    ),
    Scenario(
        "recurrent_state",
        "recurrent and convolution states that several tokens at once leave behind wrong",
        recurrent_state,
        "models with recurrent layers",
    ),
)
