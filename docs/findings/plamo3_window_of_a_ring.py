"""PLaMo 3 in mlx-lm: prefill attends to one key more than the ring of the cache keeps."""

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import plamo3

WINDOW = 4
mx.set_default_device(mx.cpu)
mx.random.seed(0)
model = plamo3.Model(plamo3.ModelArgs(
    hidden_size=64, num_hidden_layers=2, intermediate_size=96, vocab_size=128, window_size=WINDOW,
    sliding_window_pattern=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
))  # fmt: skip
model.load_weights([(name, 8 * w if w.ndim == 2 else w) for name, w in tree_flatten(model.parameters())])
model.update(tree_map(lambda w: w.astype(mx.float64), model.parameters()))
ids = mx.array([list(range(5, 17))])


def last_two(size: int) -> list[float]:
    """Relative errors of a step on a cache of so many tokens, with rings of `size` slots."""
    errors = []
    for n in (WINDOW, 11):
        caches = model.make_cache()
        for cache in caches:
            if hasattr(cache, "max_size"):
                cache.max_size = size
        model(ids[:, :n], cache=caches)
        step = model(ids[:, n : n + 1], cache=caches)[0, -1]
        whole = model(ids[:, : n + 1], cache=model.make_cache())[0, -1]
        errors.append(float(mx.linalg.norm(step - whole) / mx.linalg.norm(whole)))
    return errors


for size in (WINDOW, WINDOW + 1):
    short, long = last_two(size)
    print(f"rings of {size} slots: token 5 {short:.1e}, token 12 {long:.1e}")
