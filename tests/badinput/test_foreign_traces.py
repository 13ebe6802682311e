"""Trace files of other engines that are damaged, contradictory, huge or hostile: file, line and exit code 5."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvdrift.trace import Writer
from kvdrift.trace.readers import lines
from tests.support.command import ROOT, Result, kvdrift
from tests.support.greta import write_traces
from tests.support.tiny import tiny_model

Record = dict[str, Any]
FILE = "p_as_designed_trace.jsonl"
DECODE = "p_as_designed_decode_trace.jsonl"
SMALL: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of traces that nobody has touched."""
    model = tiny_model("llama", dtype=torch.bfloat16, **SMALL)
    folder = tmp_path_factory.mktemp("real") / "t"
    return write_traces(folder, model, {"p": [5, 9, 17, 3]}, config={"dtype": "bf16"})


@pytest.fixture
def traces(real: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(real, tmp_path / "t"))


def refused_with(done: Result, message: str) -> None:
    assert message in done.err, done.err
    assert (done.code, done.out, done.err.count("\n")) == (5, "", 1)


def edit(path: Path, number: int, change: Callable[[Record], object]) -> None:
    """Change the record on line `number` of a file."""
    found = path.read_text().splitlines()
    record = json.loads(found[number - 1])
    change(record)
    found[number - 1] = json.dumps(record)
    path.write_text("\n".join(found) + "\n")


def test_untouched_traces_are_judged(traces: Path) -> None:
    """Without this, every test below could pass on traces that are bad anyway."""
    assert kvdrift("judge", "--markdown", traces).code == 0


# ------------------------------------------------------------------------------------------------------- damaged files


def test_a_truncated_gzip_file(traces: Path) -> None:
    path = traces / FILE
    data = gzip.compress(path.read_bytes())
    path.unlink()
    (traces / f"{FILE}.gz").write_bytes(data[: len(data) // 2])
    done = kvdrift("judge", "--markdown", traces)
    refused_with(done, f"{traces / FILE}.gz: the gzip file breaks off or is damaged after line ")


@pytest.mark.parametrize("data", [b"no gzip at all", b"\x1f\x8b\x08\x00garbage that follows", b"\x1f"])
def test_what_is_no_gzip_file(traces: Path, data: bytes) -> None:
    (traces / "q_trace.jsonl.gz").write_bytes(data)
    refused_with(
        kvdrift("judge", "--markdown", traces), "q_trace.jsonl.gz: the gzip file breaks off or is damaged after line 0"
    )


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"\xff\xfe",
        b'{"event": ' + b"[" * 100_000,
        b"nonsense",
        b'{"event": "stage_trace"',
        b'{"event": "stage_trace",}',
    ],
)
def test_a_line_that_is_not_json(traces: Path, line: bytes) -> None:
    path = traces / FILE
    found = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*found[:3], line, *found[3:]]))
    done = kvdrift("judge", "--markdown", traces)
    assert done.err.startswith(f"kvdrift: {path}:4: ")
    refused_with(done, "Expected `str`" if b"[[" in line else "the line is not JSON")


def test_a_file_cut_in_the_middle_of_a_line(traces: Path) -> None:
    path = traces / FILE
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 20])
    n_lines = len(data.splitlines())
    refused_with(kvdrift("judge", "--markdown", traces), f"{path}:{n_lines}: the line is not JSON")


def test_a_line_that_no_record_has(traces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE", 1 << 20)
    (traces / "q_trace.jsonl").write_bytes(b'{"event": "' + b"x" * (2 << 20) + b'"}')
    refused_with(
        kvdrift("judge", "--markdown", traces), "q_trace.jsonl:1: the line is longer than 1 MB, so it is not a record"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("event"), "missing required field `event`"),
        (lambda r: r.pop("point"), "the record has neither `point` nor `tensor`"),
        (lambda r: r.pop("pos_id"), "pos_id is None, and must be a position from 0 up"),
        (lambda r: r.pop("layer"), "is of layer None, and must be of one from 0 up"),
        (lambda r: r.pop("sample"), "the record has no sample"),
        (lambda r: r.update(sample=[]), "the record has no sample"),
        (lambda r: r.update(sample_n=3), "sample_n is 3, and the sample has 32 values"),
        (lambda r: r.update(stride_elems=8), "the sample has 32 values of a tensor of 8"),
        (lambda r: r.update(layer="0"), "Expected `int | null`, got `str` - at `$.layer`"),
        (lambda r: r.update(pos_id=1.5), "Expected `int | null`, got `float` - at `$.pos_id`"),
        (lambda r: r.update(sample="many"), "Expected `array | null`, got `str` - at `$.sample`"),
        (lambda r: r["sample"].__setitem__(0, "many"), "a value is not a number"),
        (lambda r: r["sample"].__setitem__(0, None), "at `$.sample[0]`"),
        (lambda r: r.update(pos_id=-1), "pos_id is -1, and must be a position from 0 up"),
        (lambda r: r.update(pos_id=10**12), "pos_id is 1000000000000, and must be a position from 0 up"),
        (lambda r: r.update(layer=-2), "is of layer -2, and must be of one from 0 up"),
        (lambda r: r.update(layer=10**9), "is of layer 1000000000, and must be of one from 0 up"),
        (lambda r: r.update(seq_len=-4), "seq_len is -4, which it cannot be"),
        (lambda r: r.update(phase="training"), "the phase is 'training'"),
        (lambda r: r.update(hash=-1), "hash is -1, which it cannot be"),
        (
            lambda r: r.update(sample=[0.123456789 + i for i in range(32)]),
            "the record contradicts itself: its sample has the hash",
        ),
    ],
)
def test_fields_that_are_missing_or_wrong(traces: Path, change: Callable[[Record], object], message: str) -> None:
    edit(traces / FILE, 2, change)
    done = kvdrift("judge", "--markdown", traces)
    refused_with(done, message)
    assert f"{traces / FILE}:2: " in done.err


