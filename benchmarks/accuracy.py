"""Whether the verdicts are right: the fault corpus, clean twins and clean runs, and other tools' rules beside them.

The same as `kvdrift-bench faults`, on the embedded default model; the figures go into the engine's document in docs/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.support import say
from kvdrift_bench.cli.faults import BenchOptions, bench_faults
from kvdrift_bench.figures.shares import shown
from kvdrift_bench.figures.summary import Summary

_DOCUMENTS = {"hf": Path("docs/accuracy/bfloat16.md"), "llamacpp": Path("docs/accuracy/llamacpp.md")}


def run_faults(options: argparse.Namespace) -> bool:
    """Run the corpus; a false alarm, or a fault missed that the audit claims to see, is a failure."""
    summary = bench_faults(_asked(options), say)
    for way, figures in summary.ways.items():
        say(f"{way}: detected {shown(figures.detected)}, above the stated minimum {shown(figures.detected_above)}")
        say(f"{way}: right layer {shown(figures.right_layer)}, right site {shown(figures.right_address)}")
        say(f"{way}: false alarms on clean runs {shown(figures.clean)}, on twins {shown(figures.twins)}")
    return holds(summary)


def run_clean(options: argparse.Namespace) -> bool:
    """Audit the clean model on every set of prompts; a single false alarm is a failure."""
    asked = _asked(options, faults=(), twins=False, fills_document=False)
    summary = bench_faults(asked, say)
    for way, figures in summary.ways.items():
        say(f"{way}: false alarms {shown(figures.clean)}, without a verdict {shown(figures.unsure)}")
    return holds(summary)


def holds(summary: Summary) -> bool:
    """Whether something was measured, no clean run raised an alarm, and what should be seen was seen."""
    return bool(summary.ways) and all(
        figures.clean.trials > 0
        and figures.clean.hits + figures.twins.hits == 0
        and figures.detected_above.hits == figures.detected_above.trials
        for figures in summary.ways.values()
    )


def _asked(
    options: argparse.Namespace,
    *,
    faults: tuple[str, ...] | None = None,
    twins: bool = True,
    fills_document: bool = True,
) -> BenchOptions:
    return BenchOptions(
        engine=options.engine,
        models=tuple(options.model or ("default",)),
        dtypes=_dtypes(options) if options.engine == "hf" else BenchOptions().dtypes,
        weights=tuple(options.weights.split(",")),
        attentions=tuple(options.attn.split(",")),
        kv_types=tuple(options.kv_type.split(",")),
        flash=tuple(options.flash_attn.split(",")),
        faults=tuple(options.faults.split(",")) if options.faults and faults is None else faults,
        twins=twins and options.twins,
        n_clean=options.clean,
        ladder=options.ladder,
        out=options.out,
        markdown=(options.markdown or _DOCUMENTS.get(options.engine)) if fills_document else None,
        json=options.json,
    )


def _dtypes(options: argparse.Namespace) -> tuple[str, ...]:
    from kvdrift.engines.hf.load import resolve_dtype

    return tuple(str(resolve_dtype(name)).removeprefix("torch.") for name in options.dtype.split(","))
