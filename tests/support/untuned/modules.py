"""Projections, residuals, norms, feed-forward parts, logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvdrift_bench.planted.torch.parts import attention_modules, decoder_layers, heads
from kvdrift_bench.planted.torch.ways import Way
from kvdrift_bench.planted.torch.ways_modules import in_inputs, in_outputs
from tests.support.untuned.register import LAYER, fault


def _modules(find: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    return lambda model: [find(decoder_layers(model)[LAYER])]


_mlp = _modules(lambda layer: layer.mlp)
_layer = _modules(lambda layer: layer)


def _attention_part(name: str) -> Callable[[Any], list[Any]]:
    return lambda model: [getattr(attention_modules(model)[LAYER], name)]


@fault("projection_bias_missing", of="gpt2")
@in_outputs(_modules(lambda layer: layer.attn.c_proj))
def output_bias_missing(module: Any, args: Any, out: Tensor) -> Any:
    return out - module.bias


@fault("projection_bias_missing", of="gpt2")
@in_outputs(_modules(lambda layer: layer.attn.c_attn))
def value_bias_missing(module: Any, args: Any, out: Tensor) -> Any:
    out = out.clone()
    width = out.shape[-1] // 3
    out[..., 2 * width :] -= module.bias[2 * width :]
    return out


@fault("constant_offset", "projection_bias_missing", of="gpt2")
@in_outputs(_modules(lambda layer: layer.mlp.c_proj))
def bias_of_the_mlp_missing(module: Any, args: Any, out: Tensor) -> Any:
    return out - module.bias


def _with_input(change: Callable[[Any, Tensor, Tensor], Tensor]) -> Way:
    @in_outputs(_layer)
    def way(module: Any, args: Any, out: Any) -> Any:
        wrong = change(module, args[0], out if isinstance(out, Tensor) else out[0])
        return wrong if isinstance(out, Tensor) else (wrong, *out[1:])

    way.__name__ = change.__name__
    return way


@fault("residual_wrong", "operation_skipped")
@_with_input
def residual_added_twice(module: Any, given: Tensor, out: Tensor) -> Tensor:
    return out + given


@fault("residual_wrong", "operation_skipped")
@_with_input
def residual_of_the_layer_lost(module: Any, given: Tensor, out: Tensor) -> Tensor:
    return out - given


@fault("operation_skipped")
@_with_input
def layer_left_out(module: Any, given: Tensor, out: Tensor) -> Tensor:
    return given.clone()


@fault("zeroed")
@in_outputs(_mlp)
def mlp_left_out(module: Any, args: Any, out: Tensor) -> Any:
    return torch.zeros_like(out)


@fault("product_wrong", "between_products", "activation_approximated")
@in_outputs(_mlp)
def gate_and_up_exchanged(module: Any, args: Any, out: Tensor) -> Any:
    x = args[0]
    return module.down_proj(module.act_fn(module.up_proj(x)) * module.gate_proj(x))


@fault("product_wrong")
@in_outputs(_mlp)
def half_of_the_width_not_summed(module: Any, args: Any, out: Tensor) -> Any:
    x = args[0]
    hidden = module.act_fn(module.gate_proj(x)) * module.up_proj(x)
    hidden[..., hidden.shape[-1] // 2 :] = 0.0
    return module.down_proj(hidden)


@fault("tile_zero", "block_scaled")
@in_outputs(_mlp)
def rows_of_one_block_scaled(module: Any, args: Any, out: Tensor) -> Any:
    out = out.clone()
    out[..., 16:32] *= 0.5
    return out


@fault("norm_weight_wrong")
@in_outputs(_modules(lambda layer: layer.post_attention_layernorm))
def weight_of_the_other_norm(module: Any, args: Any, out: Tensor) -> Any:
    return out / module.weight * (1.0 + 0.3 * torch.sin(torch.arange(out.shape[-1]))).to(out.dtype)


@fault("norm_centred")
@in_inputs(_modules(lambda layer: layer.input_layernorm))
def mean_subtracted_before_the_norm(module: Any, x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


@fault("norm_input_wrong")
@in_outputs(_modules(lambda layer: layer.post_attention_layernorm))
def norm_of_the_layer_input(module: Any, args: Any, out: Tensor) -> Any:
    return type(module).forward(module, _given[0])


_given: list[Tensor] = [torch.zeros(1)]


@fault("adapter_missing", "unexplained")
@in_outputs(_attention_part("v_proj"))
def adapter_not_applied(module: Any, args: Any, out: Tensor) -> Any:
    generator = torch.Generator().manual_seed(3)
    down = torch.randn(args[0].shape[-1], 1, generator=generator).to(out.dtype)
    up = torch.randn(1, out.shape[-1], generator=generator).to(out.dtype)
    return out - 0.1 * (args[0] @ down @ up)


@fault("product_wrong")
@in_inputs(_attention_part("o_proj"))
def half_of_the_heads_not_summed(module: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[..., x.shape[-1] // 2 :] = 0.0
    return x


@fault("rounded_to_float8_e4m3fn", "between_products")
@in_inputs(_modules(lambda layer: layer.mlp.down_proj))
def activations_in_fp8(module: Any, x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).to(x.dtype)


@fault("blocks_permuted", "heads_permuted")
@in_outputs(_attention_part("q_proj"))
def query_heads_reversed(module: Any, args: Any, out: Tensor) -> Any:
    shape = out.shape
    return out.reshape(*shape[:-1], 4, -1).flip(-2).reshape(shape)


@fault("norm_weight_wrong", "unexplained", of="qwen3")
@in_outputs(_attention_part("q_norm"))
def query_norm_with_the_weight_of_keys(module: Any, args: Any, out: Tensor) -> Any:
    return out / module.weight * module.weight.flip(0)


# ----------------------------------------------------------------------------------------------------------- the head


@fault("logits_processed")
@in_outputs(heads)
def repetition_penalty_left_in(module: Any, args: Any, out: Tensor) -> Any:
    out = out.clone()
    seen = [5, 9, 17, 3, 44]
    out[..., seen] = torch.where(out[..., seen] > 0, out[..., seen] / 1.3, out[..., seen] * 1.3)
    return out


@fault("tile_zero")
@in_outputs(heads)
def end_of_the_vocabulary_not_computed(module: Any, args: Any, out: Tensor) -> Any:
    out = out.clone()
    out[..., -16:] = 0.0
    return out


@fault("logits_processed", "unexplained")
@in_outputs(heads)
def bias_of_one_token_left_in(module: Any, args: Any, out: Tensor) -> Any:
    out = out.clone()
    out[..., 7] += 5.0
    return out


@fault("logit_scale")
@in_outputs(heads)
def tied_head_scaled(module: Any, args: Any, out: Tensor) -> Any:
    return out * out.shape[-1] ** -0.5


def remember_layer_input(module: Any, args: Any) -> None:
    """Keep what a layer is given, for the norm behind attention."""
    _given[0] = args[0]
