"""Dumps of sampled tokens and their logprobs, as a sampler and a trainer write them, recorded once from a real model.

The sampler decodes at temperature 1 on a cache, in float32, bfloat16 or with weights rounded to int8; the trainer
scores the same tokens in one full forward. A fault is in one of the two. Everything is kept as arrays [sequence, token]
in one .npz file, from which dumps are drawn by choosing sequences. Recording takes about ten minutes on one core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvdrift.engines.hf.demo import demo_model_dir
from kvdrift.engines.hf.quiet import quiet_transformers
from kvdrift.errors import UsageError

N_SEQUENCES, N_PROMPT, N_TOKENS, TOP = 24, 12, 48, 5
# Which faults the trainer is recorded with; those of logits alone (temperature, a displaced row) cost no run.
TRAINER_FAULTS = ("bos", "template", "stale_weights", "position", "restart", "first_key")
SAMPLER_FAULTS = ("position", "first_key", "stale_weights")
STALE_TEMPERATURE = 0.8
_TEXTS = (
    "The capital of France is a city in which many people have lived for a long time",
    "def merge(left, right):\n    result = []\n    while left and right:\n        if left[0]",
    "Question: A train travels 60 km in 45 minutes. What is its speed in km per hour?",
    "Once upon a time there was a small robot that wanted to learn how to paint",
    "In linear algebra, a matrix is orthogonal if its transpose is equal to its",
    "Dear Sir or Madam, I am writing to you with regard to the invoice of last",
    "The three most important rules for writing clear scientific prose are these: first",
    "SELECT name, COUNT(*) FROM orders JOIN customers ON orders.customer = customers.id WHERE",
    "Water boils at a lower temperature on a mountain, because the pressure of the air",
    "List five animals that live in the sea and say what each of them eats: 1.",
    "To solve the equation 3x + 7 = 22, we first subtract seven from both sides and",
    "The old man looked at the river and said to the boy who stood beside him",
)


class Recorder:
    """One model in one dtype, which decodes, samples and scores."""

    def __init__(self, dtype: str, seed: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = demo_model_dir()
        with quiet_transformers():
            kind = torch.float32 if dtype in ("float32", "int8") else torch.bfloat16
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        if dtype == "int8":
            _round_to_int8(self.model)
        self.seed = seed
        ids = [self.tokenizer(text)["input_ids"][:N_PROMPT] for text in _TEXTS]
        assert all(len(row) == N_PROMPT for row in ids), [len(row) for row in ids]
        self.prompts = torch.tensor([ids[i % len(ids)] for i in range(N_SEQUENCES)])

    @torch.no_grad()
    def decode(
        self, fault: str | None = None, temperature: float = 1.0, forced: Tensor | None = None, batch: int = N_SEQUENCES
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Sample, or score `forced` tokens [sequence, token], step by step on a cache."""
        generator = torch.Generator().manual_seed(self.seed)
        rows = []
        for start in range(0, N_SEQUENCES, batch):
            prompts = self.prompts[start : start + batch]
            given = None if forced is None else forced[start : start + batch]
            with _changed(self.model, fault if fault == "stale_weights" else None):
                rows.append(self._decode_batch(prompts, fault, temperature, given, generator))
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def _decode_batch(
        self, prompts: Tensor, fault: str | None, temperature: float, forced: Tensor | None, generator: torch.Generator
    ) -> dict[str, np.ndarray[Any, Any]]:
        out = self.model(prompts, use_cache=True)
        logits, cache = out.logits[:, -1].float(), out.past_key_values
        kept: dict[str, list[Tensor]] = {}
        for step in range(N_TOKENS):
            raw = torch.log_softmax(logits, -1)
            chances = torch.log_softmax(logits / temperature, -1).exp()
            token = torch.multinomial(chances, 1, generator=generator) if forced is None else forced[:, step : step + 1]
            _keep(kept, logits, raw, token)
            length = N_PROMPT + step
            mask = torch.ones(len(prompts), length + 1, dtype=torch.long)
            if fault == "first_key":
                mask[:, 0] = 0
            position = torch.full((len(prompts), 1), length + (fault == "position"))
            out = self.model(token, past_key_values=cache, use_cache=True, attention_mask=mask, position_ids=position)
            logits = out.logits[:, -1].float()
        return {name: torch.stack(steps, 1).numpy() for name, steps in kept.items()}

    @torch.no_grad()
    def prefill(self, tokens: np.ndarray[Any, Any], fault: str | None = None) -> dict[str, np.ndarray[Any, Any]]:
        """Score tokens [sequence, token] in one full forward."""
        given = torch.from_numpy(tokens)
        prompts = self._prompts_of(fault)
        kept: dict[str, list[Tensor]] = {}
        with _changed(self.model, fault if fault == "stale_weights" else None):
            for start in range(0, N_SEQUENCES, 8):
                row = given[start : start + 8]
                head = prompts[start : start + 8]
                ids = torch.cat([head, row], 1)
                position = torch.arange(ids.shape[1])[None].repeat(len(ids), 1)
                if fault == "position":
                    position[:, head.shape[1] :] += 1
                if fault == "restart":
                    position[:, head.shape[1] :] -= head.shape[1]
                mask = torch.ones_like(ids)
                if fault == "first_key":
                    mask[:, 0] = 0
                logits = self.model(ids, attention_mask=mask, position_ids=position, use_cache=False).logits.float()
                at = logits[:, head.shape[1] - 1 : -1]
                _keep(kept, at, torch.log_softmax(at, -1), row[..., None])
                shifted = torch.log_softmax(logits[:, head.shape[1] :], -1).gather(-1, row[..., None])[..., 0]
                kept.setdefault("displaced", []).append(shifted)
        return {name: torch.cat(parts).numpy() for name, parts in kept.items()}

    def _prompts_of(self, fault: str | None) -> Tensor:
        if fault == "bos":
            start = torch.full((N_SEQUENCES, 1), self.tokenizer.bos_token_id)
            return torch.cat([start, self.prompts], 1)
        if fault == "template":
            before = self.tokenizer("<|im_start|>user\n")["input_ids"]
            after = self.tokenizer("<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
            head, tail = (torch.tensor(part)[None].repeat(N_SEQUENCES, 1) for part in (before, after))
            return torch.cat([head, self.prompts, tail], 1)
        return self.prompts


def _keep(kept: dict[str, list[Tensor]], logits: Tensor, raw: Tensor, token: Tensor) -> None:
    cooled = torch.log_softmax(logits / STALE_TEMPERATURE, -1)
    top = raw.topk(TOP, -1)
    for name, value in (
        ("token", token[..., 0]),
        ("logprob", raw.gather(-1, token)[..., 0]),
        ("cooled", cooled.gather(-1, token)[..., 0]),
        ("top_ids", top.indices),
        ("top_logprobs", top.values),
    ):
        kept.setdefault(name, []).append(value)


def _round_to_int8(model: torch.nn.Module) -> None:
    """Round the weights of all layers to int8 by output channel, as weight-only quantisation does."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
                scale = module.weight.abs().amax(1, keepdim=True) / 127.0
                module.weight.copy_((module.weight / scale).round() * scale)


@contextmanager
def _changed(model: torch.nn.Module, fault: str | None) -> Iterator[None]:
    """Take the weights back by one training step: every one by a share of its matrix's rms, up or down at random.

    The share is 0.2 % in float32 and 2 % in bfloat16, which has steps of up to 0.8 % itself.
    """
    if fault is None:
        yield
        return
    size = 2e-3 if next(model.parameters()).dtype == torch.float32 else 2e-2
    generator = torch.Generator().manual_seed(7)
    saved = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                saved[name] = parameter.clone()
                sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                parameter.add_((sign * size * parameter.float().pow(2).mean().sqrt()).to(parameter.dtype))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in saved:
                    parameter.copy_(saved[name])


# A token set is named by its sampler; each scoring of it by its role. `None` is no fault.
SETS: tuple[tuple[str, str | None, float], ...] = (
    ("float32", None, 1.0),
    ("bfloat16", None, 1.0),
    ("int8", None, 1.0),
    ("bfloat16", "position", 1.0),
    ("bfloat16", "first_key", 1.0),
    ("bfloat16", "stale_weights", 1.0),
    ("float32", "position", 1.0),
    ("bfloat16", "temperature", STALE_TEMPERATURE),
)


def record_pool(path: Path, seed: int = 0, say: Callable[[str], None] = lambda _: None) -> None:
    """Record the pool into the file `path`.

    Raises:
        UsageError: the file cannot be written.
        EngineUnavailable: the embedded model is not to be had.
    """
    torch.set_num_threads(1)
    kept: dict[str, np.ndarray[Any, Any]] = {}

    def keep(key: str, found: dict[str, np.ndarray[Any, Any]]) -> None:
        for name, value in found.items():
            small = value.astype(np.int32) if value.dtype.kind == "i" else value.astype(np.float32)
            kept[f"{key}/{name}"] = small

    recorders = {dtype: Recorder(dtype, seed) for dtype in ("float32", "bfloat16", "int8")}
    for dtype, fault, temperature in SETS:
        key = dtype if fault is None else f"{dtype}-{fault}"
        own = recorders[dtype]
        say(f"{key}: sampling")
        sampled = own.decode(None if fault == "temperature" else fault, temperature)
        keep(f"{key}/sampler", sampled)
        tokens = sampled["token"]
        keep(f"{key}/prefill", own.prefill(tokens, fault if fault == "stale_weights" else None))
        trainer = "float32" if dtype == "float32" else "bfloat16"
        keep(f"{key}/trainer-float32", recorders["float32"].prefill(tokens))
        if fault is None:
            keep(f"{key}/repeat", own.decode(forced=torch.from_numpy(tokens), batch=7))
            keep(f"{key}/trainer-bfloat16", recorders["bfloat16"].prefill(tokens))
            for each in TRAINER_FAULTS:
                say(f"{key}: trainer with {each}")
                keep(f"{key}/trainer-{trainer}-{each}", recorders[trainer].prefill(tokens, each))
    try:
        np.savez_compressed(path, **kept)  # type: ignore[arg-type]  # its stub takes the names for options
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; name another file with --pool") from error
