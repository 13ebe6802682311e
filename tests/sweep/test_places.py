"""A sweep whose directory is a bucket, on a real server of S3 on loopback; and pairs of engines in a sweep."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvdrift.report.schema import check
from kvdrift.sweep.files import StoreError
from kvdrift.sweep.remote import RemoteFiles
from tests.support.bucket import bucket, keys
from tests.support.command import ROOT, here, kvdrift, refused

__all__ = ["bucket", "here"]
# What a server in a thread and a client's event loop leave to the end of the process is not a fault of ours.
quiet = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
ENGINES = f"""
import sys
def quick():
    sys.path.insert(0, {str(ROOT / "examples" / "engines")!r})
    from numpy_engine import make
    return make()
def absent():
    raise OSError("not there yet")
"""
READER = {"Statement": [{"Effect": "Allow", "Action": ["s3:Get*", "s3:List*"], "Resource": "*"}]}


@quiet
@pytest.mark.slow
def test_a_sweep_goes_into_a_bucket_and_on_from_there(bucket: Any, here: Path) -> None:
    # An engine of numpy: nothing here depends on the model, and a worker need not import torch.
    (here / "mine.py").write_text(ENGINES)
    (here / "s.toml").write_text(
        "[matrix]\nmodels = ['mine:quick', 'mine:absent']\n[prompts]\np = [5, 9]\n[audit]\nspan = 1"
    )

    done = kvdrift("sweep", "s.toml", "--out", "s3://sweeps/a/nightly", "--jobs", "1", "--json")

    view = check("sweep", done.out)
    assert [(cell.state, done.code) for cell in view.cells] == [("PASS", 6), ("ERROR", 6)], done.err
    kept = keys(bucket)
    report = f"a/nightly/{view.cells[0].report}"
    assert {report, "a/nightly/sweep.json", "a/nightly/summary.json", "a/nightly/report.html"} < set(kept)
    assert "a/nightly/driver.json" not in kept
    assert f"a/nightly/results/{view.cells[1].id}.json" in kept
    (here / "mine.py").write_text(ENGINES.replace('raise OSError("not there yet")', "return quick()"))
    again = kvdrift("sweep", "--resume", "s3://sweeps/a/nightly", "--jobs", "1")
    assert again.code == 0, again.err
    assert "report: s3://sweeps/a/nightly/report.html" in again.out
    assert keys(bucket)[report] == kept[report]  # what was finished is as it was
    said = kvdrift("sweep", "status", "s3://sweeps/a/nightly")
    assert (said.code, said.out) == (0, "sweep: 2 cells: 2 PASS\n")
    (here / "t.toml").write_text("[matrix]\nmodels = ['m']")
    refused(
        kvdrift("sweep", "t.toml", "--out", "s3://sweeps/a/nightly"),
        2,
        "s3://sweeps/a/nightly holds a sweep; go on with it (--resume s3://sweeps/a/nightly) or name another --out",
    )
    assert "--out s3://sweeps/a is not empty" in kvdrift("sweep", "t.toml", "--out", "s3://sweeps/a").err


@quiet
def test_a_place_that_cannot_be_written_or_read_is_one_line(
    bucket: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3
    import s3fs

    (here / "s.toml").write_text("[matrix]\nmodels = ['m']")
    refused(
        kvdrift("sweep", "s.toml", "--out", "s3://nowhere/a"),
        2,
        "cannot write to --out s3://nowhere/a: The specified bucket does not exist; name a directory you may write to",
    )
    refused(
        kvdrift("sweep", "--resume", "s3://sweeps/none"),
        5,
        "s3://sweeps/none is not the directory of a sweep: sweeps/none/sweep.json",
    )
    iam = boto3.client("iam")
    iam.create_user(UserName="reader")
    iam.put_user_policy(
        UserName="reader", PolicyName="r", PolicyDocument=json.dumps({"Version": "2012-10-17", **READER})
    )
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    iam.close()
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0.0)  # from here on it checks who may do what
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    s3fs.S3FileSystem.clear_instance_cache()
    denied = kvdrift("sweep", "s.toml", "--out", "s3://sweeps/b")
    assert (denied.code, denied.out, denied.err.count("\n")) == (2, "", 1)
    assert denied.err.startswith("kvdrift: cannot write to --out s3://sweeps/b: ")
    assert "denied" in denied.err.lower()

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    for words, what in ((("s.toml", "--out"), "cannot write to --out"), (("--resume",), "cannot read")):
        gone = kvdrift("sweep", *words, "s3://sweeps/b")
        assert (gone.code, gone.out, gone.err.count("\n")) == (2, "", 1)
        assert gone.err.startswith(f"kvdrift: {what} s3://sweeps/b: ")
        assert "Could not connect" in gone.err


def test_another_protocol_and_a_missing_package_are_one_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "s.toml").write_text("[matrix]\nmodels = ['m']")

    assert "fsspec knows no x3:// (x3://b)" in kvdrift("sweep", "s.toml", "--out", "x3://b").err
    monkeypatch.setitem(sys.modules, "fsspec", None)
    refused(kvdrift("sweep", "s.toml", "--out", "s3://b/a"), 3, "s3://b/a needs 'fsspec'; pip install 'kvdrift[s3]'")


@quiet
def test_a_bucket_has_one_driver_and_a_killed_one_is_forgotten(bucket: Any) -> None:
    program = (
        "import time; from kvdrift.sweep.remote import RemoteFiles\n"
        "with RemoteFiles('s3://sweeps/d', beat_s=0.2).held(): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        files = RemoteFiles("s3://sweeps/d", stale_s=3.0)
        assert files.is_held()
        with pytest.raises(BlockingIOError), files.held():
            pass
    finally:
        other.kill()
        other.communicate()
    assert files.is_held()  # its last sign is a moment old
    forgiving = RemoteFiles("s3://sweeps/d", stale_s=0.0)
    with forgiving.held():
        assert RemoteFiles("s3://sweeps/d").is_held()
    assert not files.is_held()
    with pytest.raises(StoreError, match="bucket does not exist"):
        RemoteFiles("s3://nowhere/d").write("a", b"")


# Pairs of engines.

PAIR = """
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
def good():
    return AutoModelForCausalLM.from_pretrained(Path(__file__).parent, gguf_file="tiny.gguf", dtype=torch.float32), None
