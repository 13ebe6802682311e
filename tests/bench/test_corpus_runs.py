"""The corpus run through a tiny model, from the command line to the figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvdrift.errors import UsageError
from kvdrift_bench.cli.faults import BenchOptions, app, bench_faults
from kvdrift_bench.figures.document import FAULTS as MARKERS
from kvdrift_bench.models.prompt_sets import prompt_set
from kvdrift_bench.planted.torch import clean_twins
from kvdrift_bench.run import judging, runner
from kvdrift_bench.run.records import LADDER, NATIVE, Record, RecordFile, read_records
from kvdrift_bench.run.subjects import Subject, choose_subjects
from kvdrift_bench.run.torch_host import open_torch

FAULTS = ("position_plus_one", "heads_tiled")


def options(**changes: object) -> BenchOptions:
    settings: dict[str, object] = {
        "models": ("tiny:llama",),
        "dtypes": ("bfloat16",),
        "attentions": ("sdpa",),
        "faults": FAULTS,
        "twins": False,
        "n_clean": 1,
        "span": 2,
    }
    return BenchOptions(**settings | changes)  # type: ignore[arg-type]


def only_two_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    two = [twin for twin in clean_twins() if twin.name in ("own_attention", "log_softmax")]
    assert len(two) == 2
    monkeypatch.setattr("kvdrift_bench.run.torch_host.clean_twins", lambda: two)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    path = tmp_path_factory.mktemp("bench") / "runs.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        only_two_twins(patch)
        bench_faults(options(twins=True, out=path), lambda text: None)
    return read_records(path, Record)


def test_every_subject_has_one_record(measured: list[Record]) -> None:
    assert [(record.kind, record.name) for record in measured] == [
        ("clean", "clean"),
        ("twin", "own_attention"),
        ("twin", "log_softmax"),
        ("fault", "position_plus_one"),
        ("fault", "heads_tiled"),
    ]
    assert [record.error for record in measured] == [None] * 5
    assert all(record.n_tensors > 100 for record in measured)


@pytest.mark.parametrize("way", [LADDER, NATIVE])
def test_faults_are_found_where_they_were_planted_and_twins_are_not(measured: list[Record], way: str) -> None:
    for record in measured:
        judged = record.kvdrift[way]
        assert judged.is_mismatch is (record.kind == "fault")
        if record.kind == "fault":
            assert record.changed > 0
            assert (judged.right_layer, judged.right_address, judged.above) == (True, True, True)


def test_peers_see_the_same_run(measured: list[Record]) -> None:
    by_name = {record.name: record for record in measured}
    wrong, twin = by_name["heads_tiled"].peers, by_name["log_softmax"].peers

    assert wrong["gretacore_hash"].flagged
    assert wrong["sglang_rel"].flagged
    assert wrong["sglang_rel"].first in [(0, "attn_scores"), (0, "attn_probs"), (0, "attn_ctx")]
    assert twin["gretacore_hash"].flagged
    assert not twin["polygraphy_snr"].flagged
    assert all(peer.steps is not None for peer in wrong.values())  # float64 references were there


def test_without_the_ladder_nothing_but_the_native_dtype_is_captured(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"

    bench_faults(options(ladder="off", n_clean=0, out=path), lambda text: None)

    for record in read_records(path, Record):
        assert set(record.kvdrift) == {NATIVE}
        assert record.peers["dynamo_same"].steps is None
        assert record.peers["sglang_rel"].steps


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs.jsonl"
    first = bench_faults(options(out=path, faults=FAULTS[:1], ladder="off"), lambda text: None)
    before = path.read_bytes()
    path.write_bytes(before + b'{"model": "cut o')  # what an interrupted run leaves
    calls: list[str] = []
    measure = runner._measure

    def noted(bench: runner.Bench, subject: Subject, record: Record) -> None:
        calls.append(subject.name)
        measure(bench, subject, record)

    monkeypatch.setattr(runner, "_measure", noted)

    again = bench_faults(options(out=path, ladder="off"), lambda text: None)

    assert calls == [FAULTS[1]]
    assert path.read_bytes().startswith(before)
    assert (first.n_faults, again.n_faults) == (1, 2)
    assert len(read_records(path, Record)) == 3


def test_an_interrupted_run_keeps_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs.jsonl"
    measure = runner._measure

    def interrupted(bench: runner.Bench, subject: Subject, record: Record) -> None:
        if subject.name == FAULTS[1]:
            raise KeyboardInterrupt
        measure(bench, subject, record)

    monkeypatch.setattr(runner, "_measure", interrupted)
    words = ["faults", "--model", "tiny:llama", "--dtype", "bf16", "--attn", "sdpa", "--no-twins", "--clean", "0"]

    result = CliRunner().invoke(
        app, [*words, "--span", "2", "--ladder", "off", "--faults", ",".join(FAULTS), "--out", str(path)]
    )

    assert result.exit_code == 130
    assert [record.name for record in read_records(path, Record)] == [FAULTS[0]]


def test_a_fault_that_breaks_the_run_is_recorded_as_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: object, engine: object, tokens: object, commits: object) -> None:
        raise ValueError("shapes differ\nin two lines")

    monkeypatch.setattr(runner, "_capture", broken)

    summary = bench_faults(options(n_clean=0, faults=FAULTS[:1]), lambda text: None)

    (line,) = summary.broken
    assert line.startswith("position_plus_one (tiny:llama bfloat16 sdpa): ValueError: shapes differ (")
    assert "/" not in line
    assert summary.ways == {}


def test_a_diagnosis_that_breaks_off_leaves_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: object, decision: object) -> None:
        raise ValueError("no shapes fit")

    monkeypatch.setattr(judging, "explain", broken)

    summary = bench_faults(options(n_clean=0, faults=FAULTS[:1], ladder="model"), lambda text: None)

    assert summary.ways[LADDER].detected.hits == 1
    assert summary.ways[LADDER].right_cause.hits == 0
    assert "the diagnosis: ValueError: no shapes fit" in summary.broken[0]


def test_the_command_writes_its_figures(tmp_path: Path) -> None:
    document, figures = tmp_path / "accuracy.md", tmp_path / "accuracy.json"
    words = ["faults", "--model", "tiny:llama", "--dtype", "bf16", "--attn", "sdpa", "--no-twins", "--clean", "1"]
    words += ["--span", "2", "--faults", FAULTS[0], "--markdown", str(document), "--json", str(figures)]

    result = CliRunner().invoke(app, words)

    assert result.exit_code == 0, result.output
    text = document.read_text()
    assert text.startswith(MARKERS.begin)
    assert text.endswith(f"{MARKERS.end}\n")
    assert "kvdrift-bench faults --model tiny:llama --dtype bfloat16" in text
    assert str(tmp_path) not in text
    loaded = json.loads(figures.read_text())
    assert loaded["ways"]["ladder"]["detected"]["hits"] == 1
    assert {peer["rule"] for peer in loaded["peers"]} >= {"sglang_rel", "neuron_module", "sglang_k3"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "llamacpp:model.gguf"], "add --engine llamacpp"),
        (["--model", "http://127.0.0.1:8000/v1"], "no fault can be planted in a running server"),
        (["--engine", "vllm"], "use --engine hf or llamacpp"),
        (["--kv-type", "f16"], "--kv-type is for --engine llamacpp"),
        (["--flash-attn", "on"], "--flash-attn is for --engine llamacpp"),
        (["--engine", "llamacpp"], "--attn is for --engine hf"),
        (["--model", "tiny:nothing"], "no tiny model 'nothing'"),
        (["--faults", "no_such_fault"], "no fault 'no_such_fault'"),
        (["--ladder", "layer"], "--ladder model, off or both"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--model", "tiny:gemma2", "--attn", "sdpa"], "nothing is left to run"),
        (["--faults", ","], "a list of names is empty"),
        (["--clean", "-1"], "0 or more"),
        (["--sets", "0"], "--sets is 0, and must be 1 or more"),
        (["--jobs", "0"], "--jobs is 0, and must be 1 or more"),
    ],
)
def test_what_cannot_be_run_is_said_at_once(words: list[str], message: str) -> None:
    given = ["faults", "--model", "tiny:llama", "--attn", "sdpa"]
    if words[0] == "--model":
        given = ["faults"]

    result = CliRunner().invoke(app, [*given, *words])

    assert result.exit_code == 2
    assert message in result.output


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"some": "thing"}\n')

    with pytest.raises(UsageError, match=r"other\.jsonl:1"):
        RecordFile(path, Record)


def test_sets_of_prompts_differ_and_are_always_the_same() -> None:
    sets = [prompt_set(f"set_{number}", None, 128) for number in range(40)]

    assert len({json.dumps(prompts) for prompts in sets}) == 40
    assert sets == [prompt_set(f"set_{number}", None, 128) for number in range(40)]
    words = prompt_set("set_7", lambda text: [ord(c) % 100 for c in text], 128)
    assert all(5 <= len(ids) <= 40 for ids in words.values())
    assert len(words) == 3


def test_all_faults_and_twins_are_chosen_by_default() -> None:
    host = open_torch("tiny:llama", "float32", "sdpa")
    chosen = choose_subjects(host, faults=None, twins=True, n_clean=2)
    kinds = [subject.kind for subject in chosen]

    assert kinds.count("fault") >= 80
    assert kinds.count("twin") >= 30
    assert kinds.count("clean") == 2


def test_each_fault_runs_on_every_set_of_prompts_and_each_run_has_its_own_record(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"

    one = bench_faults(options(ladder="off", n_clean=0, faults=FAULTS[:1], out=path), lambda text: None)
    two = bench_faults(options(ladder="off", n_clean=0, faults=FAULTS[:1], out=path, n_sets=2), lambda text: None)

    records = read_records(path, Record)
    assert [record.prompts for record in records] == ["set_0", "set_1"]
    assert len({record.key for record in records}) == 2
    assert (one.n_faults, two.n_faults) == (1, 2)
    assert two.ways[NATIVE].by_fault[FAULTS[0]].detected.trials == 2
    assert "--sets 2" in options(n_sets=2).command


@pytest.mark.matrix  # test_llamacpp_faults.py runs in several processes as well
def test_several_processes_measure_what_one_does(tmp_path: Path) -> None:
    paths = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    asked = {"dtypes": ("bfloat16", "float32"), "ladder": "off", "n_clean": 1, "faults": FAULTS[:1]}

    summaries = [bench_faults(options(out=p, jobs=n, **asked), lambda text: None) for n, p in enumerate(paths, 1)]

    ran = [{record.key: record for record in read_records(path, Record)} for path in paths]
    assert ran[0].keys() == ran[1].keys()
    assert len(ran[0]) == 4
    for key, record in ran[0].items():
        assert ran[1][key].kvdrift == record.kvdrift
        assert ran[1][key].peers == record.peers
    assert summaries[0] == summaries[1]


def test_records_of_an_older_edition_are_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    asked = options(ladder="off", n_clean=0, faults=FAULTS[:1], out=path)
    bench_faults(asked, lambda text: None)
    path.write_bytes(path.read_bytes().replace(b'"edition":2,', b""))

    summary = bench_faults(asked, lambda text: None)

    assert [record.edition for record in read_records(path, Record)] == [1, 2]
    assert summary.n_faults == 1