def test_a_duplicate_record_names_both_lines(traces: Path) -> None:
    path = traces / FILE
    found = path.read_text().splitlines()
    path.write_text("\n".join([*found, found[4]]) + "\n")
    done = kvdrift("judge", "--markdown", traces)
    refused_with(done, f"{path}:{len(found) + 1}: the record of ")
    assert f"is there a second time; the first is {path}:5" in done.err


def test_a_phase_without_partner_is_counted_and_no_pass(traces: Path) -> None:
    (traces / DECODE).unlink()
    done = kvdrift("judge", "--markdown", traces)
    assert done.code == 6
    assert "values have no partner in the other pass (TRACE_OFFSET)" in done.out


def test_layers_out_of_order_are_paired_by_address_and_said(traces: Path) -> None:
    path = traces / FILE
    path.write_text("\n".join(reversed(path.read_text().splitlines())) + "\n")
    done = kvdrift("judge", "--markdown", traces)
    assert done.code == 0
    assert "LAYER_ORDER: " in done.out
    assert f"records come after one of a higher layer; first: {path}:" in done.out


def test_bare_nan_of_a_c_stream_is_read_and_never_passes(traces: Path) -> None:
    path = traces / DECODE
    found = path.read_text().splitlines()
    number = next(i for i, line in enumerate(found) if '"mlp_out"' in line)
    record = json.loads(found[number])
    record["sample"][0] = float("nan")
    found[number] = json.dumps(record).replace("NaN", "-nan")
    path.write_text("\n".join(found) + "\n")
    done = kvdrift("judge", "--markdown", traces)
    assert done.code == 1
    assert "layer 0 / mlp_out" in done.out


def test_facts_that_disagree(traces: Path) -> None:
    (traces / "metadata.json").write_text('{"dtype": "fp16"}')
    done = kvdrift("judge", "--markdown", traces)
    refused_with(done, "the facts disagree: dtype is ")
    assert str(traces / "config.json") in done.err
    assert str(traces / "metadata.json") in done.err


@pytest.mark.parametrize("text", ["{", "[]", "\0"])
def test_facts_that_are_none(traces: Path, text: str) -> None:
    (traces / "config.json").write_text(text)
    refused_with(kvdrift("judge", "--markdown", traces), f"{traces / 'config.json'} is not a JSON object")


# ----------------------------------------------------------------------------------------------- outside the directory


@pytest.mark.parametrize("name", [FILE, "config.json"])
def test_a_link_out_of_the_directory_is_not_followed(traces: Path, tmp_path: Path, name: str) -> None:
    shutil.move(traces / name, tmp_path / "elsewhere")
    (traces / name).symlink_to(tmp_path / "elsewhere")
    refused_with(
        kvdrift("judge", "--markdown", traces),
        f"{traces / name} leads out of {traces}; copy the file into the directory",
    )


def test_a_linked_folder_is_not_walked_into(traces: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "bad_trace.jsonl").write_text("not a record\n")
    (traces / "linked").symlink_to(tmp_path / "other")
    done = kvdrift("judge", "--markdown", traces)
    assert done.code in (0, 5)
    assert "not a record" not in done.err + done.out


# ------------------------------------------------------------------------------------------------------ which format


def test_an_unknown_format(traces: Path) -> None:
    done = kvdrift("judge", "--markdown", traces, "--format", "onnx")
    assert (done.code, done.out) == (2, "")
    assert "unknown format 'onnx'; use --format auto, kvdrift, transformers-debug, npz, sglang, greta" in done.err


