"""From what a user names to a model and a tokenizer: the embedded default, a directory, a hub id, a GGUF file, or a
function of the user's own."""

from __future__ import annotations

import importlib
import os
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from kvdrift.engines.base import CanBeOpened
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
) -> LoadedModel:
    """Load the model that `spec` names; None is the embedded default.

    Raises:
        UsageError: the dtype, the attention implementation or the device is not known.
        EngineUnavailable: there is no such model, or it is not a causal language model.
    """
    wanted = resolve_dtype(dtype)
    target = _device(device)
    options = {"--dtype": dtype, "--attn": attention, "--device": device}
    loaded = _load(spec, wanted, attention, progress)
    model = loaded.model
    if isinstance(model, CanBeOpened):
        if given := [name for name, value in options.items() if value is not None]:
            raise UsageError(
                f"{given[0]} is for models of transformers, and {spec} is an engine of its own, which says itself how "
                "it runs; leave it out"
            )
        return loaded
    reject_encoder(model, loaded.name)
    try:
        if wanted is not None and any(p.dtype != wanted for p in model.parameters() if p.is_floating_point()):
            model = model.to(wanted)
        if target is not None:
            model = model.to(target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        what = f"--device {device}" if target is not None else f"--dtype {dtype}"
        raise EngineUnavailable(f"cannot move the model to {what}: {_line(error)}") from error
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
    spec: str | None, dtype: torch.dtype | None, attention: str | None, progress: Callable[[str], None] | None
) -> LoadedModel:
    if spec is None:
        from kvdrift.engines.hf.demo import MODEL_NAME, demo_model_dir

        directory = demo_model_dir(progress)
        return _from_pretrained(str(directory), MODEL_NAME, {}, dtype, attention)
    if not spec.strip():
        raise UsageError("MODEL is empty; name a model directory, a hub id or a .gguf file, or leave it out")
    module, colon, function = spec.partition(":")
    if colon and function.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return _from_function(spec, module, function, attention)
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
                "save_pretrained wrote"
            )
        return _from_pretrained(spec, path.resolve().name, {}, dtype, attention)
    if spec.startswith((".", "/", "~")) or spec.endswith(".gguf") or spec.count("/") > 1:
        raise EngineUnavailable(f"there is no model at {spec}; check the path")
    return _from_hub(spec, dtype, attention, progress)


def _from_function(spec: str, module: str, function: str, attention: str | None) -> LoadedModel:
    """Call the user's own `package.module:function`, which returns (model, tokenizer)."""
    sys.path.insert(0, "")  # `python -m` would find modules in the working directory; a console script must be told
    try:
        found = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise EngineUnavailable(
            f"cannot import {module!r} of {spec!r}: {error}; run in the folder that holds it, or set PYTHONPATH"
        ) from error
    except AttributeError as error:
        if _raised_in(error) is not None:
            raise EngineUnavailable(f"importing {module!r} of {spec!r} failed: {_told(error)}") from error
        raise EngineUnavailable(f"{module!r} has no function {function!r}; check MODEL {spec!r}") from error
    except (Exception, SystemExit) as error:  # the user's own module may raise anything while it is imported
        raise EngineUnavailable(f"importing {module!r} of {spec!r} failed: {_told(error)}") from error
    finally:
        sys.path.remove("")
    if not callable(found):
        kind = type(found).__name__
        raise UsageError(f"{spec} is of type {kind}; it must be a function that returns (model, tokenizer)")
    try:
        result = found()
    except (Exception, SystemExit) as error:  # the same for the user's own function
        raise EngineUnavailable(f"{spec} failed: {_told(error)}; it is called without arguments") from error
    model, tokenizer = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    is_engine = isinstance(model, CanBeOpened)
    if not isinstance(model, torch.nn.Module) and not is_engine:
        raise UsageError(
            f"{spec} returned {type(model).__name__}; it must return (model, tokenizer), tokenizer may be None"
        )
    if tokenizer is not None and not (callable(tokenizer) or callable(getattr(tokenizer, "encode", None))):
        raise UsageError(
            f"{spec} returned {type(tokenizer).__name__} as the tokenizer, which has no method encode; return None if "
            "there is none"
        )
    if attention is not None and not is_engine:
        set_attention(model, attention)
    return LoadedModel(model, tokenizer, spec)


def _raised_in(error: BaseException) -> str | None:
    """Return where in the user's own code an exception came from, None if it was raised in this module."""
    frames = [f for f in traceback.extract_tb(error.__traceback__)[1:] if not f.filename.startswith("<frozen")]
    outside = [f for f in frames if f.filename not in (__file__, importlib.__file__)]
    return f"{outside[-1].filename}:{outside[-1].lineno}" if outside else None


def _told(error: BaseException) -> str:
    """An exception of the user's code as one line, with the place, since there will be no traceback."""
    where = _raised_in(error)
    return f"{type(error).__name__}: {_line(error)}" + (f" ({where})" if where is not None else "")


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
    return (
        f"cannot load the model {source!r}: {_line(error)} "
        "Check the name; a hub id needs network access or an earlier download, a local model its directory."
    )


def _cannot_attend(attention: str, error: BaseException) -> str:
    return f"cannot use --attn {attention}: {_line(error)} Use --attn eager or sdpa, or install what it needs."


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."


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
