"""A trace is written and read back bit by bit, and cache reads are kept once without losing any."""

import math
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kvdrift.errors import AlignmentError, TraceError
from kvdrift.trace.manifest import FORMAT_VERSION, Manifest
from kvdrift.trace.model import Array, PassName, PassPair, Slots, Trace
from kvdrift.trace.recording import RecordedPair
from kvdrift.trace.store import TraceStore, read_manifest, read_pairs, read_tensors
from kvdrift.vocabulary.facts import Call, EngineFacts
from kvdrift.vocabulary.plan import AuditPlan, Mode, PairRole
from kvdrift.vocabulary.sites import Site

LAW = settings(deadline=None, derandomize=True, max_examples=60, database=None)

DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}


def bare_manifest() -> Manifest:
    """A manifest without traces."""
    return Manifest(
        format_version=FORMAT_VERSION,
        created="2026-01-02T03:04:05+00:00",
        command=None,
        engine=EngineFacts(
            engine="synthetic",
            model="m",
            model_hash=None,
            dtype="float32",
            device=None,
            attention=None,
            cache=None,
            n_layers=1,
            vocab_size=None,
            max_positions=None,
            parameters=None,
            can_rewind=True,
            why_no_rewind=None,
            sites={},
            notes=(),
            versions={},
        ),
        plan=AuditPlan(mode="both", span=1, layers=None, alpha=1e-3, seed=0),
        prompts=[],
        plant=None,
        failures={},
        traces=[],
        pairs=[],
    )


def all_bits(dtype: np.dtype[np.generic], shape: tuple[int, ...], seed: int = 3) -> Array:
    """Random bit patterns, among them NaN payloads, infinities, subnormals; then both zeros and a quiet NaN."""
    n = int(np.prod(shape))
    values = np.frombuffer(np.random.default_rng(seed).bytes(n * dtype.itemsize), dtype=dtype).copy()
    values[:3] = np.array([0.0, -0.0, math.nan]).astype(dtype)
    return values.reshape(shape)


def a_trace(pass_name: str, values: Array, prompt: str = "p", rung: str = "float32") -> Trace:
    """A pass with rows, attention rows and cache reads, all of `values` [4, 2, 3]."""
    name: PassName = "prefill" if pass_name == "prefill" else "decode"
    trace = Trace(prompt, name, "full", rung, (5, 6, 7, 8))
    trace.calls.append(Call(0, 4, 0, None, "sdpa", ("sdpa:math", "other")))
    trace.add_rows(None, Site.LOGITS, (2, 3), values[:2])
    trace.add_rows(0, Site.ATTN_SCORES, (3,), values[:1], np.array([0, 2, 5]))
    trace.add_cache_read(0, Site.K_CACHE, (2,), np.arange(3), values[:3])
    trace.add_cache_read(0, Site.K_CACHE, (3,), np.arange(4), values)
    return trace


def written(directory: Path, *pairs: PassPair) -> list[PassPair]:
    """Write pairs and read them again."""
    store = TraceStore(directory)
    for pair in pairs:
        store.add(RecordedPair(PairRole.PAIR, pair))
    store.finish(bare_manifest())
    return [pair for _, pair in read_pairs(directory, read_manifest(directory))]


def assert_same(first: Trace, second: Trace) -> None:
    """Every fact and every bit of two traces agree."""
    for name in ("prompt", "pass_name", "label", "rung", "tokens", "calls"):
        assert getattr(first, name) == getattr(second, name)
    assert len(first.rows) == len(second.rows)
    for one, other in zip(first.rows, second.rows, strict=True):
        assert (one.layer, one.site, one.positions) == (other.layer, other.site, other.positions)
        assert_same_bits(one.values, other.values)
        assert (one.slots is None) == (other.slots is None)
        if one.slots is not None and other.slots is not None:
            assert_same_bits(one.slots, other.slots)
    for read, again in zip(first.cache_reads(), second.cache_reads(), strict=True):
        assert (read.layer, read.site, read.positions) == (again.layer, again.site, again.positions)
        assert_same_bits(read.slots, again.slots)
        assert_same_bits(read.rows, again.rows)


