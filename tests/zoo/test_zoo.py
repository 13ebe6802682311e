"""Types of the registry as tiny models: each has a row, and a row says what came of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvdrift.report.schema import check
from kvdrift.zoo.build import build, registered
from kvdrift.zoo.own import OWN, PARTS
from kvdrift.zoo.rows import audit_type
from kvdrift.zoo.shrink import shrink
from tests.support.command import here, kvdrift

__all__ = ["here"]


def rows_of(text: str) -> dict[str, dict[str, object]]:
    check("zoo", text.encode())
    view = json.loads(text)
    return {row["type"]: row for row in view["rows"]}


def test_each_type_is_audited_in_its_own_row_and_is_not_run_twice(here: Path) -> None:
    command = ("zoo", "--model-type", "mistral", "--model-type", "xlnet", "--rows", "zoo.jsonl", "--jobs", "1")
    done = kvdrift(*command, "--markdown", "zoo.md", "--json")

    rows = rows_of(done.out)
    assert done.code == 0, done.err
    assert rows["mistral"]["state"] == "STRUCTURAL_DRIFT"
    assert rows["mistral"]["cache"] == "DynamicCache"
    assert rows["xlnet"]["state"] == "NOT_APPLICABLE"
    page = (here / "zoo.md").read_text()
    assert "| mistral | " in page
    assert "2 types: " in page

    with (here / "zoo.jsonl").open("a") as file:
        file.write('{"type":"phi","sta')  # its writer was killed here
    again = kvdrift(*command, "--json")
    assert rows_of(again.out) == rows
    assert len((here / "zoo.jsonl").read_text().splitlines()) == 2

    more = rows_of(kvdrift(*command[:3], *command[5:], "--scenario", "rewind", "--json").out)
    assert more["mistral"]["verdicts"] == {"rewind": "STRUCTURAL_DRIFT"}  # a row without it is another row


def test_a_window_is_shorter_than_the_prompts_and_each_kind_of_layer_stays() -> None:
    config = build("gemma2").config

    assert config.sliding_window == 8
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        ("deepseek_v3", "head_dim", 8),  # it is the rotated part of a head
        ("hunyuan_v1_dense", "head_dim", 16),  # it has no default
        ("jamba", "layers_block_type", ["mamba", "attention"]),
        ("musicgen", "num_codebooks", 1),
    ],
)
def test_what_a_size_is_tied_to_and_what_has_no_default_is_set(kind: str, option: str, value: object) -> None:
    found = getattr(build(kind).config, option)

    assert (list(found) if isinstance(found, tuple | list) else found) == value


def test_every_type_with_options_of_its_own_is_registered() -> None:
    assert set(OWN) | set(PARTS) <= set(registered())


def test_a_package_that_is_missing_is_no_error_of_the_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def needs(kind: str) -> object:
        raise ImportError("TimmWrapperModel requires the PIL library")

    monkeypatch.setattr("kvdrift.zoo.rows.build", needs)
    row = audit_type({"type": "gemma3n", "scenarios": []})

    assert (row["state"], row["reason"]) == ("NOT_APPLICABLE", "TimmWrapperModel requires the PIL library")


def test_a_dictionary_of_its_own_is_not_given_a_cache() -> None:
    row = audit_type({"type": "xlm", "scenarios": []})  # its argument `cache` is none of transformers

    assert (row["state"], "left the cache empty" in row["reason"]) == ("NOT_APPLICABLE", True)


def test_a_type_that_breaks_is_an_error_of_its_own() -> None:
    row = audit_type({"type": "cpmant", "scenarios": []})  # its decode step refuses the cache that its prefill left

    assert row["state"] == "ERROR"
    assert "on 11 cached ones" in row["reason"]


def test_a_planted_fault_is_a_mismatch_of_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.cache_utils import DynamicLayer

    right = DynamicLayer.update

    def stale(self: DynamicLayer, key_states: object, value_states: object, *args: object, **options: object) -> object:
        keys, values = right(self, key_states, value_states, *args, **options)
        if keys.shape[-2] > 9 and key_states.shape[-2] == 1:  # type: ignore[attr-defined]
            keys = keys.clone()
            keys[:, :, 3] = keys[:, :, 4]
        return keys, values

    monkeypatch.setattr(DynamicLayer, "update", stale)
    row = audit_type({"type": "llama", "scenarios": []})

    assert row["state"] == "MISMATCH"
    assert "layer 0 / k_cache" in str(row["first_failure"])


def test_every_registered_type_has_a_row_in_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs/zoo.md").read_text().partition("## Why")[0]
    found = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| ")][1:]

    assert found == sorted(registered())


def test_sizes_are_made_small_and_other_options_stay() -> None:
    settings = {"hidden_size": 4096, "rope_theta": 5e5, "pad_token_id": -1, "tie_word_embeddings": False}

    assert shrink(settings) == {"hidden_size": 64, "pad_token_id": 120}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--model-type", "nonsense"), 2, "'nonsense' is not a causal language model"),
        (("--model-type", "llama", "--scenario", "nonsense"), 2, "unknown scenario 'nonsense'"),
        (("--model-type", "llama", "--type-timeout", "0"), 2, "--type-timeout is 0"),
        (("--model-type", "llama", "--backend", "slurm"), 2, "unknown backend 'slurm'"),
        (("--model-type", "llama", "--rows", "broken.jsonl"), 5, "line 1 of broken.jsonl is not a row of the zoo"),
    ],
)
def test_bad_input_is_one_line(here: Path, words: tuple[str, ...], code: int, said: str) -> None:
    (here / "broken.jsonl").write_text("{}\n")
    done = kvdrift("zoo", *words)

    assert done.code == code
    assert done.err.startswith(f"kvdrift: {said}")
    assert done.err.count("\n") == 1
    assert done.out == ""
