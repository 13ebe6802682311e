"""The server of llama-cpp-python: text prompts only, `echo` for the logprobs of a prompt.

Habits that matter:

* With `echo`, the logprobs of a prompt that does not begin with BOS are those of the neighbouring token. Prompts
  therefore begin with the BOS text where the server does not put BOS there by itself; it is found by asking.
* A prompt whose beginning has just been generated is not computed again: its echo gives the scores of decode. Before
  each score, another prompt is sent.
* Token ids are neither taken nor given. Tokens are compared by their texts, cut by the same tokenizer in both passes,
  and a comparison ends where the two cuts part.
* `repeat_penalty`, `top_k`, `top_p` and `min_p` have defaults that change the distribution, and are switched off.
* `max_tokens=0` means no limit. The end of the text cannot be ignored, so a generation may be short.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvdrift.errors import CaptureError, UsageError
from kvdrift.server.client import Client
from kvdrift.server.dialects.answers import Part, ask_quietly
from kvdrift.server.dialects.base import PLAIN_SAMPLING, Dialect, dtype_facts
from kvdrift.server.values import Cache, Score, ServedPrompt, ServedTokens, ServerFacts, Token

_SAMPLING = {**PLAIN_SAMPLING, "top_k": 0, "repeat_penalty": 1.0, "stream": False}
# What BOS is called in the families that llama.cpp runs.
_BOS = ("<s>", "<|im_start|>", "<|begin_of_text|>", "<bos>", "<|endoftext|>", "<|startoftext|>", "[BOS]", "[gMASK]")
_PROBE = "One two three"
_COUNT = "/extras/tokenize/count"
_ELSEWHERE = "Seventeen unrelated geese crossed"


class LlamaCppPython(Dialect):
    """Speaks to the server that comes with llama-cpp-python."""

    path = "/v1/completions"
    takes_ids = False
    batches = False

    def __init__(self, client: Client, facts: ServerFacts) -> None:
        super().__init__(client, facts)
        self._bos: str | None = None

    @classmethod
    def recognise(cls, client: Client, model: str, dtype: str | None) -> LlamaCppPython | None:
        """Recognise llama-cpp-python by its /extras."""
        if "count" not in ask_quietly(client, "POST", f"{client.root}{_COUNT}", {"input": "a"}):
            return None
        facts = ServerFacts(
            dialect="llama-cpp-python",
            url=client.api,
            model=model,
            **dtype_facts(dtype),
            quantised=None if dtype is None else False,
            finest="start llama_cpp.server on a float32 file with --type_k 0 --type_v 0 (float32 cache)",
            changes="--flash_attn true, --type_k 0 --type_v 0, --n_ubatch 32, --offload_kqv false",
            offers=("logprobs of a prompt (echo)",),
            lacks=(
                "token ids: tokens are compared by their texts",
                "batching: it serves one request after another, so neighbours in flight change nothing",
            ),
        )
        return cls(client, facts)

    def score_requests(self, n_tokens: int) -> int:
        """Return 2: the score, and the other prompt in front of it."""
        return 2

    def prepare(self, name: str, prompt: str | Sequence[int]) -> ServedPrompt:
        """Return the text with BOS in front of it.

        Raises:
            UsageError: the prompt is token ids.
            CaptureError: no BOS text is known to this model, so nothing it echoes can be placed.
        """
        if not isinstance(prompt, str):
            raise UsageError(
                f"the prompt {name!r} is token ids, and llama-cpp-python's server takes text only; give it as text"
            )
        if self._bos is None:
            self._bos = self._find_bos()
        tokens, _ = self._echo(self._bos + prompt)
        return ServedPrompt(name, None, prompt, 1 + self._count(tokens, len(prompt)))  # BOS is not echoed

    def spoil(self, prompt: ServedPrompt) -> ServedPrompt | None:
        """Return the prompt with its middle word replaced by its first one."""
        words = (prompt.text or "").split(" ")
        middle = len(words) // 2
        other = next((w for w in words if w != words[middle]), None)
        if other is None or middle == 0:
            return None
        return ServedPrompt(
            prompt.name, None, " ".join([*words[:middle], other, *words[middle + 1 :]]), prompt.n_tokens
        )

    def generate(self, prompt: ServedPrompt, n_tokens: int, *, seed: int, cache: Cache) -> ServedTokens:
        """Sample up to `n_tokens` tokens."""
        if cache == "cold":
            self._go_elsewhere()
        choice = self._ask(self._text(prompt), n_tokens, seed=seed, logprobs=2)
        return self._completion(choice, _texts(choice))

    def score(
        self, prompt: ServedPrompt, tokens: Sequence[Token], *, appended: Sequence[int] = (), cache: Cache = "cold"
    ) -> Score:
        """Score the text of the tokens after the prompt."""
        pieces = [str(t) for t in tokens]
        text = self._text(prompt) + "".join(pieces) + (" and so on, as before" if appended else "")
        self._go_elsewhere()
        found, values = self._echo(text)
        # Offsets count from behind BOS, in characters.
        first = self._count(found, len(prompt.text or ""))
        part = found[first : first + len(pieces)]
        agreed = next((i for i, (a, b) in enumerate(zip(pieces, part, strict=False)) if a != b), len(part))
        scores = [value.logprob() for value in values[first : first + agreed]]
        return Score(tuple(part), (*scores, *[None] * (len(pieces) - agreed)))

    def _text(self, prompt: ServedPrompt) -> str:
        return (self._bos or "") + (prompt.text or "")

    def _find_bos(self) -> str:
        """Return what must stand in front of a prompt so that BOS is its first token; raises if nothing does it.

        The echo leaves a leading BOS out. So a text that the tokenizer takes for BOS does not come back.
        """
        n_ids = self._post({"input": _PROBE}, _COUNT)["count"].value
        if n_ids == 1 + self._count(self._echo(_PROBE)[0], len(_PROBE)):
            return ""  # the server counts a BOS that it puts there by itself
        for text in _BOS:
            if "".join(self._echo(text + _PROBE)[0]).startswith(_PROBE):
                return text
        raise CaptureError(
            "llama-cpp-python's server echoes the logprobs of the neighbouring token unless a prompt begins with BOS, "
            "and none of the BOS texts that kvdrift knows is one of this model; nothing can be compared there"
        )

    def _count(self, found: Sequence[str], n_characters: int) -> int:
        """Return how many echoed tokens make up the first `n_characters` characters."""
        length = 0
        for i, piece in enumerate(found):
            if length >= n_characters:
                return i
            length += len(piece)
        return len(found)

    def _echo(self, text: str) -> tuple[list[str], list[Part]]:
        """Return the tokens of a text and their logprobs; one generated token may follow them."""
        choice = self._ask(text, 1, seed=0, logprobs=1, echo=True)
        tokens, values = _texts(choice), choice["logprobs"]["token_logprobs"].items()
        if len(tokens) != len(values):
            raise choice.error(f"has not as many logprobs as tokens ({len(tokens)})")
        return tokens, values

    def _go_elsewhere(self) -> None:
        self._ask((self._bos or "") + _ELSEWHERE, 1, seed=0)

    def _ask(self, text: str, n_tokens: int, *, seed: int, **options: Any) -> Part:
        body = {"model": self.facts.model, "prompt": text, "max_tokens": n_tokens, "seed": seed, **_SAMPLING, **options}
        return self._post(body)["choices"][0]


def _texts(choice: Part) -> list[str]:
    """Return the texts of the tokens of a choice."""
    tokens = [token.value for token in choice["logprobs"]["tokens"].items()]
    if not all(isinstance(token, str) for token in tokens):
        raise choice.error("has tokens that are not text")
    return tokens
