"""Canonical attention against a slow transcription of its definition, and the directions of causes."""

import msgspec
import numpy as np
import pytest

from kvdrift.replay.attention import Operands, attend, scale_direction
from kvdrift.replay.causes import ATTENTION_CAUSES
from kvdrift.replay.slips import likely_slip
from kvdrift.vocabulary.facts import AttentionSpec

SPECS = [
    AttentionSpec(0.35),
    AttentionSpec(0.35, softcap=2.0),
    AttentionSpec(0.35, window=4),
    AttentionSpec(0.35, sinks=(0.3, -1.0, 0.0, 2.0)),
    AttentionSpec(0.35, slopes=(0.5, 0.25, 0.125, 0.0625)),
    AttentionSpec(0.5, softcap=3.0, window=3, sinks=(0.1, 0.2, 0.3, 0.4)),
]


def operands(spec: AttentionSpec, seed: int = 0, n_slots: int = 7) -> Operands:
    rng = np.random.default_rng(seed)
    return Operands(
        rng.normal(size=(4, 8)),
        rng.normal(size=(n_slots, 2, 8)),
        rng.normal(size=(n_slots, 2, 6)),
        np.arange(n_slots),
        n_slots - 1,
        spec,
    )


def by_definition(o: Operands) -> np.ndarray:
    context = np.zeros((4, 6))
    for head in range(4):
        scores, rows = [], []
        for index, slot in enumerate(o.slots):
            if slot > o.position or (o.attention.window and slot <= o.position - o.attention.window):
                continue
            score = o.attention.scale * float(o.query[head] @ o.keys[index, head // 2])
            if o.attention.softcap:
                score = o.attention.softcap * np.tanh(score / o.attention.softcap)
            if o.attention.slopes:
                score -= o.attention.slopes[head] * float(o.position - slot)
            scores.append(score)
            rows.append(o.values[index, head // 2])
        total = sum(np.exp(s) for s in scores)
        if o.attention.sinks:
            total += np.exp(o.attention.sinks[head])
        context[head] = sum(np.exp(s) / total * row for s, row in zip(scores, rows, strict=True))
    return context


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_attention_is_what_its_definition_says(spec: AttentionSpec) -> None:
    o = operands(spec)
    np.testing.assert_allclose(attend(o).context, by_definition(o), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_scale_direction_is_the_derivative(spec: AttentionSpec) -> None:
    o, step = operands(spec), 1e-6
    more = attend(o.changed(attention=msgspec.structs.replace(spec, scale=spec.scale * (1 + step)))).context
    less = attend(o.changed(attention=msgspec.structs.replace(spec, scale=spec.scale * (1 - step)))).context

    np.testing.assert_allclose(scale_direction(o, attend(o)), (more - less) / (2 * step), rtol=1e-6, atol=1e-8)


def test_large_scores_do_not_overflow() -> None:
    o = operands(AttentionSpec(1e4))
    assert np.isfinite(attend(o).context).all()


def test_a_token_that_sees_nothing_has_no_context() -> None:
    o = operands(AttentionSpec(0.3)).changed(position=-1)
    assert not attend(o).context.any()
    for tiled in (False, True):
        nothing = attend(operands(AttentionSpec(0.3), n_slots=0).changed(tiled=tiled))
        assert nothing.context.shape == (4, 6)
        assert not nothing.context.any()


@pytest.mark.parametrize("cause", ATTENTION_CAUSES, ids=lambda cause: cause.name)
def test_every_cause_moves_the_output_where_it_can_happen_and_only_there(cause) -> None:  # type: ignore[no-untyped-def]
    needs = {
        "softcap_missing": "softcap",
        "sink_missing": "sinks",
        "sink_doubled": "sinks",
        "window_too_long": "window",
        "window_too_short": "window",
    }
    everything = operands(SPECS[-1])
    if cause.name == "k_read_as_v":
        everything = everything.changed(values=np.random.default_rng(5).normal(size=(7, 2, 8)))
    direction = cause.direction(everything, attend(everything))
    assert direction is not None
    assert np.abs(direction).max() > 1e-3

    lacking = everything.changed(attention=AttentionSpec(0.5))
    if cause.name in needs:
        assert cause.direction(lacking, attend(lacking)) is None


@pytest.mark.parametrize(
    ("text", "lie_as"),
    [
        ("[head, slot, dim]", (1, 0, 2)),
        ("[slot, dim, head]", (0, 2, 1)),
        ("[head, dim, slot]", (1, 2, 0)),
    ],
)
def test_a_slip_of_the_layout_is_named_where_keys_and_values_have_widths_of_their_own(
    text: str, lie_as: tuple[int, ...]
) -> None:
    o = operands(AttentionSpec(0.35))
    context = attend(o).context

    recorded = o.changed(
        keys=o.keys.transpose(lie_as).reshape(o.keys.shape), values=o.values.transpose(lie_as).reshape(o.values.shape)
    )

    assert likely_slip(recorded, context, 1e-12) == (
        f"layout: the rows lie as {text} and were recorded as [slot, head, dim]"
    )
    assert likely_slip(recorded, context + 1.0, 1e-12) == ""
