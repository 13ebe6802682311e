"""What the dialect of a server must offer, and reading answers: a field that is missing or odd is one clear error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from kvdrift.errors import CaptureError
from kvdrift.server.values import Cache, Generation, Prompt, Score, ServerFacts, Token


class Dialect(Protocol):
    """One kind of server. All sampling is at temperature 1 without filters or penalties: K3 needs tokens that were
    sampled from the very distribution whose logprobs are reported."""

    @property
    def facts(self) -> ServerFacts: ...

    @property
    def takes_ids(self) -> bool:
        """Whether prompts can be token ids."""
        ...

    @property
    def can_append(self) -> bool:
        """Whether a score can be taken with more tokens behind the scored ones."""
        ...

    @property
    def batches(self) -> bool:
        """Whether requests in flight at once are computed together."""
        ...

    def score_requests(self, n_tokens: int) -> int:
        """Requests that one score of so many generated tokens takes."""
        ...

    def prepare(self, name: str, prompt: str | Sequence[int]) -> Prompt:
        """Return the prompt as the server takes it."""
        ...

    def spoil(self, prompt: Prompt) -> Prompt | None:
        """Return the prompt with one token replaced, as many tokens long; None if that cannot be done."""
        ...

    def generate(self, prompt: Prompt, n_tokens: int, *, seed: int, cache: Cache) -> Generation:
        """Sample tokens; `warm` allows the prefix cache that an earlier warm request of this prompt has filled."""
        ...

    def score(
        self, prompt: Prompt, tokens: Sequence[Token], *, appended: Sequence[int] = (), cache: Cache = "cold"
    ) -> Score:
        """Score given tokens after the prompt, all computed as a prompt."""
        ...


def field(answer: Any, *path: str | int, where: str) -> Any:
    """Return what lies at a path of keys and indices.

    Raises:
        CaptureError: something on the path is missing.
    """
    found = answer
    for name in path:
        try:
            found = found[name]
        except (KeyError, IndexError, TypeError) as error:
            raise CaptureError(
                f"the answer to {where} has no {_path(path)}; is the server of the kind it seems?"
            ) from error
    return found


def logprob(value: Any, *path: str | int, where: str) -> float:
    """Return a logprob as it came, NaN and infinities as well; None is missing.

    Raises:
        CaptureError: it is no number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        said = "null" if value is None else f"a {type(value).__name__}"
        raise CaptureError(f"the answer to {where} has {said} at {_path(path)}, and a logprob is needed there")
    return float(value)


def ids(value: Any, *path: str | int, where: str) -> tuple[int, ...]:
    """Return a list of token ids.

    Raises:
        CaptureError: it is none.
    """
    if not isinstance(value, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        raise CaptureError(f"the answer to {where} has no list of token ids at {_path(path)}")
    return tuple(value)


def gap(values: Sequence[float]) -> float | None:
    """Return by how much the largest of some logprobs leads, None if there are fewer than two."""
    first = sorted(values, reverse=True)[:2]
    return first[0] - first[1] if len(first) == 2 else None


def replaced(prompt: Prompt) -> Prompt | None:
    """Return a prompt of ids whose middle token is another one of the same prompt; None if all are alike."""
    if prompt.ids is None or len(prompt.ids) < 3:
        return None
    middle = len(prompt.ids) // 2
    other = next((i for i in (*prompt.ids[middle + 1 :], *prompt.ids[:middle]) if i != prompt.ids[middle]), None)
    if other is None:
        return None
    return Prompt(prompt.name, (*prompt.ids[:middle], other, *prompt.ids[middle + 1 :]), None, prompt.n_tokens)


def counted(value: Any) -> int | None:
    """Return a count that a server may or may not tell."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _path(path: Sequence[str | int]) -> str:
    text = ""
    for name in path:
        text += f"[{name}]" if isinstance(name, int) else (f".{name}" if text else name)
    return text
