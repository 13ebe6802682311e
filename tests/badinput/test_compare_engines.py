"""Two engines that do not belong together: one message, its exit code, nothing written; and two that do after all."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import kvdrift
from kvdrift_bench.models.tiny import lively_model
from tests.support.command import kvdrift as command
from tests.support.command import names, refused, save

EXAMPLES = Path(__file__).parents[2] / "examples" / "engines"
SIZES: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": 128}


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in ("numpy_engine", "numpy_decoder", "fixed_cache_engine", "fixed_cache_decoder"):
        sys.modules.pop(name, None)


@pytest.fixture
def directory(tmp_path: Path) -> Any:
    """Saves a tiny model under a name, changed as is asked for."""

    def make(name: str, change: Any = None, **options: Any) -> Path:
        model = lively_model("llama", torch.float32, **{**SIZES, **options})
        if change is not None:
            with torch.no_grad():
                change(model)
        save(model, tmp_path / name)
        return tmp_path / name

    return make


def scaled(model: Any) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.7)


def halved(model: Any) -> None:
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (
            {"vocab_size": 150},
            2,
            "A has a vocabulary of 128 and B of 150; compare two engines of one model and tokenizer",
        ),
        ({"num_hidden_layers": 3}, 5, "A has 2 layers and B 3; compare two engines of one model"),
        (
            {"change": scaled},
            5,
            "A and B have other weights: none of the 16 matrices of A is in B; load both from the same checkpoint, in "
            "one dtype and one quantisation",
        ),
        (
            {"change": halved},
            5,
            "the weights of B are those of A rounded to bfloat16 (embed_out of p1); load both from the same file in "
            "one dtype",
        ),
    ],
    ids=["vocabulary", "layers", "weights", "dtype"],
)
def test_models_that_do_not_belong_together(
    here: Path, directory: Any, options: dict[str, Any], code: int, said: str
) -> None:
    (here / "prompts.jsonl").write_text('{"id": "p1", "token_ids": [5, 9, 17, 3]}\n')
    done = command("compare", directory("a"), directory("b", **options), "--prompts", "prompts.jsonl", "--span", "2")

    refused(done, code, said)
    assert names(here) == {"prompts.jsonl"}


def plain(weights: Any = np.float32, **changed: Any) -> Any:
    import numpy_decoder
    import numpy_engine

    return type("Mine", (numpy_engine.NumpyEngine,), changed)(numpy_decoder.Decoder(dtype=weights))


def test_engines_without_a_precision_in_common(tmp_path: Path) -> None:
    fixed = plain(np.float64, cast=kvdrift.Engine.cast)
    with pytest.raises(kvdrift.UsageError, match="A can run at float64 and B at float32, and noise is measured at one"):
        kvdrift.compare(fixed, plain(cast=kvdrift.Engine.cast), prompts={"p": [5, 9, 17]}, out=tmp_path / "run")
    coarse = plain(ml_dtypes.bfloat16, cast=kvdrift.Engine.cast, dtype="bfloat16")
    with pytest.raises(kvdrift.UsageError, match="A can run at bfloat16 alone and B at float64, float32"):
        kvdrift.compare(coarse, plain(), prompts={"p": [5, 9, 17]}, out=tmp_path / "run")

    assert list(tmp_path.iterdir()) == []


def test_engines_that_cannot_cast_are_compared_at_what_they_share() -> None:
    found: Any = kvdrift.compare(plain(cast=kvdrift.Engine.cast), plain(), prompts={"p": [5, 9, 17, 3, 44]})

    assert found.view["environment"]["sides"]["A"]["rung"] == "float32"
    assert found.verdict == "STRUCTURAL_DRIFT"


def test_an_engine_that_cannot_rewind_is_compared_all_the_same() -> None:
    """Prefill and plain decode need no way back."""
    import fixed_cache_engine

    one, two = fixed_cache_engine.make(), fixed_cache_engine.make()
    one.rewind = None
    found = kvdrift.compare(one, two, prompts={"p": [5, 9, 17, 3, 44, 2, 8, 31]})

    assert found.verdict in ("EXACT", "STRUCTURAL_DRIFT")