def assert_same_bits(first: Array, second: Array) -> None:
    assert first.dtype == second.dtype
    assert first.shape == second.shape
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("name", DTYPES)
def test_writing_and_reading_is_the_identity_for_every_bit_of_every_dtype(name: str, tmp_path: Path) -> None:
    values = all_bits(DTYPES[name], (4, 2, 3))
    pair = PassPair(Mode.KV_ALIGNED, a_trace("prefill", values), a_trace("decode", values[::-1]), (2, 3))
    (again,) = written(tmp_path, pair)
    assert (again.mode, again.positions) == (pair.mode, pair.positions)
    assert_same(pair.prefill, again.prefill)
    assert_same(pair.decode, again.decode)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_all_65536_bit_patterns_survive(name: str, tmp_path: Path) -> None:
    every = np.arange(2**16, dtype=np.uint16).view(DTYPES[name]).reshape(1, -1)
    trace = Trace("p", "prefill", "full", "float32", (1, 2))
    trace.add_rows(None, Site.LOGITS, (1,), every)
    (again,) = written(tmp_path, PassPair(Mode.AS_DESIGNED, trace, trace, (1,)))
    assert_same_bits(again.prefill.rows[0].values, every)


def test_that_the_comparison_of_traces_can_fail() -> None:
    values = all_bits(DTYPES["float32"], (4, 2, 3))
    other = values.copy()
    other.view(np.uint32)[-1, -1, -1] ^= 1
    with pytest.raises(AssertionError):
        assert_same(a_trace("prefill", values), a_trace("prefill", other))


def test_a_trace_of_two_pairs_is_written_once(tmp_path: Path) -> None:
    values = all_bits(DTYPES["float32"], (4, 2, 3))
    prefill, decode = a_trace("prefill", values), a_trace("decode", values)
    aligned = a_trace("decode", values)
    aligned.label = "kv_aligned"
    decode.label = "as_designed"
    written(
        tmp_path,
        PassPair(Mode.AS_DESIGNED, prefill, decode, (3,)),
        PassPair(Mode.KV_ALIGNED, prefill, aligned, (3,)),
    )
    assert len(read_manifest(tmp_path).traces) == 3


def test_prompt_ids_that_are_no_file_names_are_no_file_names(tmp_path: Path) -> None:
    values = all_bits(DTYPES["float32"], (4, 2, 3))
    traces = [a_trace("prefill", values, prompt) for prompt in ("../../evil", "a/b", "nul\0")]
    again = written(tmp_path, *(PassPair(Mode.AS_DESIGNED, trace, trace, (3,)) for trace in traces))
    assert [pair.prefill.prompt for pair in again] == ["../../evil", "a/b", "nul\0"]
    assert all(path.resolve().is_relative_to(tmp_path) for path in tmp_path.rglob("*"))


def test_an_empty_continuation_of_the_cache_record_survives(tmp_path: Path) -> None:
    trace = Trace("p", "prefill", "full", "float32", (1, 2, 3))
    rows = np.ones((3, 2, 2), dtype=np.float32)
    for position in (1, 2):
        trace.add_cache_read(0, Site.V_CACHE, (position,), np.arange(3), rows)
    assert len(trace.cache[1].stored) == 0
    (again,) = written(tmp_path, PassPair(Mode.AS_DESIGNED, trace, trace, (1, 2)))
    assert_same(trace, again.prefill)


# ------------------------------------------------------------------------------------------------------------ damage


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    values = all_bits(DTYPES["float32"], (4, 2, 3))
    written(tmp_path, PassPair(Mode.AS_DESIGNED, a_trace("prefill", values), a_trace("decode", values), (3,)))
    return tmp_path


def reread(directory: Path) -> None:
    list(read_pairs(directory, read_manifest(directory)))


def test_every_flipped_bit_and_every_truncation_of_a_trace_file_is_an_error(saved: Path) -> None:
    path = saved / "000/float32/prefill.full.safetensors"
    data = path.read_bytes()
    for index in range(0, len(data), 97):
        path.write_bytes(data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])
        with pytest.raises(TraceError, match="does not match its checksum"):
            reread(saved)
        path.write_bytes(data[:index])
        with pytest.raises(TraceError, match="does not match its checksum"):
            reread(saved)
    path.write_bytes(data)
    reread(saved)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_safetensors_reads_what_is_written_here_and_the_other_way_round(dtype: str, tmp_path: Path) -> None:
    values = all_bits(DTYPES[dtype], (4, 2, 3))
    written(tmp_path, PassPair(Mode.AS_DESIGNED, a_trace("prefill", values), a_trace("decode", values), (3,)))
    path = tmp_path / "000/float32/prefill.full.safetensors"
    ours = read_tensors(path)
    theirs = load_file(path)
    assert {name: tensor.tobytes() for name, tensor in ours.items()} == {
        name: bytes(tensor.contiguous().view(torch.uint8).numpy()) for name, tensor in theirs.items()
    }
    save_file(theirs, tmp_path / "again.safetensors")
    again = read_tensors(tmp_path / "again.safetensors")
    assert again.keys() == ours.keys()
    for name, tensor in again.items():
        assert_same_bits(tensor, ours[name])


