"""Audits of a real llama-server: clean ones live and drawn from what was recorded, and planted faults of decode."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from kvdrift.engines.hf.demo import find_gguf
from kvdrift.server.capture import capture_server
from kvdrift.server.client import Client
from kvdrift.server.dialects.detect import detect
from kvdrift.server.judge import judge
from kvdrift.server.plan import ServerPlan
from kvdrift.server.prompts import DEFAULT_PROMPTS
from kvdrift.server.values import Captured
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.progress import Silent
from kvdrift_bench.models.tiny_gguf import DIM, write_tiny_gguf
from kvdrift_bench.run.llama_server import started
from kvdrift_bench.run.server_faults import TWICE_FED, ServerFault, faulty, stale_slot, turned_back
from kvdrift_bench.run.server_pool import Pool, Recorded

Settings = Mapping[str, Mapping[str, str | int | bool]]
# Settings of clean servers, by what a reader calls them; what is left out has llama.cpp's default.
_DEFAULT = {"all defaults, 1 slot": dict[str, str | int | bool]()}
_UNIFIED = {"4 slots, unified": dict[str, str | int | bool](n_parallel=4, kv_unified=True)}
TINY: Settings = {
    **_DEFAULT,
    **_UNIFIED,
    "flash attention off": {"flash_attn": "disabled"},
    "cache q8_0": {"cache_type_k": "q8_0", "cache_type_v": "q8_0"},
}
EMBEDDED: Settings = {
    **_DEFAULT,
    **_UNIFIED,
    "4 slots, split": {"n_parallel": 4, "kv_unified": False},
    "1 slot, unified": {"kv_unified": True},
}
_PROMPTS, _SHORTEST, _LONGER = 12, 5, 5
_MOST_REQUESTS = 1000
_TIMEOUT_S = 300.0


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
    return Recorded(setting, dialect.facts, captured, plan, time.monotonic() - began)


def clean_audits(model: Model, n_each: int, settings: Settings, pool: Pool) -> Iterator[Recorded]:
    """Audit clean servers live, `n_each` times each setting, every time with other continuations."""

    def live(setting: str, seed: int) -> Recorded:
        with started(model.file, **settings[setting]) as url:
            return record(url, model, setting, ServerPlan(seed=seed, timeout_s=_TIMEOUT_S))

    # Setting by setting in turns, so that what an interrupted run has kept is of all of them.
    for i in range(n_each):
        for setting in settings:
            yield pool.get(f"{model.name} {setting} {i}", partial(live, setting, 100 * i))


def fault_audits(model: Model, pool: Pool) -> Iterator[tuple[str, Recorded]]:
    """Audit the servers with planted faults, with at most 1,000 requests."""
    plan = ServerPlan(max_requests=_MOST_REQUESTS, timeout_s=_TIMEOUT_S)

    def planted(fault: ServerFault) -> Recorded:
        with tempfile.TemporaryDirectory() as folder, faulty(model.file, fault, Path(folder)) as url:
            return record(url, model, fault.name, plan)

    for fault in (
        TWICE_FED,
        ServerFault(f"a stale slot in layer {model.layer}", edit=stale_slot(model.layer)),
        ServerFault("positions off by one in decode", edit=turned_back(model.head_dim, model.rope_base)),
    ):
        yield fault.name, pool.get(f"{model.name} {fault.name}", partial(planted, fault))
    for cache, name in (
        ("q4_0", "a cache of q4_0 claimed to be f16, beside a server with f16"),
        ("f16", "none: a cache of f16 beside another server with f16"),
    ):
        yield name, pool.get(f"{model.name} {name}", partial(_beside, model, cache, name))


def _beside(model: Model, cache: str, name: str) -> Recorded:
    """Audit a server with a type of cache beside one as it is claimed to be."""
    with started(model.file, cache_type_k=cache, cache_type_v=cache) as url, started(model.file) as claimed:
        plan = ServerPlan(max_requests=_MOST_REQUESTS, timeout_s=_TIMEOUT_S, against=claimed)
        return record(url, model, name, plan)


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
            mixed.n_computed_all = mixed.n_computed_all and source.n_computed_all
            mixed.absent |= source.absent
            mixed.failures |= source.failures
        yield judge(mixed, first.facts, ServerPlan(seed=i)).verdict
