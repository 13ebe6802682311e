"""Scenarios of the engine's own generation loop: what it computes while it generates, against a prefill of the result.

What the loop chooses is not known before, so it runs once, on paper, as it likes; at every precision it then makes the
same choices again. Those choices are compared as well, see `kvdrift.instruments.choice`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from kvdrift.engines.base import Generated
from kvdrift.scenarios.model import Scenario
from kvdrift.scenarios.stage import Stage
from kvdrift.vocabulary.plan import LONGEST_ROW

_ROW = 12  # tokens of a made-up prompt
_N_BEAMS = 3
_N_BEAM_TOKENS = 5


def _cut(stage: Stage, prompt: tuple[int, ...], n_new: int, most: int | None = None) -> tuple[int, ...]:
    """The end of a prompt, with room for `n_new` tokens behind it."""
    room = len(prompt) if stage.max_positions is None else max(1, stage.max_positions - n_new)
    return prompt[-min(room, most or room) :]


def generate_greedy(stage: Stage) -> None:
    """The most likely token, six times; and for two prompts of different length at once."""
    stage.need("generate")
    stage.compare_generated(stage.generate([_cut(stage, stage.prompt, 6)], n_new=6), name="alone", choice="greedy")
    if stage.lacks("padding") is None and len(stage.prompt) >= 4:
        longer = _cut(stage, stage.prompt, 4, LONGEST_ROW)
        other = stage.others[0] if stage.others else stage.different(len(longer), salt=30)
        batch = [longer, other[: max(2, len(longer) - 3)]]
        stage.compare_generated(stage.generate(batch, n_new=4), name="padded", choice="greedy")


def generate_beam(stage: Stage) -> None:
    """Three beams of one prompt, all of them returned: one that makes them change places, if there is one."""
    stage.need("generate", "batch", "reorder")
    made = None
    for prompt in _prompts(stage):
        made = stage.generate([prompt], n_new=_N_BEAM_TOKENS, n_beams=_N_BEAMS)
        if changes_places(made):
            break
    assert made is not None
    moved = "beams" if changes_places(made) else "beams that kept their places"
    stage.compare_generated(made, name=moved, choice="beams")


def generate_assisted(stage: Stage) -> None:
    """What the loop generates alone, proposed to it as drafts, two of them wrong: it has to keep the right ones, to
    drop the others from its cache, and to come to the same tokens. Then the same with a draft model, which the loop
    runs itself; the row says so if there is none, or if it broke or proposed nothing."""
    stage.need("generate", "drafts")
    n_new = 12
    prompt = _cut(stage, stage.prompt, n_new)
    alone = stage.generate([prompt], n_new=n_new).sequences[0][len(prompt) :]
    # Four drafts a call: the third is wrong; four right ones; all three wrong from the first on; the last two right.
    drafts = [
        token if index not in (2, 8) else (token - 1 if token > 1 else token + 1) for index, token in enumerate(alone)
    ]
    lacking = stage.lacks("draft_model")
    name = "drafts" if lacking is None else f"drafts, and no draft model: {lacking}"
    stage.compare_generated(stage.generate([prompt], n_new=n_new, drafts=drafts), name=name, choice="greedy")
    if lacking is None:
        made = stage.generate([prompt], n_new=n_new, draft_text=(*prompt, *alone))
        failed = made.draft_error or (None if made.has_drafts else "no draft was proposed")
        name = "draft model" if failed is None else f"draft model that failed: {failed}"
        stage.compare_generated(made, name=name, choice="greedy")


def changes_places(made: Generated) -> bool:
    """Whether a row of a loop ever went on from what another row had held."""
    return any(
        now.tokens[: -now.n_fed] != before.tokens
        for earlier, later in pairwise(made.calls)
        for before, now in zip(earlier, later, strict=True)
    )


def _prompts(stage: Stage) -> Iterator[tuple[int, ...]]:
    """The prompts that are tried, those of the audit first."""
    for prompt in (stage.prompt, *stage.others[:2]):
        yield _cut(stage, prompt, _N_BEAM_TOKENS)
    for salt in range(31, 34):
        yield _cut(stage, (*stage.prompt, *stage.different(2, salt=salt)), _N_BEAM_TOKENS, _ROW)


LOOPS = (
    Scenario(
        "generate_greedy",
        "positions, masks and left-overs of a model's own generate, and tokens that its logits do not call for",
        generate_greedy,
        "models with a generate of their own",
    ),
    Scenario(
        "generate_beam",
        "caches that generate does not bring into the order of its beams, and beams that others surpass",
        generate_beam,
        "models with a generate of their own",
    ),
    Scenario(
        "generate_assisted",
        "drafts that generate keeps in its cache after it rejected them, or accepts though they are wrong",
        generate_assisted,
        "dynamic caches that can go back",
    ),
)
