"""The corpus of llama.cpp run through a tiny GGUF file, from the command line to the figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvdrift.errors import EngineUnavailable
from kvdrift_bench.cli.faults import BenchOptions, app, bench_faults
from kvdrift_bench.figures.promises import check_promises
from kvdrift_bench.models.tiny_gguf import write_tiny_gguf
from kvdrift_bench.planted.llamacpp import clean_twins
from kvdrift_bench.run.llamacpp_host import open_llamacpp
from kvdrift_bench.run.records import LADDER, NATIVE, Record, read_records
from tests.support.gguf import demo_gguf

FAULTS = ("q_position_plus_one", "slot_zero", "sink_missing")


def options(**changes: object) -> BenchOptions:
    settings: dict[str, object] = {
        "engine": "llamacpp",
        "models": ("tiny:llama",),
        "kv_types": ("f16",),
        "flash": ("off",),
        "faults": FAULTS,
        "twins": True,
        "n_clean": 1,
        "span": 2,
    }
    return BenchOptions(**settings | changes)  # type: ignore[arg-type]


# One for each part of a layer that they change; the others are part of the matrix.
CORE = ("two_splits", "products_in_four_parts", "norms_in_float64")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    path = tmp_path_factory.mktemp("bench") / "runs.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        some = [twin for twin in clean_twins() if twin.name in CORE]
        assert len(some) == len(CORE)
        patch.setattr("kvdrift_bench.run.llamacpp_host.clean_twins", lambda: some)
        bench_faults(options(out=path), lambda text: None)
    return read_records(path, Record)


@pytest.mark.parametrize("way", [LADDER, NATIVE])
def test_faults_are_found_where_they_were_planted_and_twins_are_not(measured: list[Record], way: str) -> None:
    assert [record.error for record in measured] == [None] * len(measured)
    judged = {record.name: record.kvdrift[way] for record in measured if record.skipped is None}
    assert judged.pop("clean").verdict == "STRUCTURAL_DRIFT"
    for name in FAULTS[:2]:
        found = judged.pop(name)
        assert (found.verdict, found.right_address, found.right_cause) == ("MISMATCH", True, True), found
    assert set(judged) == set(CORE)
    assert {item.verdict for item in judged.values()} <= {"STRUCTURAL_DRIFT", "EXACT"}


@pytest.mark.matrix
def test_no_other_twin_is_a_mismatch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    others = [twin for twin in clean_twins() if twin.name not in CORE]
    monkeypatch.setattr("kvdrift_bench.run.llamacpp_host.clean_twins", lambda: others)

    bench_faults(options(out=path, faults=(), n_clean=0), lambda text: None)

    records = read_records(path, Record)
    assert [record.error for record in records] == [None] * len(others)
    judged = {record.name: record.kvdrift for record in records if record.skipped is None}
    assert len(CORE) + len(judged) >= 10
    for way in (LADDER, NATIVE):
        assert {verdicts[way].verdict for verdicts in judged.values()} <= {"STRUCTURAL_DRIFT", "EXACT"}, way


def test_a_fault_that_the_graph_cannot_carry_says_why(measured: list[Record]) -> None:
    assert [record.skipped for record in measured if record.name == "sink_missing"] == ["no attention sinks"]


def test_records_say_where_they_were_measured(measured: list[Record]) -> None:
    assert {record.setting for record in measured} == {"tiny:llama f32-kv_f16-no_flash llama.cpp"}
    places = {record.name: record.places for record in measured if record.kind == "fault"}
    assert places["q_position_plus_one"] == [(2, "q_rope"), (2, "k_rope")]
    assert all(record.changed > 0 for record in measured if record.kind == "fault" and record.skipped is None)


def test_the_effect_of_a_fault_is_read_at_the_fine_rung_and_held_against_what_the_ladder_claims(
    measured: list[Record],
) -> None:
    (record,) = (record for record in measured if record.name == "q_position_plus_one")
    ladder, native = record.kvdrift[LADDER], record.kvdrift[NATIVE]
    assert ladder.above
    assert native.above
    assert ladder.detectable is not None
    assert native.detectable is not None
    # What the ladder claims is its own, and not what the shipped configuration allows.
    assert ladder.detectable != pytest.approx(native.detectable)


def test_peers_see_the_same_run_with_the_fine_configuration_as_reference(measured: list[Record]) -> None:
    (slot,) = (record for record in measured if record.name == "slot_zero")
    assert slot.n_tensors > 100
    assert slot.peers["dynamo_same"].steps is not None
    assert slot.peers["sglang_rel"].flagged


def test_the_command_writes_its_figures(tmp_path: Path) -> None:
    document, figures = tmp_path / "gguf.md", tmp_path / "gguf.json"
    words = [
        "faults",
        "--engine",
        "llamacpp",
        "--model",
        "tiny:qwen3",
        "--kv-type",
        "f16,q8_0",
        "--flash-attn",
        "off,on",
    ]
    words += ["--no-twins", "--clean", "1", "--span", "2", "--faults", FAULTS[0], "--ladder", "off", "--jobs", "2"]

    result = CliRunner().invoke(app, [*words, "--markdown", str(document), "--json", str(figures)])

    assert result.exit_code == 0, result.output
    assert "llama.cpp keeps V in q8_0 with flash attention only; off is left out" in result.output
    text = document.read_text()
    assert "--engine llamacpp --model tiny:qwen3 --kv-type f16,q8_0 --flash-attn off,on" in text
    assert "llama-cpp-python" in text
    assert "native configuration alone" in text
    assert "r prefill in the finest configuration" in text
    assert str(tmp_path) not in text
    loaded = json.loads(figures.read_text())
    by_dtype = loaded["ways"]["native"]["by_dtype"]
    assert set(by_dtype) == {"f32-kv_f16-no_flash", "f32-kv_f16-flash", "f32-kv_q8_0-flash"}
    assert all(some["detected"]["hits"] == 1 for some in by_dtype.values())
    assert "torch" not in loaded["machine"]


def test_a_file_of_ones_own_is_named_by_its_name_alone(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "mine.gguf", "llama")
    for spec in (str(path), f"llamacpp:{path}"):
        host = open_llamacpp(spec, "f16", "off", tmp_path)
        assert (host.name, host.grounds.n_layers) == ("mine.gguf", 2)


def test_weights_are_written_again_in_the_types_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    asked = options(weights=("q8_0", "f16"), faults=("q_position_plus_one",), twins=False, ladder="off", out=path)
    bench_faults(asked, lambda text: None)
    found = {(record.dtype, record.kind): record.kvdrift[NATIVE].verdict for record in read_records(path, Record)}
    assert found == {
        ("q8_0-kv_f16-no_flash", "clean"): "STRUCTURAL_DRIFT",
        ("q8_0-kv_f16-no_flash", "fault"): "MISMATCH",
        ("float16", "clean"): "STRUCTURAL_DRIFT",
        ("float16", "fault"): "MISMATCH",
    }
    assert "--dtype q8_0,f16 --kv-type f16" in asked.command


def test_the_command_names_no_place_of_this_machine(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "mine.gguf", "llama")
    for spec in (str(path), f"llamacpp:{path}"):
        command = options(models=(spec,)).command
        assert "--model mine.gguf " in command
        assert str(tmp_path) not in command


def test_two_files_of_one_name_are_two_models(tmp_path: Path) -> None:
    """What is written again for one of them is not taken for the other."""
    written = []
    for folder, kind in (("one", "llama"), ("two", "qwen3")):
        (tmp_path / folder).mkdir()
        path = write_tiny_gguf(tmp_path / folder / "mine.gguf", kind)
        written.append(open_llamacpp(str(path), "f16", "off", tmp_path, weights="f16"))
    first, second = written
    assert first.name == second.name == "mine.gguf"
    assert not first.grounds.has("Qcur_normed")
    assert second.grounds.has("Qcur_normed")


def test_the_embedded_file_is_the_default(tmp_path: Path) -> None:
    host = open_llamacpp("default", "q8_0", "on", tmp_path)
    assert host.path == demo_gguf()
    with host.run(None) as (engine, _):
        encode = host.encoder(engine)
        assert encode is not None
        assert len(encode("two words")) > 1


def test_the_promise_of_the_native_configuration_is_counted() -> None:
    summary = bench_faults(options(ladder="off", twins=False, faults=FAULTS[:2]), lambda text: None)
    promises = {promise.what: promise.share for promise in check_promises(summary)}
    assert promises["right layer, of the detected, native configuration alone"].trials == 2


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["--model", "tiny:nothing"], "no tiny GGUF model 'nothing'", 2),
        (["--model", "absent.gguf"], "no readable model at absent.gguf", 3),
        (["--kv-type", "q9"], "unknown cache type 'q9'", 2),
        (["--kv-type", "q8_0", "--flash-attn", "off"], "nothing is left to run", 2),
        (["--flash-attn", "maybe"], "--flash-attn is 'maybe'", 2),
        (["--dtype", "q9_0"], "unknown type of weights 'q9_0'", 2),
        (["--attn", "sdpa"], "--attn is for --engine hf", 2),
        (["--faults", "rows_rolled"], "no fault 'rows_rolled'", 2),
        (["--model", "http://127.0.0.1:8000/v1"], "no fault can be planted in a running server", 2),
    ],
)
def test_what_cannot_be_run_is_said_at_once(words: list[str], message: str, code: int) -> None:
    given = ["faults", "--engine", "llamacpp"] + ([] if "--model" in words else ["--model", "tiny:llama"])
    result = CliRunner().invoke(app, [*given, *words])
    assert result.exit_code == code
    assert message in result.output


def test_the_writer_of_tiny_files_is_asked_for_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "kvdrift_bench.models.tiny_gguf", raising=False)
    with pytest.raises(EngineUnavailable, match="pip install gguf"):
        open_llamacpp("tiny:llama", "f16", "off", tmp_path)


def test_llama_cpp_is_measured_without_torch(tmp_path: Path) -> None:
    """Whoever has GGUF files alone need not install torch."""
    path = write_tiny_gguf(tmp_path / "mine.gguf", "llama")
    code = (
        # Not None in sys.modules: scipy looks there for torch, and takes what it finds for the module.
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers'):\n"
        "            raise ModuleNotFoundError(f'{name} is not here')\n"
        "sys.meta_path.insert(0, Without())\n"
        "from kvdrift_bench.cli.faults import app\n"
        f"app(['faults', '--engine', 'llamacpp', '--model', {str(path)!r}, '--kv-type', 'f16', '--flash-attn', 'on',"
        " '--faults', 'slot_zero', '--no-twins', '--clean', '0', '--span', '2', '--ladder', 'off'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "100.0 % (1 of 1" in done.stdout
