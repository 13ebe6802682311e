"""Audits of a real llama-server: clean ones live and drawn from what was recorded, and planted faults of decode."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvdrift.engines.hf.demo import find_gguf
from kvdrift.server.capture import capture_server
from kvdrift.server.client import Client
from kvdrift.server.dialects.detect import detect
from kvdrift.server.judge import judge
from kvdrift.server.plan import ServerPlan
from kvdrift.server.prompts import DEFAULT_PROMPTS
from kvdrift.server.values import Captured, ServerFacts
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.progress import Silent
from kvdrift_bench.models.tiny_gguf import DIM, write_tiny_gguf
from kvdrift_bench.run.llama_server import started
from kvdrift_bench.run.server_faults import TWICE_FED, ServerFault, faulty, stale_slot, turned_back

# Settings of clean servers, by what a reader calls them; what is left out has llama.cpp's default.
SETTINGS: dict[str, dict[str, str | int | bool]] = {
    "all defaults, 1 slot": {},
    "4 slots, unified": {"n_parallel": 4, "kv_unified": True},
    "flash attention off": {"flash_attn": "disabled"},
    "cache q8_0": {"cache_type_k": "q8_0", "cache_type_v": "q8_0"},
}
_PROMPTS, _SHORTEST, _LONGER = 12, 5, 5
_MOST_REQUESTS = 1000
_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Recorded:
    """One audit: what was captured, and how it was judged."""

    setting: str
    facts: ServerFacts
    captured: Captured
    verdict: Verdict
    seconds: float


@dataclass(frozen=True, slots=True)
class Model:
    """A GGUF file with the prompts that are sent to it, and what planting faults must know of it."""

    name: str
    file: Path
    prompts: Mapping[str, str | tuple[int, ...]]
    head_dim: int
    rope_base: float
    layer: int


def tiny(folder: Path, weights: str) -> Model:
    """Return a tiny random Llama of two layers."""
    file = write_tiny_gguf(folder / f"tiny-{weights}.gguf", "llama", reads_text=True, weights=weights)
    rng = np.random.default_rng(11)
    prompts = {
        f"p{i:02}": (1, *(int(t) for t in rng.integers(3, 131, _SHORTEST - 1 + _LONGER * i))) for i in range(_PROMPTS)
    }
    return Model(f"tiny Llama, {weights}", file, prompts, DIM, 10000.0, 0)


def smollm2() -> Model:
    """Return the embedded SmolLM2-135M-Instruct at Q4_1, with the default prompts."""
    return Model("SmolLM2-135M-Instruct, Q4_1", find_gguf(), DEFAULT_PROMPTS, 64, 100000.0, 12)


def record(url: str, model: Model, setting: str, plan: ServerPlan) -> Recorded:
    """Audit one server as `kvdrift audit` does, and keep what was captured."""
    began = time.monotonic()
    with Client(url, key=None, timeout_s=plan.timeout_s, max_requests=plan.max_requests) as client:
        dialect = detect(client, None, None)
        if plan.against is None:
            captured = capture_server(dialect, client, plan, model.prompts, Silent())
        else:
            with Client(plan.against, key=None, timeout_s=plan.timeout_s, max_requests=plan.max_requests) as second:
                other = detect(second, None, None)
                captured = capture_server(dialect, client, plan, model.prompts, Silent(), other)
    decision = judge(captured, dialect.facts, plan)
    return Recorded(setting, dialect.facts, captured, decision.verdict, time.monotonic() - began)


def clean_audits(
    model: Model, n_each: int, settings: Mapping[str, Mapping[str, str | int | bool]]
) -> Iterator[Recorded]:
    """Audit clean servers live, `n_each` times each setting, every time with other continuations."""
    for setting, words in settings.items():
        with started(model.file, **words) as url:
            for i in range(n_each):
                yield record(url, model, setting, ServerPlan(seed=100 * i, timeout_s=_TIMEOUT_S))


def fault_audits(model: Model) -> Iterator[tuple[str, Recorded]]:
    """Audit the servers with planted faults, with at most 1,000 requests."""
    plan = ServerPlan(max_requests=_MOST_REQUESTS, timeout_s=_TIMEOUT_S)
    planted = (
        TWICE_FED,
        ServerFault(f"a stale slot in layer {model.layer}", edit=stale_slot(model.layer)),
        ServerFault("positions off by one in decode", edit=turned_back(model.head_dim, model.rope_base)),
    )
    with tempfile.TemporaryDirectory() as folder:
        for fault in planted:
            with faulty(model.file, fault, Path(folder)) as url:
                yield fault.name, record(url, model, fault.name, plan)
    name = "a cache of q4_0 claimed to be f16, beside a server with f16"
    with started(model.file, cache_type_k="q4_0", cache_type_v="q4_0") as url, started(model.file) as claimed:
        beside = ServerPlan(max_requests=_MOST_REQUESTS, timeout_s=_TIMEOUT_S, against=claimed)
        yield name, record(url, model, name, beside)


def draw(recorded: list[Recorded], n: int, seed: int) -> Iterator[Verdict]:
    """Judge `n` audits, each put together prompt by prompt from random live ones of one setting."""
    rng = np.random.default_rng(seed)
    by_setting: dict[str, list[Recorded]] = {}
    for audit in recorded:
        by_setting.setdefault(audit.setting, []).append(audit)
    pools = [pool for pool in by_setting.values() if len(pool) > 1]
    for i in range(n if pools else 0):
        pool = pools[i % len(pools)]
        first = pool[0]
        mixed = Captured(prompts=list(first.captured.prompts), n_computed_all=True)
        for prompt in mixed.prompts:
            source = pool[int(rng.integers(len(pool)))].captured
            # Further texts of a prompt bear its name with a number.
            mixed.pairs += [p for p in source.pairs if p.prompt.split(" #")[0] == prompt.name]
            mixed.n_cached |= source.n_cached
        yield judge(mixed, first.facts, ServerPlan(seed=i)).verdict
