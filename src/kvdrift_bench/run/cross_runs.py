"""Every architecture that transformers and mlx-lm both have, A against B on the same weights; a process each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec

from kvdrift.errors import UsageError
from kvdrift.sweep.backend import Job, Limits
from kvdrift.sweep.local import LocalBackend

_JOB = "kvdrift_bench.run.cross_runs:compare_kind"
_TIMEOUT_S = 900.0
# Options that both need to be told, beside those of `versus_mlx.KINDS`.
_CHANGES: Mapping[str, Mapping[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 3},  # which layers are linear: mlx-lm reads no list of them
    "deepseek_v2": {
        "rope_parameters": {
            "rope_type": "yarn",  # mlx-lm has no other one for it
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        }
    },
    "gemma3": {  # as gemma3_text
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "sliding_window_pattern": 6,
    },
    "gpt_bigcode": {"n_inner": 256},
    "gpt_neox": {"intermediate_size": 256},  # mlx-lm has no option for it
    "granitemoehybrid": {"position_embedding_type": "rope"},
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]},  # mlx-lm asks for a layer of each kind
    "llama4": {
        "attention_chunk_size": 64,  # what is kept of a chunk is no row of a common layout
        "num_hidden_layers": 4,
        "layer_types": ["chunked_attention"] * 3 + ["full_attention"],  # mlx-lm has this order always
        "no_rope_layers": [1, 1, 1, 0],
        "moe_layers": [0, 1, 2, 3],
    },
    "llama4_text": {"layer_types": ["full_attention"] * 2, "moe_layers": []},  # mlx-lm has no chunks and experts in it
    "mimo_v2_flash": {
        "rope_parameters": {  # half of a head is turned: the third of the default is not even
            "full_attention": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        }
    },
    "minicpm3": {
        "rope_parameters": {
            "rope_type": "longrope",  # mlx-lm has no other one for it
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 128,
            "short_factor": [1.0, 1.5, 2.0, 3.0],
            "long_factor": [1.0, 1.5, 2.0, 3.0],
        }
    },
    "olmo_hybrid": {"linear_num_key_heads": 4},  # queries, keys and values of one width: transformers writes thirds
    "phimoe": {"attention_bias": True, "lm_head_bias": True},  # mlx-lm has them always
    "recurrent_gemma": {"num_key_value_heads": 1},  # nor for this one
}
# What an error does not say of those that cannot be compared.
_APART: Mapping[str, str] = {
    "bitnet": "mlx-lm reads weights packed to two bits, each with a weight_scale, by a kernel that Metal alone has",
    "longcat_flash": "its layers have two attention modules each, and two layers of the cache in transformers",
    "minimax": "two architectures have this name: MiniMax-01 in transformers, with layers of linear attention "
    "(self_attn.qkv_proj), and MiniMax-M2 in mlx-lm, which is compared as minimax_m2",
    "olmo": "mlx-lm reads the files of another package, hf_olmo (d_model, n_heads, mlp_hidden_size)",
}
_PAGE = """# transformers against mlx-lm

Every architecture that both have, as a tiny random model of transformers ([the zoo](zoo.md)), saved as its users would
save it and loaded by mlx-lm: the same weights in both, compared by `kvdrift compare` at the finest precision that both
have. mlx-lm reads files as they were published, and transformers 5 writes some otherwise: options and weights of such
a file get the names that mlx-lm reads, by tables ([decision 75](adr/0075-files-that-mlx-lm-reads.md)). NOT_COMPARED
says why.

Where the two differ, the third definition is the configuration: a difference that is explained stands with what mlx-lm
does otherwise, and is compared once more with that put right ([accuracy](accuracy/compare.md)). A MISMATCH without an
explanation has not been looked at by hand: it may be of either side, of how the model was made small, or of kvdrift.

The command writes this page; changes here are lost.

<!-- not run: takes minutes; tests/bench runs it for single types -->

    {command}

{versions}. {n} architectures: {counts}. {minutes} min, one after the other.

| architecture | at | verdict | first address | why | put right |
|---|---|---|---|---|---|
{rows}
"""


class CrossRow(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one architecture; `state` is its verdict, or NOT_COMPARED with the reason in `why`.

    `seconds` are those of all of it.
    """

    kind: str
    versions: str
    state: str
    at: str = ""
    place: str = ""
    why: str = ""
    corrected: str = ""
    seconds: float = 0.0


