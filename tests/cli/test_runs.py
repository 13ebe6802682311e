"""What a run leaves, where it leaves it, and that judging it again says the same."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

import kvdrift as library
from kvdrift.report import run_directory as outdir
from kvdrift.report.run_directory import RunDirectory, default_target
from kvdrift_bench.planted.torch import corpus_for
from tests.support.command import SMALL, kvdrift, names, refused
from tests.support.matrix import further
from tests.support.tiny import tiny_model

PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8], "q": [61]}
REPEATED = (
    "verdict",
    "kind",
    "exit_code",
    "first_failure",
    "modes",
    "instruments",
    "kv_alignment",
    "attention_stats",
    "projection_hashes",
    "hypotheses",
    "recommendations",
    "caveats",
    "coverage",
)


def judged(run: Path) -> dict[str, Any]:
    """What judging the traces of a run gives, as the same JSON."""
    from kvdrift.pipeline.judge import judge_directory

    return dict(json.loads(judge_directory(run)[0].to_json()))


@pytest.mark.parametrize(
    ("mode", "fault", "ladder"),
    [
        ("both", None, "model"),
        ("both", "position_plus_one", "model"),
        ("both", None, "off"),
        *further(
            ("as_designed", None, "model"),
            ("kv_aligned", "all_scales_1.001", "model"),
            ("both", None, "layer"),
            ("both", "position_plus_one", "off"),
        ),
    ],
)
def test_judging_again_says_the_same(tmp_path: Path, mode: Any, fault: str | None, ladder: Any) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16, **{**SMALL, "num_hidden_layers": 3})
    planted = {item.name: item.plant for item in corpus_for(3)}
    with planted[fault](model) if fault else nullcontext():
        audit = library.audit(model, prompts=PROMPTS, span=1, mode=mode, ladder=ladder, out=tmp_path / "run")
    written = json.loads((tmp_path / "run" / "report.json").read_text())

    again = judged(tmp_path / "run")
    done = kvdrift("judge", "--markdown", tmp_path / "run")

    assert {key: again[key] for key in REPEATED} == {key: written[key] for key in REPEATED}
    assert done.code == audit.exit_code == (1 if fault else 0)
    assert done.out == (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert kvdrift("show", "--markdown", tmp_path / "run").out == done.out


def test_a_sweep_over_lengths_is_judged_again_to_the_same_report(here: Path, llama: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16, **SMALL)
    with {item.name: item.plant for item in corpus_for(2)}["position_plus_one"](model):
        audit = library.audit(model, span=2, lengths=[30, 33], out=here / "run")
    written = json.loads((here / "run" / "report.json").read_text())
    done = kvdrift("judge", "run", "--markdown")

    assert done.code == audit.exit_code == 1
    assert (
        done.out == kvdrift("show", "run", "--markdown").out == (here / "run" / "report.md").read_text(encoding="utf-8")
    )
    assert "### Lengths" in done.out
    assert "lengths=[30, 33]" in done.out
    assert judged(here / "run")["lengths"] == written["lengths"]
    assert written["environment"]["plan"]["lengths"] == [30, 33]
    assert [row["verdict"] for row in written["lengths"]["rows"]] == ["MISMATCH", "MISMATCH"]


def test_lengths_in_the_manifest_that_are_not_those_of_the_prompts(here: Path, llama: Path) -> None:
    kvdrift("audit", llama, "--lengths", "5,9", "--span", "1", "--out", "run")
    path = here / "run" / "traces" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert [prompt["name"] for prompt in manifest["prompts"]] == ["length_5", "length_9"]
    manifest["plan"]["lengths"] = [5, 10]
    path.write_text(json.dumps(manifest))

    done = kvdrift("judge", "run")

    assert done.code == 5
    assert "the prompts are not those of the lengths [5, 10]; record the run again" in done.err


def test_a_sweep_on_the_command_line_prints_its_boundaries(here: Path, mine: Path) -> None:
    done = kvdrift("audit", "mine:clean", "--prompt", "abcdef", "--lengths", "1-4:3", "--span", "1", "--out", "run")

    report = json.loads((here / "run" / "report.json").read_text())
    assert done.code == 0
    assert [row["length"] for row in report["lengths"]["rows"]] == [1, 4]
    said = " ".join(done.out.split())
    assert all(item["text"] in said for item in report["lengths"]["boundaries"])
    assert report["coverage"]["prompts"][1]["n_tokens"] == 4


def test_the_result_and_what_it_leaves(here: Path, llama: Path, prompts: Path) -> None:
    done = kvdrift("audit", llama, "--prompts", prompts, "--span", "1", "--out", "run")

    assert done.code == 0
    assert done.err == ""
    assert re.search("^(EXACT|STRUCTURAL_DRIFT): ", done.out, re.MULTILINE)
    assert done.out.splitlines()[-1].split() == ["report:", "run/report.html"]
    assert names(here) == {"run"}
    assert names(here / "run") == {"report.html", "report.md", "report.json", "drift.parquet", "traces"}


def test_the_page_is_written_of_judged_traces_too(here: Path, llama: Path, prompts: Path) -> None:
    kvdrift("audit", llama, "--prompts", prompts, "--span", "1", "--out", "run")

    assert kvdrift("judge", "run", "--html", "page.html").code == 0

    pages = [path.read_text(encoding="utf-8") for path in (here / "page.html", here / "run" / "report.html")]
    assert pages[0] == pages[1]
    assert pages[0].startswith("<!doctype html>")
    refused(
        kvdrift("judge", "run", "--html", "nowhere/page.html"),
        2,
        "cannot write nowhere/page.html: No such file or directory; name a file you may write with --html",
    )


@pytest.mark.parametrize("place", ["nowhere/page.html", "folder", "run/report.json/page.html", "x" * 300])
def test_a_page_that_cannot_be_written_is_one_line_and_nothing_is_left(
    here: Path, llama: Path, prompts: Path, place: str
) -> None:
    kvdrift("audit", llama, "--prompts", prompts, "--span", "1", "--out", "run")
    (here / "folder").mkdir()
    before = sorted(str(path) for path in here.rglob("*"))

    done = kvdrift("judge", "run", "--html", place)

    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith(f"kvdrift: cannot write {place}: ")
    assert done.err.endswith("; name a file you may write with --html\n")
    assert sorted(str(path) for path in here.rglob("*")) == before


def test_a_run_without_traces(here: Path, llama: Path, prompts: Path) -> None:
    kvdrift("audit", llama, "--prompts", prompts, "--span", "1", "--out", "run", "--no-traces")

    assert names(here / "run") == {"report.html", "report.md", "report.json", "drift.parquet"}
    refused(
        kvdrift("judge", "run"),
        5,
        "run holds no traces to judge; it is not a run directory, was made with --no-traces, or holds files of no "
        "known format (--format knows kvdrift, transformers-debug, npz, sglang, greta)",
    )
    assert kvdrift("show", "run").code == 0


MINE = """
from kvdrift_bench.planted.torch import corpus_for
from tests.support.command import SMALL
from tests.support.tiny import tiny_model

