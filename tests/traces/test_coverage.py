"""A pass needs the recorded chain from the cache to the logits; a fault behind the end of the chain never passes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvdrift.errors import UsageError
from kvdrift.pipeline.audit import Audit, audit
from kvdrift.pipeline.judge import judge_directory
from kvdrift.vocabulary.scope import parse_scope
from kvdrift.vocabulary.sites import Site
from tests.support.carriers import one_thread
from tests.support.tiny import tiny_model
from tests.support.written import Values, write_chain


def judged(folder: Path, *scope: str) -> Audit:
    return judge_directory(folder, scope=scope)[0]


def recorded(
    sites: set[str] | None = None, layers: set[int] | None = None, fault: tuple[int | None, str] | None = None
) -> Any:
    """Return an edit that records only these sites or layers, and doubles the values of `fault` in decode."""

    def edit(name: str, layer: int | None, site: str, position: int, values: Values) -> Values | None:
        if (sites is not None and site not in sites) or (layers is not None and (layer or 0) not in layers):
            return None
        return values * 2 if name == "decode" and (layer, site) == fault else values

    return edit


# What is recorded, the fault that it cannot show, up to where it holds, and the claim that it carries.
SHORT = {
    "attention alone": (recorded({"attn_ctx"}), "layer 0 / attn_ctx", "up-to=attn_ctx"),
    "no logits": (recorded({"layer_in", "attn_ctx", "layer_out", "final_norm_out"}), "layer_out", "up-to=layer_out"),
    "two of three layers": (recorded(layers={0, 1}), "layer 1 / layer_out", "layers=0-1"),
    "the front of a layer": (recorded({"embed_out", "attn_norm_out"}, {0}), "nothing of a layer", None),
}


@pytest.mark.parametrize("name", SHORT)
def test_a_chain_that_ends_early_is_inconclusive_and_says_where(tmp_path: Path, name: str) -> None:
    edit, where, claim = SHORT[name]
    folder = write_chain(tmp_path / "t", edit)

    result = judged(folder)

    assert result.exit_code == 6
    (reason,) = result.decision.reasons
    assert reason.startswith("the verdict holds up to ")
    assert where in reason
    assert ("--scope" in reason) == (claim is not None)
    if claim is not None:
        assert reason.endswith(f"--scope {claim}")
        passed = judged(folder, claim)
        assert (passed.exit_code, passed.view["scope"]) == (0, parse_scope([claim]).name)
        assert f"**Scope**: {parse_scope([claim]).name}, and nothing beyond it" in passed.to_markdown().replace(
            "\\", ""
        )


def test_the_whole_chain_passes_and_is_drawn(tmp_path: Path) -> None:
    result = judged(write_chain(tmp_path / "t"))
    assert (result.exit_code, result.view["scope"]) == (0, None)
    text = result.to_markdown()
    assert "The chain from the cache to the logits is whole" in text
    assert "| 0-2 | no | no | yes | yes | yes | yes | yes |" in text


def test_a_site_that_one_position_lacks_breaks_the_chain(tmp_path: Path) -> None:
    """Both passes lack it, so that nothing is without a partner."""

    def edit(name: str, layer: int | None, site: str, position: int, values: Values) -> Values | None:
        return None if site in ("mlp_out", "layer_out", "layer_in") and position == 5 else values

    result = judged(write_chain(tmp_path / "t", edit))
    assert result.exit_code == 6
    assert "layer 0 / layer_out was not compared at every probed position" in result.decision.reasons[0]


def test_a_mismatch_outside_the_scope_is_a_mismatch(tmp_path: Path) -> None:
    folder = write_chain(tmp_path / "t", recorded(fault=(2, "mlp_out")))
    for scope in ("attention", "layers=0-1", "up-to=attn_ctx", "sampled"):
        assert judged(folder, scope).exit_code == 1


@pytest.mark.parametrize(
    ("scope", "sites"),
    [
        ("attention", {"attn_ctx"}),
        ("up-to=attn_out", {"attn_ctx", "attn_out"}),
        ("up-to=q_proj", {"q_proj"}),
        ("up-to=final_norm_out", {"attn_ctx", "layer_out", "final_norm_out"}),
        ("up-to=logits", {"attn_out", "layer_out", "logits"}),
    ],
)
def test_a_scope_needs_what_it_names_and_no_more(tmp_path: Path, scope: str, sites: set[str]) -> None:
    assert judged(write_chain(tmp_path / "t", recorded(sites)), scope).exit_code == 0
    for missing in sites - {"attn_ctx", "attn_out"}:
        folder = write_chain(tmp_path / missing, recorded((sites | {"v_proj"}) - {missing}))
        assert judged(folder, scope).exit_code == 6


def test_an_audit_of_some_layers_is_a_pass_of_these_layers_by_name() -> None:
    with one_thread():
        result = audit(tiny_model("llama"), prompts={"p": [5, 9, 17, 3]}, layers=(0,), span=1, mode="as_designed")
    assert (result.exit_code, result.view["scope"]) == (0, "layer 0")
    assert "**Scope**: layer 0, and nothing beyond it" in result.to_markdown()


def test_bad_scopes_are_told() -> None:
    with pytest.raises(UsageError, match="unknown scope 'heads'; use --scope attention, layers=0-3, up-to=SITE"):
        parse_scope(["heads"])
    with pytest.raises(UsageError, match="unknown site 'attn' in --scope 'up-to=attn'"):
        parse_scope(["up-to=attn"])
    assert parse_scope(["up-to=attn_ctx", "layers=0,2-3"]).up_to is Site.ATTN_CTX
    assert np.all([parse_scope([]).has_layer(layer) for layer in range(3)])