def faulty():
    model = good()[0]
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, inputs, output: output * 1.01)
    return model, None
"""


@pytest.mark.slow
def test_a_pair_of_engines_is_a_cell_that_sees_what_audits_of_one_side_cannot(here: Path) -> None:
    from kvdrift_bench.models.tiny_gguf import write_tiny_gguf

    write_tiny_gguf(here / "tiny.gguf", "llama")
    (here / "mine.py").write_text(PAIR)
    models = ", ".join(
        f"{{name = '{name}', hf = 'mine:{name}', llamacpp = './tiny.gguf', memory = '1 GB'}}"
        for name in ("good", "faulty")
    )
    (here / "s.toml").write_text(
        f"[matrix]\nmodels = [{models}]\nengines = ['hf']\npairs = [['hf', 'llamacpp']]\n"
        "[prompts]\np = [5, 9, 17, 3, 22, 41]\n[audit]\nspan = 1\n"
    )

    done = kvdrift("sweep", "s.toml", "--out", "o", "--jobs", "1", "--json")

    view = check("sweep", done.out)
    assert {(cell.model, cell.engine): cell.state for cell in view.cells} == {
        ("good", "hf"): "PASS",
        ("faulty", "hf"): "PASS",  # it contradicts nothing that it does itself
        ("good", "hf/llamacpp"): "PASS",
        ("faulty", "hf/llamacpp"): "FAIL",
    }, [cell.reasons for cell in view.cells]
    assert (done.code, view.verdict, view.alpha_of_a_cell) == (1, "FAIL", 1e-3 / 2)
    failed = view.cells[-1]
    assert failed.first_failure is not None
    assert failed.first_failure.endswith("layer 1 / mlp_out")
    assert (here / "o" / str(failed.report)).exists()
