"""Files as SGLang's dumper names and fills them, `{"value", "meta"}`, out of real passes of a tiny model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvdrift.engines.hf.engine import HFEngine
from kvdrift.pipeline.judge import judge_directory
from kvdrift.trace.model import Trace
from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.torch import corpus_for
from tests.support.carriers import one_thread
from tests.support.command import kvdrift
from tests.support.tiny import tiny_model

FAULTS = {fault.name: fault for fault in corpus_for(3)}
TOKENS = [5, 9, 17, 3, 44, 2, 8, 61]
N_DECODED = 2


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


SPLIT = ("q_proj", "k_proj", "v_proj", "q_rope", "k_rope", "attn_ctx")  # columns of each rank
Change = Callable[[str, int, int, torch.Tensor], torch.Tensor]  # of name, step, rank and value


def keep(name: str, step: int, rank: int, value: torch.Tensor) -> torch.Tensor:
    return value


class Dumper:
    """Names and fills files as the dumper does: on two ranks columns of what tensor parallelism splits, and copies."""

    def __init__(self, folder: Path, n_ranks: int = 1, change: Change = keep) -> None:
        self.folder, self.step, self.index = folder, 0, 0
        self.n_ranks, self.change = n_ranks, change
        folder.mkdir(parents=True)

    def dump(self, name: str, value: torch.Tensor, layer: int | None = None) -> None:
        for rank in range(self.n_ranks):
            mine = value.chunk(self.n_ranks, dim=-1)[rank].clone() if name in SPLIT else value
            self._save(name, self.change(name, self.step, rank, mine), layer, rank)

    def _save(self, name: str, value: torch.Tensor, layer: int | None, rank: int) -> None:
        self.index += 1
        tags: dict[str, Any] = {"step": self.step, "rank": rank, "dump_index": self.index, "name": name}
        if layer is not None:
            tags["layer_id"] = layer
        path = self.folder / ("___".join(f"{k}={v}" for k, v in tags.items()) + ".pt")
        torch.save({"value": value, "meta": {**tags, "tp_rank": rank}}, path)


def dump_passes(
    folder: Path, fault: str | None = None, *, full: bool = True, n_ranks: int = 1, change: Change = keep
) -> Path:
    """Prefill a prompt, decode two tokens, then prefill all of them: one step of the dumper each."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    dumper = Dumper(folder / "dump_1", n_ranks, change)
    (folder / "facts.json").write_text('{"dtype": "bfloat16", "n_layers": 3}')
    n = len(TOKENS) - N_DECODED
    with FAULTS[fault].plant(model) if fault else nullcontext(), HFEngine(model, name="tiny") as engine:
        sequence = engine.new_sequence(len(TOKENS))
        for start, tokens in ((0, TOKENS[:n]), *((at, TOKENS[at : at + 1]) for at in range(n, len(TOKENS)))):
            _step(dumper, sequence, start, tokens)
        if full:
            _step(dumper, engine.new_sequence(len(TOKENS)), 0, TOKENS)
    return folder


def _step(dumper: Dumper, sequence: Any, start: int, tokens: Sequence[int]) -> None:
    positions = tuple(range(start, start + len(tokens)))
    trace = Trace("p", "prefill", "x", "native", tuple(TOKENS))
    sequence.extend(tokens, probe=positions, sink=trace)
    dumper.dump("input_ids", torch.tensor(tokens))
    dumper.dump("positions", torch.tensor(positions))
    dumper.dump("seq_lens", torch.tensor([start + len(tokens)]))
    for row in trace.rows:
        if row.site in (Site.ATTN_SCORES, Site.ATTN_PROBS):
            continue
        bits = np.ascontiguousarray(row.values).view(np.int16)
        value = torch.from_numpy(bits.reshape(len(positions), -1).copy()).view(torch.bfloat16)
        if row.site is Site.ATTN_OUT:  # as its module hooks name it
            dumper.dump(f"non_intrusive__model.layers.{row.layer}.self_attn.o_proj.output", value)
        else:
            dumper.dump(str(row.site), value, row.layer)
    dumper.dump("forward_mode", torch.tensor([1]))
    dumper.step += 1


def test_a_clean_run_raises_no_alarm(tmp_path: Path) -> None:
    done = kvdrift("judge", "--markdown", dump_passes(tmp_path / "t"))
    assert done.code in (0, 6), done.out
    assert "**First failure**: none" in done.out
    assert "holds SGLang dumps of 4 forward passes" in done.err
    assert "attn_out (3)" in done.out


