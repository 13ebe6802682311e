"""One layer at a time at higher precision: the same bits as the whole model, memory for one layer, nothing left."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kvdrift.capture.modes import capture_prompt
from kvdrift.engines.hf.engine import HFEngine
from kvdrift.engines.torch import streaming
from kvdrift.engines.torch.streaming import streamed
from kvdrift.errors import CaptureError
from kvdrift.vocabulary.facts import Prompt
from kvdrift.vocabulary.plan import Mode, PairRole
from tests.support.matrix import further
from tests.support.tiny import ARCHITECTURES, tiny_model

CORE = ("llama", "gemma2", "mixtral", "mamba2")
PROMPT = Prompt("p", tuple(range(3, 20)), (5, 6))


def recorded(model: nn.Module, rung: str, *, by_layer: bool) -> dict[tuple[object, ...], bytes]:
    """Every tensor of both modes at `rung`, as bytes."""
    with HFEngine(model, by_layer=by_layer) as engine, engine.at(rung):
        modes = list(Mode) if engine.info.can_rewind else [Mode.AS_DESIGNED]
        items = list(capture_prompt(engine, PROMPT, modes, rung))
    return {
        (pair.mode, trace.pass_name, index, row.layer, row.site): row.values.tobytes()
        for item in items
        if item.role is PairRole.PAIR
        for pair in [item.pair]
        for trace in (pair.prefill, pair.decode)
        for index, row in enumerate(trace.rows)
    }


@pytest.mark.parametrize("rung", [pytest.param("float32", marks=pytest.mark.matrix), "float64"])
@pytest.mark.parametrize("architecture", [*CORE, *further(*(name for name in ARCHITECTURES if name not in CORE))])
def test_one_layer_at_a_time_computes_the_same_bits(architecture: str, rung: str) -> None:
    model = tiny_model(architecture, dtype=torch.bfloat16, lively=True)

    whole, streamed_in = (recorded(model, rung, by_layer=by_layer) for by_layer in (False, True))

    assert len(whole) >= 45
    assert streamed_in == whole


def test_that_comparison_can_fail() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    assert recorded(model, "float32", by_layer=True) != recorded(model, "float64", by_layer=True)


def test_the_parameters_are_the_same_tensors_afterwards() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    before = {name: (p.data_ptr(), p.dtype, p.data.clone()) for name, p in model.named_parameters()}

    recorded(model, "float64", by_layer=True)

    for name, parameter in model.named_parameters():
        pointer, dtype, values = before[name]
        assert (parameter.data_ptr(), parameter.dtype) == (pointer, dtype)
        assert torch.equal(parameter.data, values)


def test_the_parameters_come_back_when_a_layer_fails() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}

    def fail(*args: Any) -> None:
        raise ValueError("in the middle of a layer")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(CaptureError, match="in the middle of a layer"):
        recorded(model, "float64", by_layer=True)
    handle.remove()

    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


def test_no_more_than_one_layer_is_held() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16, num_hidden_layers=6)
    layers = list(model.model.layers)
    held = []

    def look(*args: Any) -> None:
        with torch._C.DisableTorchFunction():  # what is really there, not what a reader is handed
            stored = [parameter.data.untyped_storage() for parameter in model.parameters()]
            own = {storage.data_ptr(): storage.nbytes() for storage in stored}
        held.append(sum(own.values()))

    handles = [layer.mlp.register_forward_hook(look) for layer in layers]
    with streamed(model, torch.float64, layers) as weights, weights:
        model(torch.arange(5)[None])
    for handle in handles:
        handle.remove()

    one = max(sum(streaming._padded(p.numel()) for p in layer.parameters()) for layer in layers) * 8
    assert len(held) == 6
    assert max(held) <= one + 8


def test_a_large_matrix_in_a_layer_is_never_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    block = 1 << 10
    monkeypatch.setattr(streaming, "_LEAST_BLOCK", block)
    model = tiny_model("llama", dtype=torch.bfloat16)
    exact = tiny_model("llama", dtype=torch.bfloat16).double()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    layers, held = list(model.model.layers), []

    def look(module: nn.Module, args: Any) -> None:
        assert isinstance(module, nn.Linear)
        with torch._C.DisableTorchFunction():
            held.append(module.weight.data.untyped_storage().nbytes())

    linear = [module for layer in layers for module in layer.modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(look) for module in linear]
    with streamed(model, torch.float64, layers) as weights, weights, torch.no_grad():
        out = model(torch.arange(5)[None]).logits
        room = sum(tensor.nbytes for rooms in (weights._buffers, weights._scratch) for tensor in rooms.values())
    for handle in handles:
        handle.remove()

    assert all(module.weight.numel() * 8 > block for module in linear)
    assert len(held) == len(linear)
    assert max(held) == 8  # one NaN, in the place of all values
    assert room <= 4 * block
    torch.testing.assert_close(out, exact(torch.arange(5)[None]).logits.detach(), rtol=1e-12, atol=1e-12)


def test_a_linear_module_with_a_forward_of_its_own_is_given_its_whole_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tied(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ self.weight.T) @ self.weight

    monkeypatch.setattr(streaming, "_LEAST_BLOCK", 64)
    torch.manual_seed(0)
    layer = Tied(16, 16, bias=False).to(torch.bfloat16)
    model = nn.Sequential(layer)
    x, wide = torch.rand(3, 16).double(), layer.weight.detach().double()
    with streamed(model, torch.float64, [layer]) as weights, weights, torch.no_grad():
        out = model(x)
    assert torch.equal(out, (x @ wide.T) @ wide)


class Outside(nn.Module):
    """A layer, and weights outside it that are used in every way that a model may."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.embedding = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 50)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.turn = nn.Parameter(torch.rand(8, 8))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids) * self.scale
        x = x.to(self.scale.dtype) @ self.turn.T + torch.cat([self.scale[:4], self.scale[4:]])
        x = self.layer(F.rms_norm(x, (8,), weight=self.scale))
        out: torch.Tensor = self.head(x + self.turn.data[0])
        return out


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_weights_outside_the_layers_are_handed_out_at_the_new_precision(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Outside().to(torch.bfloat16)
    exact = Outside().double()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    ids = torch.arange(20)[None]
    monkeypatch.setattr(streaming, "_LEAST_BLOCK", block)

    with streamed(model, torch.float64, [model.layer]) as weights, weights, torch.no_grad():
        out = model(ids)

    assert out.dtype == torch.float64
    torch.testing.assert_close(out, exact(ids).detach(), rtol=1e-13, atol=1e-13)


def test_a_weight_that_is_read_behind_its_back_is_nan() -> None:
    model = Outside().to(torch.bfloat16)
    with streamed(model, torch.float64, [model.layer]):
        assert bool(model.scale.isnan().all())


def test_writing_to_a_weight_outside_its_layer_is_refused() -> None:
    model = Outside().to(torch.bfloat16)
    with (
        streamed(model, torch.float64, [model.layer]) as weights,
        weights,
        torch.no_grad(),
        pytest.raises(CaptureError, match=r"writes to a weight outside its layer .* use --ladder model"),
    ):
        model.scale.mul_(2.0)