def test_a_missing_trace_file_is_an_error(saved: Path) -> None:
    (saved / "000/float32/decode.full.safetensors").unlink()
    with pytest.raises(TraceError, match="cannot read the trace"):
        reread(saved)


def test_a_missing_manifest_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"no readable manifest\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("{}", "has format version None"),
        ('{"format_version": 99}', "has format version 99"),
        (f'{{"format_version": {FORMAT_VERSION}}}', "is damaged"),
    ],
)
def test_a_manifest_that_is_none_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(TraceError, match=message):
        read_manifest(tmp_path)


def edited(saved: Path, **changes: object) -> None:
    """Change fields of the first trace in the manifest."""
    manifest = read_manifest(saved)
    first = msgspec.structs.replace(manifest.traces[0], **changes)
    TraceStore(saved, _traces={0: first, 1: manifest.traces[1]}, _pairs=list(manifest.pairs)).finish(manifest)


def test_a_manifest_cannot_name_files_outside_its_directory(saved: Path) -> None:
    edited(saved, file="../outside.safetensors")
    with pytest.raises(TraceError, match="outside its directory"):
        reread(saved)


def test_a_pair_of_an_unlisted_trace_is_an_error(saved: Path) -> None:
    edited(saved, name="another")
    with pytest.raises(TraceError, match="does not list"):
        reread(saved)


@pytest.mark.parametrize(
    "change", [{"tensor": "nowhere"}, {"site": "no_site"}, {"layer": None}, {"slots": None}], ids=str
)
def test_a_record_of_a_missing_tensor_or_an_unknown_site_is_an_error(saved: Path, change: dict[str, object]) -> None:
    *others, last = read_manifest(saved).traces[0].records
    edited(saved, records=[*others, msgspec.structs.replace(last, **change)])
    with pytest.raises(TraceError, match=r"lacks or misnames|without slots or layer|does not list"):
        reread(saved)


def test_a_tensor_that_the_manifest_does_not_list_is_an_error(saved: Path) -> None:
    edited(saved, records=read_manifest(saved).traces[0].records[1:])
    with pytest.raises(TraceError, match="does not list"):
        reread(saved)


# ------------------------------------------------------------------------------------------------ cache reads kept once


