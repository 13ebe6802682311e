"""What one line of a dump may look like: lists, a token a line, and the answers of common engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvdrift.errors import TraceError
from kvdrift.logprobs.dump import SequenceRecord

NAMES = ("id", "request_id", "sequence_id", "sample_id", "uid", "rid", "prompt_id", "index")
TOKENS = (
    "token_ids",
    "response_token_ids",
    "response_ids",
    "responses",
    "output_token_ids",
    "output_ids",
    "completion_ids",
    "completion_token_ids",
    "input_ids",
    "tokens",
)
LOGPROBS = (
    "logprobs",
    "token_logprobs",
    "log_probs",
    "logps",
    "response_logprobs",
    "rollout_log_probs",
    "rollout_logprobs",
    "old_log_probs",
    "generation_logprobs",
    "prev_logprobs",
    "inference_logprobs",
    "completion_logprobs",
    "sampler_logprobs",
    "trainer_logprobs",
)
MASKS = ("mask", "response_mask", "loss_mask", "token_mask", "completion_mask")
PROMPTS = ("prompt_token_ids", "prompt_ids")
EXPERTS = ("experts", "routed_experts", "expert_ids")
DROPPED = ("dropped", "is_dropped", "masked_out")
_TEXT_OF_ID = "token_id:"


def read_record(item: Mapping[str, Any], where: str, column: str | None) -> Iterator[SequenceRecord]:
    """Yield the sequences of one line; an answer with several choices has several.

    Raises:
        TraceError: it has none of the known shapes.
    """
    if isinstance(item.get("choices"), list):
        yield from _choices(item, where)
    elif isinstance(item.get("outputs"), list):
        yield from _vllm(item, where)
    elif isinstance(item.get("meta_info"), Mapping):
        yield _sglang(item, where)
    else:
        yield _lists(item, where, column)


def is_token_row(item: Mapping[str, Any]) -> bool:
    """Whether a line is a single token of a sequence."""
    return any(isinstance(item.get(name), int | str) for name in ("token_id", "token")) and any(
        name in item and not isinstance(item[name], list) for name in ("logprob", *LOGPROBS)
    )


def read_token_row(
    item: Mapping[str, Any], where: str, column: str | None
) -> tuple[str | None, Any, int | str, float | None]:
    """Return name of the sequence, position, token and logprob of a line that is a single token."""
    token = item.get("token_id", item.get("token"))
    name = _first(item, ("sequence", *NAMES))[1]
    key = column if column is not None else ("logprob" if "logprob" in item else _column(item, where, None))
    if key not in item:
        raise TraceError(f"{where} has no {key!r}")
    return (
        None if name is None else str(name),
        item.get("position"),
        _token(token, where),
        _number(item[key], where),
    )


def _lists(item: Mapping[str, Any], where: str, column: str | None) -> SequenceRecord:
    key, tokens = _first(item, TOKENS)
    if not isinstance(tokens, list):
        raise TraceError(
            f"{where} has no list of tokens; write token_ids and logprobs, or one of the shapes of docs/compare.md"
        )
    name = _column(item, where, column)
    logprobs = item[name]
    if not isinstance(logprobs, list):
        raise TraceError(f"{where}: {name} is not a list of numbers, one for each of {key}")
    top = item.get("top_logprobs")
    if "top_ids" in item:
        top = [list(zip(*pair, strict=True)) for pair in zip(item["top_ids"], item["top_logprobs"], strict=True)]
        top = [[[value, token] for token, value in row] for row in top]
    record = _record(
        item,
        [_token(token, where) for token in tokens],
        [_number(value, where) for value in logprobs],
        None if top is None else [_top(entry, where) for entry in top],
        where,
    )
    return _masked(record, _first(item, MASKS)[1], where)


def _masked(record: SequenceRecord, mask: Any, where: str) -> SequenceRecord:
    """Keep the tokens that a mask of ones and zeros names."""
    if mask is None:
        return record
    if not isinstance(mask, list) or len(mask) != len(record.tokens):
        raise TraceError(f"{where}: the mask is not a list of one number for each of {len(record.tokens)} tokens")
    kept = [i for i, value in enumerate(mask) if value]

    def of(values: Sequence[Any]) -> list[Any]:
        if len(values) != len(mask):
            raise TraceError(f"{where}: {len(mask)} tokens and {len(values)} values beside them")
        return [values[i] for i in kept]

    return SequenceRecord(
        name=record.name,
        tokens=of(record.tokens),
        logprobs=of(record.logprobs),
        top=None if record.top is None else of(record.top),
        experts=None if record.experts is None else of(record.experts),
        prompt=record.prompt,
        dropped=record.dropped,
    )


def _column(item: Mapping[str, Any], where: str, column: str | None) -> str:
    """Return the name of the column with the logprobs."""
    if column is not None:
        if column not in item:
            raise TraceError(f"{where} has no {column!r}; it has {', '.join(map(str, item))}")
        return column
    found = [name for name in LOGPROBS if item.get(name) is not None]
    if not found:
        raise TraceError(
            f"{where} has no logprobs; name the column, as in FILE:COLUMN (it has {', '.join(map(str, item))})"
        )
    if len(found) > 1:
        raise TraceError(f"{where} has logprobs under {' and '.join(found)}; name one of them, as in FILE:{found[0]}")
    return found[0]


def _choices(item: Mapping[str, Any], where: str) -> Iterator[SequenceRecord]:
    """Answers as those of OpenAI's completions and chat completions."""
    name = _first(item, NAMES)[1]
    for number, choice in enumerate(item["choices"]):
        found = choice.get("logprobs") if isinstance(choice, Mapping) else None
        if not isinstance(found, Mapping):
            raise TraceError(f"{where}, choice {number} has no logprobs; ask the server for them (logprobs=1)")
        ids = choice.get("token_ids")
        if isinstance(found.get("content"), list):
            rows = found["content"]
            tokens = [_token(row["token"], where) for row in rows]
            logprobs = [_number(row["logprob"], where) for row in rows]
            top = [_top([[t["logprob"], t["token"]] for t in row.get("top_logprobs") or ()], where) for row in rows]
        else:
            tokens = [_token(token, where) for token in found.get("tokens", ())]
            logprobs = [_number(value, where) for value in found.get("token_logprobs", ())]
            given = found.get("top_logprobs") or [None] * len(tokens)
            top = [_top(entry, where) for entry in given]
        if isinstance(ids, list) and len(ids) == len(tokens):
            top = [None] * len(ids) if any(isinstance(token, str) for token in tokens) else top
            tokens = [_token(token, where) for token in ids]
        yield SequenceRecord(
            name=None if name is None else f"{name}/{number}" if len(item["choices"]) > 1 else str(name),
            tokens=tokens,
            logprobs=logprobs,
            top=top,
            prompt=_prompt(item),
        )


