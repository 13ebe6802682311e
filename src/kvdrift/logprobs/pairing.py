"""Pairs the tokens of two dumps, and of those beside them. A token without a partner is counted, never skipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvdrift.errors import AlignmentError
from kvdrift.logprobs.dump import Bools, Dump, Floats, Ints

# Fewer equal tokens than this say nothing about a displacement.
_FEWEST = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Tokens that A and B both have a logprob for, in the order of A.

    Attributes:
        names: [sequence], those with at least one pair.
        sequence: [token], place in `names`.
        position: [token], counted from the first token of the sequence in A.
        a, b: [token], logprobs in nats; they may be NaN or infinite.
        third, repeat_a, repeat_b: the same of the dumps beside A and B, NaN where they lack the token; None for none.
        grain: [token], what rounding of A and B in their files can make of a difference, in nats.
        gap, gap_b: [token], lead of the likeliest token over the runner-up in A and in B in nats, NaN where unknown.
        moved: [token], whether the likeliest token of B is another one; `known_best` says where both are known.
        flipped: [token], whether other experts were chosen, None where a dump does not tell experts.
        dropped: [sequence], whether the trainer's mask dropped it, by a dump's own word; None if neither says.
        lost: tokens without a pair, by reason.
        n_asked: tokens of A.
    """

    names: tuple[str, ...]
    sequence: Ints
    position: Ints
    a: Floats
    b: Floats
    third: Floats | None
    repeat_a: Floats | None
    repeat_b: Floats | None
    grain: Floats
    gap: Floats
    gap_b: Floats
    moved: Bools
    known_best: Bools
    flipped: Bools | None
    dropped: tuple[bool, ...] | None
    other_prompts: tuple[str, ...]
    lost: dict[str, int] = field(default_factory=dict)
    n_asked: int = 0


@dataclass(frozen=True, slots=True)
class _Match:
    """For each token of A, the place of its partner in another dump, -1 for none."""

    at: Ints
    lost: dict[str, int]
    sequences: dict[int, int]


def pair(
    a: Dump, b: Dump, *, third: Dump | None = None, repeat_a: Dump | None = None, repeat_b: Dump | None = None
) -> Pairs:
    """Pair A with B, and with the dumps beside them.

    Raises:
        AlignmentError: no sequence is in both, their tokens are displaced against each other, or differ in all of them.
    """
    match = _match(a, b)
    whole = match.at >= 0
    present = np.zeros(a.n_tokens, dtype=bool)
    present[whole] = a.present[whole] & b.present[match.at[whole]]
    lost = dict(match.lost)
    if missing := int((whole & ~present).sum()):
        lost["one side has no logprob of it"] = missing
    kept = np.flatnonzero(present)
    if not kept.size:
        raise AlignmentError(f"no token has a logprob in both {a.source} and {b.source}; nothing can be compared")
    of_b = match.at[kept]
    owner = np.repeat(np.arange(len(a.names)), np.diff(a.starts))[kept]
    used, sequence = np.unique(owner, return_inverse=True)
    known = (a.best[kept] >= 0) & (b.best[of_b] >= 0)
    flipped = None
    if a.experts is not None and b.experts is not None:
        flipped = np.array([a.experts[i] != b.experts[j] for i, j in zip(kept, of_b, strict=True)], dtype=np.bool_)
    return Pairs(
        names=tuple(a.names[i] for i in used),
        sequence=sequence.astype(np.int64),
        position=(kept - a.starts[owner]).astype(np.int64),
        a=a.logprob[kept],
        b=b.logprob[of_b],
        third=_beside(a, third, kept),
        repeat_a=_beside(a, repeat_a, kept),
        repeat_b=_beside(a, repeat_b, kept),
        grain=np.hypot(a.grain[kept], b.grain[of_b]),
        gap=a.gap[kept],
        gap_b=b.gap[of_b],
        moved=known & (_same_words(a, b, kept) != b.best[of_b]),
        known_best=known,
        flipped=flipped,
        dropped=_dropped(a, b, used, match),
        other_prompts=tuple(
            a.names[i]
            for i in used
            if (one := a.prompts[i]) is not None
            and (two := b.prompts[match.sequences[int(i)]]) is not None
            and one != two
        ),
        lost=lost,
        n_asked=a.n_tokens,
    )


def _dropped(a: Dump, b: Dump, used: Ints, match: _Match) -> tuple[bool, ...] | None:
    said = [
        next((word for word in (b.dropped[match.sequences[int(i)]], a.dropped[i]) if word is not None), None)
        for i in used
    ]
    return None if any(word is None for word in said) else tuple(bool(word) for word in said)


