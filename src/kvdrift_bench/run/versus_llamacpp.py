"""transformers against llama.cpp on the same GGUF file, at float32: tiny random models and SmolLM2-135M."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvdrift.versus.compare import compare_engines
from kvdrift_bench.models.tiny_gguf import write_tiny_gguf

PROMPTS = {"p": [5, 9, 17, 3, 22, 41, 7, 11, 30, 2]}
SMOLLM2 = "SmolLM2-135M-Instruct, Q4_1"
_SMOLLM2_PROMPTS = {"p": [504, 3575, 282, 4649, 314, 260, 253, 5345]}
# By kind of tiny file, what the file says and the reader of transformers does not take from it.
KINDS: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 32},
    "phi3": {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2},
    "gemma2": {
        "query_pre_attn_scalar": 32,
        "sliding_window": 6,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 30.0,
    },
    "gpt2": {"vocab_size": 96, "n_positions": 128, "n_inner": 96, "bos_token_id": 1, "eos_token_id": 2},
}


@dataclass(frozen=True, slots=True)
class OnGguf:
    """What was said of one file."""

    kind: str
    verdict: str
    place: str
    minimum: float
    native: float


def against_llamacpp(kinds: Mapping[str, Mapping[str, Any]] = KINDS, *, smollm2: bool = True) -> Iterator[OnGguf]:
    """Compare each kind of tiny file, and the embedded model, read by transformers, with llama.cpp."""
    for kind, changes in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            yield _compared(kind, write_tiny_gguf(Path(folder) / "tiny.gguf", kind), changes, PROMPTS)
    if smollm2:
        from kvdrift.engines.hf.demo import find_gguf

        yield _compared(SMOLLM2, find_gguf(), {}, _SMOLLM2_PROMPTS)


def _compared(kind: str, file: Path, changes: Mapping[str, Any], prompts: Mapping[str, list[int]]) -> OnGguf:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from kvdrift.engines.hf.quiet import quiet_transformers

    with quiet_transformers():
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        for name, value in changes.items():
            setattr(config, name, value)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, config=config, dtype=torch.float32
        )
    found = compare_engines(model, f"llamacpp:{file}", prompts=prompts)
    place = "" if found.decision.first is None else str(found.decision.first.place)
    return OnGguf(kind, str(found.verdict), place, found.decision.minimum or 0.0, found.decision.native or 0.0)


def table_of_llamacpp(found: Sequence[OnGguf]) -> str:
    """Return what was said of each file, as Markdown."""
    lines = ["| file | verdict | would have been seen in the logits | native logits differ by |", "|---|---|---|---|"]
    lines += [
        f"| {item.kind} | {item.verdict}{f' at {item.place}' if item.place else ''} | {item.minimum:.1g} | "
        f"{item.native:.1g} |"
        for item in found
    ]
    return "\n".join(lines) + "\n"
