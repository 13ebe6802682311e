"""The unit of resampling: a (prompt, position) pair, and which pairs are one and the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from kvdrift.vocabulary.facts import Prompt

Unit = tuple[str, int]  # prompt, position


def repeated_units(prompts: Iterable[Prompt]) -> frozenset[Unit]:
    """Return the probed pairs that have the same tokens, up to their own, as an earlier pair.

    A causal model computes the same there, so such a pair says nothing new: a statistic that counted it again would be
    surer than it may be. A pair with an unknown token (an id below 0) is taken for one of its own.
    """
    known: set[bytes] = set()
    found: set[Unit] = set()
    for prompt in prompts:
        tokens = np.array(prompt.tokens, dtype=np.int64)
        for position in prompt.probed:
            prefix = tokens[: position + 1]
            if (prefix < 0).any():
                continue
            digest = hashlib.blake2b(prefix.tobytes(), digest_size=16).digest()
            if digest in known:
                found.add((prompt.name, position))
            known.add(digest)
    return frozenset(found)
