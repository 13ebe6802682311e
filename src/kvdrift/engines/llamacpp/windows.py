"""What a sliding window shows of a cache, read from the masks of every call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvdrift.engines.llamacpp.cells import Cells, Member
from kvdrift.engines.llamacpp.ggml import Tensor
from kvdrift.engines.llamacpp.graph import role_of

# The operand that is the mask, by operation.
_MASKS = {"SOFT_MAX": 1, "FLASH_ATTN_EXT": 3}


def see_window(cells: Cells, node: Tensor, members: Sequence[Member]) -> None:
    """Note in `cells` what an attention operation shows to the last fed token of each sequence.

    A mask is an input of the graph: it is there before its node is computed, so that no node need be read for it.
    """
    index = _MASKS.get(node.op)
    role = None if index is None else role_of(node)
    mask = None if index is None else node.source(index)
    if role is None or role.layer is None or mask is None or mask.shape[0] != 1:
        return
    for row, (sequence, _) in enumerate(members):
        if row + 1 < len(members) and members[row + 1][0] == sequence:
            continue
        slots, numbers = cells.of(role.layer, sequence)
        shown = slots[~np.isneginf(mask.values()[0, 0][row, numbers].astype(np.float32))]
        cells.shown_from[role.layer, sequence] = int(shown.min()) if len(shown) else 0
