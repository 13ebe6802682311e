"""Gemma and StarCoder 2 in mlx-lm: GELU by the error function, where the configuration says its tanh form."""

import math

import mlx.core as mx
import numpy as np
from mlx_lm.models import gemma, starcoder2

WIDTH, INNER = 32, 64
FORMS = {
    "tanh form": lambda z: 0.5 * z * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3))),
    "error function": lambda z: 0.5 * z * (1.0 + np.vectorize(math.erf)(z / math.sqrt(2.0))),
}
PARTS = {
    "gemma": (gemma.MLP, {"gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)}),
    "starcoder2": (starcoder2.MLP, {"c_fc": (INNER, WIDTH), "c_proj": (WIDTH, INNER)}),
}


def by_hand(activation, x, w):
    if "up_proj" in w:
        return (activation(x @ w["gate_proj"].T) * (x @ w["up_proj"].T)) @ w["down_proj"].T
    return activation(x @ w["c_fc"].T) @ w["c_proj"].T


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
        for name, form in FORMS.items():
            exact = by_hand(form, x, weights)
            print(f"{kind}, {name}: relative error {np.linalg.norm(found - exact) / np.linalg.norm(exact):.1e}")
