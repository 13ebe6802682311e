"""Which server answers at an address, which model it serves, and what it offers for a comparison."""

from __future__ import annotations

from kvdrift.errors import EngineUnavailable, UsageError
from kvdrift.server.client import Client
from kvdrift.server.dialects.base import Dialect
from kvdrift.server.dialects.llama_cpp_python import LlamaCppPython
from kvdrift.server.dialects.llamacpp import LlamaCpp
from kvdrift.server.dialects.sglang import Sglang
from kvdrift.server.dialects.vllm import Vllm

# The most telling question first: SGLang's /server_info, llama.cpp's /props, llama-cpp-python's /extras. Many servers
# took over vLLM's parameters, so it comes last.
DIALECTS: tuple[type[Dialect], ...] = (Sglang, LlamaCpp, LlamaCppPython, Vllm)
_SHOWN_MODELS = 10


def detect(client: Client, model: str | None, told_dtype: str | None) -> Dialect:
    """Return the dialect of the server behind `client`, which its answers tell.

    Raises:
        EngineUnavailable: nobody answers, or the server offers no logprobs of prompts in any known way.
        UsageError: the model is not served, or several are and none was named.
    """
    name = _model(client, model)
    for kind in DIALECTS:
        dialect = kind.recognise(client, name, told_dtype)
        if dialect is not None:
            return dialect
    raise EngineUnavailable(f"the server at {client.api} speaks no dialect that kvdrift knows")


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
            f"the answer to {where} is not a list of models; is this the address of an LLM server's API?"
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
