"""By how much operations of llama.cpp enlarge a difference of their inputs: the room that decision 15 leaves.

Each configuration of the embedded file, and of tiny random models, is captured once, clean, natively and with aligned
inputs. The growth of an address is what is left of its difference beyond the rounding of the operation itself, over the
largest difference of its inputs.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks.support import say
from kvdrift.capture.modes import continue_greedily
from kvdrift.capture.prompts import tokenize
from kvdrift.capture.rungs import DecodeCapture
from kvdrift.errors import CaptureError
from kvdrift.instruments.native import fresh_rows, judge_native
from kvdrift.instruments.walk import COPIED, GROWTH, Walk
from kvdrift.measure.measured import Measured
from kvdrift.vocabulary.facts import Prompt
from kvdrift.vocabulary.plan import AuditPlan, Mode
from kvdrift.vocabulary.progress import Silent
from kvdrift.vocabulary.sites import PARENTS, Site
from kvdrift_bench.models.prompt_sets import DEFAULT_SET, prompt_set
from kvdrift_bench.models.tiny_gguf import ARCHITECTURES
from kvdrift_bench.run.llamacpp_host import open_llamacpp, why_not_run

_FILES = ("default", *(f"tiny:{kind}" for kind in ARCHITECTURES))
_WEIGHTS = {"default": ("file", "f16", "f32")}
_CACHES = ("f32", "f16", "bf16", "q8_0", "q4_0")


def run(options: argparse.Namespace) -> bool:
    """Measure every configuration; one that is beyond its bound is a failure."""
    largest, share = 0.0, 0.0
    with tempfile.TemporaryDirectory(prefix="kvdrift-growth-") as folder:
        for model in _FILES:
            for weights, kv_type, flash in product(_WEIGHTS.get(model, ("file",)), _CACHES, ("off", "on")):
                if why_not_run(kv_type, flash) is None:
                    found = _measure(model, weights, kv_type, flash, Path(folder))
                    largest, share = max(largest, found[0]), max(share, found[1])
    say(f"largest growth {largest:.2f} (allowed {GROWTH:g}; {COPIED:g} for copies), of a bound {share:.2f}")
    return 0.0 < share <= 1.0


def _measure(model: str, weights: str, kv_type: str, flash: str, folder: Path) -> tuple[float, float]:
    """Say how a configuration does, and return its largest growth and its largest share of a bound."""
    try:
        host = open_llamacpp(model, kv_type, flash, folder, weights=weights)
    except CaptureError as error:
        say(f"{model} K and V {kv_type}: {error}")
        return 0.0, 0.0
    with host.run(None) as (engine, _):
        info, plan = engine.info, AuditPlan(ladder="off", keep_traces=False)
        encode = host.encoder(engine)
        ids = tokenize(
            prompt_set(DEFAULT_SET, encode, info.vocab_size or 2),
            encode,
            vocab_size=info.vocab_size,
            max_positions=info.max_positions,
            span=plan.span,
        )
        prompts = [Prompt(name, t, continue_greedily(engine, t, plan.span)) for name, t in ids.items()]
        measured = Measured(plan, info, prompts, created="")
        DecodeCapture(engine, measured, measured).run(info.dtype, Silent())
    mode, arithmetic = str(Mode.KV_ALIGNED), info.arithmetic
    assert arithmetic.is_configured
    rows = measured.table.select(mode, info.dtype)
    growths = [(0.0, "nothing")]
    for site in {place.site for place in rows.places} & PARENTS.keys() - {Site.ATTN_PROBS}:
        at = np.flatnonzero(rows.is_at(site))
        inputs = Walk(rows).difference_of_inputs(at, site, arithmetic)
        own = rows.rel_l2[at] - arithmetic.bound(site)
        growths += [(growth, str(site)) for growth in (own[inputs > 0.0] / inputs[inputs > 0.0]).tolist()]
    judged = judge_native(measured.table, mode, arithmetic).evidence
    fresh = fresh_rows(measured.table, mode, arithmetic).places
    growth, where = max(growths)
    say(
        f"{host.name} {info.dtype}: of {judged.detail['n_places']} sites {judged.detail['n_judged']} judged, "
        f"{len(fresh)} with equal inputs; largest growth {growth:.2f} ({where}), of a bound {judged.statistic:.2f}"
    )
    return growth, judged.statistic or 0.0
