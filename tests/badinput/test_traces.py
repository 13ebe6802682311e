"""Saved traces that are missing, damaged or edited: `judge` says so with exit code 5, and never passes them."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kvdrift as library
from kvdrift.errors import TraceError
from kvdrift.pipeline.judge import judge_directory
from tests.support.command import kvdrift, refused
from tests.support.matrix import further
from tests.support.tiny import tiny_model

TINY: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
}


LOOSE = {"row_wise": 1e-7, "product": 1.5, "cache": 1e-3, "attention": 1e-3}  # a product that may round everything away


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory that nobody has touched."""
    out = tmp_path_factory.mktemp("whole") / "run"
    model = tiny_model("llama", dtype=torch.bfloat16, **TINY)
    audit = library.audit(model, prompts={"p": [1, 2, 3], "q": [4, 5, 6]}, span=1, out=out)
    assert audit.exit_code == 0
    return out


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy, to be spoilt."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def manifest(run: Path) -> Path:
    return run / "traces" / "manifest.json"


def edit(run: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(manifest(run).read_text())
    change(data)
    manifest(run).write_text(json.dumps(data))


def a_trace(run: Path) -> Path:
    return sorted(run.glob("traces/**/*.safetensors"))[0]


def test_an_untouched_run_is_judged(run: Path) -> None:
    """Without this, every test below could pass on a run that is bad anyway."""
    edit(run, lambda data: None)

    assert kvdrift("judge", run).code == 0


def test_no_directory(tmp_path: Path) -> None:
    for word in ("judge", "show"):
        refused(kvdrift(word, tmp_path / "none"), 5, f"there is no run directory {tmp_path / 'none'}")


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    refused(
        kvdrift("judge", tmp_path),
        5,
        f"{tmp_path} holds no traces to judge; it is not a run directory, was made with --no-traces, or holds files of "
        "no known format (--format knows kvdrift, transformers-debug, npz, sglang, greta)",
    )
    done = kvdrift("show", tmp_path)
    assert done.code == 5
    assert done.err.endswith(f"is {tmp_path} the directory of a finished run?\n")


def test_a_truncated_trace(run: Path) -> None:
    path = a_trace(run)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])

    refused(
        kvdrift("judge", run),
        5,
        f"the trace {path} ({len(data) // 2} bytes) does not match its checksum: it is truncated or was changed after "
        "it was recorded. Record the run again.",
    )


def test_one_flipped_bit(run: Path) -> None:
    path = a_trace(run)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    assert "does not match its checksum" in kvdrift("judge", run).err


def test_a_missing_trace(run: Path) -> None:
    path = a_trace(run)
    path.unlink()

    refused(kvdrift("judge", run), 5, f"cannot read the trace {path}: No such file or directory")


