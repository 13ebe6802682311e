"""From a text to token ids, by whatever a user calls a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvdrift.errors import UsageError


def encoder(tokenizer: Any) -> Callable[[str], list[int]] | None:
    """Return a function from text to token ids, None if there is no tokenizer.

    The function raises `UsageError` where the tokenizer returns no list of ids.
    """
    if tokenizer is None:
        return None
    encode: Callable[[str], Any] = getattr(tokenizer, "encode", tokenizer)

    def to_ids(text: str) -> list[int]:
        if not text:
            return []
        encoded = encode(text)
        ids = getattr(encoded, "ids", encoded)
        if not isinstance(ids, list | tuple):
            raise UsageError(f"the tokenizer returned {type(encoded).__name__} for a text, and token ids are needed")
        return [int(i) for i in ids]

    return to_ids


__all__ = ["encoder"]
