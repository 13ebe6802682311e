"""GRETA StageTrace files, made by real passes of a tiny model: judged by the command and by the analyser's script."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvdrift.trace.readers.greta.records import fnv1a, recovered
from kvdrift.vocabulary.plan import Mode
from kvdrift_bench.planted.torch import corpus_for
from tests.support.carriers import one_thread
from tests.support.command import ROOT, Result, kvdrift
from tests.support.greta import Record, write_traces
from tests.support.matrix import further
from tests.support.tiny import tiny_model

PROMPTS = {"p0_short": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12], "p6_len_6": [1, 22, 93, 14, 15, 6]}
FAULTS = {fault.name: fault for fault in corpus_for(3)}
SCRIPT = ROOT / "tools" / "benchmarks" / "analyze_b3_66_prefill_decode_drift.py"
BF16 = {"dtype": "bf16", "git_commit": "abc1234"}


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def greta(
    folder: Path,
    fault: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    attention: str | None = None,
    **options: Any,
) -> Path:
    model = tiny_model("llama", dtype=dtype, attention=attention)
    with FAULTS[fault].plant(model) if fault else nullcontext():
        return write_traces(folder, model, PROMPTS, **{"modes": tuple(Mode), "config": BF16, **options})


def script(*arguments: str | Path) -> Result:
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
    )
    return Result(done.returncode, done.stdout, done.stderr)


def field(done: Result, name: str) -> str:
    return next(line for line in done.out.splitlines() if line.startswith(f"**{name}**")).split(": ", 1)[1].strip()


def table(path: Path) -> list[dict[str, str]]:
    header, *lines = path.read_text().splitlines()
    return [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]


# -------------------------------------------------------------------------------------------------------- the verdict


@pytest.mark.parametrize("layout", ["two_files", "one_file", "runs"])
def test_a_clean_run_raises_no_alarm_in_any_layout(tmp_path: Path, layout: str) -> None:
    done = kvdrift("judge", "--markdown", greta(tmp_path / "t", layout=layout))

    assert (done.code, field(done, "Verdict").split(":")[0]) == (0, "EXACT")
    assert "GRETA StageTrace records (312 in" in done.err


@pytest.mark.parametrize(
    ("dtype", "attention"),
    [
        (torch.bfloat16, "sdpa"),
        (torch.float32, "sdpa"),
        *further((torch.float16, "eager"), (torch.float32, "eager")),
    ],
)
@pytest.mark.parametrize("sample", [None, 32])
@pytest.mark.parametrize("digits", [6, 9])
def test_clean_runs_are_never_a_mismatch(
    tmp_path: Path, dtype: torch.dtype, attention: str, sample: int | None, digits: int
) -> None:
    name = str(dtype).removeprefix("torch.")
    folder = greta(
        tmp_path / "t", dtype=dtype, attention=attention, sample=sample, digits=digits, config={"dtype": name}
    )
    done = kvdrift("judge", "--markdown", folder, "--format", "greta")

    assert done.code in (0, 6), done.out
    assert field(done, "First failure") == "none"


@pytest.mark.parametrize("layout", ["two_files", *further("one_file", "runs")])
@pytest.mark.parametrize(
    ("fault", "site"),
    [("position_plus_one", "q_rope"), ("last_key_lost", "attn_ctx"), *further(("heads_tiled", "attn_ctx"))],
)
def test_a_planted_fault_is_found_at_its_address_with_its_root_cause(
    tmp_path: Path, layout: str, fault: str, site: str
) -> None:
    folder = greta(tmp_path / "t", fault, layout=layout)

    done = kvdrift("judge", "--markdown", folder)
    scripted = script("-i", folder, "-m", "both", "-o", tmp_path / "r.md")

    assert done.code == scripted.code == 1
    assert field(done, "First failure").endswith(f"layer 0 / {site}")
    report = (tmp_path / "r.md").read_text()
    assert f"**Root cause**: {site.upper()}_DRIFT" in report
    failed = [row for row in table(tmp_path / "r.tsv") if row["first_fail"] != "-"]
    assert {(row["layer"], row["tensor"], row["root_cause"]) for row in failed} == {
        ("0", site, f"{site.upper()}_DRIFT")
    }
    assert {row["mode"] for row in failed} == set(Mode)


def test_a_fault_is_found_in_float32_whose_digits_are_few(tmp_path: Path) -> None:
    folder = greta(tmp_path / "t", "position_plus_one", torch.float32, config={"dtype": "fp32"})
    done = kvdrift("judge", "--markdown", folder)
    assert (done.code, field(done, "First failure").split(" / ", 2)[2]) == (1, "layer 0 / q_rope")
    assert "DIGITS" in done.out


def test_a_sample_is_said_and_never_passes_as_the_whole(tmp_path: Path) -> None:
    done = kvdrift("judge", "--markdown", greta(tmp_path / "t", sample=32))
    assert done.code == 6
    assert "SAMPLED: 54.4 % of the elements were recorded" in done.out
    assert "record with GRETA_TRACE_STAGE_SAMPLE" in done.out


def test_a_gross_fault_is_found_in_a_sample_without_any_facts(tmp_path: Path) -> None:
    done = kvdrift("judge", "--markdown", greta(tmp_path / "t", "position_plus_one", sample=32, config=None))
    assert done.code == 1
    assert field(done, "First failure").endswith("layer 0 / q_rope")
    assert "DTYPE_UNKNOWN" in done.out


def test_drift_of_an_engine_that_names_no_dtype_is_no_pass(tmp_path: Path) -> None:
    def drift(records: list[Record]) -> list[Record]:
        for record in records:
            if record["phase"] == "decode0" and record.get("point") == "residual_post_mlp":
                record["sample"][0] = float(f"{record['sample'][0] * 1.001:.6g}")
                record["hash"] ^= 1
        return records

    done = kvdrift("judge", "--markdown", greta(tmp_path / "t", config=None, edit=drift, digits=6))
    assert done.code == 6
    assert "the dtype that the engine computes in is not known" in done.out


def test_older_files_name_the_point_tensor(tmp_path: Path) -> None:
    assert kvdrift("judge", "--markdown", greta(tmp_path / "t", old=True)).code == 0


def test_path_proof_comes_from_seq_len(tmp_path: Path) -> None:
    """An exact zero between two runs of one code path is not an agreement."""

    def same_route(records: list[Record]) -> list[Record]:
        return [{**r, "seq_len": r["tokens_total"]} for r in records]

    done = kvdrift("judge", "--markdown", greta(tmp_path / "t", edit=same_route))
    assert done.code == 6
    assert "no path proof" in done.out


def test_logits_dumps_take_the_place_of_the_summary(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    for name, factor in (("prefill", 1.0), ("decode", 1.25)):
        place = folder / "runs" / "kv_aligned_1" / "seed_0" / "p0_short" / name
        place.mkdir(parents=True)
        logits = np.arange(1, 20, dtype=np.float32) * factor
        line = json.dumps({"token_idx": 10, "token_id": 12, "logits": [float(v) for v in logits]})
        with gzip.open(place / "logits.jsonl.gz", "wt") as file:
            file.write(line + "\n")
        (place / "metadata.json").write_text(json.dumps({"dtype": "bf16", "kv_aligned": 1}))

    done = kvdrift("judge", "--markdown", folder)

    assert done.code == 6
    assert "logits" in done.out
    assert "as_designed did not run: the files hold no such decode pass" in done.out


def test_self_noise_is_taken_from_a_prefill_in_the_decode_run(tmp_path: Path) -> None:
    folder = greta(tmp_path / "t", layout="runs")
    for prefill in folder.rglob("prefill/*.jsonl.gz"):
        decode = prefill.parents[1] / "decode" / prefill.name
        decode.write_bytes(prefill.read_bytes() + decode.read_bytes())  # gzip members may follow each other

    done = kvdrift("judge", "--markdown", folder)

    assert done.code == 0
    assert "two prefills of one token differ at 0 of" in done.out


# ---------------------------------------------------------------------------------------------------------- the hash


def test_the_hash_is_the_one_of_the_engine() -> None:
    """h = 1469598103934665603; h ^= word; h *= 1099511628211, over the words of the first 256 floats."""
    values = np.array([1.0, -2.5], dtype=np.float32)
    expected = 1469598103934665603
    for word in (0x3F800000, 0xC0200000):
        expected = ((expected ^ word) * 1099511628211) % 2**64
    assert fnv1a(values) == expected
    long = np.arange(300, dtype=np.float32)
    assert fnv1a(long) == fnv1a(long[:256]) != fnv1a(long[:255])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bits_are_recovered_from_few_digits_by_the_hash(dtype: str) -> None:
    values = torch.randn(64, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype)).float().numpy()
    printed = np.array([float(f"{v:.{9 if dtype == 'float32' else 6}g}") for v in values], dtype=np.float32)

    found = recovered(printed, fnv1a(values))

    assert found is not None
    assert np.array_equal(found, values)
    assert recovered(printed, fnv1a(values) ^ 1) is None


def test_equal_digits_with_other_hashes_are_not_equal_bits(tmp_path: Path) -> None:
    def other(records: list[Record]) -> list[Record]:
        return [{**r, "hash": r["hash"] ^ (r["phase"] == "decode0")} for r in records]

    done = kvdrift("judge", "--markdown", greta(tmp_path / "t", edit=other))
    assert field(done, "Verdict").split(":")[0] != "EXACT"
    assert "0 of 156 pairs have the same bits" not in done.out
    assert "| as_designed |" in done.out
    assert "0 of 78" in done.out


# ---------------------------------------------------------------------------------- the faults of the script's original


def test_decode_files_are_no_prefill_files(tmp_path: Path) -> None:
    """`*_trace.jsonl` matches `*_decode_trace.jsonl`: read as prefill, decode would be compared with itself."""
    folder = greta(tmp_path / "t", "position_plus_one", layout="two_files")
    for path in folder.glob("*.jsonl"):  # without phases, only the names of the files tell
        records = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "phase"}) + "\n" for r in records))

    done = script("-i", folder, "-m", "both", "-o", tmp_path / "r.md")

    assert done.code == 1
    assert "Q_ROPE_DRIFT" in (tmp_path / "r.md").read_text()


def test_k_is_compared_with_k_and_never_with_v(tmp_path: Path) -> None:
    """K and V of one token differ always; a row that compares them would fail on every clean run."""
    script("-i", greta(tmp_path / "t"), "-m", "kv_aligned", "-o", tmp_path / "r.md")
    rows = [row for row in table(tmp_path / "r.tsv") if row["tensor"] in ("k_proj", "v_proj")]
    assert rows
    assert {row["status"] for row in rows} == {"PASS"}
    report = (tmp_path / "r.md").read_text()
    assert "| K hashes vary across prompts | 2 different k_proj hashes for 2 prompts" in report
    assert "| V hashes vary across prompts | 2 different v_proj hashes for 2 prompts" in report


def test_the_exit_code_says_what_the_report_says(tmp_path: Path) -> None:
    codes = {}
    for name, fault, sample in (("clean", None, None), ("faulty", "position_plus_one", None), ("part", None, 32)):
        folder = greta(tmp_path / name, fault, sample=sample)
        codes[name] = script("-i", folder, "-m", "both", "-o", tmp_path / f"{name}.md").code
    codes["nothing"] = script("-i", tmp_path, "-m", "both", "-o", tmp_path / "none.md").code
    (tmp_path / "empty").mkdir()
    codes["empty"] = script("-i", tmp_path / "empty", "-m", "both", "-o", tmp_path / "none.md").code
    assert {name: codes[name] for name in ("clean", "faulty", "part", "empty")} == {
        "clean": 0,
        "faulty": 1,
        "part": 6,
        "empty": 5,
    }
    assert codes["nothing"] in (1, 5, 6)


def test_the_promised_verdict_is_given(tmp_path: Path) -> None:
    """The original's report ends in PENDING, with its cells to be filled."""
    for fault, verdict in ((None, "EXACT"), ("position_plus_one", "MISMATCH")):
        done = script("-i", greta(tmp_path / verdict, fault), "-m", "both", "-o", tmp_path / f"{verdict}.md")
        report = (tmp_path / f"{verdict}.md").read_text()
        assert f"**Verdict**: {verdict}" in report
        assert done.out.startswith(f"{verdict}: H")
        for unfilled in ("PENDING", "TBD"):
            assert unfilled not in report
        for title in (
            "## 1. Execution Summary",
            "## 2. KV Alignment Analysis",
            "### Projection Hashes",
            "### Attention Statistics",
            "### KV Alignment Indicators",
            "## 3. Drift Structural vs Real Mismatch",
            "### Hypothesis Testing",
            "### Evidence",
            "### Conclusion",
            "## 4. Recommendations",
            "**Generated**",
            "**Script**: `tools/benchmarks/analyze_b3_66_prefill_decode_drift.py`",
        ):
            assert title in report, title