def shared_kinds() -> list[str]:
    """Return the architectures that both have, those among them that mlx-lm loads as another one."""
    from mlx_lm.utils import MODEL_REMAPPING

    from kvdrift.zoo.build import registered
    from kvdrift.zoo.build_mlx import registered_mlx

    return sorted({*registered()} & {*registered_mlx(), *MODEL_REMAPPING})


def choose_kinds(names: Sequence[str]) -> list[str]:
    """Return the architectures of these names, or all of them.

    Raises:
        UsageError: a name is not one that both have.
    """
    known = shared_kinds()
    if unknown := [name for name in names if name not in known]:
        raise UsageError(
            f"{unknown[0]!r} is not an architecture that both have; --model-type takes one of {', '.join(known)}"
        )
    return list(dict.fromkeys(names)) or known


def compare_kind(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Compare one architecture; a job of a backend."""
    from kvdrift_bench.run.versus_mlx import KINDS, first_words, one_against_mlx

    kind, start = payload["kind"], monotonic()
    try:
        found = one_against_mlx(kind, {**KINDS.get(kind, {}), **_CHANGES.get(kind, {})})
    except SystemExit:
        row = _not_compared(payload, "its module of mlx-lm ends the process, for want of another package")
    except Exception as error:  # noqa: BLE001  # whatever an architecture raises, it is told of that one
        row = _not_compared(payload, f"{type(error).__name__}: {first_words(error)}")
    else:
        row = CrossRow(
            kind=kind,
            versions=payload["versions"],
            state=found.verdict,
            at=found.rung,
            place=found.place,
            why=found.why or found.cause,
            corrected=found.corrected,
        )
        row = _not_compared(payload, found.error) if found.error else row
    done: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(row, seconds=round(monotonic() - start, 1)))
    return done


def _not_compared(payload: Mapping[str, Any], why: str) -> CrossRow:
    kind = payload["kind"]
    told = f"{_APART[kind]}; {why}" if kind in _APART else why
    return CrossRow(kind=kind, versions=payload["versions"], state="NOT_COMPARED", why=told)


def run_cross(kinds: Sequence[str], versions: str, jobs: int | None, rows: Path | None) -> Iterator[CrossRow]:
    """Yield a row for each architecture: those that a file holds, then new ones, which it holds afterwards."""
    held: dict[str, CrossRow] = {}
    if rows is not None and rows.exists():
        lines = [msgspec.json.decode(line, type=CrossRow) for line in rows.read_bytes().splitlines()]
        held = {row.kind: row for row in lines if row.versions == versions}
    yield from (held[kind] for kind in kinds if kind in held)
    waiting = [
        Job(id=kind, function=_JOB, payload={"kind": kind, "versions": versions}, group="cross")
        for kind in kinds
        if kind not in held
    ]
    limits = Limits(jobs=jobs, timeout=_TIMEOUT_S, retries=0)
    for outcome in LocalBackend().run(waiting, limits, lambda job, worker: None):
        if outcome.value is None:
            row = _not_compared({"kind": outcome.id, "versions": versions}, str(outcome.error))
        else:
            row = msgspec.convert(outcome.value, CrossRow)
        if rows is not None:
            with rows.open("ab") as file:
                file.write(msgspec.json.encode(row) + b"\n")
        yield row


def cross_page(rows: Sequence[CrossRow], command: str, versions: str) -> str:
    """Return the page, a row for each architecture in the order of their names."""
    counts = Counter(row.state for row in rows)
    agree = sum("STRUCTURAL_DRIFT" in (row.state, row.corrected) or row.state == "EXACT" for row in rows)
    told = ", ".join(f"{n} {state}" for state, n in counts.most_common())
    return _PAGE.format(
        command=command,
        versions=versions,
        n=len(rows),
        minutes=round(sum(row.seconds for row in rows) / 60.0),
        counts=f"{told}; {agree} agree, or do once mlx-lm does what the configuration says",
        rows="\n".join(_line(row) for row in sorted(rows, key=lambda row: row.kind)),
    )


def _line(row: CrossRow) -> str:
    cells = (row.kind, row.at or "-", row.state, row.place or "-", row.why or "-", row.corrected or "-")
    safe = (cell.replace("|", "\\|").replace("<", "&lt;").replace("`", "'") for cell in cells)
    return "| " + " | ".join(safe) + " |"


__all__ = ["CrossRow", "choose_kinds", "compare_kind", "cross_page", "run_cross", "shared_kinds"]
