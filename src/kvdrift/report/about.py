"""What a verdict is about, in words: rows in the batch, key lengths, decode steps, kernel and dtype; and what was not
run."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import Protocol

from kvdrift.measure.measured import Measured
from kvdrift.vocabulary.facts import Call
from kvdrift.vocabulary.plan import Mode

# Options of a command that another run of it must not have: these routes need the ladder, and a directory of their own.
_REPLACED = ("--scenario", "--ladder", "--lengths", "--out")
_DECODE = "decode"
_MOST_NAMED = 3


class _Route(Protocol):
    """The proof that a pair took two routes, as it was measured."""

    @property
    def decode(self) -> Sequence[Call]: ...


def about(runs: Sequence[Measured]) -> str:
    """Return what was run, of one route or of several, such as "plain decode: 1 row in the batch, 2 to 36 keys"."""
    base = runs[0]
    calls = [call for run in runs for route in _native(run) for call in route.decode]
    names = ["plain decode" if run.scenario == _DECODE else run.scenario for run in runs]
    more = len(names) - _MOST_NAMED
    routes = ", ".join(names[:_MOST_NAMED]) + (f" and {more} more scenarios" if more > 0 else "")
    parts = []
    if calls:
        parts.append(_span([call.n_rows for call in calls], "row", " in the batch"))
        parts.append(_span([_keys(call) for call in calls], "key"))
        parts.append(f"{len(calls)} decode {'step' if len(calls) == 1 else 'steps'}")
        kernels = sorted({kernel for call in calls for kernel in call.kernels})
        ways = sorted({call.attention for call in calls} - {"unknown"})
        parts.append(
            (f"{' and '.join(ways)} attention" if ways else "attention not seen")
            + (f" ({', '.join(kernels)})" if kernels else "")
        )
    foreign = base.foreign
    dtype = base.info.dtype if foreign is None else foreign.computed_in
    parts.append("computed in a dtype that is not known" if dtype is None else f"computed in {dtype}")
    if foreign is None and base.info.autocast is not None:
        parts[-1] = f"computed in {base.info.autocast} with weights in {dtype}"
    return f"{routes}: {', '.join(parts)}"


def _native(run: Measured) -> Iterable[_Route]:
    """The routes at the native dtype, of the first mode that ran."""
    routes = [route for route in run.routes if route.rung == run.info.dtype]
    mode = next((mode for mode in Mode if any(route.mode == mode for route in routes)), None)
    return [route for route in routes if route.mode == mode]


def _keys(call: Call) -> int:
    return call.start + call.q_len if call.kv_len is None else call.kv_len


def _span(values: Sequence[int], what: str, behind: str = "") -> str:
    """A range in words.

    >>> _span([1, 1], "row", " in the batch"), _span([2, 36], "key")
    ('1 row in the batch', '2 to 36 keys')
    """
    low, high = min(values), max(values)
    count = str(low) if low == high else f"{low} to {high}"
    return f"{count} {what}{'' if high == 1 else 's'}{behind}"


def command_for_all(command: str | None) -> str:
    """Return the command, or the call, that runs every scenario as well.

    >>> command_for_all("kvdrift audit --dtype bfloat16 --ladder off --out run")
    'kvdrift audit --dtype bfloat16 --scenario all'
    >>> command_for_all(None)
    'kvdrift.audit(model, tokenizer, scenarios="all")'
    """
    words = [] if command is None else shlex.split(command)
    if words[:2] != ["kvdrift", "audit"]:
        return 'kvdrift.audit(model, tokenizer, scenarios="all")'
    kept: list[str] = []
    skip = False
    for word in words:
        name, _, value = word.partition("=")
        if skip or name in _REPLACED:
            skip = not skip and not value
            continue
        kept.append(word)
    return shlex.join([*kept, "--scenario", "all"])
