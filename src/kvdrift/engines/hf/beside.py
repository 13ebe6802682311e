"""What a model is given beside its tokens: images, sound, and where in the text they stand.

Such inputs go with the first call of a sequence, the one that has their places among its tokens; what they were made
into is in the cache after that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvdrift.engines.hf.kinds import CACHE_NAMES
from kvdrift.errors import UsageError

_PLACES = ("image", "video", "audio")
# What a processor returns beside the inputs, and what kvdrift makes itself.
_OWN = ("input_ids", "attention_mask", "position_ids", *CACHE_NAMES, "labels")
_TOWERS = ("vision_config", "audio_config")


class BesideTokens:
    """Inputs beside the tokens, the same for all sequences whose tokens have as many places for them."""

    def __init__(self, config: Any, inputs: Mapping[str, Any] | None) -> None:
        self._inputs = {name: value for name, value in (inputs or {}).items() if name not in _OWN}
        found = [getattr(config, f"{kind}_token_{end}", None) for kind in _PLACES for end in ("id", "index")]
        self._places = sorted({int(token) for token in found if isinstance(token, int)})
        self._n_places: int | None = None
        self._has_towers = any(getattr(config, name, None) is not None for name in _TOWERS)
        if self._inputs and not self._places:
            raise UsageError(
                f"inputs= was given ({', '.join(self._inputs)}), and the model's config names no token that stands for "
                "an image, a video or sound; leave inputs out"
            )

    @property
    def caveat(self) -> str | None:
        """What of the model was not audited for want of inputs."""
        if not self._has_towers or self._inputs:
            return None
        return (
            "text alone was fed, and the model also takes images or sound; pass them with the prompts that have their "
            "places, kvdrift.audit(model, prompts=..., inputs={'pixel_values': ...})"
        )

    def require_places(self, prompts: Mapping[str, Sequence[int]]) -> None:
        """Check that every prompt has the same number of places for the inputs, where there are any.

        Raises:
            UsageError: one has none, or another number than the first.
        """
        if not self._inputs:
            return
        for name, tokens in prompts.items():
            n_places = self._count(tokens)
            self._n_places = n_places if self._n_places is None else self._n_places
            if n_places == 0 or n_places != self._n_places:
                raise UsageError(
                    f"the prompt {name!r} has {n_places} places for the inputs ({', '.join(self._inputs)}), tokens "
                    f"{self._places}, and needs {self._n_places or 'some'}; give prompts as token ids with the places "
                    "that the processor makes (input_ids)"
                )

    def for_call(self, start: int, rows: Sequence[Sequence[int]], dtype: torch.dtype, device: Any) -> dict[str, Any]:
        """Return the arguments of a call that feeds `rows` on `start` cached tokens; floating-point ones in `dtype`."""
        if start or not self._n_places or len(rows) > 1 or self._count(rows[0]) != self._n_places:
            return {}
        return {name: _fitted(name, value, len(rows[0]), dtype, device) for name, value in self._inputs.items()}

    def _count(self, tokens: Sequence[int]) -> int:
        return sum(token in self._places for token in tokens)


def _fitted(name: str, value: Any, n_tokens: int, dtype: torch.dtype, device: Any) -> Any:
    """One input on the model's device; kinds of tokens, of which there is one each, for `n_tokens`: text behind."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(device)
    if value.is_floating_point():
        return value.to(dtype)
    if name.endswith("type_ids") and value.ndim == 2:
        behind = value.new_zeros(value.shape[0], max(0, n_tokens - value.shape[1]))
        return torch.cat([value[:, :n_tokens], behind], dim=1)
    return value


__all__ = ["BesideTokens"]
