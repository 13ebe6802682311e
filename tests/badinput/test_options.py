"""Options and prompts that cannot be used: one message, exit code 2, nothing written."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import kvdrift
from kvdrift.capture.prompts import default_prompts, tokenize
from kvdrift.errors import UsageError
from tests.support import command
from tests.support.command import names, refused


@pytest.fixture(autouse=True)
def empty(here: Path) -> Any:
    """Whatever a test asks for, the working directory is empty afterwards."""
    yield
    assert names(here) == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--span", "0"),
            "span is 0, and at least 1 token after the prompt must be probed; use --span 4 (span=4)",
        ),
        (("--mode", "zz"), "unknown mode 'zz'; use --mode as_designed, kv_aligned or both (mode=...)"),
        (("--alpha", "0"), "alpha is 0.0, and must lie between 0 and 1; use --alpha 0.001 (alpha=1e-3)"),
        (("--alpha", "2"), "alpha is 2.0, and must lie between 0 and 1; use --alpha 0.001 (alpha=1e-3)"),
        (("--alpha", "nan"), "alpha is nan, and must lie between 0 and 1; use --alpha 0.001 (alpha=1e-3)"),
        (
            ("--dtype", "int4"),
            "unknown dtype 'int4'; use --dtype with one of bfloat16, float16, float32, float64, bf16, fp16, half, "
            "fp32, fp64",
        ),
        (
            ("--cache", "zzz"),
            "unknown cache kind 'zzz'; use --cache with one of dynamic, static, or pass cache=lambda: "
            "MyCache() from Python",
        ),
        (("--layers", "x"), "cannot read 'x' in --layers 'x'; write layers as 0,3,10-12"),
        (("--layers", "²"), "cannot read '²' in --layers '²'; write layers as 0,3,10-12"),
        (("--layers", "-1"), "cannot read '-1' in --layers '-1'; write layers as 0,3,10-12"),
        (("--layers", ""), "cannot read '' in --layers ''; write layers as 0,3,10-12"),
        (("--layers", "3-1"), "the range '3-1' in --layers '3-1' runs backwards; write it as 1-3"),
        (
            ("--layers", "0-99999999999"),
            "cannot read '0-99999999999' in --layers '0-99999999999'; write layers as 0,3,10-12",
        ),
        (("--layers", "1,2"), "--layers names layer 2, and llama has layers 0 to 1"),
        (
            ("--lengths", "8,x"),
            "cannot read 'x' in --lengths '8,x'; write lengths as 64,128,250-260,512-1024:64",
        ),
        (
            ("--lengths", "64,125"),
            "--lengths names 125; with a span of 4 that is 129, and the model has 128 positions; name lengths up to "
            "124 (lengths=[...]) or use a smaller --span (span=...)",
        ),
        (
            ("--lengths", "8", "--scenario", "decode,rewind"),
            "--lengths sweeps plain decode, and a scenario runs on one prompt; leave out --scenario (scenarios=...) or "
            "--lengths (lengths=...)",
        ),
        (
            ("--lengths", "8", "--prompt", "Hi"),
            "the prompt 'prompt_0' is text, and the model came without a tokenizer; give token ids instead (a .jsonl "
            'file with "token_ids", or prompts={"p": [1, 2, 3]})',
        ),
        (("--device", "zzz"), "unknown device 'zzz'; use --device cpu, cuda or cuda:0"),
        (("--device", "meta"), "tensors on the device 'meta' have no values to compare; use --device cpu"),
        (
            ("--prompt", "Hi"),
            "the prompt 'prompt_0' is text, and the model came without a tokenizer; give token ids instead (a .jsonl "
            'file with "token_ids", or prompts={"p": [1, 2, 3]})',
        ),
    ],
)
def test_an_option(llama: Path, options: Sequence[str], message: str) -> None:
    refused(command.kvdrift("audit", llama, *options), 2, message)


def test_an_attention_implementation_that_nobody_knows(llama: Path) -> None:
    done = command.kvdrift("audit", llama, "--attn", "nonsense")

    assert done.err.startswith("kvdrift: cannot use --attn nonsense: ")
    assert done.err.endswith("Use --attn eager or sdpa, or install what it needs.\n")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)


def test_a_device_that_is_not_there(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    refused(
        command.kvdrift("audit", llama, "--device", "cuda"),
        3,
        "no CUDA device is available to this torch; use --device cpu",
    )


@pytest.mark.parametrize("options", [("--span", "x"), ("--alpha", "x"), ("--nonsense",)])
def test_what_is_no_option_at_all(llama: Path, options: Sequence[str]) -> None:
    done = command.kvdrift("audit", llama, *options)

    assert (done.code, done.out) == (2, "")
    assert options[0] in done.err


# ---------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "the prompt 'x' is empty (no tokens); give at least one token"),
        (
            [1, 128],
            "the prompt 'x' holds token id 128, which is outside the vocabulary of 128 (0 to 127); was it made by "
            "another model's tokenizer?",
        ),
        (
            [-1],
            "the prompt 'x' holds token id -1, which is outside the vocabulary of 128 (0 to 127); was it made by "
            "another model's tokenizer?",
        ),
        (
            [10**30],
            f"the prompt 'x' holds token id {10**30}, which is outside the vocabulary of 128 (0 to 127); "
            "was it made by another model's tokenizer?",
        ),
        (
            [1] * 126,
            "the prompt 'x' has 126 tokens; with a span of 4 that is 130, and the model has 128 positions; shorten the "
            "prompt or use a smaller --span (span=...)",
        ),
    ],
)
def test_tokens_that_the_model_cannot_take(tmp_path: Path, llama: Path, ids: list[int], message: str) -> None:
    path = command.write_prompts(tmp_path / "p.jsonl", {"x": ids})

    refused(command.kvdrift("audit", llama, "--prompts", path), 2, message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nope", "2: not JSON: Expecting property name enclosed in double quotes at column 2"),
        ("[1]", '2: a line must be {"id": ..., "text": ...} or {"id": ..., "token_ids": [...]}'),
        (
            '{"text": "a", "token_ids": [1]}',
            '2: a line must be {"id": ..., "text": ...} or {"id": ..., "token_ids": [...]}',
        ),
        ('{"id": "b"}', '2: a line must be {"id": ..., "text": ...} or {"id": ..., "token_ids": [...]}'),
        ('{"id": "a", "token_ids": [1]}', "2: the prompt id 'a' is used twice; ids must differ"),
        ('{"text": 5}', "2: text must be a string"),
        ('{"token_ids": [1.5]}', "2: token_ids must be a list of whole numbers"),
        ('{"token_ids": [true]}', "2: token_ids must be a list of whole numbers"),
        ('{"token_ids": "12"}', "2: token_ids must be a list of whole numbers"),
        ('{"id": null, "token_ids": [1]}', "2: id must be a string that is not empty, or a whole number"),
        ('{"id": [1], "token_ids": [1]}', "2: id must be a string that is not empty, or a whole number"),
        ('{"id": "", "token_ids": [1]}', "2: id must be a string that is not empty, or a whole number"),
    ],
)
def test_a_line_that_is_no_prompt(tmp_path: Path, llama: Path, line: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "a", "token_ids": [1]}\n' + line + "\n")

    refused(command.kvdrift("audit", llama, "--prompts", path), 2, f"{path}:{message}")


@pytest.mark.parametrize("line", ["[" * 100_000, '{"token_ids": [' + "9" * 5000 + "]}"])
def test_a_line_that_no_parser_should_have_to_read(tmp_path: Path, llama: Path, line: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(line)

    done = command.kvdrift("audit", llama, "--prompts", path)

    assert done.err.startswith(f"kvdrift: {path}:1: not a prompt: ")
    assert done.code == 2


def test_prompt_files_that_cannot_be_read(tmp_path: Path, llama: Path) -> None:
    empty, odd, binary = tmp_path / "empty.txt", tmp_path / "p.csv", tmp_path / "binary.txt"
    empty.write_text("\n\n")
    odd.write_text("a")
    binary.write_bytes(b"ab\xff\xfe")
    (tmp_path / "folder.txt").mkdir()

    for path, message in {
        tmp_path / "none.txt": f"cannot read the prompts file {tmp_path / 'none.txt'}: No such file or directory",
        tmp_path / "folder.txt": f"cannot read the prompts file {tmp_path / 'folder.txt'}: Is a directory",
        odd: f"the prompts file {odd} must end in .txt (one prompt per line) or .jsonl",
        binary: f"cannot read the prompts file {binary}: byte 2 is not UTF-8; save the file as UTF-8",
        empty: f"the prompts file {empty} holds no prompt",
    }.items():
        refused(command.kvdrift("audit", llama, "--prompts", path), 2, message)


def test_an_id_that_a_prompt_option_has_as_well(tmp_path: Path, llama: Path) -> None:
    path = command.write_prompts(tmp_path / "p.jsonl", {"prompt_0": [1]})

    refused(
        command.kvdrift("audit", llama, "--prompts", path, "--prompt", "Hi"),
        2,
        f"the prompt id 'prompt_0' of {path} is that of a --prompt; give it another id in the file",
    )


def check(prompts: Any, encode: Any = None) -> dict[str, tuple[int, ...]]:
    return tokenize(prompts, encode, vocab_size=100, max_positions=None, span=1)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1, 2]], "prompts is a list, and must map ids to prompts: prompts={'p': [1, 2, 3]}"),
        ({}, "no prompts were given; pass at least one (--prompt TEXT, prompts={...})"),
        ({3: [1]}, "the prompt id 3 must be a string of ordinary characters"),
        ({"\ud800": [1]}, "the prompt id '\\ud800' must be a string of ordinary characters"),
        (
            {"p": [1.5]},
            "the prompt 'p' is neither text nor a list of token ids (whole numbers): 'float' object cannot be "
            "interpreted as an integer",
        ),
        (
            {"p": 5},
            "the prompt 'p' is neither text nor a list of token ids (whole numbers): 'int' object is not iterable",
        ),
    ],
)
def test_prompts_of_the_library(prompts: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check(prompts)

    assert str(caught.value) == message


def test_token_ids_of_any_whole_type_are_taken() -> None:
    assert check({"p": torch.tensor([1, 2])}) == {"p": (1, 2)}


def test_a_tokenizer_that_fails() -> None:
    def encode(text: str) -> list[int]:
        raise LookupError("no such piece")

    with pytest.raises(UsageError, match="the tokenizer failed on the prompt 'p': LookupError: no such piece; give"):
        check({"p": "Hi"}, encode)
    with pytest.raises(UsageError, match="the prompt 'p' holds a character that is not valid Unicode"):
        check({"p": "\udcff"}, lambda text: [1])


def test_a_tokenizer_that_makes_nothing_of_the_default_prompts() -> None:
    """Repeating nothing until it is 16 tokens long takes for ever."""
    with pytest.raises(UsageError, match="makes no tokens of the default prompt 'p6_len_16'"):
        default_prompts(lambda text: [], 100)


@pytest.mark.parametrize("layers", [(), (-1,)])
def test_layers_of_the_library(layers: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="must name at least one layer from 0 up"):
        kvdrift.audit(None, prompts={"p": [1]}, layers=layers)


def test_separators_inside_a_text_do_not_cut_it(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"id": "p", "text": "a\u2028b"}, ensure_ascii=False) + "\r\n", encoding="utf-8")

    assert dict(kvdrift_prompts(path)) == {"p": "a\u2028b"}


def kvdrift_prompts(path: Path) -> dict[str, str | list[int]]:
    from kvdrift.capture.prompts import read_prompt_file

    return read_prompt_file(path)
