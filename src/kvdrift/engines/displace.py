"""Other tokens between two passes of one text, so that the order of the runs helps nobody."""

from __future__ import annotations

from collections.abc import Sequence

from kvdrift.engines.base import CanForget, LiveEngine


def other_tokens(tokens: Sequence[int], vocab_size: int | None) -> tuple[int, ...]:
    """Return as many tokens, each another one than the token at its place.

    Each token gives way to the next larger one of the text, the largest to the smallest, so that no token appears that
    the model may take for something else, such as an image. A text of one token many times gets its successor in the
    vocabulary.
    """
    known = sorted(set(tokens))
    if len(known) == 1:
        known.append((known[0] + 1) % (vocab_size or known[0] + 2))
    following = dict(zip(known, [*known[1:], known[0]], strict=True))
    return tuple(following[token] for token in tokens)


def displace(engine: LiveEngine, tokens: Sequence[int]) -> None:
    """Compute other tokens of the same length, so that nothing right is left lying in memory that is used again.

    A pool may still hold the rows that prefill wrote of a text. A decode step that forgets to write its own row would
    then read the right one.
    """
    sequence = engine.new_sequence(len(tokens))
    sequence.extend(other_tokens(tokens, engine.info.vocab_size))
    sequence.close()


def forget(engine: LiveEngine) -> None:
    """Put back what earlier calls have left in the model itself, such as the positions of its last generation."""
    if isinstance(engine, CanForget):
        engine.forget()
