"""The C++ and the Rust writer write what the Python writer does, byte by byte: values, slots, parts and attention."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from kvdrift.trace import Writer
from kvdrift.trace.readers.written import WrittenManifest, WrittenTrace
from kvdrift.trace.store import MANIFEST, read_json, read_tensors
from tests.support.command import ROOT
from tests.support.examples import cpp_engine, rust_program

WRITERS = ROOT / "tests" / "support" / "writers"
NAME = 'e "q" \\ \n'


def from_python(folder: Path) -> Path:
    """Write what the programs in tests/support/writers write."""
    writer = Writer(folder, engine=NAME, model="m", dtype="bfloat16", n_layers=2, absent=["k_norm", "q_norm"])
    f64 = -1.25 + 0.5 * np.arange(6.0)
    f32 = f64.astype(np.float32)
    half, byte = (0x3C00 + np.arange(6, dtype=np.uint16)), (0x30 + np.arange(6, dtype=np.uint8))
    bf16, f16 = half.view(ml_dtypes.bfloat16), half.view(np.float16)
    e4m3, e5m2 = byte.view(ml_dtypes.float8_e4m3fn), byte.view(ml_dtypes.float8_e5m2)
    tokens, slots = [5, 6, 7, 8], [3, 1, 2]
    for kind in ("prefill", "prefill_again", "decode"):
        with getattr(writer, kind)("p", tokens) as out:
            out.call(3, 1, 3) if kind == "decode" else out.call(0, 4, 0)
            out.attention(0, scale=0.1, softcap=30.5, window=3, sinks=[0.25, -1e-7], slopes=[0.5, 0.25])
            out.attention(1, scale=0.125)

            def rows(site: str, values: Any, layer: int | None = 0, out: Any = out, **how: Any) -> None:
                out.rows(site, values, positions=[3], layer=layer, **how)

            rows("embed_out", f64[None], None)
            rows("layer_in", f32[None])
            rows("q_proj", f16[None])
            rows("q_rope", bf16.reshape(1, 3, 2))
            out.cache("k_cache", e4m3.reshape(3, 1, 2), position=3, layer=0, slots=slots)
            out.cache("v_cache", e5m2.reshape(3, 1, 2), position=3, layer=0, slots=slots)
            out.cache("k_cache", bf16.reshape(3, 1, 2), position=3, layer=1)
            rows("attn_probs", f32.reshape(1, 2, 3), slots=slots)
            for rank, span in enumerate([(0, 3), (3, 6)]):
                rows("attn_ctx", f32[slice(*span)].reshape(1, 3, 1), rank=rank, heads=span)
                rows("mlp_out", f32[None, slice(*span)], rank=rank, columns=span)
                rows("attn_out", f32[None], rank=rank)
    writer.finish()
    return folder


def contents(folder: Path) -> tuple[Any, dict[Any, Any]]:
    """The facts of a directory and its passes: of each record place, dtype, shape, bytes and slots."""
    manifest = read_json(folder / MANIFEST, WrittenManifest, 1)
    engine = manifest.engine
    passes = {(entry.pass_name, entry.mode): _contents(folder, entry) for entry in manifest.traces}
    return (engine.engine, engine.model, engine.dtype, engine.n_layers, *sorted(manifest.absent)), passes


def _contents(folder: Path, entry: WrittenTrace) -> Any:
    tensors = read_tensors(folder / entry.file)
    records = {}
    for record in entry.records:
        values = tensors[record.tensor]
        slots: Any = np.arange(values.shape[0] if "cache" in record.site else values.shape[-1])
        slots = slots if record.slots is None else tensors[record.slots]
        keyed = record.site in ("k_cache", "v_cache", "attn_probs")
        part = (record.rank, *(record.heads or ()), "of", *(record.columns or ()))
        place = (record.site, record.layer, tuple(record.positions), part)
        records[place] = (str(values.dtype), values.shape, values.tobytes(), slots.tolist() if keyed else None)
    calls = [(call.start, call.q_len, call.cache_len_before) for call in entry.calls]
    return entry.prompt, entry.rung, entry.tokens, calls, entry.attention, records


@pytest.mark.parametrize(("compiled", "source"), [(cpp_engine, "values.cpp"), (rust_program, "values.rs")])
def test_another_language_writes_the_same_bytes(
    tmp_path: Path, compiled: Callable[[Path, Path], Path], source: str
) -> None:
    binary = compiled(tmp_path / "writer", WRITERS / source)
    subprocess.run([binary, tmp_path / "other"], check=True)

    facts, passes = contents(from_python(tmp_path / "python"))
    other_facts, other = contents(tmp_path / "other")

    assert facts == other_facts
    assert set(passes) == set(other) == {("prefill", None), ("prefill_again", None), ("decode", "as_designed")}
    for name, expected in passes.items():
        assert len(expected[-1]) == 14
        assert other[name] == expected, name

    again = subprocess.run([binary, tmp_path / "other"], capture_output=True, text=True)
    assert again.returncode != 0
    assert "is not empty; name a new directory" in again.stderr


def test_what_the_cpp_writer_refuses(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cpp"
    source.write_text(
        """#include "kvdrift_trace.hpp"
        template <typename F> void refused(F f) {
          try { f(); std::puts("accepted"); } catch (const std::runtime_error& e) { std::puts(e.what()); }
        }
        int main(int, char** argv) {
          kvdrift::Writer w(argv[1], "e", "m", "float32", 1);
          auto p = w.prefill("p", {1, 2});
          const double x[2] = {1, 2};
          refused([&] { p.rows("q_proj", 0, {1}, x, {1, 1}, "I8"); });
          refused([&] { p.rows("q_proj", 0, {1}, x, {2, 1}, "F64"); });
          refused([&] { p.rows("q_proj", 0, {1}, x, {1, 0}, "F64"); });
          refused([&] { p.cache("k_cache", 0, 1, x, {2, 1, 1}, "F64", {0}); });
          refused([&] { p.cache("k_cache", 0, 1, x, {2, 1}, "F64"); });
          refused([&] { p.attention(0, 1.0 / (x[0] - 1)); });
        }"""
    )
    binary = cpp_engine(tmp_path / "wrong", source)
    done = subprocess.run([binary, tmp_path / "t"], capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    expected = ["unknown dtype I8", "other rows than", "is empty", "for every slot", "[slot", "not finite"]
    assert len(said) == len(expected)
    for text, line in zip(expected, said, strict=True):
        assert text in line
