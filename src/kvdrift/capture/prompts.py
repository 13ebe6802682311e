"""Prompts: the default ones, prompt files, and turning text into checked token ids."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kvdrift.errors import KvdriftError, UsageError
from kvdrift.vocabulary.plan import Prompts, name_of_length

Encode = Callable[[str], Sequence[int]]

SHORT = "Hi"
# Two unlike texts, each longer than needed under any tokenizer, so that cutting gives the exact length. Unlike, so that
# the hashes of the two prompts must differ.
_TEXTS = {
    "p6_len_16": (
        16,
        "The river rose overnight and by morning the lower fields lay under water, so the farmers moved their sheep to "
        "the hill, counted them twice, and waited for the rain to stop before anyone spoke of mending the bridge.",
    ),
    "p6_len_32": (
        32,
        "def merge(left, right): a stable merge keeps equal items in their first order. Suppose that both lists are "
        "sorted already; then compare the two heads, take the smaller one, and repeat until one list is empty. What is "
        "left of the other list is appended as it stands, because nothing smaller can follow in a sorted sequence.",
    ),
}


def default_prompts(encode: Encode | None, vocab_size: int | None) -> dict[str, list[int]]:
    """Return the default prompts: "Hi", and two texts of exactly 16 and 32 tokens.

    Without a tokenizer the same lengths are filled with token ids spread over the vocabulary.
    """
    if encode is None:
        lengths = {"p0_short": 1} | {name: length for name, (length, _) in _TEXTS.items()}
        return {name: _made_up(length, vocab_size, salt=length) for name, length in lengths.items()}
    prompts = {"p0_short": _encode(encode, "p0_short", SHORT)}
    for name, (length, text) in _TEXTS.items():
        ids = _encode(encode, name, text)
        if not ids:
            raise UsageError(
                f"the tokenizer makes no tokens of the default prompt {name!r}; give prompts of your own "
                "(--prompts FILE, prompts={...})"
            )
        while len(ids) < length:
            ids += ids
        prompts[name] = ids[:length]
    return prompts


def _made_up(length: int, vocab_size: int | None, salt: int) -> list[int]:
    # A multiplicative walk (Knuth's golden-ratio constant) visits the vocabulary without a pattern.
    return [(2654435761 * (i + 1) + 40503 * salt) % (1 << 32) % (vocab_size or 2) for i in range(length)]


def prompts_of_lengths(
    lengths: Sequence[int],
    prompts: Prompts | None,
    encode: Encode | None,
    *,
    vocab_size: int | None,
    max_positions: int | None,
    span: int,
) -> dict[str, tuple[int, ...]]:
    """Return a prompt of exactly each length, all of them cut from one text, which is repeated where it is too short.

    The text is the longest of `prompts`; without any, the default ones in a row, or made-up tokens where there is no
    tokenizer. The prompt of a length does not depend on the other lengths.

    Raises:
        UsageError: a length with its span does not fit into the model's positions, or a prompt cannot be used.
    """
    if max_positions is not None and (outside := [length for length in lengths if length + span > max_positions]):
        raise UsageError(
            f"--lengths names {outside[0]}; with a span of {span} that is {outside[0] + span}, and the model has "
            f"{max_positions} positions; name lengths up to {max(0, max_positions - span)} (lengths=[...]) or use a "
            "smaller --span (span=...)"
        )
    longest = max(lengths)
    if prompts is not None:
        checked = tokenize(prompts, encode, vocab_size=vocab_size, max_positions=None, span=span)
        text = max(checked.values(), key=len)
    elif encode is None:
        text = tuple(_made_up(longest, vocab_size, salt=0))
    else:
        joined = {"default": " ".join(text for _, text in _TEXTS.values())}
        text = tokenize(joined, encode, vocab_size=vocab_size, max_positions=None, span=span)["default"]
    text *= -(-longest // len(text))
    return {name_of_length(length): text[:length] for length in lengths}


def read_prompt_file(path: Path) -> dict[str, str | list[int]]:
    """Read prompts from a .txt file (one a line) or a .jsonl file ({"id", "text"} or {"id", "token_ids"}).

    Raises:
        UsageError: the file cannot be read, or a line is not a prompt; the message names the line.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise UsageError(f"the prompts file {path} must end in .txt (one prompt per line) or .jsonl")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UsageError(f"cannot read the prompts file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"cannot read the prompts file {path}: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from error
    prompts: dict[str, str | list[int]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, prompt = (f"line_{number}", line) if path.suffix == ".txt" else _parse_line(path, number, line)
        if name in prompts:
            raise UsageError(f"{path}:{number}: the prompt id {name!r} is used twice; ids must differ")
        prompts[name] = prompt
    if not prompts:
        raise UsageError(f"the prompts file {path} holds no prompt")
    return prompts


def _parse_line(path: Path, number: int, line: str) -> tuple[str, str | list[int]]:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        raise UsageError(f"{path}:{number}: not a prompt: {error}") from error
    if not isinstance(item, dict) or ("text" in item) == ("token_ids" in item):
        raise UsageError(
            f'{path}:{number}: a line must be {{"id": ..., "text": ...}} or {{"id": ..., "token_ids": [...]}}'
        )
    name = item.get("id", f"line_{number}")
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    if not isinstance(name, str) or not name:
        raise UsageError(f"{path}:{number}: id must be a string that is not empty, or a whole number")
    if "text" in item:
        if not isinstance(item["text"], str):
            raise UsageError(f"{path}:{number}: text must be a string")
        return name, item["text"]
    ids = item["token_ids"]
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise UsageError(f"{path}:{number}: token_ids must be a list of whole numbers")
    return name, ids


def tokenize(
    prompts: Prompts, encode: Encode | None, *, vocab_size: int | None, max_positions: int | None, span: int
) -> dict[str, tuple[int, ...]]:
    """Return token ids by prompt id, checked against the model.

    Raises:
        UsageError: a prompt is empty, needs a tokenizer that is not there, holds ids outside the vocabulary, or does
            not fit into the model's positions together with the span.
    """
    if not isinstance(prompts, Mapping):
        raise UsageError(
            f"prompts is a {type(prompts).__name__}, and must map ids to prompts: prompts={{'p': [1, 2, 3]}}"
        )
    if not prompts:
        raise UsageError("no prompts were given; pass at least one (--prompt TEXT, prompts={...})")
    checked: dict[str, tuple[int, ...]] = {}
    for name, prompt in prompts.items():
        if not isinstance(name, str) or not name or not _is_text(name):
            raise UsageError(f"the prompt id {name!r} must be a string of ordinary characters")
        if isinstance(prompt, str):
            if encode is None:
                raise UsageError(
                    f"the prompt {name!r} is text, and the model came without a tokenizer; give token ids instead "
                    '(a .jsonl file with "token_ids", or prompts={"p": [1, 2, 3]})'
                )
            ids = tuple(_encode(encode, name, prompt))
        else:
            try:
                ids = tuple(operator.index(i) for i in prompt)
            except TypeError as error:
                raise UsageError(
                    f"the prompt {name!r} is neither text nor a list of token ids (whole numbers): {error}"
                ) from error
        _check(name, ids, vocab_size, max_positions, span)
        checked[name] = ids
    return checked


def _encode(encode: Encode, name: str, text: str) -> list[int]:
    if not _is_text(text):
        raise UsageError(f"the prompt {name!r} holds a character that is not valid Unicode; write it as UTF-8")
    try:
        return [int(i) for i in encode(text)]
    except KvdriftError:
        raise
    except Exception as error:
        raise UsageError(
            f"the tokenizer failed on the prompt {name!r}: {type(error).__name__}: {error}; give token ids instead "
            "(a .jsonl file with \"token_ids\", or prompts={'p': [1, 2, 3]})"
        ) from error


def _is_text(text: str) -> bool:
    """Whether text can be written down: half a surrogate pair, from undecodable bytes of an argument, cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _check(name: str, ids: Sequence[int], vocab_size: int | None, max_positions: int | None, span: int) -> None:
    if not ids:
        raise UsageError(f"the prompt {name!r} is empty (no tokens); give at least one token")
    outside = [i for i in ids if i < 0 or (vocab_size is not None and i >= vocab_size)]
    if outside:
        raise UsageError(
            f"the prompt {name!r} holds token id {outside[0]}, which is outside the vocabulary of {vocab_size} (0 to "
            f"{(vocab_size or 0) - 1}); was it made by another model's tokenizer?"
        )
    if max_positions is not None and len(ids) + span > max_positions:
        raise UsageError(
            f"the prompt {name!r} has {len(ids)} tokens; with a span of {span} that is {len(ids) + span}, and the "
            f"model has {max_positions} positions; shorten the prompt or use a smaller --span (span=...)"
        )


def name_prompts(texts: Sequence[str]) -> Mapping[str, str]:
    """Give the prompts of repeated --prompt options the ids prompt_0, prompt_1, ..."""
    return {f"prompt_{index}": text for index, text in enumerate(texts)}
