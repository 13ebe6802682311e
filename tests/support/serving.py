"""A small server on loopback: a real tiny model with a real KV cache behind the HTTP dialects of real servers.

Decode steps run on the cache, prompts are prefilled anew, and faults are planted into the decode step, the prefix cache
or the reporting of logprobs. Requests that are in flight at once are decoded as one batch of that size.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from tests.support.tiny import tiny_model

MODEL = "tiny"
BOUNDARY = 32
_LARGEST_BATCH = 4


def some_prompts(n: int = 12) -> dict[str, list[int]]:
    """Prompts of 6 to 28 token ids."""
    rng = np.random.default_rng(7)
    return {f"p{i:02}": [int(t) for t in rng.integers(3, 128, 6 + 2 * i)] for i in range(n)}


def ids_of(prompt: str | list[int]) -> list[int]:
    """A tokenizer: one id a character."""
    return [ord(character) % 128 for character in prompt] if isinstance(prompt, str) else prompt


@dataclass
class Engine:
    """A model, its prefix cache, and at most one fault of a known name."""

    dtype: torch.dtype = torch.float32
    fault: str | None = None
    chunk: int | None = None
    size: float = 1.5
    model: Any = field(init=False)
    lock: threading.Lock = field(default_factory=threading.Lock)
    prefixes: dict[str, tuple[tuple[int, ...], Any]] = field(default_factory=dict)
    in_flight: int = 0
    batch: int = 1
    largest_batch: int = 0

    def __post_init__(self) -> None:
        self.model = tiny_model("llama", dtype=self.dtype, max_position_embeddings=512, num_hidden_layers=2)

    def forward(self, ids: list[int], cache: Any, *, batch: int = 1, decode: bool = False) -> torch.Tensor:
        """Feed ids on top of a cache; return the logprobs [token, vocabulary] of the first row."""
        start = cache.get_seq_length()
        positions = torch.arange(start, start + len(ids))
        options: dict[str, Any] = {}
        faulty = decode and (self.fault != "batch" or batch > 1)
        if faulty and self.fault in ("rope", "batch"):
            positions = positions + 1
        if faulty and self.fault == "rows_past_boundary" and start > BOUNDARY:
            mask = torch.ones(batch, start + len(ids), dtype=torch.long)
            mask[:, BOUNDARY:start] = 0
            options["attention_mask"] = mask
        scaled = [layer.self_attn for layer in self.model.model.layers] if faulty and self.fault == "scaled" else []
        for attention in scaled:
            attention.scaling *= self.size
        try:
            with torch.no_grad():
                logits = self.model(
                    input_ids=torch.tensor([ids] * batch),
                    past_key_values=cache,
                    use_cache=True,
                    position_ids=positions[None].expand(batch, -1),
                    **options,
                ).logits[0]
        finally:
            for attention in scaled:
                attention.scaling /= self.size
        return torch.log_softmax(logits.float(), dim=-1)

    def prefill(self, ids: list[int], batch: int = 1) -> tuple[torch.Tensor, Any]:
        """Return the logprobs behind every token, and the cache."""
        cache = DynamicCache()
        parts = [ids] if self.chunk is None else [ids[i : i + self.chunk] for i in range(0, len(ids), self.chunk)]
        return torch.cat([self.forward(part, cache, batch=batch) for part in parts]), cache

    def generate(self, ids: list[int], n: int, seed: int, salt: str, batch: int) -> tuple[list[Any], int]:
        """Return (token, logprob, the two largest logprobs) of n sampled tokens, and the cached prompt tokens."""
        self.largest_batch = max(self.largest_batch, batch)
        n_cached = 0
        if salt in self.prefixes and batch == 1:
            source = ids
            if self.fault == "prefix":
                others = [known for name, (known, _) in self.prefixes.items() if name != salt]
                source = list((others[0] * len(ids))[: len(ids)]) if others else ids
            _, cache = self.prefill(source[:-1])
            n_cached = len(ids) - 1
            last = self.forward(ids[-1:], cache)[-1]
        else:
            rows, cache = self.prefill(ids, batch)
            last = rows[-1]
            self.prefixes[salt] = (tuple(ids), None)
        if self.fault == "stale":
            for layer in cache.layers:
                for rows in (layer.keys, layer.values):
                    rows[..., len(ids) // 2, :] = rows[..., 0, :]
        rng = np.random.default_rng(seed)
        out = []
        for step in range(n):
            probabilities = last.double().exp().numpy()
            token = int(np.searchsorted(np.cumsum(probabilities) / probabilities.sum(), rng.random()))
            value = float(last[token])
            if self.fault == "nan" and step == 3:
                value = math.nan
            out.append((token, value, torch.topk(last, 2).values.tolist()))
            last = self.forward([token], cache, batch=batch, decode=True)[-1]
        return out, n_cached

    def on_top_of(self, ids: list[int], n_cached: int) -> torch.Tensor:
        """Return the logprobs behind the last id, of which all but the first `n_cached` are computed together."""
        rows, cache = self.prefill(ids[: n_cached or len(ids)])
        if n_cached:
            rows = self.forward(ids[n_cached:], cache, decode=len(ids) - n_cached == 1)
        return rows[-1]

    def score(self, ids: list[int]) -> list[float | None]:
        """Return the logprob of each token after those in front of it; None for the first."""
        rows, _ = self.prefill(ids)
        values: list[float | None] = [None, *(float(rows[i - 1, ids[i]]) for i in range(1, len(ids)))]
        if self.fault == "shifted":
            values = [None, None, *values[1:-1]]
            values[1] = values[2]
        return values


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = (
        True  # head and body are two writes, and the second would wait 40 ms for an acknowledgement
    )

    def log_message(self, format: str, *args: Any) -> None:
        """Keep stderr clean."""

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(json.loads(raw))

    def _answer(self, body: Any) -> None:
        server: Any = self.server
        server.seen.append((self.command, self.path, dict(self.headers), body))
        status, headers, answer = server.reply(self.command, self.path, body, dict(self.headers))
        raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


Reply = tuple[int, dict[str, str], Any]


class Server(ThreadingHTTPServer):
    """Answers by `reply`, and remembers what it was asked."""

    daemon_threads = True

    def __init__(self, reply: Any) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply = reply
        self.seen: list[tuple[str, str, dict[str, str], Any]] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is not a reason to print a traceback."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextmanager
def serving(reply: Any) -> Iterator[Server]:
    """Serve `reply` while the context is open."""
    server = Server(reply)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Vllm:
    """The dialect of vLLM over an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(self, method: str, path: str, body: Any, headers: dict[str, str]) -> Reply:
        if path == "/v1/models":
            return 200, {}, {"data": [{"id": MODEL}]}
        if path == "/version":
            return 200, {}, {"version": "0.0-tiny"}
        if path != "/v1/completions":
            return 404, {}, {"detail": "Not Found"}
        return 200, {}, {"choices": [self.complete(body)], "usage": {}}

    def complete(self, body: Any) -> dict[str, Any]:
        engine = self.engine
        with _counted(engine):
            ids = ids_of(body["prompt"])
            choice: dict[str, Any] = {"finish_reason": "length", "prompt_token_ids": ids}
            salt = body.get("cache_salt", "")
            if body.get("prompt_logprobs") is not None:
                values = engine.score(ids)
                choice["prompt_logprobs"] = [
                    None if v is None else {str(t): {"logprob": v, "rank": 1}} for t, v in zip(ids, values, strict=True)
                ]
            out, _ = engine.generate(ids, body["max_tokens"], body.get("seed", 0), salt, engine.batch)
        choice["token_ids"] = [token for token, _, _ in out]
        choice["logprobs"] = {
            "token_logprobs": [value for _, value, _ in out],
            "top_logprobs": [{f"token_id:{i}": v for i, v in enumerate(top)} for _, _, top in out],
        }
        return choice


