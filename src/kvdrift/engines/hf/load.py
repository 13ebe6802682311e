"""From what a user names to a model and a tokenizer: the embedded default, a directory, a hub id, a GGUF file, or a
function of the user's own."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from kvdrift.engines.function import WRAP_IT, call_function, check_tokenizer, first_words, names_function
from kvdrift.engines.hf.quiet import quiet_transformers
from kvdrift.engines.torch.precision import DTYPES
from kvdrift.errors import EngineUnavailable, UsageError

_DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "fp64": "float64"}


_HUB = "https://huggingface.co"  # unless HF_ENDPOINT names another
# Longer than a slow network needs for one connection.
_CONNECT_S = 5.0


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model, its tokenizer (None if it has none), and the name under which it is reported."""

    model: Any
    tokenizer: Any
    name: str


def resolve_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype that a user named, None for the model's own."""
    if name is None or name == "auto":
        return None
    full = _DTYPE_ALIASES.get(name, name)
    if full not in DTYPES:
        known = ", ".join([*DTYPES, *_DTYPE_ALIASES])
        raise UsageError(f"unknown dtype {name!r}; use --dtype with one of {known}")
    return DTYPES[full]


def load_model(
    spec: str | None,
    *,
    dtype: str | None = None,
    attention: str | None = None,
    device: str | None = None,
    progress: Callable[[str], None] | None = None,
    made: tuple[Any, Any] | None = None,
) -> LoadedModel:
    """Load the model that `spec` names; None is the embedded default. `made` is what its function returned, if it is
    one and was called already.

    Raises:
        UsageError: the dtype, the attention implementation or the device is not known.
        EngineUnavailable: there is no such model, or it is not a causal language model.
    """
    wanted = resolve_dtype(dtype)
    target = _device(device)
    loaded = _load(spec, wanted, attention, progress, made)
    model = loaded.model
    reject_encoder(model, loaded.name)
    try:
        if wanted is not None and any(p.dtype != wanted for p in model.parameters() if p.is_floating_point()):
            model = model.to(wanted)
        if target is not None:
            model = model.to(target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        what = f"--device {device}" if target is not None else f"--dtype {dtype}"
        raise EngineUnavailable(f"cannot move the model to {what}: {first_words(error)}") from error
    return LoadedModel(model, loaded.tokenizer, loaded.name)


def reject_encoder(model: Any, name: str) -> None:
    """Refuse a BERT-like model: its tokens see those after them, so nothing that is cached can be right.

    Raises:
        EngineUnavailable: attention is bidirectional, by what the modules say of themselves.
    """
    modules = list(model.modules())
    if any(getattr(m, "is_causal", None) is True for m in modules):
        return
    if any(getattr(m, "is_decoder", None) is False for m in modules):
        raise EngineUnavailable(
            f"{name} ({type(model).__name__}) is encoder-only: its attention is bidirectional, so it has no decode "
            "step on a cache to audit. Use a decoder-only language model."
        )


def _load(
    spec: str | None,
    dtype: torch.dtype | None,
    attention: str | None,
    progress: Callable[[str], None] | None,
    made: tuple[Any, Any] | None,
) -> LoadedModel:
    if spec is None:
        from kvdrift.engines.hf.demo import MODEL_NAME, demo_model_dir

        directory = demo_model_dir(progress)
        return _from_pretrained(str(directory), MODEL_NAME, {}, dtype, attention)
    if not spec.strip():
        raise UsageError("MODEL is empty; name a model directory, a hub id or a .gguf file, or leave it out")
    if names_function(spec):
        return _from_function(spec, call_function(spec) if made is None else made, attention)
    path = Path(spec)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UsageError(
                f"{spec} is a file, and not a .gguf file; name a model directory, a hub id or a .gguf file"
            )
        return _from_pretrained(str(path.parent), path.stem, {"gguf_file": path.name}, dtype, attention, shown=spec)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise EngineUnavailable(
                f"the directory {spec} has no config.json, so it holds no transformers model; name the directory that "
                f"save_pretrained wrote, or, for a model of your own, {WRAP_IT}"
            )
        return _from_pretrained(spec, path.resolve().name, {}, dtype, attention)
    if spec.startswith((".", "/", "~")) or spec.endswith(".gguf") or spec.count("/") > 1:
        raise EngineUnavailable(f"there is no model at {spec}; check the path")
    return _from_hub(spec, dtype, attention, progress)


def _from_function(spec: str, made: tuple[Any, Any], attention: str | None) -> LoadedModel:
    """Check what the user's own `package.module:function` returned."""
    model, tokenizer = made
    if not isinstance(model, torch.nn.Module):
        raise UsageError(
            f"{spec} returned {type(model).__name__}; it must return (model, tokenizer), tokenizer may be None. "
            f"What is no transformers model can be audited too; {WRAP_IT}"
        )
    check_tokenizer(spec, tokenizer)
    if attention is not None:
        set_attention(model, attention)
    return LoadedModel(model, tokenizer, spec)


def set_attention(model: Any, attention: str) -> None:
    """Switch the attention implementation of a loaded model."""
    if not hasattr(model, "set_attn_implementation"):
        raise UsageError(f"{type(model).__name__} has one attention implementation only; leave --attn out")
    try:
        model.set_attn_implementation(attention)
    except (ValueError, KeyError, ImportError) as error:
        raise UsageError(_cannot_attend(attention, error)) from error


def _from_hub(
    name: str, dtype: torch.dtype | None, attention: str | None, progress: Callable[[str], None] | None
) -> LoadedModel:
    """Load from the hub, or without asking it from an earlier download if it cannot be reached."""
    if progress is not None:
        progress(f"loading {name}")
    problem = why_no_hub()
    return _from_pretrained(
        name, name, {} if problem is None else {"local_files_only": True}, dtype, attention, problem
    )


def why_no_hub() -> str | None:
    """Say why the hub cannot be reached, None if it can, or if only the hub's own client can tell.

    The client tries each file six times with growing pauses, half a minute in all where names do not resolve and
    minutes where a firewall drops everything. One connection tells the same. Behind a proxy there is none to try.
    """
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{name} is set"
    url = urlsplit(os.environ.get("HF_ENDPOINT") or _HUB)
    if getproxies() or not url.hostname:
        return None
    try:
        socket.create_connection((url.hostname, url.port or 443), timeout=_CONNECT_S).close()
    except OSError as error:
        return f"{url.hostname} cannot be reached ({error.strerror or error})"
    return None


def _from_pretrained(
    source: str,
    name: str,
    where: dict[str, Any],
    dtype: torch.dtype | None,
    attention: str | None,
    no_hub: str | None = None,
    *,
    shown: str | None = None,
) -> LoadedModel:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    def refuse(error: BaseException) -> EngineUnavailable:
        return EngineUnavailable(_cannot_load(shown or source, error, no_hub))

    # Code that comes with a checkpoint is not run; without the word, transformers would ask on the terminal.
    where = {**where, "trust_remote_code": False}
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(source, **where)
        except Exception as error:
            raise refuse(error) from error
        if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise EngineUnavailable(
                f"{name} is a {config.model_type} model, which transformers does not offer as a causal language model; "
                "kvdrift audits decoder-only language models."
            )
        options: dict[str, Any] = {"dtype": dtype or "auto", "output_loading_info": True, **where}
        if attention is not None:
            options["attn_implementation"] = attention
        try:
            model, info = AutoModelForCausalLM.from_pretrained(source, **options)
        except Exception as error:
            if attention is not None and ("attention" in str(error).lower() or attention in str(error)):
                raise UsageError(_cannot_attend(attention, error)) from error
            raise refuse(error) from error
        reject_encoder(model, name)
        if missing := sorted(info["missing_keys"]):
            raise EngineUnavailable(
                f"the checkpoint of {shown or source} lacks {len(missing)} weights of a {type(model).__name__}, such "
                f"as {missing[0]}; they would be random. Check that the checkpoint is whole, and that it is one of a "
                "causal language model."
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **where)
        except Exception:  # noqa: BLE001 - the same; prompts can still be given as token ids
            tokenizer = None
    return LoadedModel(model, tokenizer, name)


def _cannot_load(source: str, error: BaseException, no_hub: str | None) -> str:
    if no_hub is not None and isinstance(error, OSError):
        return (
            f"cannot load the model {source!r}: it is not a directory here, {no_hub}, and no earlier download is in "
            "the cache. Check the name, connect to the network, or name a local directory."
        )
    words = first_words(error)
    said = words if words.endswith((".", "!", "?")) else f"{words}."
    if source.endswith(".gguf"):
        return (
            f"cannot load the model {source!r}: {said} That is what transformers says of the file; to audit it as "
            f"llama.cpp runs it: kvdrift audit llamacpp:{source}"
        )
    return (
        f"cannot load the model {source!r}: {said} "
        "Check the name; a hub id needs network access or an earlier download, a local model its directory. If it is "
        f"no transformers model, {WRAP_IT}"
    )


def _cannot_attend(attention: str, error: BaseException) -> str:
    return f"cannot use --attn {attention}: {first_words(error)} Use --attn eager or sdpa, or install what it needs."


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}; use --device cpu, cuda or cuda:0") from error
    if device.type == "meta":
        raise UsageError("tensors on the device 'meta' have no values to compare; use --device cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EngineUnavailable("no CUDA device is available to this torch; use --device cpu")
    return device
