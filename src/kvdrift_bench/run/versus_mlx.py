"""transformers against mlx-lm: tiny random models of many architectures, the same weights in both, at float64."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvdrift.engines.base import LiveEngine
from kvdrift.engines.hf.engine import HFEngine
from kvdrift.engines.mlx.engine import MLXModel
from kvdrift.errors import KvdriftError
from kvdrift.trace.model import Trace
from kvdrift.versus.compare import EngineComparison, compare_engines
from kvdrift.versus.values import Floats, relative
from kvdrift.vocabulary.plan import AuditPlan
from kvdrift.vocabulary.sites import Site
from kvdrift.zoo.build import build
from kvdrift_bench.run.mlx_exact import exact_functions
from kvdrift_bench.run.mlx_files import DECODERS, write_for_mlx

PROMPTS = {"p": [5, 9, 17, 3, 22, 41, 7, 11, 30, 2]}
# What a configuration must have besides what the zoo gives it: mlx-lm takes the layer of each kind from a pattern.
_PATTERN = {"num_hidden_layers": 4, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
KINDS: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "ministral3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 64},
    "gemma3_text": {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "sliding_window_pattern": 6,
    },
    "phi": {},
    "phi3": {},
    "starcoder2": {},
    "olmo2": {},
    "olmo3": {},
    "stablelm": {},
    "cohere": {},
    "cohere2": {**_PATTERN, "sliding_window_pattern": 4},
    "granite": {"attention_multiplier": 0.25},
    "glm": {},
    "glm4": {},
    "nemotron": {"num_key_value_heads": 2},
    "smollm3": {},
    "exaone4": {**_PATTERN, "sliding_window_pattern": "LLLG"},
    "helium": {},
    "ernie4_5": {},
    "seed_oss": {},
    "apertus": {},
    "mixtral": {},
    "qwen2_moe": {},
    "olmoe": {},
}


@dataclass(frozen=True, slots=True)
class Correction:
    """What one side does otherwise than the configuration says, and how it is put right in mlx-lm for a second run."""

    text: str
    put_right: Callable[[Any, Any], AbstractContextManager[None]]


@contextmanager
def _instead(owner: Any, name: str, other: Any) -> Iterator[None]:
    """Let an attribute be another one while the context is open."""
    honest = getattr(owner, name)
    setattr(owner, name, other)
    try:
        yield
    finally:
        setattr(owner, name, honest)


def _tanh_gelu(model: Any, config: Any) -> AbstractContextManager[None]:
    import mlx.nn as nn

    return _instead(nn, "gelu", nn.gelu_approx)


def _exact_gelu(model: Any, config: Any) -> AbstractContextManager[None]:
    import mlx.nn as nn

    return _instead(nn, "gelu_approx", nn.gelu)


@contextmanager
def _limited_steps(model: Any, config: Any) -> Iterator[None]:
    for layer in model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (config.time_step_min, float("inf"))
    yield


@contextmanager
def _partial_rope(model: Any, config: Any) -> Iterator[None]:
    for layer in model.layers:
        layer.self_attn.rope.dims = int(config.head_dim * config.rope_parameters["partial_rotary_factor"])
    yield


def _weights_of_all_experts(model: Any, config: Any) -> AbstractContextManager[None]:
    import mlx.core as mx
    from mlx_lm.models.jamba import JambaSparseMoeBlock

    def call(self: Any, x: Any) -> Any:
        weights = mx.softmax(self.router(x), axis=-1, precise=True)
        k = self.num_experts_per_tok
        chosen = mx.argpartition(-weights, kth=k - 1, axis=-1)[..., :k]
        return (self.switch_mlp(x, chosen) * mx.take_along_axis(weights, chosen, axis=-1)[..., None]).sum(axis=-2)

    return _instead(JambaSparseMoeBlock, "__call__", call)


@contextmanager
def _epsilon_of_latents(model: Any, config: Any) -> Iterator[None]:
    for layer in model.layers:
        for name in ("q_a_layernorm", "kv_a_layernorm"):
            if hasattr(getattr(layer, "self_attn", None), name):
                getattr(layer.self_attn, name).eps = 1e-6
    yield


@contextmanager
def _epsilon_and_divided_logits(model: Any, config: Any) -> Iterator[None]:
    own = type(model).__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs) / (config.hidden_size / config.dim_model_base)

    with _epsilon_of_latents(model, config), _instead(type(model), "__call__", call):
        yield


def _epsilon_of_norms(model: Any, config: Any) -> AbstractContextManager[None]:
    import mlx.core as mx
    from mlx_lm.models import nanochat

    return _instead(nanochat, "rms_norm", lambda x: mx.fast.rms_norm(x, None, config.rms_norm_eps))


@contextmanager
def _exact_bounds_of_yarn(model: Any, config: Any) -> Iterator[None]:
    import mlx.core as mx
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inverse, _ = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    for layer in model.layers:
        layer.self_attn.rope._freqs = mx.array((1.0 / inverse).numpy())
    yield


@contextmanager
def _norm_where_turned(model: Any, config: Any) -> Iterator[None]:
    for layer in model.layers:
        layer.self_attn.use_qk_norm = bool(layer.self_attn.use_rope)
    yield


@contextmanager
def _one_token_more(model: Any, config: Any) -> Iterator[None]:
    model.args.sliding_window_size = model.model.sliding_window_size = config.sliding_window
    yield


def _norm_by_group(model: Any, config: Any) -> AbstractContextManager[None]:
    import mlx.core as mx
    from mlx_lm.models.activations import swiglu
    from mlx_lm.models.mamba2 import MambaRMSNormGated

    def call(self: Any, x: Any, gate: Any = None) -> Any:
        x = x if gate is None else swiglu(gate, x)
        grouped = x.reshape(*x.shape[:-1], config.n_groups, -1)
        ones = mx.ones(grouped.shape[-1:], dtype=x.dtype)
        return self.weight * mx.fast.rms_norm(grouped, ones, self.eps).reshape(x.shape)

    return _instead(MambaRMSNormGated, "__call__", call)


@contextmanager
def _epsilon_of_blocks(model: Any, config: Any) -> Iterator[None]:
    for layer in model.layers:
        layer.temporal_pre_norm.eps = layer.channel_pre_norm.eps = config.rms_norm_eps
    yield


_LATENTS = "transformers norms the latents with an epsilon of 1e-6, and mlx-lm with {}"
_GELU = "its configuration says gelu_pytorch_tanh, and mlx-lm computes gelu by the error function"
CORRECTIONS = {
    "gemma": Correction(_GELU, _tanh_gelu),
    "starcoder2": Correction(_GELU, _tanh_gelu),
    "jamba": Correction(
        "transformers weighs experts by the softmax over all of them, and mlx-lm by that over the chosen ones",
        _weights_of_all_experts,
    ),
    "glm4_moe_lite": Correction(_LATENTS.format("that of the configuration, 1e-5"), _epsilon_of_latents),
    "kimi_linear": Correction(_LATENTS.format("that of the configuration, 1e-5"), _epsilon_of_latents),
    "minicpm3": Correction(
        _LATENTS.format("mlx's default, 1e-5; a tied head's logits are divided, and mlx-lm does not"),
        _epsilon_and_divided_logits,
    ),
    "nanochat": Correction(
        "its configuration has an epsilon of 1e-6, and mlx-lm norms everything with 1e-5", _epsilon_of_norms
    ),
    "gpt_oss": Correction(
        "its configuration says truncate: false for YaRN, and mlx-lm rounds the bounds of the ramp to whole dimensions",
        _exact_bounds_of_yarn,
    ),
    "llama4_text": Correction(
        "transformers norms queries and keys where they are turned, and mlx-lm in every layer", _norm_where_turned
    ),
    "mimo_v2_flash": Correction(
        "transformers lets a token see sliding_window_size others, and mlx-lm counts the token among them",
        _one_token_more,
    ),
    "mamba2": Correction(
        "transformers norms the groups of a state by themselves, and mlx-lm all of them together", _norm_by_group
    ),
    "gpt_bigcode": Correction(_GELU, _tanh_gelu),
    "gpt_neox": Correction(
        "its configuration says gelu, and mlx-lm computes the tanh form of it in place of the error function",
        _exact_gelu,
    ),
    "nemotron_h": Correction(
        "transformers limits time steps of a prefill by time_step_min, and mlx-lm does not", _limited_steps
    ),
    "recurrent_gemma": Correction(
        "its configuration has an epsilon of 1e-6, and mlx-lm norms the input of each block with 1e-5",
        _epsilon_of_blocks,
    ),
    "glm": Correction("its configuration turns a part of each head, and mlx-lm turns all of it", _partial_rope),
}


# What lies below float64 in mlx-lm's own code of an architecture.
_CAST = "mlx-lm casts queries and keys to float32"
LEFT = {"phi": _CAST, "stablelm": _CAST, "ministral3": "mlx-lm makes the frequencies of YaRN at float32"}


@dataclass(frozen=True, slots=True)
class Against:
    """What was said of one architecture; `error` where it could not be compared.

    `corrected` is the verdict once that was put right in mlx-lm which `why` names. `apart` is how far the logits of
    both, so corrected, lie apart in the 2-norm, relative, as mlx computes and with `exact_functions`; `left` says why
    more than rounding is left then.
    """

    kind: str
    verdict: str
    rung: str
    place: str
    cause: str
    guilty: str
    minimum: float
    native: float
    error: str
    why: str = ""
    corrected: str = ""
    apart: tuple[float, float] | None = None
    left: str = ""

    @property
    def is_explained(self) -> bool:
        """Whether both agree, or do once one side does what the configuration says."""
        return "STRUCTURAL_DRIFT" in (self.verdict, self.corrected)


def against_mlx(kinds: Mapping[str, Mapping[str, Any]] = KINDS) -> Iterator[Against]:
    """Compare each architecture in transformers with itself in mlx-lm."""
    for kind, changes in kinds.items():
        found = one_against_mlx(kind, changes)
        yield found if found.error else replace(found, apart=_apart(kind, changes), left=LEFT.get(kind, ""))


def one_against_mlx(kind: str, changes: Mapping[str, Any]) -> Against:
    """Compare one architecture, and once more with what is known to be otherwise in mlx-lm put right."""
    try:
        found = _said(kind, _compared(kind, changes))
        if found.verdict == "MISMATCH" and kind in CORRECTIONS:
            again = _compared(kind, changes, CORRECTIONS[kind])
            found = replace(found, why=CORRECTIONS[kind].text, corrected=str(again.verdict))
    except (KvdriftError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        return Against(kind, "", "", "", "", "", 0.0, 0.0, f"{type(error).__name__}: {first_words(error)}")
    return found


def first_words(error: BaseException) -> str:
    """Return the first line of a message, and the first of a list that it announces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]).rstrip(",")


