"""RecurrentGemma: its states lie in the modules, its convolution starts anew, and it has no mask of padding."""

import copy

import torch
from transformers import AutoModelForCausalLM, DynamicCache, RecurrentGemmaConfig

torch.manual_seed(0)
config = RecurrentGemmaConfig(
    vocab_size=128, hidden_size=64, lru_width=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, attention_window_size=32,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float64).eval()
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.mul_(4.0)
        else:  # biases, which are zero before training
            parameter.add_(0.25 * torch.randn_like(parameter))
ids = torch.arange(5, 17)[None]


def told(name: str, logits: torch.Tensor, right: torch.Tensor) -> None:
    """Print how far two rows of logits are apart, in the 2-norm."""
    print(f"{name}: {(logits - right).norm() / right.norm():.1e}")


def fed(*pieces: torch.Tensor) -> torch.Tensor:
    """Logits of the last token of a text that is fed in pieces."""
    at, cache, logits = 0, DynamicCache(config=config), torch.empty(0)
    for piece in pieces:
        where = torch.arange(at, at + piece.shape[1])[None]
        logits = model(piece, past_key_values=cache, position_ids=where, use_cache=True).logits[0, -1]
        at += piece.shape[1]
    return logits


with torch.no_grad():
    full = fed(ids)
    told("one by one", fed(ids[:, :10], ids[:, 10:11], ids[:, 11:]), full)
    told("two at once", fed(ids[:, :10], ids[:, 10:]), full)

    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(15) >= 3).long()[None]
    where = (torch.arange(15) - 3).clamp(min=0)[None]
    alone = model(ids).logits[0]
    in_a_row = model(padded, attention_mask=mask, position_ids=where).logits[0, 3:]
    told("padded on the left, first token", in_a_row[0], alone[0])

    first = DynamicCache(config=config)
    model(ids[:, :11], past_key_values=first, use_cache=True)
    kept = copy.deepcopy(first)
    at = torch.tensor([[11]])
    model(torch.tensor([[99]]), past_key_values=first, position_ids=at, use_cache=True)
    told("on a copied cache", model(ids[:, 11:], past_key_values=kept, position_ids=at).logits[0, -1], full)
