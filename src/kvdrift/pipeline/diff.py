"""Two runs beside each other: what got worse beyond noise, what appeared and what vanished. No tolerance is asked for.

Drift of the same token at the same place is paired, as log(drift of B / drift of A), where equal bits count as the
smallest drift of that place in both runs. If the runs were the same, A and B could be swapped at every (prompt,
position), so that the signs of a unit's values flip together: sign-flip permutation with the largest statistic of all
places gives a p-value for each, adjusted for all of them. A place is worse, or better, where it is at most alpha.

Runs of other weights or another dtype drift by other amounts with nothing wrong, so that their drift is not compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvdrift.errors import KvdriftError, TraceError
from kvdrift.instruments.sign_flips import sign_flip_max_t, units_for
from kvdrift.pairing.drift import DriftTable
from kvdrift.pairing.rows import Rows, keys_of, unit_keys
from kvdrift.report.view import SCHEMA_VERSION, to_strict_json
from kvdrift.vocabulary.address import Place

_ALPHA = 1e-3
_ORDER = ("EXACT", "STRUCTURAL_DRIFT", "INCONCLUSIVE", "MISMATCH")
# Facts of which a difference means that drift cannot be compared, and facts that are named and compared across.
_DECISIVE = ("model_hash", "dtype")
_NAMED = ("model", "engine", "device", "attention", "cache", "parameters")


@dataclass(frozen=True, slots=True)
class Shift:
    """A place whose drift changed: the typical ratio of B to A, and the p-value adjusted for all places."""

    mode: str
    place: Place
    ratio: float
    p_value: float

    def __str__(self) -> str:
        return f"{self.mode} / {self.place}: drift {self.ratio:.3g} times as large (p {self.p_value:.1e})"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDiff:
    """What separates run B from run A.

    Attributes:
        facts: differences of what was run, the ones that forbid a comparison first.
        verdicts: verdicts of both runs.
        worse: all that speaks against B, a sentence each; empty if B is no worse.
        better: what is gone or smaller in B.
        changed: what is neither: another first failure, caveats that came or went.
        n_units: distinct (prompt, position) units that both have, and `why_not` says why their drift was not compared.
    """

    facts: tuple[str, ...]
    verdicts: tuple[str, str]
    worse: tuple[str, ...]
    better: tuple[str, ...]
    changed: tuple[str, ...]
    n_units: int
    why_not: str | None
    alpha: float = _ALPHA

    @property
    def exit_code(self) -> int:
        """0 if B is no worse than A, 1 if it is."""
        return 1 if self.worse else 0

    def lines(self) -> list[str]:
        """Return the comparison for people, a fact a line."""
        lines = [f"{self.verdicts[0]} -> {self.verdicts[1]}: {'worse' if self.worse else 'no worse'}"]
        for title, items in (
            ("other facts", self.facts),
            ("worse", self.worse),
            ("better", self.better),
            ("changed", self.changed),
        ):
            lines += [f"  {title}: {item}" for item in items]
        if self.why_not is not None:
            lines.append(f"  drift was not compared place by place: {self.why_not}")
        else:
            lines.append(f"  drift was compared at {self.n_units} (prompt, position) units, alpha {self.alpha:g}")
        return lines

    def to_json(self) -> str:
        """Return the comparison as strict JSON."""
        found = {name: getattr(self, name) for name in self.__slots__}
        return to_strict_json({"schema_version": SCHEMA_VERSION, **found, "exit_code": self.exit_code})


def diff_runs(a: Path, b: Path, *, alpha: float = _ALPHA) -> RunDiff:
    """Compare the runs in the directories `a` and `b`.

    Raises:
        TraceError: a directory holds no finished run, or one of a newer kvdrift, or both are of unlike kinds.
    """
    one, two = read_view(a), read_view(b)
    if (kinds := [_kind(view) for view in (one, two)])[0] != kinds[1]:
        raise TraceError(f"{a} is {kinds[0]} and {b} {kinds[1]}; compare two runs of one kind")
    facts, forbidding = _facts(one, two)
    worse: list[str] = []
    better: list[str] = []
    changed: list[str] = []
    for sentence, by in _verdicts(one, two):
        (worse if by > 0 else better if by < 0 else changed).append(sentence)
    shifts, n_units, why_not = _drift(a, b, one, two, forbidding, alpha)
    for shift in shifts:
        (worse if shift.ratio > 1.0 else better).append(str(shift))
    return RunDiff(
        facts=tuple(facts),
        verdicts=(one["verdict"], two["verdict"]),
        worse=tuple(worse),
        better=tuple(better),
        changed=tuple(changed),
        n_units=n_units,
        why_not=why_not,
        alpha=alpha,
    )


def read_view(directory: Path) -> dict[str, Any]:
    """Return the report of a run directory as plain data.

    Raises:
        TraceError: there is none, it is damaged, or a newer kvdrift wrote it.
    """
    path = directory / "report.json"
    try:
        view = json.loads(path.read_text(encoding="utf-8"))
        version = view["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TraceError(f"cannot read {path}: {error}; is {directory} the directory of a finished run?") from error
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise TraceError(
            f"{path} has schema version {version}, and this kvdrift knows up to {SCHEMA_VERSION}; update kvdrift"
        )
    if view.get("verdict") not in _ORDER:
        raise TraceError(f"{path} has no verdict; is {directory} the directory of a finished run?")
    return dict(view)


def _kind(view: Mapping[str, Any]) -> str:
    """What a report is of, in words."""
    if "report" in view:
        return {"compare-logprobs": "a comparison of logprobs"}.get(view["report"], "a comparison of two engines")
    return "an audit of a server" if view.get("kind") == "server" else "an audit of a model"


def _facts(one: Mapping[str, Any], two: Mapping[str, Any]) -> tuple[list[str], str | None]:
    """The facts that differ, in words, and the first that forbids a comparison of drift."""
    left, right = one.get("environment", {}), two.get("environment", {})
    found = [(name, left.get(name), right.get(name)) for name in (*_DECISIVE, *_NAMED)]
    versions = [
        (f"version of {name}", left.get("versions", {}).get(name), right.get("versions", {}).get(name))
        for name in sorted({*left.get("versions", {}), *right.get("versions", {})})
    ]
    different = [(name, x, y) for name, x, y in (*found, *versions) if x != y]
    said = [f"{name} {_short(x)} and {_short(y)}" for name, x, y in different]
    return said, next((said[i] for i, item in enumerate(different) if item[0] in _DECISIVE), None)


def _short(value: object) -> str:
    text = "unknown" if value is None else str(value)
    return text if len(text) <= 24 else text[:16] + "..."


def _verdicts(one: Mapping[str, Any], two: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """What changed in the verdicts, with +1 where B is worse, -1 where it is better and 0 where it is neither."""
    before, after = _routes(one), _routes(two)
    for name in dict.fromkeys([*before, *after]):
        (x, where_x), (y, where_y) = before.get(name, (None, None)), after.get(name, (None, None))
        if x is None or y is None:
            gone = y is None
            yield f"{name}: {'not run any more' if gone else f'new, {y}'}", int(gone or y in _ORDER[2:])
        elif x != y:
            step = _ORDER.index(y) - _ORDER.index(x)
            # EXACT and STRUCTURAL_DRIFT are both a pass, and another kernel is all that it takes to change them.
            yield (
                f"{name}: {x}, now {y}" + (f" at {where_y}" if where_y else ""),
                0 if {x, y} <= {*_ORDER[:2]} else step,
            )
        elif where_x != where_y:
            yield f"{name}: first failure {where_x}, now {where_y}", 0
    codes = [{caveat["code"] for caveat in view.get("caveats", ())} for view in (one, two)]
    for code in sorted(codes[1] - codes[0]):
        yield f"caveat {code} is new", 0
    for code in sorted(codes[0] - codes[1]):
        yield f"caveat {code} is gone", 0


def _routes(view: Mapping[str, Any]) -> dict[str, tuple[str, str | None]]:
    """Verdict and first failure of every route that ran, and of the whole."""
    first = view.get("first_failure")
    found = {"the whole": (view["verdict"], first["text"] if isinstance(first, dict) else first)}
    for row in view.get("scenarios", ()):
        if row["verdict"] is not None:
            found[row["name"]] = (row["verdict"], row["first_failure"])
    return found


def _drift(
    a: Path, b: Path, one: Mapping[str, Any], two: Mapping[str, Any], forbidding: str | None, alpha: float
) -> tuple[list[Shift], int, str | None]:
    if forbidding is not None:
        return [], 0, forbidding
    if "leading_scenario" in one and one["leading_scenario"] != two.get("leading_scenario"):
        return [], 0, f"the routes are {one['leading_scenario']} and {two.get('leading_scenario')}"
    try:
        tables = [_table(path) for path in (a, b)]
    except KvdriftError as error:
        return [], 0, str(error)
    dtype = one["environment"]["dtype"]
    needed = units_for(alpha)
    tests: list[tuple[str, Place]] = []
    values: list[np.ndarray[Any, np.dtype[np.float64]]] = []
    n_units = 0
    for mode in one["modes"]:
        for place, ratios in _ratios(tables[0].select(mode, dtype), tables[1].select(mode, dtype)):
            n_units = max(n_units, len(ratios))
            if needed is not None and len(ratios) >= needed:
                tests.append((mode, place))
                values.append(ratios)
    if not tests:
        return (
            [],
            n_units,
            f"{n_units} distinct (prompt, position) units are in both, and alpha {alpha:g} takes {needed}",
        )
    shifts = []
    for length in sorted({len(item) for item in values}):
        chosen = [i for i, item in enumerate(values) if len(item) == length]
        found = sign_flip_max_t(np.array([values[i] for i in chosen]), seed=0)
        share = alpha * len(chosen) / len(values)
        shifts += [
            Shift(*tests[i], float(np.exp(values[i].mean())), float(found.p_values[k]))
            for k, i in enumerate(chosen)
            if found.p_values[k] <= share
        ]
    return sorted(shifts, key=lambda item: (item.mode, item.place.forward_rank)), n_units, None


def _table(directory: Path) -> DriftTable:
    paths = [directory / name for name in ("drift.parquet", "drift.csv.gz") if (directory / name).exists()]
    if not paths:
        raise TraceError(f"{directory} has no drift table")
    return DriftTable.read(paths[0])


def _ratios(a: Rows, b: Rows) -> Iterator[tuple[Place, np.ndarray[Any, np.dtype[np.float64]]]]:
    """log(drift of B / drift of A) by place, [unit], of tokens that both have at the same prompt and position."""
    if not len(a) or not len(b):
        return
    codes = {name: code for code, name in enumerate(a.names)}
    renamed = np.array([codes.get(name, len(codes) + i) for i, name in enumerate(b.names)])
    at = a.find(keys_of(renamed[b.prompt], b.position, b.layer, b.site))
    both = np.flatnonzero(at >= 0)
    both = both[(a.token_id[at[both]] == b.token_id[both]) & np.isfinite(a.rel_l2[at[both]] + b.rel_l2[both])]
    left, right = a.where(at[both]), b.where(both)
    for code, place in enumerate(right.places):
        here = np.flatnonzero(right.place == code)
        x, y = left.rel_l2[here], right.rel_l2[here]
        least = np.concatenate([x[x > 0.0], y[y > 0.0]]).min(initial=np.inf)
        least = least if np.isfinite(least) else 1.0  # equal bits throughout: the ratio is 1
        _, units = np.unique(unit_keys(left.key[here]), return_index=True)
        yield place, np.log(np.maximum(y, least) / np.maximum(x, least))[units]
