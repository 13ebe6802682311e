"""Models of mlx-lm: clean on every kind of cache, faults at their address, and what is refused."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import cache, gemma3n, llama
from typer.testing import CliRunner

import kvdrift
from kvdrift.cli.app import app
from kvdrift.engines.mlx.caches import slots_of
from kvdrift.engines.mlx.engine import MLXModel
from kvdrift.errors import UsageError
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.evidence import Verdict

PASSES = (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)
PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 31], "q": [7, 1, 70, 22, 13, 14, 15, 60, 61, 62, 11, 3]}
CONFIG = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 96,
}


def tiny() -> Any:
    mx.random.seed(0)
    with mx.stream(mx.cpu):
        model = llama.Model(llama.ModelArgs(**CONFIG))
        model.update(tree_map(lambda p: mx.random.normal(p.shape) * 0.15 if p.ndim > 1 else p, model.parameters()))
        mx.eval(model.parameters())
    return model


def audited(model: Any, kind: str = "default", **options: Any) -> Audit:
    return kvdrift.audit(MLXModel(model, cache=kind), prompts=PROMPTS, **{"span": 2, **options})


@contextmanager
def in_attention(module: Any, change: Any) -> Iterator[None]:
    """Let `change(module, x, cache)` run before attention when a token comes alone."""
    kind = type(module)

    def call(self: Any, x: Any, mask: Any = None, cache: Any = None) -> Any:
        scale = self.scale
        if x.shape[1] == 1:
            change(self, cache)
        try:
            return kind.__call__(self, x, mask, cache)
        finally:
            self.scale = scale

    module.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    yield
    module.__class__ = kind


@pytest.mark.parametrize("kind", ["default", "batch", "quantized", "rotating", "chunked"])
def test_a_clean_model_passes_on_every_kind_of_cache(kind: str) -> None:
    audit = audited(tiny(), kind, span=2 if kind != "rotating" else 4)
    info = audit.suite.judged.measured.info

    assert audit.verdict in PASSES
    assert audit.view["modes"]["as_designed"]["status"] == "PASS"
    assert audit.view["modes"]["kv_aligned"]["status"] == ("NOT RUN" if kind == "rotating" else "PASS")
    assert info.perturbable == (kind != "quantized")
    assert not info.caveats


def test_parameters_are_the_same_afterwards() -> None:
    model = tiny()
    before = dict(tree_flatten(model.parameters()))
    kinds = [type(module) for _, module in model.named_modules()]
    audited(model, span=1)

    assert all(value is before[name] for name, value in tree_flatten(model.parameters()))
    assert [type(module) for _, module in model.named_modules()] == kinds


def stale(module: Any, held: Any) -> None:
    held.values[..., 5, :] = held.values[..., 4, :]


def shifted(module: Any, held: Any) -> None:
    held.offset += 1


def scaled(module: Any, held: Any) -> None:
    module.scale = 0.3


# mlx turns by angles of float32, whatever the model computes in.
@pytest.mark.parametrize(
    ("change", "site", "cause"),
    [
        (stale, "v_cache", "slot_aliased"),
        (shifted, "q_rope", "rope_position_offset"),
        (scaled, "attn_scores", "score_scale"),
    ],
)
def test_a_fault_is_found_at_its_address_and_named(change: Any, site: str, cause: str) -> None:
    model = tiny()
    with in_attention(model.layers[1].self_attn, change):
        audit = audited(model, mode="as_designed")

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (1, site)
    assert audit.diagnosis is not None
    assert str(audit.diagnosis.cause) == cause, audit.diagnosis


def test_an_offset_that_changes_under_the_queries_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch cache that counts in place changes the array that the model took its positions from before."""

    class InPlace(cache.BatchKVCache):  # type: ignore[misc]  # mlx-lm has no types
        def update_and_fetch(self, keys: Any, values: Any) -> Any:
            held = vars(self)["offset"]
            found = super().update_and_fetch(keys, values)
            held += keys.shape[2]
            self.offset = held
            return found

    text = {
        "model_type": "gemma3n_text",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "head_dim": 32,
        "rms_norm_eps": 1e-6,
        "vocab_size": 96,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 96,
        "sliding_window": 64,
        "laurel_rank": 8,
        "max_position_embeddings": 256,
        "rope_local_base_freq": 10000.0,
        "rope_theta": 1e6,
        "final_logit_softcapping": 30.0,
        "layer_types": ["full_attention", "sliding_attention"],
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 2,
        "hidden_size_per_layer_input": 16,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
    }
    mx.random.seed(0)
    model = gemma3n.Model(gemma3n.ModelArgs(model_type="gemma3n", text_config=text))
    clean = audited(model, "batch", mode="as_designed")
    monkeypatch.setattr(cache, "BatchKVCache", InPlace)
    audit = audited(model, "batch", mode="as_designed")

    assert clean.verdict in PASSES
    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (0, "q_rope")
    assert audit.diagnosis is not None
    assert str(audit.diagnosis.cause).startswith("rope_position_offset"), audit.diagnosis


def test_rows_of_a_ring_have_their_positions() -> None:
    ring = cache.RotatingKVCache(max_size=8, keep=2)
    seen = []
    for first, n in ((0, 5), (5, 1), (6, 1), (7, 1), (8, 1), (9, 1), (10, 3), (13, 1)):
        rows = mx.arange(first, first + n).reshape(1, 1, n, 1).astype(mx.float32)
        keys, _ = ring.update_and_fetch(rows, rows)
        seen.append((np.ravel(np.array(keys)).tolist(), slots_of(ring, keys.shape[2], n, first + n).tolist()))

    assert [slots for _, slots in seen] == [rows for rows, _ in seen]


def test_the_command_line_opens_a_directory(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(tiny().parameters())))
    (tmp_path / "prompts.jsonl").write_text('{"id": "p", "token_ids": [5, 9, 17, 3]}\n')
    words = ["audit", f"mlx:{folder}", "--prompts", str(tmp_path / "prompts.jsonl"), "--span", "1"]
    done = CliRunner().invoke(app, [*words, "--cache", "batch", "--out", str(tmp_path / "run")])
    refused = [
        CliRunner().invoke(app, more)
        for more in ([*words, "--dtype", "bf16"], [*words, "--cache", "static"], [*words, "--ladder", "layer"])
    ]
    missing = CliRunner().invoke(app, ["audit", f"mlx:{tmp_path}/none"])

    assert done.exit_code == 0, done.stderr
    assert "51 of 51 bit-exact" in done.stdout
    assert [each.exit_code for each in refused] == [2, 2, 2]
    assert "unknown cache kind 'static'; use --cache with one of default, batch" in refused[1].stderr
    assert missing.exit_code == 3


def test_an_unknown_cache_is_told() -> None:
    with pytest.raises(UsageError, match="unknown cache kind 'paged'"):
        MLXModel(tiny(), cache="paged")


@pytest.mark.parametrize("name", ["mlx_gelu", "mlx_glm_rotation", "mlx_recurrent_gemma_epsilon"])
def test_a_finding_of_mlx_lm_is_what_its_script_shows(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[2] / "docs" / "findings" / f"{name}.md"

    runpy.run_path(str(page.with_suffix(".py")))

    shown = re.findall(r"relative error (\S+)", capsys.readouterr().out)
    assert [float(figure) > 1e-5 for figure in shown] == [True, False] * (len(shown) // 2)
    assert all(figure in page.read_text() for figure in shown if float(figure) > 1e-5)
