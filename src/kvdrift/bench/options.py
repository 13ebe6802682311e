"""What a benchmark is asked to do. Loads no framework, so that the command line starts at once."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvdrift.errors import UsageError
from kvdrift.plan import AuditPlan

EMBEDDED = "default"
# What an audit takes, and what runs where no fault can be planted.
_OTHER_ENGINES = ("llamacpp:", "http://", "https://")
LadderChoice = Literal["model", "off", "both"]
LADDER_CHOICES: tuple[LadderChoice, ...] = ("model", "off", "both")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What `kvdrift bench faults` is asked to do; see its options. `jobs` changes no figure."""

    models: tuple[str, ...] = (EMBEDDED,)
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    attentions: tuple[str, ...] = ("sdpa", "eager")
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
        if self.ladder not in LADDER_CHOICES:
            raise UsageError(f"unknown ladder {self.ladder!r}; use --ladder model, off or both (ladder=...)")
        other = next((model for model in self.models if model.startswith(_OTHER_ENGINES)), None)
        if other is not None:
            raise UsageError(
                f"faults are planted in PyTorch models, and {other!r} runs in another engine; "
                f"use --model {EMBEDDED}, tiny:llama or a checkpoint (models=...)"
            )
        for flag, name, value, least in (
            ("--clean", "n_clean", self.n_clean, 0),
            ("--sets", "n_sets", self.n_sets, 1),
            ("--jobs", "jobs", self.jobs, 1),
        ):
            if value < least:
                raise UsageError(f"{flag} is {value}, and must be {least} or more; use {flag} {least} ({name}={least})")

    @property
    def command(self) -> str:
        """The command that gives these figures, without the paths of this machine."""
        words = ["kvdrift", "bench", "faults"]
        for model in self.models:
            words += ["--model", Path(model).name if Path(model).exists() else model]
        words += ["--dtype", ",".join(self.dtypes), "--attn", ",".join(self.attentions)]
        words += ["--faults", ",".join(self.faults)] if self.faults is not None else []
        words += ["--twins" if self.twins else "--no-twins", "--clean", str(self.n_clean)]
        words += ["--sets", str(self.n_sets)] if self.n_sets > 1 else []
        words += ["--ladder", self.ladder, "--span", str(self.span)]
        return shlex.join(words)