@contextmanager
def _both(kind: str, changes: Mapping[str, Any], correction: Correction | None) -> Iterator[tuple[Any, MLXModel]]:
    """Yield one tiny model in transformers and in mlx-lm, where something may be put right."""
    from mlx_lm.utils import load_model

    model = build(DECODERS.get(kind, kind), **changes)
    with tempfile.TemporaryDirectory() as folder:
        write_for_mlx(model, kind, Path(folder))
        other, _ = load_model(Path(folder))
        with nullcontext() if correction is None else correction.put_right(other, model.config), torch.no_grad():
            yield model, MLXModel(other, name=kind)


def _compared(kind: str, changes: Mapping[str, Any], correction: Correction | None = None) -> EngineComparison:
    with _both(kind, changes, correction) as (model, other):
        return compare_engines(model, other, prompts=PROMPTS)


def _apart(kind: str, changes: Mapping[str, Any]) -> tuple[float, float]:
    """Return how far the logits of a prefill at float64 lie apart, as mlx computes and with exact functions."""
    plan = AuditPlan(layers=(0,))
    with _both(kind, changes, CORRECTIONS.get(kind)) as (model, other):
        with HFEngine(model, layers=plan.layers) as engine:
            reference = _logits(engine)
        found = []
        for functions in (nullcontext, exact_functions):
            with other.opened(plan) as opened, functions():
                found.append(relative(reference, _logits(opened.engine)))
    return found[0], found[1]