def test_one_mode_alone_reads_that_mode_alone(tmp_path: Path) -> None:
    folder = greta(tmp_path / "t", layout="runs")
    for mode in Mode:
        script("-i", folder, "-m", str(mode), "-o", tmp_path / "r.md")
        assert {row["mode"] for row in table(tmp_path / "r.tsv")} == {str(mode)}


def test_a_position_that_only_one_pass_has_is_a_trace_offset(tmp_path: Path) -> None:
    def later(records: list[Record]) -> list[Record]:
        return [{**r, "pos_id": r["pos_id"] + (r["phase"] == "decode0")} for r in records]

    done = script("-i", greta(tmp_path / "t", edit=later), "-m", "both", "-o", tmp_path / "r.md")

    assert done.code == 1
    rows = table(tmp_path / "r.tsv")
    assert {(row["root_cause"], row["status"]) for row in rows} == {("TRACE_OFFSET", "TRACE_OFFSET")}
    assert "**Root cause**: TRACE_OFFSET" in (tmp_path / "r.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-m", "sideways", "-o", "r.md"], 2, "unknown mode 'sideways'"),
        (["-m", "both", "-o", "r.txt"], 2, "must end in .md"),
        (["-m", "both", "-o", "nowhere/r.md"], 2, "there is no directory"),
    ],
)
def test_bad_options_of_the_script(
    tmp_path: Path, arguments: Sequence[str], code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = script("-i", tmp_path, *arguments)
    assert done.code == code
    assert message in done.err
    assert done.out == ""
    assert not list(tmp_path.glob("r.*"))