@pytest.mark.parametrize("name", ["kvdrift", "sglang", "npz", "transformers-debug"])
def test_the_wrong_format_is_a_message(traces: Path, name: str) -> None:
    done = kvdrift("judge", "--markdown", traces, "--format", name)
    assert (done.code, done.out, done.err.count("\n")) == (5, "", 1)


def test_lines_of_something_else(traces: Path) -> None:
    for path in traces.glob("*.jsonl"):
        path.write_text('{"event": "request", "id": 1}\n')
    refused_with(kvdrift("judge", "--markdown", traces), "holds no stage_trace or stage_logits record of a known point")


# ------------------------------------------------------------------------------------------------- written directories


@pytest.fixture
def written(tmp_path: Path) -> Path:
    folder = tmp_path / "w"
    writer = Writer(folder, engine="e", model="m", dtype="float32", n_layers=1)
    rows = np.ones((1, 4), np.float32)
    for out in (writer.prefill("p", [1, 2, 3]), writer.decode("p", [1, 2, 3])):
        with out:
            out.call(0, 3, 0) if out._kind == "prefill" else out.call(2, 1, 2)
            out.rows("layer_in", rows, positions=[2], layer=0)
            out.rows("attn_norm_out", rows, positions=[2], layer=0)
    writer.finish()
    return folder


def change_manifest(folder: Path, change: Callable[[Any], object]) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_an_untouched_written_directory_is_judged(written: Path) -> None:
    assert kvdrift("judge", "--markdown", written, "--scope", "up-to=attn_norm_out").code == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["traces"][0].update(file="../outside.safetensors"), "names a file outside its directory"),
        (lambda m: m["traces"][0].update(file="/etc/passwd"), "names a file outside its directory"),
        (lambda m: m["traces"][0].update(file="/etc/passwd", sha256=None), "names a file outside its directory"),
        (lambda m: m["traces"][0].update(file="missing", sha256=None), "cannot read the trace"),
        (lambda m: m["traces"][0].update(sha256="0" * 64), "does not match its checksum"),
        (lambda m: m.update(format="other"), "is of the format 'other'"),
        (lambda m: m.update(format_version=9), "has format version 9, and this kvdrift reads 1"),
        (lambda m: m.update(colour="red"), "unknown field `colour`"),
        (lambda m: m["engine"].update(dtype="int8"), "the engine's dtype is 'int8'"),
        (lambda m: m["engine"].update(n_layers=0), "the engine has 0 layers"),
        (lambda m: m["traces"][0].update(pass_name="train"), "has the pass 'train'"),
        (lambda m: m["traces"][1].update(mode="sideways"), "has the mode 'sideways'"),
        (lambda m: m["traces"][1].update(rung="int4"), "has the rung 'int4'"),
        (lambda m: m["traces"][1].update(tokens=[]), "has 0 tokens"),
        (lambda m: m["traces"].append(m["traces"][0]), "is listed twice"),
        (lambda m: m["traces"].append({**m["traces"][1], "name": "again"}), "has two passes of one kind"),
        (lambda m: m["traces"].pop(0), "and no prefill to compare it with"),
        (lambda m: m["traces"][0]["records"][0].update(site="query"), "records the unknown site 'query'"),
        (lambda m: m["traces"][0]["records"][0].update(layer=7), "of layer 7, and the engine has 1 layers"),
        (lambda m: m["traces"][0]["records"][0].update(positions=[3]), "outside its 3 tokens"),
        (lambda m: m["traces"][0]["records"][0].update(positions=[1, 2]), "does not fit its 2 positions"),
        (lambda m: m["traces"][0]["records"][0].update(site="k_cache"), "a cache read is [slot, head, dim]"),
        (lambda m: m["traces"][0]["records"].pop(), "which manifest.json does not list"),
        (lambda m: m["traces"][0]["records"][0].update(tensor="nothing"), "which manifest.json does not list"),
    ],
)
def test_an_edited_manifest(written: Path, change: Callable[[Any], object], message: str) -> None:
    change_manifest(written, change)
    refused_with(kvdrift("judge", "--markdown", written), message)


def test_a_pass_that_was_taken_out_does_not_pass(written: Path) -> None:
    change_manifest(written, lambda m: m["traces"].pop())
    done = kvdrift("judge", "--markdown", written)
    assert done.code == 6


def header_of(folder: Path, header: object) -> None:
    """Put another header into the safetensors file of the prefill, and take its checksum away."""
    path = next(folder.glob("*/*/prefill.safetensors"))
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    change_manifest(folder, lambda m: m["traces"][0].update(sha256=None))


