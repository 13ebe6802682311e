"""What a mismatch of logprobs looks like: displaced, a temperature, another prompt, from a position on, or everywhere.

From logprobs alone a cause is a resemblance. Only a displacement, and a temperature where the runners-up are known, are
computed and compared.
"""

from __future__ import annotations

import numpy as np

from kvdrift.logprobs.dump import Bools, Floats
from kvdrift.logprobs.outcome import Resemblance, SequenceResult
from kvdrift.logprobs.pairing import Pairs

# A displaced dump fits at its lag; rounding cannot make the misfit there smaller than at 0, let alone a quarter.
_FAR_BETTER = 0.25
_LIKE_TEMPERATURE = 0.1
_OF_THE_EDGE = 0.3
_FADES = 2.0
# Logprobs of the same tokens by one model are alike; below this correlation, and so much less likely, they are not.
_ALIKE, _UNLIKELY = 0.5, 3.0


def cause_of(pairs: Pairs, z: Floats, kept: Bools, sequences: tuple[SequenceResult, ...]) -> Resemblance:
    """Return what the differences look like. `z` [token] is the difference over typical rounding."""
    if (lag := _lag(pairs, kept)) is not None:
        return lag
    if (unrelated := _unrelated(pairs, kept)) is not None:
        return unrelated
    if (heat := _temperature(pairs, kept)) is not None:
        return heat
    if pairs.other_prompts:
        return Resemblance(
            "other_prompt",
            f"the prompts of {len(pairs.other_prompts)} sequences have other ids, {pairs.other_prompts[0]} among them: "
            "another template, BOS token or tokenizer",
        )
    if (change := _from_on(sequences)) is not None:
        return change
    if (fading := _fades(pairs, z, kept)) is not None:
        return fading
    beyond = sum(item.beyond for item in sequences)
    return Resemblance(
        "everywhere",
        f"drift is spread over the sequences ({beyond} of {len(sequences)} beyond rounding): other weights, another "
        "arithmetic, another mask or other positions",
    )


def _lag(pairs: Pairs, kept: Bools) -> Resemblance | None:
    d = pairs.b - pairs.a
    base = float(np.mean(d[kept] ** 2))
    for lag in (1, -1):
        near, far = (pairs.a[:-1], pairs.b[1:]) if lag == 1 else (pairs.a[1:], pairs.b[:-1])
        inside = (pairs.sequence[:-1] == pairs.sequence[1:]) & kept[:-1] & kept[1:]
        if inside.sum() < 8:
            continue
        misfit = float(np.mean((far - near)[inside] ** 2))
        if misfit < _FAR_BETTER**2 * base:
            where = "late" if lag == 1 else "early"
            return Resemblance(
                "displaced",
                f"the logprobs of B stand one token too {where}: displaced by one they agree; mind how logits are "
                "shifted against tokens, and the mask of the response",
                1.0 - misfit / base,
            )
    return None


def _unrelated(pairs: Pairs, kept: Bools) -> Resemblance | None:
    a, b = pairs.a[kept], pairs.b[kept]
    gap = float(a.mean() - b.mean())
    if abs(gap) < _UNLIKELY or a.size < 8 or not a.std() or not b.std():
        return None
    alike = float(np.corrcoef(a, b)[0, 1])
    if alike >= _ALIKE:
        return None
    side = "B" if gap > 0 else "A"
    return Resemblance(
        "unrelated",
        f"the logprobs of {side} are {abs(gap):.2g} nats lower on average and have little to do with the others "
        f"(correlation {alike:.2g}): taken from the wrong row of logits, or of other tokens; mind the shift by one",
    )


def _temperature(pairs: Pairs, kept: Bools) -> Resemblance | None:
    """One side divided its logits by a temperature: leads of the likeliest token over the runner-up show it exactly."""
    known = kept & pairs.known_best & ~pairs.moved & (pairs.gap > 0.5) & (pairs.gap_b > 0.0)
    if known.sum() >= 16:
        ratio = np.log(pairs.gap_b[known] / pairs.gap[known])
        middle = float(np.median(ratio))
        spread = float(np.median(np.abs(ratio - middle))) / 0.675
        if abs(middle) > 0.02 and abs(middle) > 2.0 * spread:
            heat = float(np.exp(-middle))
            return Resemblance("temperature", f"the logits of B are those of A divided by {heat:.3g}: a temperature")
        return None
    d, x = (pairs.b - pairs.a)[kept], 0.5 * (pairs.a + pairs.b)[kept]
    centred = x - x.mean()
    if not (spread := float(centred @ centred)):
        return None
    slope = float(centred @ d) / spread
    share = slope**2 * spread / float(d @ d)
    # A temperature T moves a logprob a by k (H - |a|), with k = 1/T - 1 and an entropy H between 0 and |a| and above:
    # by no more than k |a| downwards (upwards for T > 1). A slope that is small beside the largest d / |a| is not.
    clear = pairs.a[kept] < -1.0
    edge = float(np.max(-np.sign(slope) * d[clear] / -pairs.a[kept][clear], initial=0.0))
    if share < _LIKE_TEMPERATURE or abs(slope) < _OF_THE_EDGE * edge:
        return None
    flat = "flatter" if slope < 0 else "sharper"
    return Resemblance(
        "temperature",
        f"the distributions of B are {flat} than those of A (slope {slope:+.2g} per nat): a temperature or another "
        "processor of logits on one side alone looks like this; logprobs of the runners-up would tell",
        share,
    )


def _from_on(sequences: tuple[SequenceResult, ...]) -> Resemblance | None:
    beyond = [item for item in sequences if item.beyond]
    changed = [item.change for item in beyond if item.change is not None]
    if not changed or len(changed) < 0.5 * len(beyond):
        return None
    low, high = min(changed), max(changed)
    if high - low <= 8:
        text = f"all of them change at token {low}" if low == high else f"all of them change at tokens {low} to {high}"
        return Resemblance(
            "from_a_position", f"drift begins inside the sequences, and {text}: a length at which the engine changes"
        )
    return Resemblance(
        "from_a_position",
        f"drift begins inside the sequences, at tokens {low} to {high}: an event (eviction, preemption, new weights in "
        "flight, a reused slot) and not a length",
    )


def _fades(pairs: Pairs, z: Floats, kept: Bools) -> Resemblance | None:
    length = np.bincount(pairs.sequence, minlength=len(pairs.names))[pairs.sequence]
    first, last = kept & (4 * pairs.position < length), kept & (4 * pairs.position >= 3 * length)
    if first.sum() < 8 or last.sum() < 8:
        return None
    early, late = (float(np.sqrt(np.mean(z[part] ** 2))) for part in (first, last))
    if early < _FADES * late:
        return None
    return Resemblance(
        "fades",
        f"drift is largest in the first quarter of the tokens and fades ({early / late:.2g} times the last quarter): "
        "another prompt before them (template, BOS), or a wrong position where the response begins",
    )
