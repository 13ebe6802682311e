"""What a benchmark is asked to do. Loads no framework, so that the command line starts at once."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from kvdrift.errors import UsageError
from kvdrift.vocabulary.plan import AuditPlan

EMBEDDED = "default"
TINY = "tiny:"  # how a model made for the benchmark is named
EngineChoice = Literal["hf", "llamacpp"]
ENGINE_CHOICES: tuple[EngineChoice, ...] = ("hf", "llamacpp")
AS_THEY_ARE = "file"  # weights of the type that the file has
LLAMACPP = "llamacpp:"  # how an audit names a file that llama.cpp is to run
_SERVERS = ("http://", "https://")
LadderChoice = Literal["model", "off", "both"]
LADDER_CHOICES: tuple[LadderChoice, ...] = ("model", "off", "both")
_FLASH = ("off", "on")


class Setting(NamedTuple):
    """A model, as `--model` names it, and how it is run: its dtype and attention implementation in torch; the types of
    its weights and of K and V, and whether attention is fused, in llama.cpp."""

    engine: EngineChoice
    model: str
    dtype: str
    attention: str
    kv_type: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What `kvdrift-bench faults` is asked to do; see its options. `jobs` changes no figure.

    `dtypes` and `attentions` are of `hf`; `weights`, `kv_types` and `flash` of `llamacpp`.
    """

    engine: EngineChoice = "hf"
    models: tuple[str, ...] = (EMBEDDED,)
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    attentions: tuple[str, ...] = ("sdpa", "eager")
    weights: tuple[str, ...] = (AS_THEY_ARE,)
    kv_types: tuple[str, ...] = ("f16", "q8_0")
    flash: tuple[str, ...] = ("off", "on")
    faults: tuple[str, ...] | None = None
    twins: bool = True
    n_clean: int = 20
    n_sets: int = 1
    ladder: LadderChoice = "both"
    span: int = AuditPlan().span
    out: Path | None = None
    markdown: Path | None = None
    json: Path | None = None
    jobs: int = 1

    def __post_init__(self) -> None:
        if self.engine not in ENGINE_CHOICES:
            raise UsageError(f"unknown engine {self.engine!r}; use --engine hf or llamacpp (engine=...)")
        if self.ladder not in LADDER_CHOICES:
            raise UsageError(f"unknown ladder {self.ladder!r}; use --ladder model, off or both (ladder=...)")
        for model in self.models:
            self._check_model(model)
        if wrong := [choice for choice in self.flash if choice not in _FLASH]:
            raise UsageError(f"--flash-attn is {wrong[0]!r}; use on, off or both of them (flash=...)")
        for flag, name, value, least in (
            ("--clean", "n_clean", self.n_clean, 0),
            ("--sets", "n_sets", self.n_sets, 1),
            ("--jobs", "jobs", self.jobs, 1),
        ):
            if value < least:
                raise UsageError(f"{flag} is {value}, and must be {least} or more; use {flag} {least} ({name}={least})")

    def _check_model(self, model: str) -> None:
        if model.startswith(_SERVERS):
            raise UsageError(
                f"no fault can be planted in a running server, such as {model!r}; use --engine hf or llamacpp with "
                f"--model {EMBEDDED}, tiny:llama or a model of yours (models=...)"
            )
        if model.startswith(LLAMACPP) and self.engine != "llamacpp":
            raise UsageError(f"{model!r} runs in llama.cpp; add --engine llamacpp (engine=...)")

    @property
    def settings(self) -> list[Setting]:
        """Every model in every way in which it is to be run."""
        if self.engine == "hf":
            ways = [(dtype, attention, "") for dtype in self.dtypes for attention in self.attentions]
        else:
            ways = [(w, flash, kv_type) for w in self.weights for kv_type in self.kv_types for flash in self.flash]
        return [Setting(self.engine, model, *way) for model in self.models for way in ways]

    @property
    def command(self) -> str:
        """The command that gives these figures, without the paths of this machine."""
        words = ["kvdrift-bench", "faults"]
        words += ["--engine", self.engine] if self.engine != "hf" else []
        for model in self.models:
            place = Path(model.removeprefix(LLAMACPP))
            words += ["--model", place.name if place.exists() else model]
        if self.engine == "hf":
            words += ["--dtype", ",".join(self.dtypes), "--attn", ",".join(self.attentions)]
        else:
            words += ["--dtype", ",".join(self.weights)] if self.weights != (AS_THEY_ARE,) else []
            words += ["--kv-type", ",".join(self.kv_types), "--flash-attn", ",".join(self.flash)]
        words += ["--faults", ",".join(self.faults)] if self.faults is not None else []
        words += ["--twins" if self.twins else "--no-twins", "--clean", str(self.n_clean)]
        words += ["--sets", str(self.n_sets)] if self.n_sets > 1 else []
        words += ["--ladder", self.ladder, "--span", str(self.span)]
        return shlex.join(words)