def _vllm(item: Mapping[str, Any], where: str) -> Iterator[SequenceRecord]:
    """Results of vLLM's `LLM.generate`: for each token a mapping from ids to logprobs."""
    name = _first(item, NAMES)[1]
    for number, output in enumerate(item["outputs"]):
        tokens = [_token(token, where) for token in output["token_ids"]]
        top = [_top(entry, where) for entry in output.get("logprobs") or [None] * len(tokens)]
        if len(top) != len(tokens):
            raise TraceError(f"{where}: {len(tokens)} tokens and {len(top)} logprobs; write one for each token")
        yield SequenceRecord(
            name=None if name is None else f"{name}/{number}" if len(item["outputs"]) > 1 else str(name),
            tokens=tokens,
            logprobs=[None if entry is None else entry.get(token) for token, entry in zip(tokens, top, strict=True)],
            top=top,
            prompt=_prompt(item),
        )


def _sglang(item: Mapping[str, Any], where: str) -> SequenceRecord:
    """Answers of SGLang: rows of logprob, id and text."""
    meta = item["meta_info"]
    rows = meta.get("output_token_logprobs")
    if not isinstance(rows, list):
        raise TraceError(f"{where} has no output_token_logprobs; ask the server for them (return_logprob)")
    given = meta.get("output_top_logprobs") or [None] * len(rows)
    return _record(
        {"id": _first(meta, NAMES)[1], **item},
        [_token(row[1], where) for row in rows],
        [_number(row[0], where) for row in rows],
        [_top(entry, where) for entry in given],
        where,
    )


def _record(
    item: Mapping[str, Any],
    tokens: list[int | str],
    logprobs: list[float | None],
    top: list[dict[int | str, float] | None] | None,
    where: str,
) -> SequenceRecord:
    name = _first(item, NAMES)[1]
    dropped = _first(item, DROPPED)[1]
    experts = _first(item, EXPERTS)[1]
    if experts is not None and not isinstance(experts, list):
        raise TraceError(f"{where}: the experts are not a list of one entry for each token")
    return SequenceRecord(
        name=None if name is None else str(name),
        tokens=tokens,
        logprobs=logprobs,
        top=top,
        experts=experts,
        prompt=_prompt(item),
        dropped=None if dropped is None else bool(dropped),
    )


def _first(item: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Any]:
    return next(((name, item[name]) for name in names if item.get(name) is not None), ("", None))


def _prompt(item: Mapping[str, Any]) -> tuple[int, ...] | None:
    found = _first(item, PROMPTS)[1]
    return tuple(found) if isinstance(found, list) and all(isinstance(token, int) for token in found) else None


def _token(value: Any, where: str) -> int | str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TraceError(f"{where}: {value!r} is no token; write ids as whole numbers")
    if isinstance(value, str) and value.startswith(_TEXT_OF_ID) and value[len(_TEXT_OF_ID) :].isdigit():
        return int(value[len(_TEXT_OF_ID) :])
    return value


def _number(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, str) and value.lower() in ("nan", "inf", "-inf", "infinity", "-infinity"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TraceError(f"{where}: {value!r} is no logprob; write numbers, or null for a token that has none")
    return float(value)


def _top(entry: Any, where: str) -> dict[int | str, float] | None:
    """Read the likeliest tokens of one position: a mapping from tokens, or rows of logprob and token."""
    if entry is None:
        return None
    found: dict[int | str, float] = {}
    rows = entry.items() if isinstance(entry, Mapping) else [(row[1], row[0]) for row in entry]
    for token, value in rows:
        if isinstance(value, Mapping):
            value = value.get("logprob")
        number = _number(value, where)
        if number is not None:
            found[int(token) if isinstance(token, str) and token.isdigit() else _token(token, where)] = number
    return found