def test_a_missing_manifest(run: Path) -> None:
    manifest(run).unlink()

    done = kvdrift("judge", run)

    assert done.err.startswith(f"kvdrift: no readable manifest.json in {run / 'traces'} (No such file or directory)")
    assert done.code == 5


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format_version": ' + b"[" * 100_000])
def test_a_manifest_that_is_none(run: Path, text: bytes) -> None:
    manifest(run).write_bytes(text)

    done = kvdrift("judge", run)

    assert done.err.startswith(f"kvdrift: {manifest(run)} ")
    assert (done.code, done.out, done.err.count("\n")) == (5, "", 1)


def test_a_truncated_manifest(run: Path) -> None:
    data = manifest(run).read_bytes()
    manifest(run).write_bytes(data[: len(data) // 2])

    assert kvdrift("judge", run).code == 5


@pytest.mark.parametrize("version", [0, 2, "1", None, 10**30])
def test_another_version(run: Path, version: Any) -> None:
    edit(run, lambda data: data.update(format_version=version))

    refused(
        kvdrift("judge", run),
        5,
        f"{manifest(run)} has format version {version}, and this kvdrift reads 1",
    )


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "a\0b", ""])
def test_a_file_outside_the_directory(run: Path, name: str) -> None:
    edit(run, lambda data: data["traces"][0].update(file=name))

    done = kvdrift("judge", run)

    assert (done.code, done.out, done.err.count("\n")) == (5, "", 1)


def test_a_link_out_of_the_directory(run: Path, tmp_path: Path) -> None:
    path = a_trace(run)
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")

    assert "names a file outside its directory" in kvdrift("judge", run).err


def without(kind: str, **values: str) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        before = len(data[kind])
        data[kind] = [item for item in data[kind] if any(item[k] != v for k, v in values.items())]
        assert len(data[kind]) < before

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("pairs", rung="float64"),
            "8 pairs of passes are missing, such as pair of 'p' in as_designed at float64",
        ),
        (
            lambda data: data.update(pairs=[pair for pair in data["pairs"] if pair["shift"] <= 0.0]),
            "a perturbed pass has no counterpart",
        ),
        (
            without("pairs", rung="bfloat16"),
            "6 pairs of passes are missing, such as pair of 'p' in as_designed at bfloat16",
        ),
        (
            without("pairs", prompt="q", role="pair"),
            "4 pairs of passes are missing, such as pair of 'q' in as_designed at",
        ),
        (
            without("pairs", mode="kv_aligned", role="pair"),
            "4 pairs of passes are missing, such as pair of 'p' in kv_al",
        ),
        (
            without("pairs", role="self_noise"),
            "4 pairs of passes are missing, such as self_noise of 'p' in as_designed",
        ),
        (without("pairs", role="control"), "0 positive controls are listed, and 4 was planted"),
        (without("prompts", name="q"), "pair of 'q' in as_designed at bfloat16 is not part of the run"),
        (without("traces", rung="float64", label="full"), "that it does not list"),
        (lambda data: data.update(pairs=[]), "14 pairs of passes are missing"),
        (lambda data: data["pairs"].append(data["pairs"][0]), "a pair of passes is listed twice"),
        (lambda data: data["traces"].append(data["traces"][0]), "lists two traces of one name"),
        (lambda data: data["plan"].update(mode="as_designed"), "in kv_aligned at bfloat16 is not part of the run"),
        (lambda data: data["plan"].update(span=2), "the prompt 'p' has no tokens, or is not continued by 2"),
        (lambda data: data["plan"].update(alpha=7.0), "alpha is 7.0, and must lie between 0 and 1"),
        (lambda data: data["engine"].update(dtype="int3"), "unknown dtype 'int3'"),
        (
            lambda data: data["engine"].update(ladder=["float64", "float32"]),
            "float64 and float32 are not a coarse and a fine",
        ),
        (lambda data: data["engine"].update(ladder=["float16", "float32"]), "in as_designed at float32"),
        (
            lambda data: data["engine"].update(roundoffs=LOOSE),
            "roundoffs of the native precision are not between 0 and 1",
        ),
        (lambda data: data["engine"].update(pinned=0.5), "nothing can be pinned at 0.5 above the rung float32"),
        (lambda data: data["engine"].update(roundoffs={"product": 0.1}), "missing required field `row_wise`"),
        (lambda data: data["engine"].update(can_rewind=False), "in kv_aligned at bfloat16 is not part of the run"),
        (lambda data: data["pairs"][0].update(decode=data["pairs"][0]["prefill"]), "joins traces of something else"),
        (lambda data: data["pairs"][0].update(positions=[2]), "joins traces of something else"),
        (lambda data: data["pairs"][0].update(positions=[]), "joins traces of something else"),
        (lambda data: data["pairs"][0].update(prefill="nowhere"), "pairs a trace 'nowhere' that it does not list"),
        (lambda data: data["pairs"][0].update(role="friend"), "Invalid enum value 'friend'"),
        (lambda data: data["traces"][0]["records"].pop(), "which manifest.json does not list"),
        (lambda data: data["traces"][0].update(pass_name="other"), "names an unknown pass 'other'"),
        (
            lambda data: data["traces"][0]["tokens"].append(data["traces"][0]["tokens"].pop() ^ 1),
            "joins traces of something else",
        ),
        (lambda data: data["traces"][0].update(rung="float64"), "joins traces of something else"),
        (lambda data: data.update(surprise=1), "unknown field `surprise`"),
        (lambda data: data["plan"].pop("alpha"), "missing required field `alpha`"),
    ],
)
def test_an_edited_manifest(run: Path, change: Callable[[Any], None], message: str) -> None:
    """What was taken out cannot disagree, so that leaving it out must not pass."""
    edit(run, change)

    done = kvdrift("judge", run)

    assert message in done.err
    assert (done.code, done.out, done.err.count("\n")) == (5, "", 1)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of a manifest, the first and the last item of each list."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list) and value:
        for index in {0, len(value) - 1}:
            yield from leaves(value[index], (*path, index))
    else:
        yield path


@pytest.mark.parametrize("odd", [None, *further(-1, 10**25, "\0", [None])])
def test_no_odd_value_anywhere_is_a_crash(run: Path, odd: Any) -> None:
    """Whatever stands in a manifest, judge either judges it or says with exit code 5 that it cannot."""
    text = manifest(run).read_text()
    original = json.loads(text)
    seen = 0
    for path in leaves({key: value for key, value in original.items() if key != "traces"}):
        data = json.loads(text)
        place = data
        for key in path[:-1]:
            place = place[key]
        if place[path[-1]] == odd:
            continue
        place[path[-1]] = odd
        manifest(run).write_text(json.dumps(data))

        done = kvdrift("judge", run)

        assert done.code in (0, 1, 5, 6), path
        assert (done.err == "") == (done.code != 5), path
        seen += done.code == 5
    assert seen > 10


@pytest.mark.parametrize("odd", [None, *further(-1, 10**25, {})])
def test_no_odd_value_in_a_trace_is_a_crash(run: Path, odd: Any) -> None:
    text = manifest(run).read_text()
    for path in leaves(json.loads(text)["traces"][0]):
        data = json.loads(text)
        place = data["traces"][0]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = odd
        manifest(run).write_text(json.dumps(data))

        done = kvdrift("judge", run)

        # What is told about attention is believed: with another scale, what was recorded is not what that gives.
        assert done.code in ((0, 1, 5, 6) if path[0] == "attention" else (0, 5, 6)), path
        assert (done.err == "") == (done.code != 5), path


def test_an_alpha_that_is_none(run: Path) -> None:
    refused(
        kvdrift("judge", run, "--alpha", "0"),
        2,
        "alpha is 0.0, and must lie between 0 and 1; use --alpha 0.001 (alpha=1e-3)",
    )


def test_a_folder_of_thousands_of_folders_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvdrift.trace.recording._MOST_FOLDERS", 8)
    for number in range(9):
        (tmp_path / f"{number}").mkdir()
    (tmp_path / "8" / "stray.npz").write_bytes(b"")

    with pytest.raises(TraceError, match=r"has more than 8 folders in it, .*name the folder that holds the traces"):
        judge_directory(tmp_path)
