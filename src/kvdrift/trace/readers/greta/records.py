"""The lines of GRETA StageTrace files: their fields, their points as sites, and what their hashes prove."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
from numpy.typing import NDArray

from kvdrift.vocabulary.precision import COARSEST, HALF
from kvdrift.vocabulary.sites import Site

Number = float | str  # C++ streams print nan and inf without quotes; they are quoted before the line is read

# `attn_out` is what the attention kernel leaves, before the output projection, and `wo_out` is what follows it.
POINTS: dict[str, Site] = {
    "embed_out": Site.EMBED_OUT,
    "x_in": Site.LAYER_IN,
    "residual_pre_attn": Site.LAYER_IN,
    "attn_norm": Site.ATTN_NORM_OUT,
    "attn_norm_out": Site.ATTN_NORM_OUT,
    "norm_out": Site.ATTN_NORM_OUT,
    "q_proj": Site.Q_PROJ,
    "q_pre_rope": Site.Q_PROJ,
    "k_proj": Site.K_PROJ,
    "k_pre_rope": Site.K_PROJ,
    "v_proj": Site.V_PROJ,
    "q_post_rope": Site.Q_ROPE,
    "k_post_rope": Site.K_ROPE,
    "attn_out": Site.ATTN_CTX,
    "wo_out": Site.ATTN_OUT,
    "residual_post_attn": Site.RESID_ATTN,
    "ffn_norm": Site.FFN_NORM_OUT,
    "ffn_norm_out": Site.FFN_NORM_OUT,
    "mlp_out": Site.MLP_OUT,
    "residual_post_mlp": Site.LAYER_OUT,
    "final_norm": Site.FINAL_NORM_OUT,
    "final_norm_out": Site.FINAL_NORM_OUT,
    "logits": Site.LOGITS,
}
OUTSIDE = frozenset({Site.EMBED_OUT, Site.FINAL_NORM_OUT, Site.LOGITS})
PHASES = {"prefill_last": "prefill", "prefill": "prefill"}  # decode, decode0, decode1 ... are decode

# Fields of a logits record that stand for logits of which no sample was written.
SUMMARY = ("min", "max", "mean", "top1_logit", "top2_logit")

_OFFSET, _PRIME, _MASK = 1469598103934665603, 1099511628211, (1 << 64) - 1
HASHED = 256  # floats that a hash covers
# A float32 is given exactly by nine significant digits.
_EXACT_DIGITS = 9
_BARE = re.compile(rb"(?<=[\[,:])\s*(-?)(?:\+)?(nan|inf|infinity)(?:\([^)]*\))?(?=\s*[,\]}])", re.IGNORECASE)


class StageRecord(msgspec.Struct, frozen=True):
    """One line, `stage_trace` or `stage_logits`; fields that are not needed are passed over."""

    event: str
    pos_id: int | None = None
    phase: str | None = None
    point: str | None = None
    tensor: str | None = None
    prompt_id: str | None = None
    layer: int | None = None
    seq_len: int | None = None
    tokens_total: int | None = None
    stride_elems: int | None = None
    sample_n: int | None = None
    hash: int | None = None
    sample: list[Number] | None = None
    token_id: int | None = None
    logical_tok_idx: int | None = None
    kv_pos: int | None = None
    route: str | None = None
    vocab: int | None = None
    min: Number | None = None
    max: Number | None = None
    mean: Number | None = None
    top1_logit: Number | None = None
    top2_logit: Number | None = None

    def summary(self) -> list[Number]:
        """The figures of a logits record, in a fixed order; empty if one of them is missing."""
        found: list[Any] = [getattr(self, name) for name in SUMMARY]
        return [] if None in found else found


class LogitsRecord(msgspec.Struct, frozen=True):
    """One line of a logits dump."""

    token_idx: int
    token_id: int
    logits: list[Number]


def quoted(line: bytes) -> bytes:
    """Return a line with the bare nan and inf of C++ streams as strings, so that it is JSON."""
    return _BARE.sub(rb'"\1\2"', line)


def fnv1a(values: NDArray[np.float32]) -> int:
    """Return the hash that GRETA writes: FNV-1a over the 32-bit words of the first 256 floats, modulo 2^64.

    >>> fnv1a(np.zeros(0, np.float32))
    1469598103934665603
    """
    hashed = _OFFSET
    for word in values[:HASHED].astype("<f4").view("<u4").tolist():
        hashed = ((hashed ^ word) * _PRIME) & _MASK
    return int(hashed)


def floats(sample: list[Number]) -> NDArray[np.float32]:
    """Return printed numbers as float32.

    Raises:
        ValueError: a string among them is not a number.
    """
    with np.errstate(over="ignore"):
        return np.array([float(value) for value in sample], dtype=np.float64).astype(np.float32)


def recovered(values: NDArray[np.float32], expected: int) -> NDArray[np.float32] | None:
    """Return the values whose hash is `expected`: as printed, or rounded to the half dtype they come from.

    Few digits give a half-precision value exactly, and a float32 only nearly. None if no reading fits.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
            candidate = values.astype(dtype).astype(np.float32)
            if fnv1a(candidate) == expected:
                return candidate
    return None


def is_exact(sample: list[Number]) -> bool:
    """Whether the numbers are printed with enough digits to give a float32 exactly."""
    return any(len(_digits(value)) >= _EXACT_DIGITS for value in sample)


def _digits(value: Number) -> str:
    text = repr(value).partition("e")[0] if isinstance(value, float) else ""
    return text.replace("-", "").replace(".", "").lstrip("0")


@dataclass(slots=True)
class TrailingBits:
    """Which half-precision dtypes the values of each site fit into, by those values that are known to the bit."""

    fits: dict[Site, dict[str, bool]] = field(default_factory=dict)

    def add(self, site: Site, values: NDArray[np.float32]) -> None:
        """Look at more values of a site; zero, NaN and infinity are of any dtype."""
        values = values[np.isfinite(values) & (values != 0)]
        if not len(values) or site in (Site.EMBED_OUT, Site.LOGITS):  # a table, and what is often widened
            return
        fits = self.fits.setdefault(site, dict.fromkeys(HALF, True))
        with np.errstate(over="ignore"):
            for name, dtype in (("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)):
                if fits[name]:
                    fits[name] = bool((values.astype(dtype).astype(np.float32) == values).all())

    @property
    def of_half(self) -> str | None:
        """The coarsest dtype of half precision that all values of some site fit into, None if there is none."""
        return next((name for name in HALF if any(fits[name] for fits in self.fits.values())), None)

    @property
    def plausible(self) -> str:
        """The coarsest dtype that an engine with such values may compute in.

        Where the values of a site fit into half precision that is it, whatever others are widened to. Values of float32
        come from products whose operands a matrix unit may have rounded to 11 bits (TF32), the significand of float16.
        Where nothing is known it is bfloat16, the coarsest in use.
        """
        return self.of_half or ("float16" if self.fits else COARSEST)

    def __str__(self) -> str:
        if not self.fits:
            return "no value is known to the bit, so the bounds are those of bfloat16, the coarsest in use"
        if self.of_half:
            return f"the bits of its values are those of {self.plausible}, so the bounds are too"
        return (
            "its values have bits of float32, and a matrix unit may round their operands to 11 bits, so the bounds are "
            "those of float16"
        )
