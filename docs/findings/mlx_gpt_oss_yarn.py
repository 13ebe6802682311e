"""gpt-oss in mlx-lm: the ramp of YaRN lies between whole dimensions, where the configuration says truncate: false."""

import math

import numpy as np
from mlx_lm.models.rope_utils import initialize_rope
from transformers import GptOssConfig

config = GptOssConfig()
rope = config.rope_parameters
dims, base, factor = config.head_dim, rope["rope_theta"], rope["factor"]
found = np.array(
    initialize_rope(dims, base, traditional=False, scaling_config=dict(rope))._freqs, dtype=np.float64
)  # fmt: skip


def dimension(rotations):
    """The dimension whose pair turns so often within the original length."""
    return dims * math.log(rope["original_max_position_embeddings"] / (rotations * 2 * math.pi)) / (2 * math.log(base))


def wavelengths(low, high):
    """YaRN: divided by the factor above `high`, as they are below `low`, and mixed between the two."""
    own = base ** (np.arange(0, dims, 2) / dims)
    mixed = np.clip((np.arange(dims // 2) - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - mixed) / own + mixed / (factor * own))


low, high = dimension(rope["beta_fast"]), dimension(rope["beta_slow"])
print(f"truncate of the configuration: {rope['truncate']}; the ramp lies between {low:.2f} and {high:.2f}")
for name, exact in (
    ("as it is", wavelengths(low, high)),
    ("between whole dimensions", wavelengths(math.floor(low), math.ceil(high))),
):
    print(f"ramp {name}: largest relative error of a wavelength {np.abs(found / exact - 1.0).max():.1e}")