def _logits(engine: LiveEngine) -> Floats:
    (tokens,) = PROMPTS.values()
    trace = Trace("p", "prefill", "as_designed", "float64", tuple(tokens))
    with engine.at("float64"):
        sequence = engine.new_sequence(len(tokens))
        sequence.extend(tokens, probe=range(len(tokens)), sink=trace)
        sequence.close()
    (rows,) = (record.values for record in trace.rows if record.site is Site.LOGITS)
    return np.asarray(rows, dtype=np.float64).reshape(len(tokens), -1)


def _said(kind: str, found: EngineComparison) -> Against:
    decision = found.decision
    return Against(
        kind=kind,
        verdict=str(found.verdict),
        rung=found.view["environment"]["sides"]["A"]["rung"],
        place="" if decision.first is None else str(decision.first.place),
        cause="" if decision.cause is None else str(decision.cause[0]),
        guilty=decision.guilty or "",
        minimum=float(decision.minimum or 0.0),
        native=float(decision.native or 0.0),
        error="",
    )


def table_of_mlx(found: Sequence[Against]) -> str:
    """Return what was said of each architecture, as Markdown."""
    lines = [
        "| architecture | at | verdict | first address | why | put right | logits apart | with exact functions |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for item in found:
        said = item.error or item.verdict
        cells = [item.kind, item.rung or "-", said, item.place or "-", item.why or item.cause or "-"]
        apart = ["-", "-"] if item.apart is None else [f"{size:.1e}" for size in item.apart]
        apart[1] += f" ({item.left})" if item.left else ""
        lines.append("| " + " | ".join([*cells, item.corrected or "-", *apart]) + " |")
    return "\n".join(lines) + "\n"