@pytest.mark.parametrize(
    ("fault", "where"), [("position_plus_one", "layer 0 / q_rope"), ("heads_tiled", "layer 0 / attn_ctx")]
)
def test_a_planted_fault_is_found_where_it_is(tmp_path: Path, fault: str, where: str) -> None:
    done = kvdrift("judge", "--markdown", dump_passes(tmp_path / "t", fault), "--format", "sglang")
    assert done.code == 1, done.out
    assert where in next(line for line in done.out.splitlines() if line.startswith("**First failure**"))


def refused_with(folder: Path, message: str) -> None:
    done = kvdrift("judge", "--markdown", folder)
    assert message in done.err
    assert (done.code, done.out, done.err.count("\n")) == (5, "", 1)


def test_a_file_that_would_run_code_does_not(tmp_path: Path) -> None:
    folder = dump_passes(tmp_path / "t")

    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "harmed",))

    path = next(folder.rglob("*name=input_ids.pt"))
    torch.save({"value": Harmful(), "meta": {}}, path)
    refused_with(folder, "and is not unpickled")
    torch.save({"value": Harmful()}, path, _use_new_zipfile_serialization=False, pickle_protocol=4)
    refused_with(folder, "and is not unpickled")
    assert not (tmp_path / "harmed").exists()


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    folder = dump_passes(tmp_path / "t")
    path = next(folder.rglob("*name=embed_out.pt"))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    refused_with(folder, "is not a readable .pt file")
    for damaged in (b"", b"\x80\x02."):  # an unpickler that pops what is not there
        path.write_bytes(damaged)
        refused_with(folder, "is not a readable .pt file")
    path.write_bytes(data)
    torch.save(torch.zeros(2, device="meta"), path)
    refused_with(folder, "")
    torch.save([1, 2], path)
    refused_with(folder, "does not hold a tensor under 'value'")
    path.write_bytes(data)
    path.rename(path.with_name("odd.pt"))
    refused_with(folder, "is not named as SGLang's dumper names its files")


def test_steps_that_cannot_be_read(tmp_path: Path) -> None:
    folder = dump_passes(tmp_path / "a", full=False)
    refused_with(folder, "no prefill of a whole decoded sequence was dumped")
    folder = dump_passes(tmp_path / "b")
    next(folder.rglob("*step=1___*name=positions.pt")).unlink()
    refused_with(folder, "step 1 of")
    folder = dump_passes(tmp_path / "c")
    torch.save({"value": torch.tensor([3, 4]), "meta": {}}, next(folder.rglob("*step=0___*name=seq_lens.pt")))
    refused_with(folder, "holds several requests")


def test_two_ranks_are_joined_to_what_one_would_have_dumped(tmp_path: Path) -> None:
    one = judge_directory(dump_passes(tmp_path / "one"))[0]
    two = judge_directory(dump_passes(tmp_path / "two", n_ranks=2))[0]
    figures = [(o.n_pairs, o.n_exact, o.n_within, o.n_beyond, o.n_unpaired) for o in one.decision.outcomes]
    assert [(o.n_pairs, o.n_exact, o.n_within, o.n_beyond, o.n_unpaired) for o in two.decision.outcomes] == figures
    assert (two.verdict, two.decision.reasons) == (one.verdict, one.decision.reasons)


def test_a_fault_of_the_second_rank_is_found_and_named(tmp_path: Path) -> None:
    def wrong(name: str, step: int, rank: int, value: torch.Tensor) -> torch.Tensor:
        return value * 1.5 if (name, rank) == ("q_proj", 1) and step in (1, 2) else value

    result = judge_directory(dump_passes(tmp_path / "t", n_ranks=2, change=wrong))[0]
    assert (result.exit_code, str(result.first_failure).split(" / ", 2)[2]) == (1, "layer 0 / q_proj")
    (text,) = [caveat.text for caveat in result.caveats if caveat.code == "RANK"]
    assert text.startswith("q_proj of layer 0 differs on rank 1 (columns ")


def test_copies_on_two_ranks_that_differ_are_no_pass(tmp_path: Path) -> None:
    def wrong(name: str, step: int, rank: int, value: torch.Tensor) -> torch.Tensor:
        return value * 1.5 if (name, rank, step) == ("mlp_out", 1, 1) else value

    result = judge_directory(dump_passes(tmp_path / "t", n_ranks=2, change=wrong))[0]
    assert result.exit_code == 1
    assert "differs from its copy on rank 0" in result.to_markdown()
