"""`kvdrift.record`: traces of an engine that can only run, judged elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import kvdrift
from kvdrift.cli.app import app
from kvdrift.errors import KvdriftError

PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 31], "q": [7, 1, 70, 22, 13, 14, 15, 60]}
EXAMPLES = Path(__file__).parents[2] / "examples" / "engines"


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def functions(kind: str = "Decoder", *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """What an author has of a decoder in numpy; with a fault, where one is named."""
    import numpy_decoder

    class Stale(numpy_decoder.Decoder):
        def read(self, n: int, keys: Any, values: Any, n_tokens: int) -> Any:
            if n == 1 and n_tokens == 1:
                values = np.concatenate([values[:3], values[2:3], values[4:]])
            return keys, values

    decoder = Stale() if kind == "stale" else numpy_decoder.Decoder()
    original = decoder.weights

    def cast(dtype: str) -> None:
        decoder.weights = {name: rows.astype(dtype) for name, rows in original.items()}

    made = {
        "step": decoder.forward,
        "new_cache": lambda max_length: decoder.empty(),
        "rewind": lambda cache, length: [(keys[:length], values[:length]) for keys, values in cache],
        "cast": cast,
    }
    return {name: function for name, function in made.items() if name not in without}


def judged(folder: Path) -> Any:
    return CliRunner().invoke(app, ["judge", str(folder), "--json"])


def verdict_of(folder: Path) -> tuple[str, dict[str, Any]]:
    import json

    view = json.loads(judged(folder).stdout)
    return view["verdict"], view


def test_what_an_engine_ran_is_judged_from_its_traces(tmp_path: Path) -> None:
    written = kvdrift.record(**functions(), directory=tmp_path / "traces", prompts=PROMPTS, span=2, name="mine")
    verdict, view = verdict_of(written)

    assert written == tmp_path / "traces"
    assert verdict == "STRUCTURAL_DRIFT"
    assert {mode["status"] for mode in view["modes"].values()} == {"PASS"}
    assert view["model"] == "mine"


def test_the_second_prefill_is_written_too(tmp_path: Path) -> None:
    kvdrift.record(**functions(), directory=tmp_path / "traces", prompts=PROMPTS, span=2)
    told = CliRunner().invoke(app, ["trace", "check", str(tmp_path / "traces")]).stdout

    (line,) = (line for line in told.splitlines() if "second prefill" in line)
    assert line.endswith(" values")


def test_a_stale_slot_is_found_in_the_traces(tmp_path: Path) -> None:
    kvdrift.record(**functions("stale"), directory=tmp_path / "traces", prompts=PROMPTS, span=2)
    verdict, view = verdict_of(tmp_path / "traces")

    assert verdict == "MISMATCH"
    assert (view["first_failure"]["layer"], view["first_failure"]["site"]) == (1, "v_cache")


def test_what_the_engine_cannot_do_is_not_recorded(tmp_path: Path) -> None:
    some = functions(without=("rewind", "cast"))
    kvdrift.record(**some, directory=tmp_path / "traces", prompts=PROMPTS, span=2)
    verdict, view = verdict_of(tmp_path / "traces")

    assert verdict in ("STRUCTURAL_DRIFT", "INCONCLUSIVE")
    assert view["modes"]["kv_aligned"]["status"] == "NOT RUN"
    assert "MODE_NOT_RUN" in {item["code"] for item in view["caveats"]}


def test_an_engine_is_recorded_as_it_is(tmp_path: Path) -> None:
    import numpy_engine

    kvdrift.record(numpy_engine.make(), tmp_path / "traces", prompts={"p": PROMPTS["p"]}, span=1)
    verdict, view = verdict_of(tmp_path / "traces")

    assert verdict in ("STRUCTURAL_DRIFT", "INCONCLUSIVE")
    assert view["environment"]["model_hash"] is not None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"step": None}, "step= is missing; pass step(tokens, cache, start, see)"),
        ({"rewind": 3}, "rewind= is of type int; pass a function"),
        ({"prompts": {"p": []}}, "the prompt 'p' is empty (no tokens)"),
        ({"prompts": {"p": [5, 99]}}, "holds token id 99"),
        ({"step": lambda tokens, cache, start, see: None}, "extend returned no logits"),
    ],
)
def test_what_does_not_fit_is_told_and_nothing_is_written(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    options = {**functions(), "prompts": PROMPTS, **changes}
    with pytest.raises(KvdriftError) as caught:
        kvdrift.record(**options, directory=tmp_path / "traces")

    assert said in str(caught.value)
    assert not (tmp_path / "traces").exists()


def test_a_directory_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(KvdriftError, match="is not empty; name a new directory"):
        kvdrift.record(**functions(), directory=tmp_path, prompts=PROMPTS)

    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_engine_with_functions_beside_it_is_told(tmp_path: Path) -> None:
    import numpy_engine

    with pytest.raises(KvdriftError, match=r"rewind= goes with a function, and .* is an engine; leave it out"):
        kvdrift.record(numpy_engine.make(), tmp_path / "traces", prompts=PROMPTS, rewind=lambda cache, n: cache)
