"""Facts about a model of transformers, for traces and reports."""

from __future__ import annotations

from typing import Any

PACKAGES = ("kvdrift", "torch", "transformers", "numpy")


def what_to_check(is_native: bool) -> str:
    """What to say behind an error of the model itself; away from its own dtype, it need not run at all."""
    if is_native:
        return (
            "Check that the model runs by itself on these prompts with this cache (--cache) and attention "
            "implementation (--attn)."
        )
    return "It runs at its own dtype, and something in it cannot compute at this one; --ladder off leaves the rung out."


def experts_per_token(config: Any) -> int | None:
    """How many experts a router takes for each token, None for a model without experts or with an unknown option."""
    found = (getattr(config, name, None) for name in ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k"))
    return next((value for value in found if isinstance(value, int) and value > 0), None)
