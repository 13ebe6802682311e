"""Every shape of a dump that is read, and what is refused: named, with an exit code, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from kvdrift.logprobs.dump import Dump
from kvdrift.logprobs.files import read_dump
from tests.support.command import Result, kvdrift
from tests.support.logprobs import simulate, write, write_all

LISTS: dict[str, Any] = {"id": "q", "token_ids": [5, 6, 7], "logprobs": [-0.5, None, -1.5]}
COMPLETION = {
    "id": "q",
    "choices": [
        {
            "logprobs": {
                "tokens": ["token_id:5", "token_id:6", "token_id:7"],
                "token_logprobs": [-0.5, None, -1.5],
                "top_logprobs": [{"token_id:5": -0.5, "token_id:9": -1.0}, None, None],
            }
        }
    ],
}
CHAT = {
    "id": "q",
    "choices": [
        {
            "token_ids": [5, 6, 7],
            "logprobs": {
                "content": [
                    {"token": text, "logprob": value} for text, value in (("a", -0.5), ("b", None), ("c", -1.5))
                ]
            },
        }
    ],
}
VLLM = {
    "request_id": "q",
    "outputs": [
        {
            "token_ids": [5, 6, 7],
            "logprobs": [{"5": {"logprob": -0.5}, "9": {"logprob": -1.0}}, {"9": {"logprob": -1.0}}, {"7": -1.5}],
        }
    ],
}
SGLANG = {"meta_info": {"id": "q", "output_token_logprobs": [[-0.5, 5, "a"], [None, 6, "b"], [-1.5, 7, None]]}}
MASKED = {"id": "q", "input_ids": [1, 5, 6, 7], "logps": [0.0, -0.5, None, -1.5], "loss_mask": [0, 1, 1, 1]}


def lines(path: Path, *items: Any) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


@pytest.mark.parametrize(
    "item",
    [LISTS, COMPLETION, CHAT, VLLM, SGLANG, MASKED],
    ids=["lists", "completion", "chat", "vllm", "sglang", "masked"],
)
def test_a_shape_of_a_line_is_read(tmp_path: Path, item: Any) -> None:
    check(read_dump(lines(tmp_path / "d.jsonl", item)))


def test_one_token_a_line_is_read(tmp_path: Path) -> None:
    rows = [
        {"sequence": "q", "position": p, "token_id": t, "logprob": v}
        for p, t, v in ((2, 7, -1.5), (0, 5, -0.5), (1, 6, None))
    ]
    check(read_dump(lines(tmp_path / "d.jsonl", *rows)))


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_columns_are_read(tmp_path: Path, suffix: str) -> None:
    arrays = {
        "token_ids": np.array([[5, 6, 7, 0]]),
        "logprobs": np.array([[-0.5, np.nan, -1.5, 0.0]], dtype=np.float32),
        "lengths": np.array([3]),
    }
    path = tmp_path / f"d.{suffix}"
    if suffix == "npz":
        np.savez(path, allow_pickle=False, **arrays)
    else:
        save_file(arrays, path)
    dump = read_dump(path)
    assert dump.token.tolist() == [5, 6, 7]
    assert np.isnan(dump.logprob).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32"])
@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_mask_of_any_whole_dtype_is_read(tmp_path: Path, suffix: str, dtype: str) -> None:
    arrays = {
        "token_ids": np.array([[5, 6, 7, 0]], dtype=np.int32),
        "logprobs": np.array([[-0.5, np.nan, -1.5, 0.0]], dtype=np.float32),
        "mask": np.array([[1, 1, 1, 0]]).astype(dtype),
    }
    path = tmp_path / f"d.{suffix}"
    np.savez(path, allow_pickle=False, **arrays) if suffix == "npz" else save_file(arrays, path)
    assert read_dump(path).token.tolist() == [5, 6, 7]


def check(dump: Dump) -> None:
    assert dump.names == ("q",)
    assert dump.token.tolist() == [5, 6, 7]
    assert dump.logprob[[0, 2]].tolist() == [-0.5, -1.5]
    assert dump.present.tolist() == [True, False, True]


def test_texts_are_tokens_too(tmp_path: Path) -> None:
    item = {"tokens": ["a", "b", "a"], "logprobs": [-1.0, -2.0, -3.0]}
    dump = read_dump(lines(tmp_path / "d.jsonl", item))
    assert dump.texts == ("a", "b")
    assert dump.tokens_of(0) == ["a", "b", "a"]


def test_what_was_rounded_when_it_was_written_is_seen(tmp_path: Path) -> None:
    sides = simulate()
    exact = sides.logprobs("trainer")
    coarse = (exact.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    for values, name in ((coarse, "bfloat16"), (exact.round(3), "3 decimals"), (exact, "float32")):
        assert read_dump(write(tmp_path / "d.jsonl", sides.tokens, values)).grain_text == name


def test_a_column_of_a_file(tmp_path: Path) -> None:
    rollout = write_all(tmp_path, simulate())["rollout"]
    done = kvdrift("compare", f"{rollout}:rollout_log_probs", f"{rollout}:old_log_probs", "--out", tmp_path / "run")

    assert done.code == 0, done
    assert done.out.startswith("STRUCTURAL_DRIFT: H0: rounding explains")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["report.html", "report.json", "report.md"]
    assert "| A | " in (tmp_path / "run" / "report.md").read_text()


def refused(folder: Path, a: Any, b: Any, *options: Any) -> Result:
    before = sorted(folder.iterdir())
    done = kvdrift("compare", a, b, "--out", folder / "run", *options)
    assert (done.out, sorted(folder.iterdir())) == ("", before)
    return done


@pytest.mark.parametrize("lag", [1, -1])
def test_dumps_that_are_misaligned_by_one(tmp_path: Path, lag: int) -> None:
    sides = simulate()
    tokens, values = sides.tokens, sides.logprobs("trainer")
    a = write(tmp_path / "a.jsonl", tokens[:, 1:] if lag < 0 else tokens[:, :-1], values[:, 1:])
    b = write(tmp_path / "b.jsonl", tokens[:, :-1] if lag < 0 else tokens[:, 1:], values[:, 1:])
    done = refused(tmp_path, a, b)

    assert done.code == 5
    early = a if lag > 0 else b
    assert "the dumps are misaligned by 1: in sequence s0, " in done.err
    assert f"{early} begins 1 token before" in done.err


def test_another_tokenizer(tmp_path: Path) -> None:
    sides = simulate()
    a = write(tmp_path / "a.jsonl", sides.tokens, sides.logprobs("sampler"))
    b = write(tmp_path / "b.jsonl", sides.tokens + 1000, sides.logprobs("trainer"))
    done = refused(tmp_path, a, b)

    assert done.code == 5
    assert "no sequence has the same tokens in both dumps: sequence s0 differs from token 0 on" in done.err


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("", 5, "holds no sequence"),
        ('{"token_ids": [1, 2], "logprobs": [-1.0]}', 5, "2 tokens and 1 logprobs"),
        ('{"token_ids": [1], "logprobs": [0.7]}', 5, "0.7 is not the logarithm of a probability"),
        ('{"token_ids": [1], "logprobs": ["x"]}', 5, "'x' is no logprob"),
        ('{"token_ids": [1], "logprobs": [-1.0]', 5, "line 1 is not JSON"),
        ('{"logprobs": [-1.0]}', 5, "has no list of tokens"),
        ('{"token_ids": [1], "score": [-1.0]}', 5, "has no logprobs; name the column, as in FILE:COLUMN"),
        ('{"token_ids": [1], "log_probs": [-1], "old_log_probs": [-1]}', 5, "name one of them, as in FILE:log_probs"),
        ('{"id": "other", "token_ids": [1], "logprobs": [-1.0]}', 5, "have no sequence in common"),
        ('{"id": "s0", "tokens": ["a"], "logprobs": [-1.0]}', 5, "has texts of tokens and the other dump has ids"),
        ('{"token_ids": [9223372036854775808], "logprobs": [-1.0]}', 5, "cannot read"),
        (f'{{"token_ids": [1], "logprobs": [-1{"0" * 400}]}}', 5, "cannot read"),
        ("[" * 100_000, 5, "cannot read"),
    ],
)
def test_bad_dumps_are_named(tmp_path: Path, text: str, code: int, message: str) -> None:
    sides = simulate()
    a = write(tmp_path / "a.jsonl", sides.tokens, sides.logprobs("sampler"))
    b = tmp_path / "b.jsonl"
    b.write_text(text + "\n")
    done = refused(tmp_path, a, b)

    assert done.code == code
    assert message in done.err


def test_bad_options_are_named(tmp_path: Path) -> None:
    paths = write_all(tmp_path, simulate())
    a, b = paths["sampler"], paths["trainer"]
    for options, message in (
        (["--dtype-a", "bf61"], "unknown dtype 'bf61'"),
        (["--drop", "tme"], "is not RULE:LIMIT"),
        (["--alpha", "2"], "alpha is 2.0, and must lie between"),
        (["--third", str(a)], "was given twice"),
        (["--third", str(tmp_path / "none.jsonl")], "there is no file"),
    ):
        done = refused(tmp_path, a, b, *options)
        assert (done.code, message in done.err) == (2, True), done
    done = refused(tmp_path, a, tmp_path)
    assert (done.code, "A is a dump of logprobs and B is a directory of traces" in done.err) == (2, True)


def test_tokens_without_a_partner_are_counted_and_are_no_pass(tmp_path: Path) -> None:
    sides = simulate()
    a = write(tmp_path / "a.jsonl", sides.tokens, sides.logprobs("sampler"))
    b = write(tmp_path / "b.jsonl", sides.tokens[:20], sides.logprobs("trainer")[:20])
    done = kvdrift("compare", a, b, "--json", "--out", tmp_path / "run")

    assert done.code == 6
    view = json.loads(done.out)
    assert view["lost"] == {"its sequence is only in one dump": 160}
    assert any(caveat["code"] == "TRACE_OFFSET" for caveat in view["caveats"])
