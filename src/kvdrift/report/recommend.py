"""What to do next, from the verdict and the first failing site."""

from __future__ import annotations

from collections.abc import Sequence

from kvdrift.verdict.decide import Decision
from kvdrift.vocabulary.evidence import CHOICE, Diagnosis, Verdict
from kvdrift.vocabulary.run_files import table_name
from kvdrift.vocabulary.sites import CACHE_SITES, Site

# What can go wrong between the site before and this one, in a decode step and not in prefill.
_LOOK_AT = {
    Site.EMBED_OUT: "the token ids that the decode step is fed, and the embedding (scale, position table) that it uses",
    Site.LAYER_IN: "what runs between the layer below and this one: hooks, pipeline hand-over, position embeddings "
    "that are added to the hidden state",
    Site.ATTN_NORM_OUT: "the norm in front of attention on the decode path: its epsilon, its weight, the dtype in "
    "which it takes the variance",
    Site.Q_PROJ: "the query projection on the decode path: weight layout, fused or separate kernels, adapters",
    Site.K_PROJ: "the key projection on the decode path: weight layout, fused or separate kernels, adapters",
    Site.V_PROJ: "the value projection on the decode path: weight layout, fused or separate kernels, adapters",
    Site.Q_NORM: "the per-head query norm on the decode path",
    Site.K_NORM: "the per-head key norm on the decode path",
    Site.Q_ROPE: "the position that the decode step gives to RoPE (offset by the cache length, per row when padded), "
    "and the RoPE base, scaling and dtype",
    Site.K_ROPE: "the position and the RoPE tables with which new keys are rotated before they are stored",
    Site.K_CACHE: "the key cache: which slot a token is written to, rows that are stale, shifted or aliased, the dtype "
    "and scale in which keys are stored",
    Site.V_CACHE: "the value cache: which slot a token is written to, its layout, stale rows, stored dtype and scale",
    Site.ATTN_SCORES: "the score computation of the decode kernel: softmax scale, mask and window bounds, softcap, "
    "which kv head a query head reads",
    Site.ATTN_PROBS: "the softmax of the decode kernel: its dtype, attention sinks, the merge of split keys",
    Site.ATTN_CTX: "how the decode kernel weights the values: head mapping, V layout, merge of partial results, a "
    "scale or mask that is applied inside the kernel",
    Site.ATTN_OUT: "the output projection on the decode path",
    Site.RESID_ATTN: "the residual addition after attention, and any norm or scale on that branch",
    Site.FFN_NORM_OUT: "the norm in front of the feed-forward part on the decode path",
    Site.ROUTER: "the expert router: its dtype, and whether two experts are nearly tied",
    Site.MLP_OUT: "the feed-forward part for a single token: expert dispatch, fused kernels, activation",
    Site.CONV_STATE: "the convolution state: how many inputs are kept, and whether it is taken before the convolution",
    Site.SSM_STATE: "the recurrent state: its layout, its dtype, and the token at which it is taken",
    Site.LAYER_OUT: "the last residual addition of the layer",
    Site.FINAL_NORM_OUT: "the final norm on the decode path",
    Site.LOGITS: "the output head: which row it is given, softcap, scale",
}


def recommend(
    decision: Decision, diagnosis: Diagnosis | None = None, about: str = "what was run", not_run: str | None = None
) -> list[str]:
    """Return what the reader should do, most urgent first; what the named cause asks for comes before all else.

    `about` is what the verdict is about, `not_run` a sentence on what could have been run beside it.
    """
    if decision.verdict is Verdict.MISMATCH:
        advice = None if diagnosis is None else diagnosis.cause.remedy
        return [*([] if advice is None else [advice]), *_mismatch(decision)]
    further = [f"{line}." for line in (not_run, *decision.asks) if line is not None]
    if decision.verdict is Verdict.INCONCLUSIVE:
        first = None if decision.settled_by is None else f"{decision.settled_by}."
        return [
            *([first] if first is not None else _settle(decision.reasons)),
            "Do not read this run as a pass; nothing was shown about the decode path.",
            *(f"{ask}." for ask in decision.asks),
        ]
    if decision.verdict is Verdict.EXACT:
        return [
            "Keep the run as a baseline: prefill and decode agree bit by bit in what was run. Compare other lengths, "
            "dtypes and attention implementations with it.",
            *further,
        ]
    return [
        f"Document the drift as expected rounding for what was run, {about}.",
        f"Set tolerances of your own tests from the drift measured here ({table_name()}), not from a constant: it "
        "grows with depth and differs from site to site.",
        *further,
    ]


def _settle(reasons: Sequence[str]) -> list[str]:
    """What to settle: once for all reasons, since one thing that broke is the reason for many."""
    if len(reasons) < 2:
        return [f"Settle this first: {reason}." for reason in reasons]
    return [f"Settle this first, and what follows from it may go with it: {reasons[0]}."] + [
        f"Then: {reason}." for reason in reasons[1:]
    ]


def _mismatch(decision: Decision) -> list[str]:
    first = decision.first_failure
    assert first is not None
    if any(item.instrument == CHOICE and item.supports == "H1" for item in decision.evidence) and decision.reasons:
        return [
            f"The first such choice was made at {first}. No tensor up to the logits drifts beyond rounding.",
            "Do not call it a near tie: both routes put another token first, by more than they differ.",
        ]
    steps = [f"Look at {_LOOK_AT[first.site]}. The first address beyond rounding is {first}."]
    if decision.kind == "precision":
        steps.append(
            f"It is gone at {decision.rungs.lower} and {decision.rungs.upper}, so look for what only the native dtype "
            "has: the dtype in which the cache, a table or an accumulator is kept on the decode path, and kernels that "
            "run at this dtype alone."
        )
        return [*steps, "Do not widen a tolerance: rounding that both passes share was allowed for already."]
    if decision.kind is None:
        return [
            *steps,
            "Whether more precision would remove it was not measured; the same passes at float32 and float64 tell a "
            "wrong formula from lost bits.",
            "Do not widen a tolerance: rounding cannot make a difference of this size from equal inputs.",
        ]
    modes = {outcome.mode: outcome for outcome in decision.outcomes}
    designed, aligned = modes["as_designed"], modes["kv_aligned"]
    if designed.n_beyond and aligned.verdict not in (None, Verdict.MISMATCH):
        steps.append(
            "The mismatch is gone when decode runs on the rows that prefill wrote, so it came through the content of "
            "the cache: check what is written there (positions, rotation, slots), not the decode kernel."
        )
    elif designed.n_beyond and aligned.n_beyond and first.site in CACHE_SITES:
        steps.append(
            "It stays when prefill alone has filled the cache, so rows change between prefill's write and decode's "
            "read: check how the decode step appends to the cache, and which slots it then reads."
        )
    elif designed.n_beyond and aligned.n_beyond:
        steps.append("It stays when decode runs on the rows that prefill wrote, so the decode path itself makes it.")
    elif aligned.n_beyond and designed.verdict is not None:
        steps.append("It shows only after a rewind of the cache: check what rewind leaves behind.")
    steps.append(
        f"Do not widen a tolerance: the drift does not shrink at {decision.rungs.upper}, so it is not rounding."
    )
    return steps
