"""Engines of a caller's own in other frameworks: `kvdrift.Engine`, written in plain numpy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import kvdrift
from kvdrift.cli.app import app
from kvdrift.engines.own.arrays import like, to_numpy
from kvdrift.errors import KvdriftError
from kvdrift.pipeline.audit import Audit
from kvdrift.trace.model import Array
from kvdrift.vocabulary.evidence import Verdict

PASSES = (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)
PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 31], "q": [7, 1, 70, 22, 13, 14, 15, 60]}
EXAMPLES = Path(__file__).parents[2] / "examples" / "engines"


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules of the examples are found, and forgotten afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in ("numpy_engine", "numpy_decoder"):
        sys.modules.pop(name, None)


def engine(*, without: tuple[str, ...] = (), decoder: type | None = None, **changed: Any) -> Any:
    """The engine of the example without some of its methods, or with others."""
    import numpy_decoder
    import numpy_engine

    methods = {**{name: getattr(kvdrift.Engine, name) for name in without}, **changed}
    return type("Mine", (numpy_engine.NumpyEngine,), methods)((decoder or numpy_decoder.Decoder)())


def audited(given: Any, **options: Any) -> Audit:
    return kvdrift.audit(given, prompts=PROMPTS, **{"span": 2, **options})


def caveats(audit: Audit) -> dict[str, str]:
    return {item["code"]: item["text"] for item in audit.view["caveats"]}


@cache
def clean() -> Audit:
    return audited(engine())


def test_a_clean_engine_passes_with_its_layers_isolated() -> None:
    audit = clean()
    info = audit.suite.judged.measured.info

    assert audit.verdict in PASSES
    assert {mode["status"] for mode in audit.view["modes"].values()} == {"PASS"}
    assert (info.engine, info.model, info.dtype, info.n_layers, info.vocab_size) == ("own", "Mine", "float32", 3, 96)
    assert info.perturbable
    assert info.caveats == {}
    assert info.notes[0].startswith("sites handed over: embed_out, layer_in, attn_norm_out")
    assert len(str(info.model_hash)) == 64


def test_a_stale_slot_is_found_at_its_address() -> None:
    import numpy_decoder

    class Stale(numpy_decoder.Decoder):
        def read(self, n: int, keys: Any, values: Any, n_tokens: int) -> Any:
            if n == 1 and n_tokens == 1:
                values = np.concatenate([values[:3], values[2:3], values[4:]])
            return keys, values

    audit = audited(engine(decoder=Stale))

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (1, "v_cache")
    assert "slot 3" in audit.view["hypotheses"]["conclusion"]
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause == "slot_aliased"


def test_a_shifted_position_is_found_at_its_address() -> None:
    import numpy_decoder

    class Shifted(numpy_decoder.Decoder):
        def rotated(self, n: int, q: Any, places: Any) -> Any:
            return numpy_decoder.rotate(q, places + (n == 2 and len(q) == 1))

    audit = audited(engine(decoder=Shifted))

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (2, "q_rope")


def watching(self: Any, tokens: list[int], cache: Any, start: int) -> Any:
    """Hands everything over, and goes on with its own values."""

    def see(layer: Any, site: str, values: Any) -> Any:
        self.see(layer, site, values)
        return values

    return self.decoder.forward(tokens, cache, start, see)


def keeping(self: Any, tokens: list[int], cache: Any, start: int) -> Any:
    """Keeps what it computes, for `record`."""
    self.kept = {}

    def see(layer: Any, site: str, values: Any) -> Any:
        self.kept[layer, site] = values
        return values

    return self.decoder.forward(tokens, cache, start, see)


def silent(self: Any, tokens: list[int], cache: Any, start: int) -> Any:
    return self.decoder.forward(tokens, cache, start, lambda layer, site, values: values)


NO_CAST = "the precision ladder did not complete: float64: Mine computes in float32 alone; write cast(dtype)"
IN_VALUES = "does not go on with what see returns for attn_norm_out, q_rope, k_cache, v_cache, attn_out, mlp_out"
CANNOT: dict[str, tuple[dict[str, Any], tuple[str, str], dict[str, str]]] = {
    "rewind": ({"without": ("rewind",)}, ("PASS", "NOT RUN"), {"NO_REWIND": "kv_aligned is not run"}),
    "cast": ({"without": ("cast",)}, ("INCONCLUSIVE", "INCONCLUSIVE"), {"NO_CAST": "no finer precision is run"}),
    "weights": ({"without": ("weights",)}, ("PASS", "PASS"), {"NO_WEIGHTS": "the model has no hash"}),
    "copy": ({"without": ("rewind",), "copy": lambda self, cache: list(cache)}, ("PASS", "PASS"), {}),
    "go on with it": (
        {"extend": watching},
        ("PASS", "PASS"),
        {"NOT_ISOLATED": "layers are not isolated", "CONTROL_IN_VALUES": IN_VALUES, "NOT_REPLAYED": "call attends("},
    ),
    "see": (
        {"extend": keeping, "record": lambda self: self.kept},
        ("PASS", "PASS"),
        {"NOT_ISOLATED": "layers are not isolated", "CONTROL_IN_VALUES": IN_VALUES, "NOT_REPLAYED": "call attends("},
    ),
    "show anything": ({"extend": silent}, ("INCONCLUSIVE", "INCONCLUSIVE"), {"NO_SITES": "nothing but the logits is"}),
}


@pytest.mark.parametrize("ability", CANNOT)
def test_what_an_engine_cannot_do_is_said_with_what_it_costs(ability: str) -> None:
    options, statuses, said = CANNOT[ability]
    audit = audited(engine(**options))
    found = caveats(audit)

    assert tuple(mode["status"] for mode in audit.view["modes"].values()) == statuses
    assert {code for code in found if code.startswith(("NO_", "NOT_", "CONTROL_"))} == {*said}
    assert {code: text for code, text in said.items() if text not in found[code]} == {}


def test_a_fault_is_found_in_an_engine_that_only_shows_what_it_computes() -> None:
    import numpy_decoder

    class Shifted(numpy_decoder.Decoder):
        def rotated(self, n: int, q: Any, places: Any) -> Any:
            return numpy_decoder.rotate(q, places + (n == 2 and len(q) == 1))

    kept: dict[str, Any] = {"extend": keeping, "record": lambda self: self.kept, "without": ("rewind", "weights")}
    audit = audited(engine(decoder=Shifted, **kept))

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (2, "q_rope")


def test_a_layer_that_also_reads_what_lies_below_is_not_isolated() -> None:
    """A residual around the place where the input is handed over: replaced inputs would be half a replacement."""

    def around(self: Any, tokens: list[int], cache: Any, start: int) -> Any:
        kept: dict[Any, Any] = {}

        def see(layer: Any, site: str, values: Any) -> Any:
            if site == "layer_in":
                kept["below"] = values
                return self.see(layer, site, values)
            if site == "resid_attn" and layer == 1:
                values = values + kept["below"]
            return self.see(layer, site, values)

        return self.decoder.forward(tokens, cache, start, see)

    audit = audited(engine(extend=around), ladder="off")

    assert caveats(audit)["NOT_ISOLATED"].startswith("layer 1 reads what the layer below computed beside what see")


def test_a_layer_that_hides_its_attention_does_not_pass() -> None:
    """What is not handed over is not what the model does not have."""

    def hiding(self: Any, tokens: list[int], cache: Any, start: int) -> Any:
        def see(layer: Any, site: str, values: Any) -> Any:
            hidden = layer == 1 and site in ("attn_ctx", "attn_out", "resid_attn")
            return values if hidden else self.see(layer, site, values)

        return self.decoder.forward(tokens, cache, start, see)

    audit = audited(engine(extend=hiding), mode="as_designed")

    assert audit.verdict is Verdict.INCONCLUSIVE
    assert "layer 1 / attn_ctx" in str(audit.view["modes"]["as_designed"]["reasons"])


def casting_nothing(self: Any, dtype: str) -> None:
    """Says that it computes in another dtype."""


def casting_for_good(self: Any, dtype: str) -> None:
    weights = self.decoder.weights
    self.decoder.weights = {name: (rows.astype("float16")).astype(dtype) for name, rows in weights.items()}


@pytest.mark.parametrize(
    ("cast", "said"),
    [
        (casting_nothing, "after cast('float64') Mine hands over float32; cast weights and caches"),
        (casting_for_good, "Mine has other weights after cast('float64') and cast('float32') than before"),
    ],
)
def test_a_cast_that_is_none_does_not_pass(cast: Any, said: str) -> None:
    audit = audited(engine(cast=cast), mode="as_designed")

    assert audit.verdict is Verdict.INCONCLUSIVE
    assert said in audit.view["modes"]["as_designed"]["reasons"][0]


def handing(layer: Any, site: str, values: Any) -> Any:
    def extend(self: Any, tokens: list[int], cache: Any, start: int) -> Any:
        self.see(layer, site, values)
        return np.zeros((len(tokens), 9), np.float32)

    return extend


def returning(value: Any) -> Any:
    return lambda self, tokens, cache, start: value


def raising(self: Any, *arguments: Any) -> Any:
    raise LookupError("no such row\nand more")


ROWS = np.ones((5, 4), np.float32)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"extend": returning(None)}, "extend returned no logits: a value of type NoneType"),
        ({"extend": returning(np.ones((3, 9)))}, "extend returned an array of shape [3, 9] for 5 tokens"),
        ({"extend": returning(np.ones((1, 9)))}, "extend returned the logits of 1 of 5 tokens"),
        ({"extend": returning([[1, 2]])}, "holds int64; hand over floating-point numbers"),
        ({"extend": raising}, "Mine failed in a call of 5 tokens on 0 cached ones: LookupError: no such row"),
        ({"new_cache": raising}, "Mine failed in new_cache(6): LookupError: no such row"),
        ({"weights": raising}, "Mine failed in weights(): LookupError: no such row"),
        ({"weights": lambda self: {"w": np.array([np.nan])}}, "weights of w are NaN or infinite"),
        ({"extend": handing(0, "query", ROWS)}, "see was given the site 'query', and the sites are embed_out"),
        ({"extend": handing(None, "q_rope", ROWS)}, "see was given q_rope with the layer None, and that site is in a"),
        ({"extend": handing(0, "embed_out", ROWS)}, "see was given embed_out with the layer 0, and that site is outs"),
        ({"extend": handing(None, "logits", ROWS)}, "see was given logits, which extend returns; leave that out"),
        ({"extend": handing(0, "q_rope", ROWS[:4])}, "layer 0 / q_rope has the shape [4, 4] for 5 tokens"),
        ({"extend": handing(0, "k_cache", ROWS)}, "layer 0 / k_cache has the shape [5, 4]; hand over [slot, kv head"),
        ({"extend": handing(1, "q_rope", ROWS)}, "hands over nothing of layer 0, and has values of layer 1"),
        ({"dtype": "float8"}, "computes in 'float8'; say dtype = one of bfloat16"),
        ({"without": ("extend",)}, "Mine has no extend; write extend(tokens, cache, start)"),
        ({"max_length": 4}, "the prompt 'p' has 8 tokens; with a span of 2 that is 10, and the model has 4 positions"),
    ],
)
def test_what_does_not_fit_is_one_message(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(KvdriftError) as caught:
        audited(engine(**changes))

    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("framework", ["numpy", "torch", "mlx"])
def test_arrays_of_other_frameworks_come_back_as_the_same_bits(framework: str, dtype: str) -> None:
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    wanted: Array = np.arange(-6, 6, dtype=np.float32).reshape(3, 4).astype(dtype)
    made: dict[str, Any] = {
        "numpy": lambda: wanted,
        "torch": lambda: torch.tensor(wanted.astype(np.float64), dtype=getattr(torch, dtype)),
        "mlx": lambda: mx.array(wanted.astype(np.float64), dtype=getattr(mx, dtype)),
    }
    values = made[framework]()
    found = to_numpy(values)
    back = like(found, values)

    assert found.dtype == np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    assert found.tobytes() == wanted.tobytes()
    assert type(back) is type(values)
    assert back.dtype == values.dtype
    assert to_numpy(back).tobytes() == wanted.tobytes()


def test_the_command_takes_an_engine_and_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"id": "p", "token_ids": [5, 9, 17, 3]}\n')
    words = ["audit", "numpy_engine:make", "--prompts", str(tmp_path / "prompts.jsonl"), "--span", "1"]
    code = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); from typer.testing import CliRunner\n"
        f"from kvdrift.cli.app import app\ndone = CliRunner().invoke(app, {[*words, '--out', str(tmp_path / 'run')]})\n"
        "print(done.exit_code, sorted({'torch', 'transformers', 'mlx'} & sys.modules.keys()), done.output)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    refused = CliRunner().invoke(app, [*words, "--dtype", "bf16"])

    assert done.stdout.startswith("0 []"), done.stdout
    assert (tmp_path / "run" / "report.html").exists()
    assert refused.exit_code == 2
    assert "--dtype is for models of transformers, and numpy_engine:make is an engine of its own" in refused.stderr


def test_an_engine_is_compared_with_another() -> None:
    import numpy_decoder

    class Shifted(numpy_decoder.Decoder):
        def rotated(self, n: int, q: Any, places: Any) -> Any:
            return numpy_decoder.rotate(q, places + (n == 2 and len(q) == 1))

    same = kvdrift.compare(engine(), engine(), prompts=PROMPTS)
    other: Any = kvdrift.compare(engine(decoder=Shifted), engine(), prompts=PROMPTS)

    assert same.verdict == "STRUCTURAL_DRIFT"
    assert (other.verdict, other.guilty, other.decision.guilty_pass) == ("MISMATCH", "A", "decode")
    assert str(other.decision.first.place) == "layer 2 / q_rope"
