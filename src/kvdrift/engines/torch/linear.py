"""The weights of a linear module as it computes with them, and its product in exact arithmetic.

A quantised weight is what the module makes of it, and an adapter is part of the product. A weight that cannot be known
is named, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kvdrift.engines import partial_sums

# Numbers of a weight matrix that are held at float64 at a time: half a megabyte, which the cache of a core holds while
# they are converted, squared and multiplied.
_BLOCK = 1 << 16


class UnknownWeight(Exception):
    """Why the weight of a module cannot be known."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a product with one weight matrix, by its kind: `forward` may compute it in any way."""
    weight = getattr(module, "weight", None)
    # An adapter around a norm has these attributes too, and no number in them.
    sized = all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))
    return has_adapter(module) or _is_transposed(module) or (isinstance(weight, Tensor) and sized)


def row_of(output: Any) -> Tensor | None:
    """Return what a product gave, [..., out]: one tensor, or several for the same rows, side by side; None: no such."""
    parts = output if isinstance(output, tuple | list) else (output,)
    if not parts or not all(isinstance(part, Tensor) and part.shape[:-1] == parts[0].shape[:-1] for part in parts):
        return None
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)


def last_of(output: Any, width: int) -> Tensor | None:
    """Return the last tensor that a product hands on, if it is as wide as the product and stands behind others, as the
    logits of some routers do behind what becomes of them; None: there are no others, or they belong to it."""
    parts = output if isinstance(output, tuple | list) else ()
    if len(parts) < 2 or not all(isinstance(part, Tensor) and part.ndim for part in parts):
        return None
    is_one = parts[-1].shape[-1] == width and parts[0].shape[:-1] == parts[-1].shape[:-1]
    return torch.as_tensor(parts[-1]) if is_one else None


def is_plain(module: nn.Module) -> bool:
    """Whether a linear module keeps its weight as numbers of 16 bits or more, so that there is no doubt what it is."""
    if has_adapter(module):
        return is_plain(module.base_layer)  # type: ignore[arg-type]
    weight = module.weight
    is_own = type(weight) in (Tensor, nn.Parameter) and getattr(weight, "quant_state", None) is None
    return is_own and weight.is_floating_point() and weight.element_size() >= 2  # type: ignore[operator]


def has_adapter(module: nn.Module) -> bool:
    """Whether a module is a linear one that low-rank adapters were put around."""
    base = getattr(module, "base_layer", None)
    return isinstance(base, nn.Module) and hasattr(module, "lora_A") and is_linear(base)


def exact_product(module: nn.Module, x: Tensor, adapter: str | None = None) -> tuple[Tensor, Tensor]:
    """Return W x + b for the rows `x` [row, in] in float64, and the root of the sum of its squared terms, both
    [row, out]. NaN and infinity in `x` go where the arithmetic takes them.

    `adapter` is the one of several that the rows asked for, None for those that are active.

    Raises:
        UnknownWeight: what the module multiplies by cannot be known.
    """
    if has_adapter(module):
        return _adapted(module, x, adapter)
    if isinstance(getattr(module, "base_layer", None), nn.Module):
        raise UnknownWeight("it has an adapter of a kind that kvdrift does not know around its weight")
    weight = _dense(module)
    if x.shape[-1] != weight.shape[1]:
        raise UnknownWeight(f"its weight is {list(weight.shape)}, and it got {x.shape[-1]} features")
    reference, squares = multiply(weight, x)
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        reference += bias.double()
        squares += bias.double().square()
    return reference, squares.sqrt()