@pytest.mark.parametrize(
    "shape", [[10**9, 10**9], [2**62, 4], [-1, 4], [0, 4], [1, 5], [], [1.5], ["4"], [[4]], [2**64]]
)
def test_absurd_shapes_in_a_safetensors_header(written: Path, shape: list[Any]) -> None:
    names = ["0.layer_in", "1.attn_norm_out"]
    offsets = [[0, 16], [16, 32]]
    header_of(
        written, {n: {"dtype": "F32", "shape": shape, "data_offsets": o} for n, o in zip(names, offsets, strict=True)}
    )
    done = kvdrift("judge", "--markdown", written)
    assert (done.code, done.out, done.err.count("\n")) == (5, "", 1)
    assert "prefill.safetensors" in done.err


@pytest.mark.parametrize("offsets", [[0, 10**15], [16, 0], [-16, 0], [8, 24], [0]])
def test_absurd_offsets_in_a_safetensors_header(written: Path, offsets: list[int]) -> None:
    header_of(written, {"0.layer_in": {"dtype": "F32", "shape": [1, 4], "data_offsets": offsets}})
    done = kvdrift("judge", "--markdown", written)
    assert (done.code, done.out, done.err.count("\n")) == (5, "", 1)


@pytest.mark.parametrize(
    "spans",
    [[(0, 16), (0, 16), (16, 32)], [(16, 32)], [(0, 16)]],
    ids=["two at one place", "a gap before", "bytes of nobody behind"],
)
def test_tensors_that_overlap_or_leave_gaps(written: Path, spans: list[tuple[int, int]]) -> None:
    header_of(
        written, {f"{i}.x": {"dtype": "F32", "shape": [1, 4], "data_offsets": span} for i, span in enumerate(spans)}
    )
    path = next(written.glob("*/*/prefill.safetensors"))
    data = path.read_bytes()
    path.write_bytes(data[: 8 + int.from_bytes(data[:8], "little")] + bytes(32))
    refused_with(kvdrift("judge", "--markdown", written), "its tensors overlap or leave gaps")


@pytest.mark.parametrize("size", [0, 10**18])
def test_an_absurd_header_length(written: Path, size: int) -> None:
    path = next(written.glob("*/*/prefill.safetensors"))
    path.write_bytes(size.to_bytes(8, "little") + path.read_bytes()[8:])
    change_manifest(written, lambda m: m["traces"][0].update(sha256=None))
    refused_with(kvdrift("judge", "--markdown", written), "is not a readable safetensors file")


# ---------------------------------------------------------------------------------------------------------- huge files

_PEAK = """
import resource, sys
from pathlib import Path
from kvdrift.pipeline.judge import judge_directory

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1 << 20)

small = judge_directory(Path(sys.argv[1]))
before = peak()
audit, _ = judge_directory(Path(sys.argv[2]))
print(audit.verdict, peak() - before)
"""


@pytest.mark.slow
def test_a_file_of_100_mb_is_read_in_less_than_60_mb(real: Path, tmp_path: Path) -> None:
    """Many prompts in one file; what stays is a row for each compared pair."""
    big = tmp_path / "big"
    big.mkdir()
    (big / "config.json").write_text('{"dtype": "bf16"}')
    rng = np.random.default_rng(1)
    # To write out other values for every prompt takes longer than to read them.
    samples = [[float(f"{v:.6g}") for v in rng.normal(size=4096).astype(np.float16)] for _ in range(16)]
    texts = [json.dumps(sample) for sample in samples]
    size, prompt = 0, 0
    with (big / "all_trace.jsonl").open("w") as file:
        while size < 100 << 20:
            for phase, seq_len in (("prefill_last", 8), ("decode0", 1)):
                record = {
                    "event": "stage_trace",
                    "prompt_id": f"p{prompt}",
                    "phase": phase,
                    "point": "x_in",
                    "layer": 0,
                    "pos_id": 7,
                    "seq_len": seq_len,
                    "tokens_total": 8,
                    "stride_elems": 4096,
                    "sample_n": 4096,
                }
                size += file.write(f'{json.dumps(record)[:-1]}, "sample": {texts[prompt % len(texts)]}}}\n')
            prompt += 1

    done = subprocess.run(
        [sys.executable, "-c", _PEAK, real, big],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )

    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[1]) < 60.0, done.stdout


def test_nothing_is_left_in_the_temporary_folder(traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    assert kvdrift("judge", "--markdown", traces).code == 0
    edit(traces / FILE, 2, lambda r: r.pop("pos_id"))
    assert kvdrift("judge", "--markdown", traces).code == 5
    assert list((tmp_path / "tmp").iterdir()) == []
