"""Sites that a model does not have, as its writer says: not asked for, told in the inventory, and never an excuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kvdrift.errors import UsageError
from kvdrift.trace import Writer
from tests.support.command import kvdrift
from tests.support.written import Values, write_chain


def leave_out(*sites: str) -> object:
    def edit(name: str, layer: int | None, site: str, position: int, values: Values) -> Values | None:
        return None if site in sites else values

    return edit


def name_absent(folder: Path, *sites: str) -> Path:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "absent": list(sites)}))
    return folder


def test_the_inventory_tells_absent_from_not_recorded(tmp_path: Path) -> None:
    folder = name_absent(write_chain(tmp_path / "t", leave_out("attn_norm_out", "v_proj")), "attn_norm_out")  # type: ignore[arg-type]
    done = kvdrift("trace", "check", folder)
    there, missing = done.out.split("Missing, and what that costs:")
    assert "absent             attn_norm_out: the model does not have them" in there
    line = next(line for line in missing.splitlines() if line.strip().startswith("not recorded"))
    assert "v_proj" in line
    assert "attn_norm_out" not in line


def test_what_is_absent_closes_no_link_of_the_chain(tmp_path: Path) -> None:
    """A residual sum may be absent, as in parallel blocks; attention and what a layer hands on are asked for anyway."""
    clean = name_absent(write_chain(tmp_path / "clean", leave_out("resid_attn")), "resid_attn")  # type: ignore[arg-type]
    assert kvdrift("judge", "--markdown", clean).code == 0
    attention = ("attn_ctx", "attn_out", "resid_attn")
    bare = name_absent(write_chain(tmp_path / "bare", leave_out(*attention)), "resid_attn")  # type: ignore[arg-type]
    done = kvdrift("judge", "--markdown", bare)
    assert done.code == 6
    assert "attn_ctx" in done.out


def test_nothing_can_be_claimed_up_to_an_absent_site(tmp_path: Path) -> None:
    folder = name_absent(write_chain(tmp_path / "t"), "q_norm")
    done = kvdrift("judge", folder, "--scope", "up-to=q_norm")
    assert (done.code, "the model has no q_norm" in done.err) == (2, True)


@pytest.mark.parametrize("site", ["attn_ctx", "q_proj", "colour"])
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path: Path, site: str) -> None:
    done = kvdrift("judge", name_absent(write_chain(tmp_path / "t"), site))
    assert done.code == 5
    assert "absent names" in done.err


def test_the_writer_writes_what_is_absent_and_refuses_to_record_it(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "t", engine="e", model="m", dtype="float32", n_layers=1, absent=["q_norm", "k_norm"])
    with writer.prefill("p", [1, 2]) as out:
        out.rows("embed_out", np.ones((1, 2), np.float32), positions=[1])
        with pytest.raises(UsageError, match="q_norm is named as absent from the model"):
            out.rows("q_norm", np.ones((1, 2), np.float32), positions=[1], layer=0)
    writer.finish()
    assert json.loads((tmp_path / "t" / "manifest.json").read_text())["absent"] == ["k_norm", "q_norm"]
    with pytest.raises(UsageError, match="absent names the unknown site 'colour'"):
        Writer(tmp_path / "u", engine="e", model="m", dtype="float32", n_layers=1, absent=["colour"])
