"""What `--scenario all` costs, and how many forward passes shared prefills spare."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

import kvdrift
from benchmarks.support import demo, say
from kvdrift_bench.models.tiny import tiny_model

TINY_LIMIT_S, DEMO_LIMIT_S = 60.0, 600.0


def run(options: argparse.Namespace) -> bool:
    """Run every scenario on a tiny model and on the embedded one; False if one takes longer than it may."""
    loaded = demo()
    # On matrices this small threads only wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    prompts = {"p": list(range(1, 18)), "q": list(range(20, 32))}
    tiny = _timed("tiny llama", tiny_model("llama", torch.float32, "sdpa"), None, prompts)
    torch.set_num_threads(threads)
    return (tiny <= TINY_LIMIT_S) & (_timed(loaded.name, loaded.model, loaded.tokenizer, None) <= DEMO_LIMIT_S)


def _timed(name: str, model: Any, tokenizer: Any, prompts: Any) -> float:
    began = time.perf_counter()
    audit = kvdrift.audit(model, tokenizer, prompts=prompts, scenarios="all")
    seconds = time.perf_counter() - began
    rows, passes = audit.view["scenarios"], audit.view["forward_passes"]
    say(
        f"{name}: {seconds:.0f} s, {sum(row['applicable'] for row in rows)} of {len(rows)} scenarios apply, "
        f"{passes['made']} forward passes made, {passes['saved']} spared; {audit.verdict}"
    )
    return seconds
