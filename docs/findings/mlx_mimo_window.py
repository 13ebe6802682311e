"""MiMo-V2-Flash: a token sees `sliding_window_size` keys in mlx-lm, itself among them, and one more in transformers."""

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_causal_mask
from transformers import MiMoV2FlashConfig
from transformers.masking_utils import sliding_window_overlay

published = 128  # of config.json
config = MiMoV2FlashConfig(sliding_window_size=published)
sees = sliding_window_overlay(config.sliding_window)
with mx.stream(mx.cpu):
    mask = np.array(create_causal_mask(300, window_size=published))
print(f"sliding_window_size {published}: sliding_window of transformers {config.sliding_window}")
n_theirs = sum(bool(sees(0, 0, 299, key)) for key in range(300))
print(f"keys that token 299 sees: transformers {n_theirs}, mlx-lm {mask[299].sum()}")
