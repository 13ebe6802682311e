"""What is known of every planted fault and clean twin: names, classes, references, causes, sites and true places.

`pytest tests/golden --update-golden` writes the file anew, after a fault was added on purpose.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvdrift_bench.models.carriers import N_LAYERS, carrier_of, one_thread
from kvdrift_bench.planted import llamacpp
from kvdrift_bench.planted.facts import FaultFacts
from kvdrift_bench.planted.torch import Fault, clean_twins, corpus_for

FILE = Path(__file__).parent / "corpus.json"


def facts(fault: FaultFacts) -> dict[str, Any]:
    return {
        "mechanism": fault.mechanism,
        "reference": fault.reference,
        "where": fault.where,
        "sites": [str(site) for site in fault.sites],
        "cause": fault.cause,
        "also": list(fault.also),
        "layer": fault.layer,
        "keyed_to_dtype": fault.keyed_to_dtype,
        "amount": fault.amount,
        "undiagnosable": fault.undiagnosable,
    }


def in_torch(fault: Fault) -> dict[str, Any]:
    carrier, model = carrier_of(fault)
    places = [[layer, str(site)] for layer, site in fault.places(model)]
    return {**facts(fault), "dtypes": list(fault.dtypes), "needs": fault.needs, "carrier": carrier, "places": places}


def whole_corpus() -> dict[str, Any]:
    with one_thread():
        return {
            "torch": {fault.name: in_torch(fault) for fault in corpus_for(N_LAYERS)},
            "torch_twins": {
                twin.name: {"reference": twin.reference, "why": twin.why, "carrier": carrier_of(twin)[0]}
                for twin in clean_twins()
            },
            "llamacpp": {fault.name: facts(fault) for fault in llamacpp.corpus_for(N_LAYERS)},
            "llamacpp_twins": {
                twin.name: {"reference": twin.reference, "why": twin.why} for twin in llamacpp.clean_twins()
            },
        }


def test_the_corpus_is_the_golden_one(request: pytest.FixtureRequest) -> None:
    found = whole_corpus()
    if request.config.getoption("--update-golden"):
        FILE.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    expected = json.loads(FILE.read_text(encoding="utf-8"))
    for kind, planted in expected.items():
        assert found[kind] == planted, kind
    assert found.keys() == expected.keys()