def _same_words(a: Dump, b: Dump, kept: Ints) -> Ints:
    """The likeliest tokens of A [token] as B numbers them."""
    if a.texts is None or b.texts is None:
        return a.best[kept]
    place = {text: i for i, text in enumerate(b.texts)}
    table = np.array([place.get(text, -2) for text in a.texts], dtype=np.int64)
    return np.where(a.best[kept] >= 0, table[np.maximum(a.best[kept], 0)], -1)


def _beside(a: Dump, other: Dump | None, kept: Ints) -> Floats | None:
    if other is None:
        return None
    at = _match(a, other).at[kept]
    found = np.full(kept.size, np.nan)
    found[at >= 0] = other.logprob[at[at >= 0]]
    if not np.isfinite(found).any():
        raise AlignmentError(f"no token of {a.source} has a logprob in {other.source}; nothing can be compared")
    return found


def _match(a: Dump, b: Dump) -> _Match:
    if (a.texts is None) != (b.texts is None):
        with_texts = a.source if a.texts is not None else b.source
        raise AlignmentError(f"{with_texts} has texts of tokens and the other dump has ids; write ids in both")
    partner = _sequences(a, b)
    at = np.full(a.n_tokens, -1, dtype=np.int64)
    lost: dict[str, int] = {}
    other: list[tuple[int, int]] = []
    for i in range(len(a.names)):
        n = int(a.starts[i + 1] - a.starts[i])
        if i not in partner:
            _count(lost, "its sequence is only in one dump", n)
            continue
        j = partner[i]
        one, two = a.tokens_of(i), b.tokens_of(j)
        common = min(len(one), len(two))
        if one[:common] != two[:common]:
            other.append((i, j))
            _count(lost, "the other dump has other tokens in its sequence", n)
            continue
        at[a.starts[i] : a.starts[i] + common] = b.starts[j] + np.arange(common)
        _count(lost, "one dump ends earlier", abs(len(one) - len(two)))
    without = set(range(len(b.names))) - set(partner.values())
    _count(lost, "its sequence is only in one dump", sum(int(b.starts[j + 1] - b.starts[j]) for j in without))
    if other:
        _refuse_displaced(a, b, other)
        if len(other) == len(partner):
            _refuse_other_tokens(a, b, other[0])
    return _Match(at, lost, partner)


def _count(lost: dict[str, int], reason: str, n: int) -> None:
    if n:
        lost[reason] = lost.get(reason, 0) + n


def _sequences(a: Dump, b: Dump) -> dict[int, int]:
    """Return the place in B of each sequence of A that both have."""
    if a.named and b.named:
        place = {name: j for j, name in enumerate(b.names)}
        found = {i: place[name] for i, name in enumerate(a.names) if name in place}
        if not found:
            raise AlignmentError(
                f"{a.source} and {b.source} have no sequence in common: {a.names[0]!r} and so on against "
                f"{b.names[0]!r}; give both sides the same ids, or none, and the same order"
            )
        return found
    if len(a.names) != len(b.names):
        raise AlignmentError(
            f"{a.source} has {len(a.names)} sequences and {b.source} {len(b.names)}, and they have no ids to find "
            "partners by; write an id with each sequence"
        )
    return {i: i for i in range(len(a.names))}


def _refuse_displaced(a: Dump, b: Dump, pairs: Sequence[tuple[int, int]]) -> None:
    """Refuse dumps one of which begins some tokens before the other: each logprob would meet that of its neighbour."""
    for i, j in pairs:
        one, two = a.tokens_of(i), b.tokens_of(j)
        for lag in (1, -1, 2, -2, 3, -3):
            first, second = (one[lag:], two) if lag > 0 else (one, two[-lag:])
            common = min(len(first), len(second))
            if common >= _FEWEST and first[:common] == second[:common]:
                early, late = (a, b) if lag > 0 else (b, a)
                raise AlignmentError(
                    f"the dumps are misaligned by {abs(lag)}: in sequence {a.names[i]}, {early.source} begins "
                    f"{abs(lag)} token{'s' if abs(lag) > 1 else ''} before {late.source}; mind the mask of the "
                    "response, and write the same tokens in both"
                )


def _refuse_other_tokens(a: Dump, b: Dump, pair: tuple[int, int]) -> None:
    one, two = a.tokens_of(pair[0]), b.tokens_of(pair[1])
    at = next(k for k in range(min(len(one), len(two))) if one[k] != two[k])
    raise AlignmentError(
        f"no sequence has the same tokens in both dumps: sequence {a.names[pair[0]]} differs from token {at} on "
        f"({one[at]!r} in {a.source}, {two[at]!r} in {b.source}); another tokenizer or vocabulary, other samples or "
        "another order: score the very ids that were sampled"
    )