kept = []

def clean():
    print("loading my model")
    return tiny_model("llama", **SMALL), Letters()

def faulty():
    model, tokenizer = clean()
    fault = next(fault for fault in corpus_for(2) if fault.name == "position_plus_one")
    kept.append(fault.plant(model))
    kept[-1].__enter__()
    return model, tokenizer

class Letters:
    def encode(self, text):
        return [ord(letter) % 128 for letter in text]
"""


@pytest.fixture
def mine(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's own in the working directory."""
    import sys

    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (here / "mine.py").write_text(MINE)
    return here


def test_a_planted_fault_in_a_model_of_ones_own(mine: Path) -> None:
    done = kvdrift("audit", "mine:faulty", "--prompt", "one two", "--prompt", "three", "--span", "1", "--out", "run")

    assert done.code == 1
    said = " ".join(done.out.split())
    assert "MISMATCH (semantic): decode computes something else than prefill" in said
    assert "about: plain decode: 1 row in the batch, 6 to 8 keys, " in said
    assert "first failure: prompt_0 / pos 7 / layer 0 / q_ro" in said
    assert done.err == "loading my model\n"  # stdout is for the result
    report = json.loads((mine / "run" / "report.json").read_text())
    assert [prompt["id"] for prompt in report["coverage"]["prompts"]] == ["prompt_0", "prompt_1"]
    assert [prompt["n_tokens"] for prompt in report["coverage"]["prompts"]] == [7, 5]
    assert kvdrift("judge", "run").code == 1


