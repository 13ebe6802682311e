"""Faults of kernels: what goes wrong inside of compiled code, in decode steps alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from kvdrift_bench.planted.kernels import attention, layers, products
from kvdrift_bench.planted.kernels.registry import broken, broken_ones
from kvdrift_bench.planted.torch.parts import decoder_layers, heads, mlps, needs_modules, two_thirds_up
from kvdrift_bench.planted.torch.ways import AttentionCall, in_attention, in_one_layer, in_rotation

# ------------------------------------------------------------------------------------------------------ attention

_TILED: tuple[Any, ...] = (8, False, 0.0, False)


def _in_one_layer(change: Callable[[AttentionCall], Tensor]) -> Any:
    return in_attention(in_one_layer(change))


@broken_ones(
    {
        "tile_tail_skipped": ("tiled_attention", _TILED, "tail_skipped"),
        "tile_in_the_sum_alone": ("tiled_attention", _TILED, "tile_weight"),
        "running_peak_stale": ("tiled_attention", _TILED, "peak_stale"),
        "one_head_where_keys_are_even": ("tiled_attention", _TILED, "one_head_row"),
        "scale_of_a_kernel_1.01": ("tiled_attention", (8, False, 0.0, True), "scale"),
        "last_split_dropped": ("split_attention", (3, 0), "split_dropped"),
        "log_sums_of_base_2_as_natural": ("split_attention", (3, 1), "wrong_base"),
        "softmax_over_fewer_splits": ("split_attention", (4, 2), "split_dropped"),
    },
    attention.scores_in_cpp,
)
def in_compiled_attention(what: tuple[str, tuple[Any, ...], str]) -> Any:
    name, options, defect = what
    return in_attention(attention.in_cpp(name, *options, defect=defect))


broken(attention.scores_in_cpp, name="last_page_of_the_table_stale")(_in_one_layer(attention.paged("page_stale")))
broken(attention.scores_in_cpp, name="tail_skipped_in_bfloat16_only")(
    _in_one_layer(attention.half_only("tail_skipped"))
)
broken(attention.scores_in_numba, name="one_head_forgets_its_last_key")(_in_one_layer(attention.in_numba(odd=True)))
broken(attention.scores_in_inductor, name="compiled_scale_1.02")(_in_one_layer(attention.in_inductor(1.02)))

# ------------------------------------------------------------------------------------------------------ products


def _one(find: Callable[[nn.Module], list[nn.Module]]) -> Callable[[nn.Module], list[nn.Module]]:
    """The module of the layer that faults of one layer are planted in."""
    return lambda model: [find(model)[two_thirds_up(model)]]


def _down(model: nn.Module) -> list[nn.Module]:
    found: list[Any] = mlps(model)
    return [mlp.down_proj for mlp in found if isinstance(getattr(mlp, "down_proj", None), nn.Linear)]


def _values(model: nn.Module) -> list[nn.Module]:
    blocks: list[Any] = decoder_layers(model)
    return [block.self_attn.v_proj for block in blocks if hasattr(getattr(block, "self_attn", None), "v_proj")]


def _down_in_cpp(model: nn.Module) -> str | None:
    return needs_modules(_down, "no down projection")(model) or products.linears_in_cpp(model)


def _down_in_numba(model: nn.Module) -> str | None:
    return needs_modules(_down, "no down projection")(model) or products.linears_in_numba(model)


def _values_in_cpp(model: nn.Module) -> str | None:
    return needs_modules(_values, "no projection of values")(model) or products.linears_in_cpp(model)


broken(_values_in_cpp, name="inner_tail_skipped")(
    products.multiplied(_one(_values), products.by_gemv(defect="tail_skipped"))
)
broken(_down_in_cpp, name="one_output_wrong")(products.multiplied(_one(_down), products.by_gemv(defect="one_output")))
broken(_down_in_numba, name="last_input_left_out")(products.multiplied(_one(_down), products.by_loops(1)))
broken(products.linears_in_cpp, name="one_logit_wrong")(
    products.multiplied(heads, products.by_gemv(defect="one_output"))
)
broken(products.linears_in_cpp, name="last_logit_not_written")(
    products.multiplied(heads, products.by_gemv(defect="one_element"))
)


@broken_ones({"factor_of_another_row": 8, "factor_of_another_group": 4}, _down_in_cpp)
def in_packed_weights(bits: int) -> Any:
    return products.packed(bits, "group_shifted", _one(_down))


broken(needs_modules(_values, "no projection of values"), name="fused_parts_exchanged")(products.fused((0, 2, 1)))

# ------------------------------------------------------------------------------------------------------ layers


def _first_norms(model: nn.Module) -> Iterable[nn.Module]:
    blocks: list[Any] = decoder_layers(model)
    return [blocks[two_thirds_up(model)].input_layernorm]


broken(layers.rms_in_cpp, name="norm_epsilon_of_a_kernel")(layers.norms_in_cpp("epsilon", _first_norms))
broken(layers.rms_in_cpp, name="last_dim_not_normed")(layers.norms_in_cpp("one_element", _first_norms))
broken(layers.rotation_in_cpp, name="last_pair_not_rotated")(in_rotation(in_one_layer(layers.in_cpp("tail_skipped"))))
broken(layers.gated_in_cpp, name="last_activation_not_written")(layers.activations_in_cpp("one_element"))
