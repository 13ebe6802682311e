"""How far rounding alone can move a logprob of a server, before anything is measured on it, and what that hides."""

from __future__ import annotations

from kvdrift.server.values import ServerFacts

# Typical (rms) difference of a logprob between two right kernels, in nats, by the dtype of activations: the larger of
# what clean engines showed (docs/engines/server.md, "How large rounding is").
ROUNDING = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 6e-2}
# Activations rounded to 8 bits in blocks, whatever the dtype, as llama.cpp does with quantised weights.
QUANTISED = 0.15
# Logprobs travel as decimal figures of float32; below this, two of them are the same.
DIGITS = 1e-5
# Drift up to so many times the noise is taken for rounding: two bits more lost by one kernel than by another.
MARGIN = 4.0


def rounding_of(facts: ServerFacts) -> tuple[float, str]:
    """Return the typical rounding of a logprob on this server, in nats, and where the figure comes from."""
    if facts.dtype is None:
        if facts.quantised:
            return QUANTISED, f"weights of type {facts.weights}: activations may be rounded to 8 bits"
        if facts.dialect.startswith("llama"):
            return QUANTISED, "the dtype is unknown; taken as activations rounded to 8 bits, as with quantised weights"
        return ROUNDING["bfloat16"], "the dtype is unknown; taken as bfloat16"
    size, text = ROUNDING[facts.dtype], f"{facts.dtype}, said by {facts.dtype_from}"
    if facts.quantised and size < QUANTISED:
        return QUANTISED, f"{text}, with quantised weights: activations may be rounded to 8 bits"
    if facts.cache_dtype is not None and size < ROUNDING[facts.cache_dtype]:
        return ROUNDING[
            facts.cache_dtype
        ], f"{text}, with a cache of {facts.cache_dtype}, which is this server's default"
    return size, text