def test_the_same_model_without_the_fault(mine: Path) -> None:
    (mine / "p.txt").write_text("one two\n\nthree\n")

    assert (
        kvdrift("audit", "mine:clean", "--prompts", "p.txt", "--prompt", "x", "--span", "1", "--out", "run").code == 0
    )
    report = json.loads((mine / "run" / "report.json").read_text())
    assert [prompt["id"] for prompt in report["coverage"]["prompts"]] == ["line_1", "line_3", "prompt_0"]


# ----------------------------------------------------------------------------------------------------- where it lies


def finish(target: Path, text: str) -> None:
    with RunDirectory(target) as directory:
        assert directory.work is not None
        (directory.work / "report.json").write_text(text)
        directory.commit()


def test_runs_of_the_same_second_do_not_meet(here: Path) -> None:
    with default_target() as first, default_target() as second:
        assert first != second
        finish(first, "1")
        finish(second, "2")
    with default_target() as third:
        finish(third, "3")

    assert len({first, second, third}) == 3
    assert names(here / "kvdrift-runs") == {first.name, second.name, third.name}
    assert (first / "report.json").read_text() == "1"


def test_the_default_place(here: Path, llama: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2026, 2, 7, 10, 15, 0, tzinfo=tz)

    monkeypatch.setattr(outdir, "datetime", Clock)
    for _ in range(2):
        assert kvdrift("audit", llama, "--prompts", prompts, "--span", "1", "--layers", "0").code in (0, 6)

    assert names(here / "kvdrift-runs") == {"20260207-101500", "20260207-101500-2"}


def test_a_run_that_fails_leaves_no_default_place(here: Path) -> None:
    assert kvdrift("audit", "/no/such/model").code == 3
    assert names(here) == set()


def test_the_same_place_twice(here: Path) -> None:
    finish(here / "run", "1")
    (here / "run" / "note.txt").write_text("of the first run")
    (here / "link").symlink_to("run")

    finish(here / "run", "2")
    assert names(here / "run") == {"report.json"}
    finish(here / "link", "3")

    assert (here / "run" / "report.json").read_text() == "3"
    assert (here / "link").is_symlink()
    assert names(here) == {"run", "link"}


def test_the_earlier_run_stays_until_the_new_one_is_whole(here: Path) -> None:
    finish(here / "run", "1")

    with pytest.raises(IsADirectoryError), RunDirectory(here / "run") as directory:
        (directory.work or here).write_text("2")

    assert (here / "run" / "report.json").read_text() == "1"
    assert names(here) == {"run"}


