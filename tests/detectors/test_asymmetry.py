"""The pass that is further from float64 is found, in its layer, and two passes that only round are left alone."""

import dataclasses
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import kvdrift
from kvdrift.instruments.asymmetry import ErrorTable, judge_asymmetry
from kvdrift.trace.model import PassName, PassPair, Trace
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.evidence import Evidence, Verdict
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.torch import corpus_for
from tests.support.audits import by_architecture
from tests.support.matrix import further
from tests.support.tiny import tiny_model

PROMPTS = {"a": list(range(3, 20)), "b": list(range(40, 49)), "c": [5, 9, 77, 3, 8]}
CORPUS = {fault.name: fault for fault in corpus_for(3)}
U = 2.0**-8


def evidence(audit: Any) -> Evidence:
    found: Evidence = next(item for item in audit.evidence if item.instrument == "asymmetry")
    return found


@pytest.mark.parametrize(
    ("dtype", "attention"),
    [(torch.bfloat16, "sdpa"), (torch.float32, "sdpa"), *further((torch.float16, "eager"), (torch.bfloat16, "eager"))],
    ids=str,
)
@pytest.mark.parametrize("architecture", by_architecture(["llama", "gpt2", "mixtral"], core=("llama",)))
def test_a_clean_model_raises_no_alarm(architecture: str, dtype: torch.dtype, attention: str) -> None:
    model = tiny_model(architecture, dtype=dtype, attention=attention, lively=True)
    found = evidence(kvdrift.audit(model, prompts=PROMPTS, ladder="layer"))

    assert found.supports != "H1"
    assert found.valid == (dtype is not torch.float32)


@pytest.mark.parametrize("ladder", [*further("model"), "layer"])
@pytest.mark.parametrize("name", ["slot_stale", "one_layer_scale_1.01"])
def test_decode_is_found_guilty_in_the_layer_of_the_fault(name: str, ladder: Any) -> None:
    model = tiny_model("llama", dtype=torch.float16, num_hidden_layers=4)
    fault = CORPUS[name]
    with fault.plant(model) as commits:
        audit = kvdrift.audit(model, prompts=PROMPTS, ladder=ladder)
    found = evidence(audit)

    assert commits.changed > 0
    assert audit.verdict is Verdict.MISMATCH
    assert found.supports == "H1"
    assert found.detail["guilty"] == "decode"
    assert f"layer {fault.first_layer(model)} / " in found.text


def test_what_is_given_is_not_measured_and_a_lost_row_is_beyond_all_bounds() -> None:
    errors = ErrorTable()
    kinds: list[tuple[PassName, str]] = [("prefill", "bfloat16"), ("decode", "bfloat16"), ("prefill", "float64")]
    passes = [Trace("p", name, "full", rung, (1, 2, 3)) for name, rung in kinds]
    for trace in passes:
        values = np.ones((1, 4), dtype=trace.rung if trace.rung == "float64" else ml_dtypes.bfloat16)
        for site in (Site.LAYER_IN, Site.ROUTER, Site.ATTN_OUT):
            trace.add_rows(0, site, (2,), values)
        slots = np.arange(1 if trace.pass_name == "decode" else 0, 3)
        rows = np.ones((len(slots), 1, 4), dtype=values.dtype)
        trace.add_cache_read(0, Site.K_CACHE, (2,), slots, rows)

    errors.remember(PassPair(Mode.KV_ALIGNED, passes[0], passes[1], (2,)))
    errors.compare(passes[2])

    assert errors.values == {
        Address("p", 2, 0, Site.ATTN_OUT): (0.0, 0.0),
        Address("p", 2, 0, Site.K_CACHE): (0.0, math.inf),
    }


def table(n_layers: int = 5, n_units: int = 12, seed: int = 0) -> ErrorTable:
    """Errors of two passes that only round: mostly in common, a tenth of it each pass's own."""
    rng = np.random.default_rng(seed)
    errors = ErrorTable()
    for layer in range(n_layers):
        for site in (Site.ATTN_OUT, Site.MLP_OUT):
            for unit in range(n_units):
                common, first, second = U * rng.lognormal(), *(1.0 + 0.1 * rng.standard_normal(2))
                errors.values[Address("p", unit, layer, site)] = (common * abs(first), common * abs(second))
    return errors


def spoiled(layer: int, factors: tuple[float, float], units: range = range(12)) -> ErrorTable:
    errors = table()
    for unit in units:
        address = Address("p", unit, layer, Site.MLP_OUT)
        prefill, decode = errors.values[address]
        errors.values[address] = (prefill * factors[0], decode * factors[1])
    return errors


@pytest.mark.parametrize(("factors", "guilty"), [((1.0, 4.0), "decode"), ((4.0, 1.0), "prefill")])
def test_the_side_that_errs_is_named(factors: tuple[float, float], guilty: str) -> None:
    found = judge_asymmetry(spoiled(3, factors), "bfloat16", 1e-3, 0)
    assert found.first is not None
    assert (found.first.layer, found.first.site) == (3, Site.MLP_OUT)
    assert found.evidence.detail["guilty"] == guilty


@pytest.mark.parametrize(
    "errors",
    [
        spoiled(3, (1.0, 1.5)),  # less than twice the error of the other pass
        spoiled(3, (1.0, 50.0), range(3)),  # a few units, as where two experts are nearly tied
    ],
    ids=["small", "few"],
)
def test_a_small_or_rare_difference_is_no_alarm(errors: ErrorTable) -> None:
    assert judge_asymmetry(errors, "bfloat16", 1e-3, 0).evidence.supports == "H0"


def test_a_kernel_that_rounds_otherwise_in_all_layers_is_no_alarm() -> None:
    errors = table()
    errors.values = {key: (a, 3.0 * b if key[3] == "mlp_out" else b) for key, (a, b) in errors.values.items()}
    assert judge_asymmetry(errors, "bfloat16", 1e-3, 0).evidence.supports == "H0"


def test_false_alarms_are_as_rare_as_promised() -> None:
    """At alpha 0.05, 200 runs of pure rounding: alarms beyond 4 standard deviations would be a broken promise."""
    n, alpha = 200, 0.05
    alarms = sum(judge_asymmetry(table(seed=seed), "bfloat16", alpha, 0).evidence.supports == "H1" for seed in range(n))
    assert alarms <= n * alpha + 4.0 * (n * alpha * (1.0 - alpha)) ** 0.5


@pytest.mark.parametrize(
    ("errors", "native", "reason"),
    [
        (table(), "float32", "the ladder decides"),
        (ErrorTable(), "bfloat16", "no specification was run"),
        (table(n_layers=2), "bfloat16", "no site was measured at 3 layers"),
        (table(n_units=6), "bfloat16", "6 distinct (prompt, position) units give no p-value"),
    ],
)
def test_it_abstains_where_it_cannot_tell(errors: ErrorTable, native: str, reason: str) -> None:
    found = judge_asymmetry(errors, native, 1e-3, 0)
    assert found.first is None
    assert not found.evidence.valid
    assert reason in str(dataclasses.asdict(found.evidence)["reason"])
