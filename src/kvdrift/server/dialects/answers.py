"""Reading a server's answer: a field that is missing or odd is one clear error, which names its place in the answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kvdrift.errors import CaptureError, EngineUnavailable
from kvdrift.server.client import Client

_LONGEST_TEXT = 100


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an answer: its JSON value, the request that it answers, and the keys and indices that lead to it."""

    value: Any
    where: str
    path: tuple[str | int, ...] = ()

    def __getitem__(self, name: str | int) -> Part:
        """Return the part under a key or an index.

        Raises:
            CaptureError: nothing stands there.
        """
        part = Part(None, self.where, (*self.path, name))
        try:
            return Part(self.value[name], self.where, part.path)
        except (KeyError, IndexError, TypeError) as error:
            raise part.error(f"has no {part}; is the server of the kind it seems?") from error

    def __str__(self) -> str:
        """The place, such as `choices[0].logprobs`."""
        return "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in self.path).removeprefix(".")

    def error(self, text: str) -> CaptureError:
        """Return the error that says `text` of the answer."""
        return CaptureError(f"the answer to {self.where} {text}")

    def find(self, *path: str) -> Any:
        """Return the value under some keys, None where one is missing: what a server may or may not tell."""
        value = self.value
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def count(self, *path: str) -> int | None:
        """Return the count under some keys, None where there is none."""
        value = self.find(*path)
        return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None

    def listed(self, *path: str) -> list[Any]:
        """Return the list under some keys, an empty one where there is none."""
        value = self.find(*path)
        return value if isinstance(value, list) else []

    def items(self) -> list[Part]:
        """Return the parts of a list.

        Raises:
            CaptureError: it is not a list.
        """
        if not isinstance(self.value, list):
            raise self.error(f"has no list at {self}")
        return [self[i] for i in range(len(self.value))]

    def logprob(self) -> float:
        """Return a logprob in nats, as it came: NaN and infinities as well.

        Raises:
            CaptureError: it is not a number.
        """
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            said = "null" if self.value is None else f"a {type(self.value).__name__}"
            raise self.error(f"has {said} at {self}, and a logprob is needed there")
        return float(self.value)

    def id(self) -> int:
        """Return a token id.

        Raises:
            CaptureError: it is not an integer.
        """
        if not isinstance(self.value, int) or isinstance(self.value, bool):
            raise self.error(f"has no token id at {self}")
        return self.value

    def ids(self) -> tuple[int, ...]:
        """Return a list of token ids.

        Raises:
            CaptureError: it is not one.
        """
        return tuple(item.id() for item in self.items())


def gap(values: Iterable[Any]) -> float | None:
    """Return by how many nats the largest of some logprobs leads, None if fewer than two of the values are numbers.

    >>> gap([-3.0, -1.0, None, -1.5])
    0.5
    """
    first = sorted((float(v) for v in values if isinstance(v, int | float)), reverse=True)[:2]
    return first[0] - first[1] if len(first) == 2 else None


def ask_quietly(client: Client, method: str, url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the JSON object of an answer, empty where the server does not know the question."""
    try:
        answer = client.probe(method, url, body)
    except (CaptureError, EngineUnavailable):
        return {}
    return answer.body if answer.status < 400 and isinstance(answer.body, dict) else {}


def text_or_none(client: Client, value: Any) -> str | None:
    """Return a text that a server tells of itself, shortened and without the API key; None if it is not a text."""
    return client.redact(value)[:_LONGEST_TEXT] if isinstance(value, str) and value else None
