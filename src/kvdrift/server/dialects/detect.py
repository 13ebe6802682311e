"""Which server answers at an address, which model it serves, and what it offers for a comparison."""

from __future__ import annotations

from typing import Any

from kvdrift.errors import CaptureError, EngineUnavailable, UsageError
from kvdrift.server.client import Answer, Client
from kvdrift.server.dialects.base import Dialect
from kvdrift.server.dialects.llama_cpp_python import LlamaCppPython
from kvdrift.server.dialects.llamacpp import LlamaCpp
from kvdrift.server.dialects.sglang import Sglang
from kvdrift.server.dialects.vllm import Vllm
from kvdrift.server.plan import dtype_name
from kvdrift.server.values import ServerFacts

_SHOWN_MODELS = 10


def detect(client: Client, model: str | None, told_dtype: str | None) -> Dialect:
    """Return the dialect of the server behind `client`.

    Servers are told apart by what they answer, the most telling question first: SGLang's /server_info, llama.cpp's
    /props, llama-cpp-python's /extras, vLLM's token ids.

    Raises:
        EngineUnavailable: nobody answers, or the server offers no logprobs of prompts in any known way.
        UsageError: the model is not served, or several are and none was named.
    """
    name = _model(client, model)
    for attempt in (_sglang, _llamacpp, _llama_cpp_python):
        dialect = attempt(client, name, told_dtype)
        if dialect is not None:
            return dialect
    return _vllm(client, name, told_dtype)


def _model(client: Client, wanted: str | None) -> str:
    where = f"GET {client.api}/models"
    answer = client.probe("GET", f"{client.api}/models")
    if answer.status == 404 and wanted is not None:
        return wanted  # an API without a list: the first request will tell
    if answer.status >= 400:
        raise client.error("GET", f"{client.api}/models", answer)
    items = answer.body.get("data") if isinstance(answer.body, dict) else None
    if not isinstance(items, list):
        raise EngineUnavailable(
            f"the answer to {where} is no list of models; is this the address of an LLM server's API?"
        )
    served = [item["id"] for item in items if isinstance(item, dict) and isinstance(item.get("id"), str)]
    shown = ", ".join(client.redact(name) for name in served[:_SHOWN_MODELS]) or "none"
    if len(served) > _SHOWN_MODELS:
        shown += f" and {len(served) - _SHOWN_MODELS} more"
    if wanted is None:
        if len(served) != 1:
            raise UsageError(f"the server serves {len(served)} models ({shown}); name one with --model (model=...)")
        return str(served[0])
    if wanted not in served:
        raise UsageError(f"the server does not serve {wanted!r}; it serves: {shown}; name one of them with --model")
    return wanted


def _sglang(client: Client, model: str, told: str | None) -> Dialect | None:
    answer = _quietly(client, "GET", f"{client.root}/server_info")
    info = answer.body if answer.status < 400 and isinstance(answer.body, dict) else {}
    if "disable_radix_cache" not in info and "internal_states" not in info:
        return None
    dtype = info.get("dtype")
    said = dtype_name(dtype) if isinstance(dtype, str) else None
    lacks = []
    if info.get("disable_radix_cache") is True:
        lacks.append("a prefix cache: it is switched off, so a warm one was not tested")
    if info.get("quantization"):
        lacks.append("plain weights: they are quantised, and kernels may round activations as well")
    return Sglang(
        client,
        ServerFacts(
            dialect="SGLang",
            url=client.root,
            model=model,
            dtype=told or said,
            dtype_from="--dtype" if told else ("the server" if said else None),
            version=_text(client, info.get("version")),
            quantised=bool(info.get("quantization")),
            offers=("token ids in both directions", "input logprobs (logprob_start_len)", "a salt for the radix cache"),
            lacks=tuple(lacks),
            notes=("Sampling seeds are honoured only if the server was started for deterministic sampling.",),
        ),
    )


