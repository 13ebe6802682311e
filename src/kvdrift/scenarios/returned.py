"""Which values of a generation loop belong to the rows that it returned."""

from __future__ import annotations

from collections.abc import Iterator

from kvdrift.engines.base import Generated


def returned_positions(made: Generated) -> Iterator[tuple[int, int, int, tuple[int, ...]]]:
    """Yield, for every call and row of a loop, the positions at which it computed a row that was returned in the end:
    (call, row, returned row, positions).

    That is so where the row then stood for what the returned row begins with, drafts that were rejected later and beams
    that died excluded. Of a prompt only the last position counts, the one with logits.
    """
    beams = made.wanted.n_beams > 1
    seen: set[tuple[int, int]] = set()
    for call, rows in enumerate(made.calls):
        for row, fed in enumerate(rows):
            first = len(fed.tokens) - min(fed.n_fed, fed.n_logits)
            for index, tokens in enumerate(made.sequences):
                positions = tuple(
                    position
                    for position in range(first, len(fed.tokens))
                    if fed.tokens[: position + 1] == tokens[: position + 1] and (index, position) not in seen
                )
                if positions and (beams or index == row):
                    seen.update((index, position) for position in positions)
                    yield call, row, index, positions


def is_plain_prefill(made: Generated, call: int) -> bool:
    """Whether a call is no other route: one row, from its first token on."""
    rows = made.calls[call]
    return len(rows) == 1 and rows[0].n_fed == len(rows[0].tokens)


def require_computed(made: Generated) -> None:
    """Check that the loop computed every token that it returned from the tokens before.

    Raises:
        ValueError: it returned a token behind tokens that none of its rows ever stood for.
    """
    seen = {(index, position) for _, _, index, found in returned_positions(made) for position in found}
    beams = made.wanted.n_beams > 1
    for index, tokens in enumerate(made.sequences):
        n_prompt = len(made.wanted.prompts[0 if beams else index])
        for position in range(n_prompt - 1, len(tokens) - 1):
            if (index, position) not in seen:
                raise ValueError(
                    f"generate returned token {tokens[position + 1]} in row {index}, and none of its calls computed "
                    f"what comes behind the {position + 1} tokens before it"
                )
