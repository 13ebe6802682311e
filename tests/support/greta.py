"""GRETA StageTrace files out of real passes of a tiny model, in every layout that the engine has had."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kvdrift.engines.hf.engine import HFEngine
from kvdrift.trace.model import Trace
from kvdrift.trace.readers.greta.records import fnv1a
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.sites import Site

Layout = Literal["two_files", "one_file", "runs"]
Record = dict[str, Any]
NAMES = {
    Site.EMBED_OUT: "embed_out",
    Site.LAYER_IN: "x_in",
    Site.ATTN_NORM_OUT: "attn_norm_out",
    Site.Q_PROJ: "q_pre_rope",
    Site.Q_ROPE: "q_post_rope",
    Site.K_PROJ: "k_proj",
    Site.V_PROJ: "v_proj",
    Site.ATTN_CTX: "attn_out",
    Site.ATTN_OUT: "wo_out",
    Site.RESID_ATTN: "residual_post_attn",
    Site.FFN_NORM_OUT: "ffn_norm",
    Site.MLP_OUT: "mlp_out",
    Site.LAYER_OUT: "residual_post_mlp",
    Site.FINAL_NORM_OUT: "final_norm",
}


def passes(model: Any, tokens: Sequence[int], mode: Mode) -> tuple[Trace, Trace]:
    """Return prefill and the decode of the last token, as an engine without layer isolation runs them."""
    prompt, last = tuple(tokens), len(tokens) - 1
    prefill = Trace("p", "prefill", "full", "native", prompt)
    decode = Trace("p", "decode", str(mode), "native", prompt)
    with HFEngine(model, name="tiny") as engine:
        sequence = engine.new_sequence(len(prompt), keep_past=True)
        sequence.extend(prompt, probe=(last,), sink=prefill)
        if mode is Mode.KV_ALIGNED:
            sequence.rewind(1)
        else:
            sequence.close()
            sequence = engine.new_sequence(len(prompt))
            sequence.extend(prompt[:-1])
        sequence.extend(prompt[-1:], probe=(last,), sink=decode)
        sequence.close()
    return prefill, decode


def records(trace: Trace, *, prompt_id: str, sample: int | None, digits: int) -> list[Record]:
    """Return the lines of one pass: `sample` values of each tensor, None for all, printed with so many digits."""
    phase = "prefill_last" if trace.pass_name == "prefill" else "decode0"
    found = []
    for row in trace.rows:
        for index, position in enumerate(row.positions):
            values = row.values[index].astype(np.float32).reshape(-1)
            call = next(c for c in trace.calls if c.start <= position < c.start + c.q_len)
            common = {
                "prompt_id": prompt_id,
                "phase": phase,
                "step": 0 if phase == "prefill_last" else 1,
                "pos_id": position,
                "seq_len": call.q_len,
                "tokens_total": call.cache_len_before + call.q_len,
            }
            if row.site is Site.LOGITS:
                found.append(logits_record(values, common, digits))
            elif row.site in NAMES:
                part = values[:sample]
                found.append(
                    {
                        "event": "stage_trace",
                        **common,
                        "point": NAMES[row.site],
                        "layer": 0 if row.layer is None else row.layer,
                        "token_index": position - call.start,
                        "stride_elems": len(values),
                        "sample_n": len(part),
                        "hash": fnv1a(part),
                        **statistics(part, digits),
                        "sample": [printed(v, digits) for v in part],
                        **({"token_id": trace.tokens[position]} if row.site is Site.EMBED_OUT else {}),
                    }
                )
    return found


def logits_record(values: np.ndarray[Any, Any], common: Mapping[str, object], digits: int) -> Record:
    first, second = np.argsort(values)[::-1][:2]
    figures = {"top1_logit": values[first], "top2_logit": values[second], "gap": values[first] - values[second]}
    return {
        "event": "stage_logits",
        **common,
        "point": "logits",
        "layer": -1,
        "hash": fnv1a(values),
        **{k: v for k, v in statistics(values, digits).items() if k in ("min", "max", "mean")},
        "top1_id": int(first),
        "top2_id": int(second),
        **{name: printed(value, digits) for name, value in figures.items()},
        "vocab": len(values),
    }


def statistics(values: np.ndarray[Any, Any], digits: int) -> Record:
    figures = {"min": values.min(), "max": values.max(), "mean": values.mean(), "abs_sum": np.abs(values).sum()}
    counts = {"nan": int(np.isnan(values).sum()), "inf": int(np.isinf(values).sum())}
    return {**{k: printed(v, digits) for k, v in figures.items()}, **counts, "nz_count": int((values != 0).sum())}


def printed(value: Any, digits: int) -> float:
    return float(f"{float(value):.{digits}g}")


def write_traces(
    folder: Path,
    model: Any,
    prompts: Mapping[str, Sequence[int]],
    *,
    layout: Layout = "two_files",
    modes: Iterable[Mode] = (Mode.AS_DESIGNED,),
    sample: int | None = None,
    digits: int = 6,
    config: Mapping[str, object] | None = None,
    old: bool = False,
    edit: Callable[[list[Record]], list[Record]] | None = None,
) -> Path:
    """Run every prompt in every mode and write what GRETA would have written.

    `old` gives the fields the names that they had first; `edit` may change the records of each pass.
    """
    for mode in modes:
        for prompt_id, tokens in prompts.items():
            found = [records(t, prompt_id=prompt_id, sample=sample, digits=digits) for t in passes(model, tokens, mode)]
            found = [edit(lines) for lines in found] if edit is not None else found
            if old:
                found = [[{"tensor" if k == "point" else k: v for k, v in r.items()} for r in lines] for lines in found]
            _write(folder, layout, mode, prompt_id, found)
    if config is not None:
        place = folder / "runs" if layout == "runs" else folder
        (place / "config.json").write_text(json.dumps(config))
    return folder


def _write(folder: Path, layout: Layout, mode: Mode, prompt_id: str, found: list[list[Record]]) -> None:
    prefill, decode = ("".join(json.dumps(record) + "\n" for record in lines) for lines in found)
    if layout == "runs":
        for name, text in (("prefill", prefill), ("decode", decode)):
            place = folder / "runs" / f"kv_aligned_{int(mode is Mode.KV_ALIGNED)}" / "seed_0" / name
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{prompt_id}_trace.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    elif layout == "one_file":
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{prompt_id}_{mode}_trace.jsonl").write_text(prefill + decode)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{prompt_id}_{mode}_trace.jsonl").write_text(prefill)
        (folder / f"{prompt_id}_{mode}_decode_trace.jsonl").write_text(decode)