def multiply(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """W x, and the sum of its squared terms, of a weight [out, in], a block of its rows at a time."""
    operand = x.to(torch.float64)
    squared = x.to(torch.float32).square()
    n_out, n_in = weight.shape
    reference = operand.new_empty(len(x), n_out)
    squares = torch.empty_like(reference)
    step = max(1, _BLOCK // max(1, n_in))
    for start in range(0, n_out, step):
        block, here = weight[start : start + step], slice(start, start + step)
        narrow = block.to(torch.float32)
        # Sixteen bits get to float64 faster by way of float32, which holds them exactly.
        wide = (narrow if block.element_size() == 2 else block).to(torch.float64)
        reference[:, here] = operand @ wide.T
        squares[:, here] = (squared @ narrow.square().T).double()
    return reference, squares


def of_partial_sums(reference: Tensor, spread: Tensor, n_terms: int) -> Tensor:
    """Do as `kvdrift.engines.partial_sums.of_partial_sums`, on the device of `reference`."""
    exact, size = (each.double().cpu().numpy() for each in (reference, spread))
    return torch.from_numpy(partial_sums.of_partial_sums(exact, size, n_terms)).to(reference.device)


def _adapted(module: Any, x: Tensor, adapter: str | None) -> tuple[Tensor, Tensor]:
    """The base product and what every active adapter adds, or the one that was asked for, through a row of its own rank
    that is not rounded."""
    reference, spread = exact_product(module.base_layer, x)
    if module.disable_adapters or module.merged:
        return reference, spread
    squares = spread.square()
    # PEFT leaves out an adapter that this layer does not have, such as the one that it calls __base__.
    for name in _active(module) if adapter is None else (adapter,) if adapter in module.lora_A else ():
        is_more = any(getattr(module, kind, {}).get(name) for kind in ("use_dora", "lora_bias", "lora_variant"))
        if is_more or not all(hasattr(part[name], "weight") for part in (module.lora_A, module.lora_B)):
            raise UnknownWeight("its adapter is more than a product of two matrices")
        down, up, scaling = module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
        inner, inner_squares = multiply(down, x)
        added, added_squares = multiply(up, inner)
        reference += scaling * added
        # An error of one rounding of the inner row, which is as large as its terms, comes through the second matrix.
        _, through = multiply(up, inner_squares.sqrt())
        squares += scaling**2 * (added_squares + through)
    return reference, squares.sqrt()


def _active(module: Any) -> Iterator[str]:
    for name in module.active_adapters:
        if name in module.lora_A:
            yield name
        elif any(name in kind for kind in _other_adapters(module)):
            raise UnknownWeight("it has an adapter of another kind")


def _other_adapters(module: Any) -> list[Any]:
    names = (name for name in getattr(module, "adapter_layer_names", ()) if not name.startswith(("lora_A", "lora_B")))
    return [found for name in names if len(found := getattr(module, name, ()))]


def _is_transposed(module: nn.Module) -> bool:
    """Whether a module keeps its weight as [in, out], as the linear modules of GPT-2 do."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _dense(module: Any) -> Tensor:
    """The weight [out, in] that a module multiplies by, dequantised where it is quantised; a view of it where not."""
    weight = module.weight
    if weight.is_meta:
        raise UnknownWeight("its weight is not on the machine while the module does not run (offloaded)")
    if getattr(weight, "quant_state", None) is not None:
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            raise UnknownWeight("its weight was packed anew for the kernels of this processor")
        from bitsandbytes import functional

        return torch.as_tensor(functional.dequantize_4bit(weight.data, weight.quant_state))
    scales = getattr(weight, "SCB", None)
    scales = getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales
    if weight.dtype == torch.int8 and scales is not None:
        return torch.mul(weight.data.float(), scales.float()[:, None] / 127.0)
    if type(weight) not in (Tensor, nn.Parameter) and hasattr(weight, "dequantize"):
        weight = weight.dequantize()
    if weight.ndim != 2 or not weight.is_floating_point() or weight.element_size() < 2:
        raise UnknownWeight(f"its weight is packed as {weight.dtype} in a way that kvdrift does not know")
    dense: Tensor = weight.detach()
    return dense.T if _is_transposed(module) else dense


__all__ = [
    "UnknownWeight",
    "exact_product",
    "has_adapter",
    "is_linear",
    "is_plain",
    "last_of",
    "multiply",
    "of_partial_sums",
    "row_of",
]