def test_new_parents_go_with_a_run_that_fails(here: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunDirectory(here / "a" / "b" / "run"):
        raise ZeroDivisionError
    assert names(here) == set()

    finish(here / "a" / "b" / "run", "1")
    assert names(here / "a" / "b") == {"run"}


def test_what_a_dead_run_left_is_removed_and_a_live_one_is_not(here: Path) -> None:
    dead, other = here / ".run.abc.part", here / ".other.abc.part"
    dead.mkdir()
    other.mkdir()
    (dead / "report.md").write_text("half")

    with RunDirectory(here / "run") as live:
        assert live.work is not None
        assert not dead.exists()
        finish(here / "run", "2")
        assert live.work.is_dir()
        (live.work / "report.json").write_text("1")
        live.commit()

    assert names(here) == {"run", ".other.abc.part"}
    assert (here / "run" / "report.json").read_text() == "1"


KILLED_AFTER = """
import os, signal, sys
from pathlib import Path
from kvdrift.report.run_directory import RunDirectory

n_calls = -100

def call(original):
    def replaced(*arguments, **options):
        global n_calls
        if n_calls == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        n_calls += 1
        return original(*arguments, **options)
    return replaced

for name in ("replace", "rmdir", "unlink"):
    setattr(os, name, call(getattr(os, name)))
with RunDirectory(Path("run")) as directory:
    n_calls = 0
    (directory.work / "report.json").write_text("2")
    directory.commit()
"""


@pytest.mark.parametrize("n_calls", range(6))
def test_a_run_killed_at_any_step_of_its_commit_leaves_the_old_run_or_the_new_one(here: Path, n_calls: int) -> None:
    """The steps are those that change what has a name; a run killed between two renames is put right by the next."""
    finish(here / "run", "1")

    done = subprocess.run([sys.executable, "-c", KILLED_AFTER, str(n_calls)], cwd=here, check=False)

    assert done.returncode == -signal.SIGKILL
    with RunDirectory(here / "run"):
        assert names(here / "run") == {"report.json"}
        assert (here / "run" / "report.json").read_text() == ("1" if n_calls < 4 else "2")
    assert names(here) == {"run"}


def test_runs_that_end_at_once_do_not_mix(here: Path) -> None:
    """Every moment shows one whole run, of one writer, or for the blink of a replacement none."""
    done = threading.Event()
    files = ("report.json", "report.md")

    def write(writer: int) -> None:
        for n in range(20):
            with RunDirectory(here / "run") as directory:
                for name in files:
                    ((directory.work or here) / name).write_text(f"{writer} {n}")
                directory.commit()

    def text(folder: int, name: str) -> str:
        with open(os.open(name, os.O_RDONLY, dir_fd=folder)) as file:
            return file.read()

    def read() -> list[set[str]]:
        mixed = []
        while not done.is_set():
            with suppress(OSError):
                folder = os.open(here / "run", os.O_RDONLY)
                try:
                    texts = {text(folder, name) for name in files}
                finally:
                    os.close(folder)
                if len(texts) != 1:
                    mixed.append(texts)
        return mixed

    with ThreadPoolExecutor(5) as pool:
        reader = pool.submit(read)
        writers = [pool.submit(write, writer) for writer in range(4)]
        try:
            for writer in writers:
                writer.result()
        finally:
            done.set()
        assert reader.result() == []

    assert names(here) == {"run"}
    assert names(here / "run") == {"report.json", "report.md"}


def test_the_claim_of_a_killed_run_goes_with_it(here: Path) -> None:
    (here / "kvdrift-runs" / "20260207-101500").mkdir(parents=True)
    (here / "kvdrift-runs" / ".20260207-101500.abc.part" / "new").mkdir(parents=True)

    with default_target() as target:
        finish(target, "1")

    assert names(here / "kvdrift-runs") == {target.name}


def test_names_with_wildcards_are_names(here: Path) -> None:
    (here / ".run1.abc.part").mkdir()

    finish(here / "run[1]", "1")
    finish(here / "run*", "1")

    assert names(here) == {".run1.abc.part", "run[1]", "run*"}


def test_a_finished_run_is_readable_as_files_usually_are(here: Path) -> None:
    mask = os.umask(0o022)
    try:
        finish(here / "run", "1")
    finally:
        os.umask(mask)

    assert (here / "run").stat().st_mode & 0o777 == 0o755