class Sglang:
    """The dialect of SGLang over an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(self, method: str, path: str, body: Any, headers: dict[str, str]) -> Reply:
        engine = self.engine
        if path == "/v1/models":
            return 200, {}, {"data": [{"id": MODEL}]}
        if path == "/server_info":
            dtype = str(engine.dtype).removeprefix("torch.")
            return 200, {}, {"disable_radix_cache": False, "dtype": dtype, "version": "0.0-tiny", "quantization": None}
        if path != "/generate":
            return 404, {}, {"detail": "Not Found"}
        with _counted(engine):
            ids = body["input_ids"] if "input_ids" in body else ids_of(body["text"])
            meta: dict[str, Any] = {"finish_reason": {"type": "length"}, "cached_tokens": 0}
            if body["logprob_start_len"] == 0:
                values = engine.score(ids)
                meta["input_token_logprobs"] = [[v, t, None] for v, t in zip(values, ids, strict=True)]
            options = body["sampling_params"]
            out, cached = engine.generate(
                ids, options["max_new_tokens"], options["sampling_seed"], body["cache_salt"], engine.batch
            )
        if body["logprob_start_len"] != 0:
            meta["cached_tokens"] = cached
        meta["output_token_logprobs"] = [[v, t, None] for t, v, _ in out]
        meta["output_top_logprobs"] = [[[v, 0, None] for v in top] for _, _, top in out]
        return 200, {}, {"meta_info": meta}


class LlamaCpp:
    """The dialect of llama.cpp's own server over an engine; without `goes_on` it computes every prompt as a whole."""

    def __init__(self, engine: Engine, goes_on: bool = True) -> None:
        self.engine = engine
        self.goes_on = goes_on
        self.slot: list[int] = []  # the ids whose rows the last request has left

    def __call__(self, method: str, path: str, body: Any, headers: dict[str, str]) -> Reply:
        engine = self.engine
        if path == "/v1/models":
            return 200, {}, {"data": [{"id": MODEL}]}
        if path == "/props":
            return 200, {}, {"default_generation_settings": {}, "build_info": "b0-tiny"}
        if path == "/tokenize":
            return 200, {}, {"tokens": ids_of(body["content"])}
        if path != "/completion":
            return 404, {}, {"error": {"message": "File Not Found"}}
        ids = body["prompt"]
        with _counted(engine):
            if body.get("logit_bias"):
                token = body["logit_bias"][0][0]
                cached = _common(ids[:-1], self.slot) if body["cache_prompt"] and self.goes_on else 0
                row = engine.on_top_of(ids, cached)
                out = [(token, float(row[token]), [0.0, -1.0])]
                self.slot = ids
            else:
                salt = "shared" if body["cache_prompt"] else str(len(engine.prefixes))
                if salt == "shared" and engine.prefixes.get(salt, ((), None))[0] != tuple(ids):
                    engine.prefixes.pop(salt, None)
                out, cached = engine.generate(ids, body["n_predict"], body["seed"], salt, engine.batch)
                self.slot = [*ids, *(token for token, _, _ in out)]
        answer = {
            "tokens": [token for token, _, _ in out],
            "completion_probabilities": [
                {"id": token, "logprob": value, "top_logprobs": [{"logprob": v} for v in top]}
                for token, value, top in out
            ],
            "timings": {"prompt_n": len(ids) - cached, "cache_n": cached},
            "stop_type": "limit",
        }
        return 200, {}, answer


@contextmanager
def _counted(engine: Engine) -> Iterator[None]:
    """Count requests in flight, and hold the engine; the batch is as large as the count was on entry."""
    engine.in_flight += 1
    try:
        with engine.lock:
            engine.batch = min(_LARGEST_BATCH, engine.in_flight)
            yield
    finally:
        engine.in_flight -= 1


def _common(one: list[int], other: list[int]) -> int:
    """Return how many ids two lists begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
