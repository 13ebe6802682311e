"""Runs one engine for a comparison: prefill and decode of each prompt, and both on inputs changed a little."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from kvdrift.engines.base import HasFunctions, LiveEngine, Shifting
from kvdrift.engines.displace import displace
from kvdrift.pairing.floors import SCALES
from kvdrift.trace.model import Trace
from kvdrift.trace.recording import perturbed_label
from kvdrift.versus.values import Floats, PassValues, PromptPasses, values_of
from kvdrift.versus.weights import Numbers, numbers_of
from kvdrift.vocabulary.facts import EngineFacts, Prompt
from kvdrift.vocabulary.sites import Site


@dataclass(slots=True)
class Side:
    """One of the two that are compared.

    Attributes:
        name: A or B.
        what: the engine and model, in words.
        rung: the precision of its passes.
        prompts: by prompt, what was recorded.
        settings: of the model's configuration, empty where the engine does not tell.
        weights: the numbers that it holds, None where it does not show them.
        functions: the largest error of its elementary functions at that precision, where the engine measures it.
        native: logits [position, vocabulary] of prefill at the native precision by prompt, where they were recorded.
        remarks: what the reader must know of this side.
    """

    name: str
    what: str
    facts: EngineFacts
    rung: str
    prompts: dict[str, PromptPasses] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: Numbers | None = None
    functions: float = 0.0
    native: dict[str, Floats] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def is_measured(self) -> bool:
        """Whether the noise of its passes was measured."""
        return bool(self.prompts) and all(item.changed is not None for item in self.prompts.values())


def record_side(
    name: str, engine: LiveEngine, prompts: Sequence[Prompt], rung: str, say: Callable[[str], None] = lambda _: None
) -> Side:
    """Record all passes of an engine at `rung`, and the logits of its prefill at its native precision.

    Raises:
        CaptureError: the engine broke off.
        UsageError: it cannot run at that precision.
    """
    facts = engine.info
    side = Side(
        name, f"{facts.engine}: {facts.model}", facts, rung, settings=settings_of(engine), weights=numbers_of(engine)
    )
    for prompt in prompts:
        say(f"{name}: {prompt.name} at {facts.dtype}")
        logits = _passes(engine, prompt, facts.dtype, prefill_alone=True)[0].rows
        side.native[prompt.name] = np.array(
            [row for place, rows in logits.items() if place.site is Site.LOGITS for _, row in sorted(rows.items())]
        )
    with engine.at(rung):
        if isinstance(engine, HasFunctions):
            side.functions = engine.function_error(max(len(prompt.tokens) for prompt in prompts))
        for prompt in prompts:
            say(f"{name}: {prompt.name} at {rung}")
            prefill, decode = _passes(engine, prompt, rung, with_products=True)
            changed = None
            if facts.perturbable and rung in SCALES:
                changed = _changed(cast("Shifting", engine), engine, prompt, rung)
            side.prompts[prompt.name] = PromptPasses(prompt.tokens, prompt.probed, prefill, decode, changed)
    return side


def settings_of(engine: LiveEngine) -> dict[str, Any]:
    """Return the settings that decide what a model computes, where the engine has a configuration to ask."""
    config: Any = getattr(getattr(engine, "model", None), "config", None)
    told = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    flat: dict[str, Any] = {}
    for key, value in told.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": each for inner, each in value.items() if _is_plain(each)}
        elif _is_plain(value):
            flat[key] = value
    return {key: value for key, value in flat.items() if key not in _NO_SETTING and not key.startswith("_")}


_NO_SETTING = {"transformers_version", "dtype", "torch_dtype", "attn_implementation", "use_cache", "architectures"}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(item is None or isinstance(item, bool | int | float | str) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _changed(
    shifting: Shifting, engine: LiveEngine, prompt: Prompt, rung: str
) -> dict[str, tuple[PassValues, PassValues]]:
    size = SCALES[rung].sizes[0]
    found = []
    for shift in (size, -size):
        with shifting.shifted(shift):
            found.append(_passes(engine, prompt, rung, shift=shift))
    (up, up_decode), (down, down_decode) = found
    return {"prefill": (up, down), "decode": (up_decode, down_decode)}


def _passes(
    engine: LiveEngine,
    prompt: Prompt,
    rung: str,
    *,
    shift: float = 0.0,
    prefill_alone: bool = False,
    with_products: bool = False,
) -> tuple[PassValues, PassValues]:
    """Prefill and decode of one prompt. Other tokens are computed between them, so that no right row is left lying."""
    label = perturbed_label("as_designed", shift) if shift else "as_designed"
    prefill = Trace(prompt.name, "prefill", label, rung, prompt.tokens)
    products = getattr(engine, "exact_products", None) if with_products else None
    with nullcontext() if products is None else products(whatever_dtype=True):
        sequence = engine.new_sequence(len(prompt.tokens))
        sequence.extend(prompt.tokens, probe=prompt.probed, sink=prefill)
        sequence.close()
    decode = Trace(prompt.name, "decode", label, rung, prompt.tokens)
    if not prefill_alone:
        displace(engine, prompt.tokens)
        sequence = engine.new_sequence(len(prompt.tokens))
        sequence.extend(prompt.prompt)
        for position, token in zip(prompt.probed, prompt.continuation, strict=True):
            sequence.extend([token], probe=(position,), sink=decode)
        sequence.close()
    return values_of(prefill), values_of(decode)