@st.composite
def read_sequences(draw: st.DrawFn) -> list[tuple[Slots, Array]]:
    """Cache reads as engines make them: growing, edited, windows that slide, rewound, in any order of slots."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = DTYPES[draw(st.sampled_from(["float32", "bfloat16"]))]
    cache = {slot: all_bits(dtype, (2, 3), slot) for slot in range(draw(st.integers(1, 5)))}
    reads = []
    for _ in range(draw(st.integers(1, 8))):
        action = draw(st.sampled_from(["grow", "edit", "slide", "rewind", "nothing", "refill"]))
        if action == "grow":
            cache[max(cache) + 1] = all_bits(dtype, (2, 3), int(generator.integers(2**32)))
        elif action == "edit":
            slot = draw(st.sampled_from(sorted(cache)))
            cache[slot] = cache[slot].copy()
            cache[slot].view(np.uint8)[0, 0] ^= 1
        elif action == "slide":
            cache[max(cache) + 1] = all_bits(dtype, (2, 3), int(generator.integers(2**32)))
            del cache[min(cache)]
        elif action == "rewind" and len(cache) > 1:
            del cache[max(cache)]
        elif action == "refill":
            cache = {slot: all_bits(dtype, (2, 3), int(generator.integers(2**32))) for slot in cache}
        order = list(cache)
        if draw(st.booleans()):
            order = [int(slot) for slot in generator.permutation(order)]
        reads.append((np.array(order, dtype=np.int64), np.stack([cache[slot] for slot in order])))
    return reads


@LAW
@given(read_sequences())
def test_cache_reads_come_back_as_they_were_recorded(reads: list[tuple[Slots, Array]]) -> None:
    trace = Trace("p", "decode", "as_designed", "float32", tuple(range(99)))
    for position, (slots, rows) in enumerate(reads):
        trace.add_cache_read(0, Site.K_CACHE, (position,), slots, rows)
        trace.add_cache_read(1, Site.V_CACHE, (position,), slots, rows)
    for layer, site in ((0, Site.K_CACHE), (1, Site.V_CACHE)):
        again = [read for read in trace.cache_reads() if (read.layer, read.site) == (layer, site)]
        for position, ((slots, rows), read) in enumerate(zip(reads, again, strict=True)):
            assert read.positions == (position,)
            assert_same_bits(read.slots, slots)
            assert_same_bits(read.rows, rows)


def test_rows_that_did_not_change_are_kept_once() -> None:
    trace = Trace("p", "decode", "as_designed", "float32", tuple(range(99)))
    rows = np.random.default_rng(0).normal(size=(40, 2, 3))
    for position in range(30, 40):
        trace.add_cache_read(0, Site.K_CACHE, (position,), np.arange(position + 1), rows[: position + 1])
    assert sum(len(record.rows) for record in trace.cache) == 40


def test_a_zero_that_changes_its_sign_is_a_changed_row() -> None:
    trace = Trace("p", "decode", "as_designed", "float32", tuple(range(9)))
    rows = np.zeros((2, 1, 1), dtype=np.float32)
    trace.add_cache_read(0, Site.K_CACHE, (0,), np.arange(2), rows)
    trace.add_cache_read(0, Site.K_CACHE, (1,), np.arange(2), -rows)
    assert [bool(np.signbit(read.rows).all()) for read in trace.cache_reads()] == [False, True]


def test_a_read_after_release_is_kept_whole() -> None:
    trace = Trace("p", "decode", "as_designed", "float32", tuple(range(9)))
    rows = np.ones((2, 1, 1))
    trace.add_cache_read(0, Site.K_CACHE, (0,), np.arange(2), rows)
    trace.release()
    trace.add_cache_read(0, Site.K_CACHE, (1,), np.arange(2), rows)
    assert [len(record.rows) for record in trace.cache] == [2, 2]


def test_rows_and_positions_or_slots_of_another_number_are_errors() -> None:
    trace = Trace("p", "decode", "as_designed", "float32", (1, 2))
    with pytest.raises(AlignmentError, match="2 rows for 1 positions"):
        trace.add_rows(0, Site.Q_PROJ, (1,), np.ones((2, 3)))
    with pytest.raises(AlignmentError, match="2 rows for 3 slots"):
        trace.add_cache_read(0, Site.K_CACHE, (1,), np.arange(3), np.ones((2, 1, 1)))
    with pytest.raises(AlignmentError, match="q_proj"):
        trace.add_cache_read(0, Site.Q_PROJ, (1,), np.arange(2), np.ones((2, 1, 1)))


def test_a_first_cache_record_that_is_not_whole_is_an_error() -> None:
    trace = Trace("p", "decode", "as_designed", "float32", tuple(range(9)))
    rows = np.ones((2, 1, 1))
    trace.add_cache_read(0, Site.K_CACHE, (0,), np.arange(2), rows)
    trace.add_cache_read(0, Site.K_CACHE, (1,), np.arange(2), rows)
    del trace.cache[0]
    with pytest.raises(AlignmentError, match="the first cache read is not complete"):
        list(trace.cache_reads())


def test_a_call_ends_at_its_last_position() -> None:
    trace = Trace("p", "decode", "as_designed", "float32", tuple(range(9)))
    trace.calls += [Call(0, 4, 0, 4, "sdpa", ()), Call(4, 1, 4, 5, "sdpa", ())]
    assert trace.call_ends() == {3, 4}


@pytest.mark.parametrize(
    ("first", "second", "stored"),
    [
        ([0, 1, 2], [0, 1, 2, 3], [1, 3]),  # appended, as nearly always
        ([0, 1, 2], [0, 1, 2], [1]),
        ([0, 1, 2], [1, 2, 3], [0, 2]),  # a window
        ([2, 0, 1], [2, 0, 1, 3], [2, 3]),  # in no order
        ([0, 1, 2], [0, 1, 2, 0], [1, 3]),  # one slot twice
        ([], [0, 1], [0, 1]),
    ],
    ids=str,
)
def test_a_read_keeps_what_changed_and_is_whole_again(first: list[int], second: list[int], stored: list[int]) -> None:
    rng = np.random.default_rng(0)
    by_slot = rng.normal(size=(4, 2, 3)).astype(np.float32)
    trace = Trace("p", "decode", "as_designed", "float32", tuple(range(8)))
    trace.add_cache_read(0, Site.K_CACHE, (2,), np.array(first, dtype=np.int64), by_slot[first])
    by_slot[1] += 1.0
    rows = by_slot[second]
    if second.count(0) > 1:
        rows[-1] += 1.0
    trace.add_cache_read(0, Site.K_CACHE, (3,), np.array(second, dtype=np.int64), rows)

    assert trace.cache[1].stored.tolist() == stored
    np.testing.assert_array_equal(list(trace.cache_reads())[1].rows, rows)