def _llamacpp(client: Client, model: str, told: str | None) -> Dialect | None:
    answer = _quietly(client, "GET", f"{client.root}/props")
    props = answer.body if answer.status < 400 and isinstance(answer.body, dict) else {}
    if "default_generation_settings" not in props:
        return None
    return LlamaCpp(
        client,
        ServerFacts(
            dialect="llama.cpp",
            url=client.root,
            model=model,
            dtype=told,
            dtype_from="--dtype" if told else None,
            version=_text(client, props.get("build_info")),
            quantised=None if told is None else False,
            offers=(
                "token ids in both directions",
                "logprobs of the next token after any prompt",
                "cache_prompt on or off",
            ),
            lacks=("logprobs of a whole prompt: tokens are scored one request each, and only some of them",),
        ),
    )


def _llama_cpp_python(client: Client, model: str, told: str | None) -> Dialect | None:
    url = f"{client.root}/extras/tokenize/count"
    answer = _quietly(client, "POST", url, {"input": "a"})
    if answer.status >= 400 or not isinstance(answer.body, dict) or "count" not in answer.body:
        return None
    return LlamaCppPython(
        client,
        ServerFacts(
            dialect="llama-cpp-python",
            url=client.api,
            model=model,
            dtype=told,
            dtype_from="--dtype" if told else None,
            quantised=None if told is None else False,
            offers=("logprobs of a prompt (echo)",),
            lacks=(
                "token ids: tokens are compared by their texts",
                "batching: it serves one request after another, so neighbours in flight change nothing",
            ),
        ),
    )


def _vllm(client: Client, model: str, told: str | None) -> Dialect:
    """Try one small request; what comes back says whether this server can be audited at all."""
    url = f"{client.api}/completions"
    body = {
        "model": model,
        "prompt": [1, 2, 3],
        "max_tokens": 1,
        "logprobs": 1,
        "prompt_logprobs": 0,
        "return_token_ids": True,
    }
    answer = client.probe("POST", url, body)
    if answer.status >= 400:
        raise client.error("POST", url, answer)
    choice = _first(answer.body)
    missing = [
        text
        for found, text in (
            (choice.get("token_ids"), "the ids of generated tokens (return_token_ids)"),
            (choice.get("prompt_logprobs"), "the logprobs of a prompt (prompt_logprobs)"),
            (choice.get("logprobs"), "logprobs of generated tokens (logprobs)"),
        )
        if not isinstance(found, list | dict)
    ]
    if missing:
        raise EngineUnavailable(
            f"the server at {client.api} does not give {', nor '.join(missing)}; kvdrift can audit vLLM, SGLang, "
            "llama.cpp and llama-cpp-python, or saved traces (kvdrift judge)"
        )
    version = _quietly(client, "GET", f"{client.root}/version")
    said = version.body.get("version") if version.status < 400 and isinstance(version.body, dict) else None
    return Vllm(
        client,
        ServerFacts(
            dialect="vLLM",
            url=client.api,
            model=model,
            dtype=told,
            dtype_from="--dtype" if told else None,
            version=_text(client, said),
            offers=("token ids in both directions", "prompt_logprobs", "a salt for the prefix cache (cache_salt)"),
            lacks=("its dtype: name it with --dtype",) if told is None else (),
            notes=("A request with prompt_logprobs does not read the prefix cache; decode routes do.",),
        ),
    )


def _first(body: Any) -> dict[str, Any]:
    choices = body.get("choices") if isinstance(body, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else {}


def _quietly(client: Client, method: str, url: str, body: dict[str, Any] | None = None) -> Answer:
    """Ask what many servers do not know; an answer that is no JSON counts as not knowing."""
    try:
        return client.probe(method, url, body)
    except (CaptureError, EngineUnavailable):
        return Answer(404, None)


def _text(client: Client, value: Any) -> str | None:
    return client.redact(value)[:100] if isinstance(value, str) and value else None
