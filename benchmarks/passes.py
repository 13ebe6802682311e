"""Forward passes of the default audit: bare, audited, captured, and what hooks of others make of them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import kvdrift
from benchmarks.table import timed
from kvdrift.capture.modes import continue_greedily
from kvdrift.capture.prompts import default_prompts
from kvdrift.engines.encode import encoder
from kvdrift.engines.hf.engine import HFEngine
from kvdrift.engines.hf.load import LoadedModel
from kvdrift.engines.torch.precision import DTYPES, at_dtype
from kvdrift.trace.model import Trace
from kvdrift.vocabulary.plan import LadderChoice

SPAN = 4

Texts = dict[str, tuple[list[int], list[int]]]  # by name: a prompt, and what the model puts after it


def native_of(model: Any) -> str:
    """Return the name of the dtype of a model's weights."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def texts_of(loaded: LoadedModel, length: int | None = None) -> Texts:
    """Return the default prompts, or one of `length` tokens, with their continuations."""
    encode = encoder(loaded.tokenizer)
    prompts = {name: list(ids) for name, ids in default_prompts(encode, None).items()}
    if length is not None:
        longest = max(prompts.values(), key=len)
        prompts = {"long": (longest * (length // len(longest) + 1))[:length]}
    with HFEngine(loaded.model) as engine:
        return {name: (ids, list(continue_greedily(engine, ids, SPAN))) for name, ids in prompts.items()}


@torch.no_grad()
def bare(model: Any, texts: Texts, rungs: Iterable[str]) -> float:
    """Return the processor time of the passes that a comparison of prefill and decode needs, at each precision, and of
    nothing else: all tokens at once, then the prompt and a step for each further token."""
    spent = 0.0
    for rung in rungs:
        at: AbstractContextManager[None] = nullcontext() if native_of(model) == rung else at_dtype(model, DTYPES[rung])
        with at:
            began = time.process_time()
            for prompt, more in texts.values():
                call(model, [*prompt, *more], DynamicCache(config=model.config), SPAN + 1)
                cache = DynamicCache(config=model.config)
                call(model, prompt, cache, 1)
                for token in more:
                    call(model, [token], cache, 1)
            spent += time.process_time() - began
    return spent


def call(model: Any, tokens: Sequence[int], cache: DynamicCache, keep: int) -> None:
    """Run one forward call on a cache, with the logits of the last `keep` tokens."""
    model(torch.tensor([list(tokens)]), past_key_values=cache, use_cache=True, logits_to_keep=keep)


def audit_of(loaded: LoadedModel, ladder: LadderChoice = "model", texts: Texts | None = None) -> Callable[[], float]:
    """Return what times an audit with its report, traces and all."""
    prompts = None if texts is None else {name: ids for name, (ids, _) in texts.items()}

    def audit() -> float:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            return timed(
                lambda: kvdrift.audit(
                    loaded.model, loaded.tokenizer, prompts=prompts, span=SPAN, out=out, ladder=ladder
                )
            )

    return audit


def capture(engine: HFEngine, texts: Texts) -> None:
    """Record the same passes at all sites, at the positions behind each prompt."""
    rung = engine.info.dtype
    for name, (prompt, more) in texts.items():
        tokens = (*prompt, *more)
        probed = tuple(range(len(prompt), len(tokens)))
        prefill, decode = (Trace(name, kind, "bench", rung, tokens) for kind in ("prefill", "decode"))
        sequence = engine.new_sequence(len(tokens))
        sequence.extend(tokens, probe=probed, sink=prefill)
        sequence.close()
        sequence = engine.new_sequence(len(tokens))
        sequence.extend(prompt)
        for position, token in zip(probed, more, strict=True):
            sequence.extend([token], probe=(position,), sink=decode)
        sequence.close()


def save_by_hooks(model: Any, texts: Texts) -> float:
    """Return the processor time of the same passes with a hook on every module, each call saved as one file."""
    with tempfile.TemporaryDirectory() as folder:
        count, is_armed = 0, False

        def keep(name: str) -> Callable[..., None]:
            def hook(module: Any, args: Any, output: Any) -> None:
                nonlocal count
                value = output[0] if isinstance(output, tuple) else output
                if is_armed and isinstance(value, torch.Tensor):
                    count += 1
                    torch.save(value.detach().clone(), Path(folder) / f"{count}-{name}.pt")

            return hook

        def watched(tokens: Sequence[int], cache: DynamicCache, keep: int) -> None:
            nonlocal is_armed
            is_armed = True
            call(model, tokens, cache, keep)
            is_armed = False

        handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name]
        try:
            return timed(lambda: _both(model, texts, watched))
        finally:
            for handle in handles:
                handle.remove()


@torch.no_grad()
def _both(model: Any, texts: Texts, watched: Callable[[Sequence[int], DynamicCache, int], object]) -> None:
    """Run what `capture` runs: the calls that it records by `watched`, and the prompt before decode by itself."""
    for prompt, more in texts.values():
        watched([*prompt, *more], DynamicCache(config=model.config), SPAN + 1)
        cache = DynamicCache(config=model.config)
        call(model, prompt, cache, 1)
        for token in more:
            watched([token], cache, 1)


def save_by_nnsight(wrapped: Any, texts: Texts) -> float:
    """Return the processor time of the same passes under nnsight, which keeps what every module of a layer gives.

    `wrapped` is the model as nnsight has it.
    """
    return timed(lambda: _both(wrapped._module, texts, partial(_traced, wrapped)))


def _traced(wrapped: Any, tokens: Sequence[int], cache: DynamicCache, keep: int) -> int:
    """Run a call under nnsight and return how many values it kept."""
    nnsight = import_module("nnsight")
    ids = torch.tensor([list(tokens)])
    with wrapped.trace(ids, past_key_values=cache, use_cache=True, logits_to_keep=keep):
        kept = nnsight.save([])
        for layer in wrapped.model.layers:
            kept.append(layer.input_layernorm.output.clone())
            kept.append(layer.self_attn.q_proj.output.clone())
            kept.append(layer.self_attn.k_proj.output.clone())
            kept.append(layer.self_attn.v_proj.output.clone())
            kept.append(layer.self_attn.o_proj.output.clone())
            kept.append(layer.post_attention_layernorm.output.clone())
            kept.append(layer.mlp.output.clone())
        kept.append(wrapped.lm_head.output.clone())
    return len(kept)
