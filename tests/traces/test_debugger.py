"""Files of transformers' own model debugger, made by running it on a tiny model."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache
from transformers.model_debugging_utils import model_addition_debugger_context

from kvdrift_bench.planted.torch import corpus_for
from tests.support.carriers import one_thread
from tests.support.command import kvdrift
from tests.support.tiny import tiny_model

FAULTS = {fault.name: fault for fault in corpus_for(3)}
TOKENS = [5, 9, 17, 3, 44, 2, 8, 61]
TREE = "LlamaForCausalLM_debug_tree_FULL_TENSORS.json"


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def debug(folder: Path, fault: str | None = None, *, printed: bool = False, n_steps: int = 1) -> Path:
    """Run prefill and `n_steps` decode steps under the debugger."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    folder.mkdir()
    (folder / "facts.json").write_text('{"dtype": "bfloat16", "n_layers": 3}')
    ids = torch.tensor([TOKENS])
    with FAULTS[fault].plant(model) if fault else nullcontext():
        places = [(folder / "p.prefill", ids, None)]
        cache = DynamicCache(config=model.config)
        model(ids[:, :-n_steps], past_key_values=cache)
        for step in range(n_steps):
            at = len(TOKENS) - n_steps + step
            name = folder / "p.decode" / str(step) if n_steps > 1 else folder / "p.decode"
            places.append((name, ids[:, at : at + 1], cache))
        for place, tokens, past in places:
            with model_addition_debugger_context(model, debug_path=str(place), do_prune_layers=False, use_repr=printed):
                model(input_ids=tokens, past_key_values=past, use_cache=past is not None)
    return folder


@pytest.mark.parametrize("n_steps", [1, 2])
def test_a_clean_run_raises_no_alarm(tmp_path: Path, n_steps: int) -> None:
    done = kvdrift("judge", "--markdown", debug(tmp_path / "t", n_steps=n_steps))
    assert done.code in (0, 6), done.out
    assert "none" in next(line for line in done.out.splitlines() if line.startswith("**First failure**"))
    assert "holds calls of transformers' model debugger (2 passes)" in done.err


def test_a_planted_fault_is_found_in_its_layer(tmp_path: Path) -> None:
    """The debugger sees modules, and no rotation: the first thing after it is the attention context."""
    done = kvdrift("judge", "--markdown", debug(tmp_path / "t", "heads_tiled"), "--format", "transformers-debug")
    assert done.code == 1, done.out
    assert "layer 0 / attn_ctx" in next(line for line in done.out.splitlines() if line.startswith("**First failure**"))


def test_printed_tensors_are_parts_and_never_a_pass(tmp_path: Path) -> None:
    done = kvdrift("judge", "--markdown", debug(tmp_path / "t", printed=True))
    assert done.code == 6
    assert "elements were recorded, and the rest may differ" in done.out
    assert "TRACE_OFFSET" not in done.out


def test_a_fault_is_found_in_printed_tensors(tmp_path: Path) -> None:
    done = kvdrift("judge", "--markdown", debug(tmp_path / "t", "heads_tiled", printed=True))
    assert done.code == 1, done.out


def refused_with(folder: Path, message: str) -> None:
    done = kvdrift("judge", "--markdown", folder)
    assert message in done.err
    assert (done.code, done.out, done.err.count("\n")) == (5, "", 1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{", "[", "is not a tree of the model debugger"),
        ('"torch.bfloat16"', '"torch.quint8"', "of the dtype 'torch.quint8'"),
        ('"torch.Size([1, 8, 64])"', '"torch.Size([1000000, 1000000, 1000000])"', "of the shape"),
        ("./LlamaForCausalLM.lm_head_outputs", "../../outside", "leads out of"),
        ("./LlamaForCausalLM.lm_head_outputs", "./missing", "cannot read"),
        ("input_ids", "other_ids", "has no input_ids"),
    ],
)
def test_damaged_trees(tmp_path: Path, old: str, new: str, message: str) -> None:
    folder = debug(tmp_path / "t")
    path = folder / "p.prefill" / TREE
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    refused_with(folder, message)


def test_a_truncated_tree_and_another_prompt(tmp_path: Path) -> None:
    folder = debug(tmp_path / "t")
    path = folder / "p.decode" / TREE
    path.write_bytes(path.read_bytes()[:1000])
    refused_with(folder, "is not a tree of the model debugger")
    (folder / "p.decode").rename(folder / "decoded")
    refused_with(folder, "is not named PROMPT.prefill")
