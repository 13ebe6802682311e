"""Traces of other programs: the Python and the C++ writer, judged by the command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from kvdrift.errors import UsageError
from kvdrift.trace import Writer
from tests.support.command import ROOT, Result, kvdrift
from tests.support.examples import EXAMPLES, cpp_engine, numpy_engine, rust_program


def verdict(done: Result) -> str:
    return next(line for line in done.out.splitlines() if line.startswith("**Verdict**")).split(":")[1].strip()


def first_failure(done: Result) -> str:
    return next(line for line in done.out.splitlines() if line.startswith("**First failure**")).split(": ", 1)[1]


# bug, and layer / site (/ slot) at which it is made
BUGS = [
    ("position", "layer 0 / q_rope", "rope_position_offset"),
    ("stale", "layer 1 / k_cache / slot 2", "slot_aliased"),
    ("scale", "layer 0 / attn_scores", "score_scale"),
]


def test_the_numpy_example_with_its_ladder_is_structural(tmp_path: Path) -> None:
    done = kvdrift("judge", "--markdown", numpy_engine(tmp_path / "traces"))

    assert (done.code, verdict(done)) == (0, "STRUCTURAL_DRIFT")
    assert done.err == f"kvdrift: {tmp_path / 'traces'} holds kvdrift traces written by numpy_engine\n"
    assert "| Positive control seen | q_rope scaled by 1 + " in done.out
    assert "CONTROL_IN_VALUES" in done.out


def test_without_the_ladder_the_native_instruments_carry_the_verdict(tmp_path: Path) -> None:
    done = kvdrift("judge", "--markdown", numpy_engine(tmp_path / "traces", "--no-ladder"))

    assert (done.code, verdict(done)) == (0, "STRUCTURAL_DRIFT")
    assert "structural as far as these files show it" in done.out


@pytest.mark.parametrize(("bug", "where", "cause"), BUGS)
def test_a_bug_of_the_numpy_example_is_found_where_it_is(tmp_path: Path, bug: str, where: str, cause: str) -> None:
    done = kvdrift("judge", "--markdown", numpy_engine(tmp_path / "traces", "--bug", bug))

    assert (done.code, verdict(done)) == (1, "MISMATCH, semantic")
    assert first_failure(done).endswith(where)
    assert f"**{cause}" in done.out


@pytest.mark.parametrize(("bug", "where", "cause"), BUGS)
def test_the_same_bugs_are_found_without_the_ladder(tmp_path: Path, bug: str, where: str, cause: str) -> None:
    done = kvdrift("judge", "--markdown", numpy_engine(tmp_path / "traces", "--bug", bug, "--no-ladder"))

    assert (done.code, verdict(done)) == (1, "MISMATCH")
    assert first_failure(done).split(" / ", 2)[2] == where


def test_the_cpp_example(tmp_path: Path) -> None:
    binary = cpp_engine(tmp_path / "engine")
    expected = {"": (0, "none"), "scale": (1, "layer 0 / attn_ctx"), "stale": (1, "layer 0 / k_cache / slot 1")}
    for bug, (code, where) in expected.items():
        folder = tmp_path / f"traces{bug}"
        subprocess.run([binary, folder, bug], check=True)

        done = kvdrift("judge", "--markdown", folder)

        assert done.code == code, done.out
        assert first_failure(done).endswith(where)


def test_the_rust_example(tmp_path: Path) -> None:
    binary = rust_program(tmp_path / "engine")
    expected = {"": (0, "none"), "scale": (1, "layer 0 / attn_ctx"), "stale": (1, "layer 0 / k_cache / slot 6")}
    for bug, (code, where) in expected.items():
        folder = tmp_path / f"traces{bug}"
        subprocess.run([binary, folder, bug], check=True)

        done = kvdrift("judge", "--markdown", folder)

        assert done.code == code, done.out
        assert first_failure(done).endswith(where)
    again = subprocess.run([binary, tmp_path / "traces"], capture_output=True, text=True)
    assert again.returncode != 0
    assert "is not empty; name a new directory" in again.stderr


def test_the_cpp_header_is_short() -> None:
    assert len((EXAMPLES / "kvdrift_trace.hpp").read_text().splitlines()) < 220


def test_the_writer_imports_no_framework() -> None:
    code = "import sys; import kvdrift.trace; kvdrift.trace.Writer; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "src")
    names = set(done.stdout.split())
    assert "ml_dtypes" in names
    assert not names & {"torch", "transformers", "pyarrow", "rich", "jinja2"}


# ------------------------------------------------------------------------------------ what happens without each piece


def write(
    folder: Path,
    *,
    values: Any = None,
    calls: bool = True,
    n_decoded: int = 1,
    dtype: str = "bfloat16",
    tokens: tuple[int, ...] = (4, 5, 6, 7),
    sites: tuple[str, ...] = ("layer_in", "attn_norm_out", "q_proj"),
) -> Writer:
    """Write two prompts of one layer whose passes have the same bits, except where `values` says otherwise."""
    writer = Writer(folder, engine="e", model="m", dtype=dtype, n_layers=1)
    numbers = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    for prompt in ("p", "q"):
        rng = np.random.default_rng(len(prompt))
        rows = {site: rng.normal(size=(n_decoded, 8)).astype(numbers) for site in sites}
        positions = list(range(len(tokens) - n_decoded, len(tokens)))
        for kind in ("prefill", "decode"):
            out = writer.prefill(prompt, tokens) if kind == "prefill" else writer.decode(prompt, tokens)
            with out:
                for site, found in rows.items():
                    changed = values(kind, site, found) if values is not None else found
                    if changed is not None:
                        out.rows(site, changed.astype(numbers), positions=positions, layer=0)
                for position in positions if calls and kind == "decode" else ():
                    out.call(position, 1, position)
                if calls and kind == "prefill":
                    out.call(0, len(tokens), 0)
    writer.finish()
    return writer


def test_equal_bits_on_two_proven_routes_are_exact(tmp_path: Path) -> None:
    write(tmp_path / "t")
    done = kvdrift("judge", "--markdown", tmp_path / "t", "--scope", "up-to=q_proj")
    assert (done.code, verdict(done)) == (0, "EXACT")
    assert "**Scope**: up to q_proj, and nothing beyond it" in done.out


def test_equal_bits_without_path_proof_are_inconclusive(tmp_path: Path) -> None:
    write(tmp_path / "t", calls=False)
    done = kvdrift("judge", "--markdown", tmp_path / "t")
    assert (done.code, verdict(done)) == (6, "INCONCLUSIVE")
    assert "no path proof" in done.out


def test_a_missing_site_is_counted_and_inconclusive(tmp_path: Path) -> None:
    write(tmp_path / "t", values=lambda kind, site, v: None if (kind, site) == ("decode", "q_proj") else v)
    done = kvdrift("judge", "--markdown", tmp_path / "t")
    assert done.code == 6
    assert "2 values have no partner in the other pass (TRACE_OFFSET)" in done.out


def test_other_token_ids_in_the_two_passes_are_no_pair(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "t", engine="e", model="m", dtype="float32", n_layers=1)
    for out in (writer.prefill("p", [1, 2, 3]), writer.decode("p", [1, 9, 3])):
        with out:
            out.rows("layer_in", np.ones((1, 4), np.float32), positions=[2], layer=0)
    writer.finish()
    done = kvdrift("judge", "--markdown", tmp_path / "t")
    assert done.code == 6
    assert "TRACE_OFFSET" in done.out


def test_what_nothing_bounds_is_inconclusive_and_says_what_settles_it(tmp_path: Path) -> None:
    def other(kind: str, site: str, found: Any) -> Any:
        return found * (1.01 if kind == "decode" and site in ("layer_in", "attn_norm_out") else 1.0)

    write(tmp_path / "t", values=other)
    done = kvdrift("judge", "--markdown", tmp_path / "t", "--scope", "up-to=q_proj")
    assert done.code == 6
    assert "nothing bounds what rounding may do" in done.out
    assert "a second prefill of the same tokens (self-noise), settle it" in done.out


def test_a_difference_from_equal_inputs_is_a_mismatch(tmp_path: Path) -> None:
    write(
        tmp_path / "t", values=lambda kind, site, v: v * (1.1 if (kind, site) == ("decode", "attn_norm_out") else 1.0)
    )
    done = kvdrift("judge", "--markdown", tmp_path / "t")
    assert (done.code, verdict(done)) == (1, "MISMATCH")
    assert first_failure(done) == "p / pos 3 / layer 0 / attn_norm_out"


def test_one_rounding_from_equal_inputs_is_none(tmp_path: Path) -> None:
    def rounded(kind: str, site: str, found: Any) -> Any:
        if (kind, site) != ("decode", "q_proj"):
            return found
        return np.nextafter(found, np.array(np.inf, found.dtype))

    write(tmp_path / "t", values=rounded)
    done = kvdrift("judge", "--markdown", tmp_path / "t", "--scope", "up-to=q_proj")
    assert (done.code, verdict(done)) == (0, "STRUCTURAL_DRIFT")


def test_self_noise_covers_drift_of_its_own_size_and_not_more(tmp_path: Path) -> None:
    codes = {}
    for size in (0.01, 0.5):
        folder = tmp_path / str(size)
        writer = Writer(folder, engine="e", model="m", dtype="bfloat16", n_layers=1)
        base = np.random.default_rng(1).normal(size=(1, 64))
        passes = [
            (writer.prefill("p", [1, 2, 3]), [1, 2], 0.0),
            (writer.prefill_again("p", [1, 2]), [1], 0.01),
            (writer.decode("p", [1, 2, 3]), [2], size),
        ]
        for out, positions, factor in passes:
            with out:
                for site, drift in (("embed_out", 0.0), ("final_norm_out", factor)):
                    rows = np.repeat(base * (1 + drift), len(positions), axis=0).astype(ml_dtypes.bfloat16)
                    out.rows(site, rows, positions=positions)
                for site in ("layer_in", "attn_ctx"):
                    out.rows(site, np.ones((len(positions), 4), np.float32), positions=positions, layer=0)
                for position in positions[-1:]:
                    out.call(*((position, 1, position) if factor == size else (0, position + 1, 0)))
        writer.finish()
        codes[size] = kvdrift("judge", "--markdown", folder, "--scope", "up-to=final_norm_out").code
    assert codes == {0.01: 0, 0.5: 6}


def test_a_nan_on_one_side_is_never_a_pass(tmp_path: Path) -> None:
    def broken(kind: str, site: str, found: Any) -> Any:
        found = found.copy()
        found[0, 0] = np.nan if (kind, site) == ("decode", "q_proj") else found[0, 0]
        return found

    write(tmp_path / "t", values=broken)
    assert kvdrift("judge", "--markdown", tmp_path / "t").code == 1


def test_facts_that_nobody_gave_stay_unknown(tmp_path: Path) -> None:
    write(tmp_path / "t")
    out = kvdrift("judge", "--markdown", tmp_path / "t").out
    assert "| Weights SHA-256 | unknown |" in out
    assert "| Engine | e on an unknown device |" in out
    assert next(line for line in out.splitlines() if line.startswith("| Versions |")).startswith(
        "| Versions | kvdrift "
    )


# ------------------------------------------------------------------------------------------------------- bad arguments


def test_what_the_writer_refuses(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown dtype 'int8'"):
        Writer(tmp_path / "a", engine="e", model="m", dtype="int8", n_layers=1)
    with pytest.raises(UsageError, match="a fact about the engine cannot be written"):
        Writer(tmp_path / "a", engine="e", model="m", dtype="float32", n_layers=1, colour="red")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UsageError, match="is not empty"):
        Writer(tmp_path / "full", engine="e", model="m", dtype="float32", n_layers=1)
    writer = Writer(tmp_path / "b", engine="e", model="m", dtype="float32", n_layers=1)
    with pytest.raises(UsageError, match="no pass was written"):
        writer.finish()
    out = writer.prefill("p", [1, 2])
    with pytest.raises(UsageError, match="unknown site 'query'"):
        out.rows("query", np.ones((1, 2), np.float32), positions=[0], layer=0)
    with pytest.raises(UsageError, match=r"the positions \[2\] are not among the 2 tokens"):
        out.rows("q_proj", np.ones((1, 2), np.float32), positions=[2], layer=0)
    with pytest.raises(UsageError, match="has the shape"):
        out.rows("q_proj", np.ones((2, 2), np.float32), positions=[0], layer=0)
    with pytest.raises(UsageError, match="q_proj is int32"):
        out.rows("q_proj", np.ones((1, 2), np.int32), positions=[0], layer=0)
    with pytest.raises(UsageError, match="is not a cache read"):
        out.cache("k_cache", np.ones((1, 2), np.float32), position=0, layer=0)
    with pytest.raises(UsageError, match="unknown mode 'fast'"):
        writer.decode("p", [1, 2], mode="fast")


def test_a_directory_without_finish_is_no_trace(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "t", engine="e", model="m", dtype="float32", n_layers=1)
    with writer.prefill("p", [1, 2]) as out:
        out.rows("embed_out", np.ones((1, 2), np.float32), positions=[1])
    assert kvdrift("judge", "--markdown", tmp_path / "t").code == 5


def test_the_manifest_is_json_of_the_documented_fields(tmp_path: Path) -> None:
    write(tmp_path / "t")
    manifest = json.loads((tmp_path / "t" / "manifest.json").read_text())
    assert {"format", "format_version", "engine", "traces"} <= manifest.keys()
    documented = (ROOT / "docs" / "trace-format.md").read_text()
    for name in (*manifest["traces"][0], *manifest["engine"]):
        assert f"`{name}`" in documented, name


def test_a_decode_pass_without_a_record_is_nothing_compared(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "t", engine="e", model="m", dtype="float32", n_layers=1)
    with writer.prefill("p", [1, 2]) as out:
        out.rows("embed_out", np.ones((1, 2), np.float32), positions=[1])
    with writer.decode("p", [1, 2]) as out:
        out.call(1, 1, 1)
    writer.finish()
    done = kvdrift("judge", "--markdown", tmp_path / "t")
    assert done.code == 6
    assert "nothing was compared" in done.out


def test_what_an_operation_may_amplify_is_no_fault(tmp_path: Path) -> None:
    """A site may drift more than its inputs do: a cancelling sum or a steep softmax multiplies relative differences."""
    codes = {}
    for size in (5e-4, 5e-2):
        drift = {"layer_in": 1e-6, "attn_norm_out": size}

        def moved(kind: str, site: str, found: Any, drift: dict[str, float] = drift) -> Any:
            return found * (1.0 + (drift.get(site, 0.0) if kind == "decode" else 0.0))

        write(tmp_path / str(size), values=moved, dtype="float32", sites=("layer_in", "attn_norm_out"))
        codes[size] = kvdrift("judge", "--markdown", tmp_path / str(size), "--scope", "up-to=attn_norm_out").code
    assert codes == {5e-4: 0, 5e-2: 1}
