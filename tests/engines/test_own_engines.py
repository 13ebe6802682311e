"""Engines of a caller's own: what kvdrift is told of them, what it finds itself, and that faults are found."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt
from typer.testing import CliRunner

import kvdrift
from kvdrift.cli.app import app
from kvdrift.errors import UsageError
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.evidence import Verdict

PASSES = (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)
PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 31], "q": [7, 1, 70, 22, 13, 14, 15, 60, 61, 62, 11, 3]}
EXAMPLES = Path(__file__).parents[2] / "examples" / "engines"


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules of the examples are found, and forgotten afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in ("fixed_cache_engine", "fixed_cache_decoder"):
        sys.modules.pop(name, None)


def fixed() -> Any:
    import fixed_cache_engine

    return fixed_cache_engine.make()


def audited(engine: Any, **options: Any) -> Audit:
    return kvdrift.audit(engine, prompts=PROMPTS, **{"span": 2, **options})


@cache
def clean() -> Audit:
    return audited(fixed())


def test_a_clean_engine_passes_with_its_layers_isolated() -> None:
    audit = clean()
    info = audit.suite.judged.measured.info

    assert audit.verdict in PASSES
    assert {mode["status"] for mode in audit.view["modes"].values()} == {"PASS"}
    assert info.perturbable
    assert (info.engine, info.model, info.n_layers, info.vocab_size) == ("own", "Decoder", 3, 96)
    assert "found by what modules read and write: embed_out, layer_in" in info.notes[0]
    assert "named by the caller: attn_ctx, attn_out, final_norm_out" in info.notes[0]


@pytest.mark.parametrize("config", [None, SimpleNamespace(padded_vocab_size=128)])
def test_the_head_is_known_by_its_width_whatever_the_configuration_is(config: Any) -> None:
    engine = fixed()
    engine.model.config = config
    audit = audited(engine, ladder="off")

    minima = [item.detail["minimum_by_site"] for item in audit.evidence if item.instrument == "products" and item.valid]
    assert minima
    assert all(isinstance(by_site, dict) and "logits" in by_site for by_site in minima)


def test_a_stale_slot_is_found_at_its_address() -> None:
    engine = fixed()
    rows_of = engine.model.layers[1].attention

    def stale(module: Any, args: Any) -> None:
        if args[0].shape[1] == 1 and module.rows is not None:
            module.rows.values[:, :, 5] = module.rows.values[:, :, 4]

    handle = rows_of.register_forward_pre_hook(stale)
    audit = audited(engine)
    handle.remove()

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (1, "v_cache")
    assert "slot 5" in audit.view["hypotheses"]["conclusion"]
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause == "slot_aliased"


def test_a_shifted_position_is_found_at_its_address() -> None:
    engine = fixed()

    def shifted(module: Any, args: Any) -> Any:
        x, _, mask, places = args
        return (x, engine.model.angles[places + 1], mask, places) if x.shape[1] == 1 else args

    engine.model.layers[2].attention.register_forward_pre_hook(shifted)
    audit = audited(engine)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (2, "q_rope")


def test_a_pass_that_depends_on_its_own_length_is_not_noisy() -> None:
    """Queries are turned by as many positions as a call has tokens: a perturbed prefill of fewer tokens would differ
    from the clean one, and that difference would excuse the fault."""
    engine = fixed()
    norms = engine.model.layers[1].attention

    def late(module: Any, args: Any) -> Any:
        x, _, mask, places = args
        return x, engine.model.angles[places + x.shape[1]], mask, places

    norms.register_forward_pre_hook(late)
    audit = audited(engine, span=4, mode="as_designed")

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (1, "q_rope")


def test_a_wrong_scale_is_found_at_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fixed()
    plain = torch.nn.functional.scaled_dot_product_attention

    class Functions:
        @staticmethod
        def scaled_dot_product_attention(q: Any, k: Any, v: Any, attn_mask: Any) -> Any:
            return plain(q, k, v, attn_mask, scale=0.3 if q.shape[2] == 1 else None)

    monkeypatch.setattr(sys.modules["fixed_cache_decoder"], "F", Functions)
    audit = audited(engine)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (0, "attn_scores")


def test_without_a_way_back_one_mode_is_missing_and_says_why() -> None:
    given = fixed()
    given.rewind = None
    modes = audited(given, ladder="off").view["modes"]

    assert modes["kv_aligned"]["reasons"] == ["not available: it has no rewind; pass rewind=... to TorchEngine"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sites": {"layers.{i}.attention.wx": "q_proj"}}, "and the model has no such module; it has layers.0."),
        ({"sites": {"layers.{i}.attention.wo": "o_proj"}}, "sites= names 'o_proj' for"),
        ({"sites": {"layers.{i}.attention": "k_cache"}}, "is not the input or output of a module; leave it out"),
        ({"sites": {"layers.{i}": "logits"}}, "is not the input or output of a module"),
        ({"sites": {"layers.0.attention": "attn_out"}}, "write {i} where the number of the layer stands"),
        ({"step": None}, "step= is of type NoneType; pass a function"),
        ({"rewind": 3}, "rewind= is of type int; pass a function"),
    ],
)
def test_what_does_not_fit_is_told_when_it_is_said(changes: dict[str, Any], said: str) -> None:
    options = {"step": lambda *a: None, "new_cache": lambda n: None, **changes}
    with pytest.raises(UsageError) as caught:
        kvdrift.TorchEngine(fixed().model, **options)

    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (lambda tokens, cache, start: None, "step= returned NoneType; it must return logits [1, token, vocabulary]"),
        (lambda tokens, cache, start: torch.ones(3), "step= returned a tensor of shape [3] for 5 tokens"),
        (lambda tokens, cache, start: torch.ones(1, 1, 9), "returned the logits of 1 of 5 tokens"),
    ],
)
def test_a_step_that_gives_no_logits_is_told(step: Any, said: str) -> None:
    engine = kvdrift.TorchEngine(fixed().model, step=step, new_cache=lambda n: None)
    with pytest.raises(UsageError) as caught:
        audited(engine)

    assert said in str(caught.value)


def test_the_command_line_takes_an_engine(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"id": "p", "token_ids": [5, 9, 17, 3]}\n')
    words = ["audit", "fixed_cache_engine:make", "--prompts", str(tmp_path / "prompts.jsonl"), "--span", "1"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "run")])
    refused = [CliRunner().invoke(app, [*words, *more]) for more in (["--dtype", "bf16"], ["--cache", "static"])]

    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "run" / "report.html").exists()
    assert [each.exit_code for each in refused] == [2, 2]
    assert "--dtype is for models of transformers, and fixed_cache_engine:make is an engine of" in refused[0].stderr
    assert "--cache is for models of transformers, and fixed_cache_engine:make is an engine of" in refused[1].stderr


def test_the_page_about_own_engines_runs(tmp_path: Path) -> None:
    page = (EXAMPLES.parents[1] / "docs" / "engines" / "own.md").read_text(encoding="utf-8")
    blocks = [(token.info, token.content) for token in MarkdownIt().parse(page) if token.type == "fence"]
    files = {info.removeprefix("python file="): text for info, text in blocks if "file=" in info}
    checks = [text for info, text in blocks if info == "python check"]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    done = [
        subprocess.run([sys.executable, "-W", "error", "-c", check], capture_output=True, text=True, cwd=tmp_path)
        for check in checks
    ]

    assert set(files) == {"mine.py", "engines.py", "plain.py"}
    assert [each.returncode for each in done] == [0, 0, 0], [each.stderr for each in done]


def test_adapters_fit_one_screen() -> None:
    adapters = list(EXAMPLES.glob("*_engine.py"))

    assert len(adapters) >= 3
    assert {path.name: n for path in adapters if (n := len(path.read_text().splitlines())) > 40} == {}
