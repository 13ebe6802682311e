"""A recording that does not fit itself is no pass and no alarm; what it lacks is counted; what it shows is used."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvdrift.pipeline.audit import Audit
from kvdrift.pipeline.judge import judge_directory
from kvdrift.trace import Writer
from kvdrift.vocabulary.plan import Mode
from tests.support.written import Values, write_chain

HEADS, KV, DIM, WIDTH = 4, 2, 8, 32
PROMPTS = {"a": 14, "b": 17}


def judged(folder: Path, *scope: str) -> Audit:
    return judge_directory(folder, scope=scope)[0]


@dataclass(frozen=True)
class Ring:
    """A layer of attention whose cache holds the last `window` tokens, in ring order.

    `slots` says whether the recording names them. `spoil(name, keys, position)` changes the keys that a pass reads.
    """

    window: int = 6
    slots: bool = True
    scale: float = DIM**-0.5
    stated: float | None = None  # the scale that is recorded
    layout: Callable[[Values], Values] = lambda rows: rows
    spoil: Callable[[str, Values, int], Values] = lambda name, keys, position: keys
    modes: Sequence[Mode] = (Mode.AS_DESIGNED,)
    again: bool = False
    rungs: Sequence[str] = ("float32",)
    dtype: str = "float32"
    pinned: float = 0.0  # what two prefills of the second prompt differ by at the query, at any rung

    def write(self, folder: Path) -> Path:
        writer = Writer(folder, engine="ring", model="m", dtype=self.dtype, n_layers=1)
        for rung in self.rungs if self.dtype == "float32" else (self.dtype,):
            for prompt, n in PROMPTS.items():
                tokens = list(range(1, n + 1))
                self.passed(writer.prefill(prompt, tokens, dtype=rung), "prefill", n, rung)
                if self.again:
                    self.passed(writer.prefill_again(prompt, tokens, dtype=rung), "again", n, rung)
                for mode in self.modes:
                    self.passed(writer.decode(prompt, tokens, mode=mode, dtype=rung), str(mode), n, rung)
        writer.finish()
        return folder

    def passed(self, opened: Any, name: str, n: int, rung: str) -> None:
        rng = np.random.default_rng(n)
        x, q = (rng.normal(size=(n, WIDTH)).astype(rung) for _ in range(2))
        k, v = (rng.normal(size=(n, KV, DIM)).astype(rung) for _ in range(2))
        decodes = name in (*Mode,)
        with opened as out:
            out.attention(0, scale=self.scale if self.stated is None else self.stated, window=self.window)
            for p in [n - 2, n - 1]:
                out.call(*((p, 1, p) if decodes else (0, n, 0))) if decodes or p == n - 1 else None
                held = np.arange(max(0, p - self.window + 1), p + 1)
                held = held[np.argsort(held % self.window)]
                keys = self.spoil(name, k[held].copy(), p)
                context = self.attend(q[p].reshape(HEADS, DIM), keys, v[held], decodes)
                slots = held.tolist() if self.slots else None
                out.rows("embed_out", x[None, p], positions=[p])
                query = q[p] * q.dtype.type(1 + self.pinned * (name == "again" and n == 17))
                out.rows("q_rope", query.reshape(1, HEADS, DIM), positions=[p], layer=0)
                out.cache("k_cache", self.layout(keys), position=p, layer=0, slots=slots)
                out.cache("v_cache", self.layout(v[held]), position=p, layer=0, slots=slots)
                out.rows("attn_ctx", context[None], positions=[p], layer=0)
                layer_out = x[p] + context.reshape(-1)
                out.rows("layer_out", layer_out[None], positions=[p], layer=0)
                out.rows("logits", (layer_out if not decodes else layer_out * 1)[None], positions=[p])

    def attend(self, q: Values, keys: Values, values: Values, decodes: bool) -> Values:
        keys, values = (np.repeat(rows, HEADS // KV, axis=1) for rows in (keys, values))
        scores = np.einsum("hd,shd->hs", q, keys) * q.dtype.type(self.scale)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        order = slice(None, None, -1 if decodes else 1)  # the two passes round differently
        context = np.zeros_like(q)
        for s in range(keys.shape[0])[order]:
            context += weights[:, s, None] * values[s]
        return context


def test_a_ring_that_names_its_slots_passes(tmp_path: Path) -> None:
    result = judged(Ring().write(tmp_path / "t"))
    assert (result.exit_code, result.decision.reasons) == (0, ())


def test_a_context_by_head_is_replayed_at_half_precision(tmp_path: Path) -> None:
    """The documented shape of attn_ctx is [position, head, dim]."""
    result = judged(Ring(dtype="float16").write(tmp_path / "t"))
    (replay,) = (item for item in result.evidence if item.instrument == "replay")
    assert (replay.supports, replay.valid) == ("H0", True)


@pytest.mark.parametrize(
    ("ring", "slip"),
    [
        (Ring(slots=False), "likely slots: the rows are those of the last tokens"),
        (Ring(stated=1.0), "likely scale: attention used 1 / sqrt(dim) = 0.353553, and 1 was recorded"),
        (Ring(layout=lambda rows: rows.transpose(1, 0, 2).reshape(rows.shape)), "likely layout: the rows lie as [head"),
        (Ring(layout=lambda rows: rows * 2), "no usual slip of slots, scale, layout or mask explains it"),
    ],
    ids=["slots", "scale", "layout", "none of these"],
)
def test_attention_that_fits_neither_pass_is_a_slip_of_the_recording(tmp_path: Path, ring: Ring, slip: str) -> None:
    result = judged(ring.write(tmp_path / "t"))
    assert result.exit_code == 6
    (reason,) = result.decision.reasons
    assert reason.startswith("the recording does not fit itself: at 4 of 4 places")
    assert slip in reason
    assert not any("except inside attention" in caveat.text for caveat in result.caveats)


def test_attention_that_is_wrong_in_decode_alone_is_a_fault(tmp_path: Path) -> None:
    def evicted(name: str, keys: Values, position: int) -> Values:
        return keys[::-1].copy() if name == "as_designed" else keys

    assert judged(Ring(spoil=evicted).write(tmp_path / "t")).exit_code == 1


def stale(name: str, keys: Values, position: int) -> Values:
    """Slot 2 of what decode reads holds the row of slot 1."""
    if name == "as_designed":
        keys[2] = keys[1]
    return keys


def test_one_stale_slot_among_equal_ones_is_named_at_one_rung(tmp_path: Path) -> None:
    result = judged(Ring(window=12, spoil=stale).write(tmp_path / "t"))
    assert (result.exit_code, result.first_failure and str(result.first_failure.site)) == (1, "k_cache")
    assert result.diagnosis is not None
    assert result.diagnosis.cause == "slot_aliased"
    assert any(item.instrument == "cache" and item.supports == "H1" for item in result.evidence)
    clean = judged(Ring(window=12).write(tmp_path / "clean"))
    assert clean.exit_code == 0
    assert any(item.instrument == "cache" and item.supports == "H0" for item in clean.evidence)


def test_a_step_that_was_not_taken_on_the_rows_of_prefill_breaks_the_promise(tmp_path: Path) -> None:
    """All rows are a rounding off, as after a prefill of the tokens before: no fault, and no kv_aligned either."""

    def other(name: str, keys: Values, position: int) -> Values:
        return keys * np.float32(1 + 1e-6) if name == "kv_aligned" else keys

    both = tuple(Mode)
    result = judged(Ring(window=12, spoil=other, modes=both).write(tmp_path / "t"))
    assert result.exit_code == 6
    (reason,) = result.decision.reasons
    assert reason.startswith("the promise of kv_aligned does not hold: in 4 of 8 cache reads") or "4 of 4" in reason
    assert judged(Ring(window=12, modes=both).write(tmp_path / "clean")).exit_code == 0


def test_a_slot_that_is_wrong_in_kv_aligned_is_a_fault_and_no_broken_promise(tmp_path: Path) -> None:
    def one(name: str, keys: Values, position: int) -> Values:
        if name == "kv_aligned":
            keys[3] = keys[2]
        return keys

    assert judged(Ring(window=12, spoil=one, modes=tuple(Mode)).write(tmp_path / "t")).exit_code == 1


def test_the_control_stands_above_a_bound_that_a_later_file_raises(tmp_path: Path) -> None:
    """A rotation that stays at float32 inside the float64 run shows in the second prompt alone."""
    ring = Ring(modes=tuple(Mode), again=True, rungs=("float32", "float64"), pinned=1e-9)
    result = judged(ring.write(tmp_path / "t"))
    assert (str(result.verdict), result.decision.reasons) == ("STRUCTURAL_DRIFT", ())
    control = next(item for item in result.evidence if item.instrument == "positive_control")
    assert control.valid
    assert control.minimum_detectable is not None
    assert control.minimum_detectable > 32 * 1e-9


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_a_hole_on_either_side_is_counted_and_no_pass(tmp_path: Path, name: str) -> None:
    def hole(at: str, layer: int | None, site: str, position: int, values: Values) -> Values | None:
        return None if at == name and position in (5, 8) else values

    result = judged(write_chain(tmp_path / "t", hole))
    assert result.exit_code == 6
    assert "TRACE_OFFSET" in {caveat.code for caveat in result.caveats}
    assert judged(tmp_path / "t", "sampled").exit_code == 6


def test_other_tokens_are_named_with_their_position(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "t", engine="e", model="m", dtype="float32", n_layers=1)
    for out in (writer.prefill("p", [1, 2, 3]), writer.decode("p", [1, 9, 3])):
        with out:
            out.rows("layer_in", np.ones((1, 4), np.float32), positions=[2], layer=0)
    writer.finish()
    (reason,) = judged(tmp_path / "t").decision.reasons
    assert reason.startswith("the tokens differ at position 1: 2 in prefill, 9 in decode (TRACE_OFFSET)")


@pytest.mark.parametrize(("noise", "code"), [(0.0, 1), (1e-3, 6)])
def test_an_engine_that_repeats_itself_to_the_bit_does_not_round_by_half(
    tmp_path: Path, noise: float, code: int
) -> None:
    """Nothing is recorded of what the value is computed from, so that nothing else bounds it."""
    writer = Writer(tmp_path / "t", engine="e", model="m", dtype="float32", n_layers=2)
    rows = np.random.default_rng(0).normal(size=(1, 16)).astype(np.float32)
    tokens = [1, 2, 3]
    passes = [
        (writer.prefill("p", tokens), 0.0),
        (writer.prefill_again("p", tokens), noise),
        (writer.decode("p", tokens), 0.5),
    ]
    for out, drift in passes:
        with out:
            out.rows("layer_out", rows * np.float32(1 + drift), positions=[2], layer=1)
    writer.finish()
    result = judged(tmp_path / "t", "sampled")
    assert (result.exit_code, result.first_failure is not None) == (code, code == 1)
