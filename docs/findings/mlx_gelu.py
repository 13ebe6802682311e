"""GELU in mlx-lm: Gemma, StarCoder 2 and GPT-BigCode by the error function, GPT-NeoX by its tanh form."""

import math
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
from mlx_lm.models import gemma, gpt_bigcode, gpt_neox, starcoder2

WIDTH, INNER = 32, 64
FORMS = {
    "tanh form": lambda z: 0.5 * z * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3))),
    "error function": lambda z: 0.5 * z * (1.0 + np.vectorize(math.erf)(z / math.sqrt(2.0))),
}
PARTS = {
    "gemma": (gemma.MLP, {"gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)}),
    "starcoder2": (starcoder2.MLP, {"c_fc": (INNER, WIDTH), "c_proj": (WIDTH, INNER)}),
    "gpt_bigcode": (
        lambda width, inner: gpt_bigcode.MLP(SimpleNamespace(n_embd=width, n_inner=inner)),
        {"c_fc": (INNER, WIDTH), "c_proj": (WIDTH, INNER)},
    ),
    "gpt_neox": (
        lambda width, inner: gpt_neox.MLP(SimpleNamespace(hidden_size=width)),
        {"dense_h_to_4h": (4 * WIDTH, WIDTH), "dense_4h_to_h": (WIDTH, 4 * WIDTH)},
    ),
}


def by_hand(activation, x, w):
    if "up_proj" in w:
        return (activation(x @ w["gate_proj"].T) * (x @ w["up_proj"].T)) @ w["down_proj"].T
    up, down = w.values()
    return activation(x @ up.T) @ down.T


rng = np.random.default_rng(0)
with mx.stream(mx.cpu):
    for kind, (make, shapes) in PARTS.items():
        weights = {name: 0.3 * rng.standard_normal(shape) for name, shape in shapes.items()}
        mlp = make(WIDTH, INNER)
        for name, values in weights.items():
            part = getattr(mlp, name)
            part.weight = mx.array(values, dtype=mx.float64)
            if "bias" in part:
                part.bias = mx.zeros(part.bias.shape)
        x = rng.standard_normal((1, WIDTH))
        found = np.array(mlp(mx.array(x, dtype=mx.float64)))
        forms = reversed(FORMS.items()) if kind == "gpt_neox" else FORMS.items()  # the one of the configuration first
        for name, form in forms:
            exact = by_hand(form, x, weights)
            print(f"{kind}, {name}: relative error {np.linalg.norm(found - exact) / np.linalg.norm(exact):.1e}")
