"""The audit of a running server: detect, capture, judge, and leave a run directory. Only composes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvdrift.errors import UsageError
from kvdrift.report.markdown import MEANING, STATUS, environment_of
from kvdrift.report.run_directory import RunDirectory
from kvdrift.report.server_page import render_server_html
from kvdrift.report.view import to_strict_json
from kvdrift.server.capture import capture_server
from kvdrift.server.client import AGAINST_KEY_VARIABLE, KEY_VARIABLES, Client, key_from_environment
from kvdrift.server.dialects.detect import detect
from kvdrift.server.judge import judge
from kvdrift.server.outcome import ServerDecision
from kvdrift.server.plan import ServerPlan
from kvdrift.server.prompts import DEFAULT_PROMPTS
from kvdrift.server.view import build_server_view
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.plan import Prompts
from kvdrift.vocabulary.progress import Progress, Silent


@dataclass(frozen=True, slots=True)
class ServerAudit:
    """The result. `path` is the run directory, None if none was written; no text of it holds the API key."""

    decision: ServerDecision
    view: dict[str, Any]
    path: Path | None
    redact: Callable[[str], str]

    @property
    def verdict(self) -> Verdict:
        return self.decision.verdict

    @property
    def exit_code(self) -> int:
        """0 STRUCTURAL_DRIFT, 1 MISMATCH, 6 INCONCLUSIVE."""
        return self.verdict.exit_code

    @property
    def clean_view(self) -> dict[str, Any]:
        """The view without the API key, for renderings that escape or wrap what they are given."""
        clean = _without(self.view, self.redact)
        assert isinstance(clean, dict)
        return clean

    def to_json(self) -> str:
        """Return the report as strict JSON; non-finite figures are the strings "nan", "inf" and "-inf"."""
        return self.redact(to_strict_json(self.view))

    def to_markdown(self) -> str:
        """Return the report for people."""
        template = environment_of("kvdrift.server").get_template("server.md.jinja")
        verdict = self.view["verdict"]
        return self.redact(template.render(view=self.view, meaning=MEANING[verdict], status=STATUS[verdict]))

    def to_html(self) -> str:
        """Return the report with its pictures as one page of HTML, which fetches nothing."""
        return render_server_html(self.clean_view)

    def summary(self) -> str:
        """Return the few lines that the command prints."""
        lines = [f"{self.verdict}: {self.view['conclusion']}"]
        lines += [
            f"  {route['name']}: {route['status']}, drift {route['typical']:.2g} nats rms, bound {route['bound']:.2g}"
            for route in self.view["routes"]
        ]
        if self.decision.diagnosis is not None:
            lines.append(f"  diagnosis: {self.decision.diagnosis}")
        lines += [f"  - {line}" for line in self.view["recommendations"]]
        if self.path is not None:
            lines.append(f"report: {self.path / 'report.html'}")
        return self.redact("\n".join(lines) + "\n")


def _without(value: Any, redact: Callable[[str], str]) -> Any:
    """Return plain data whose texts and keys are redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact(str(key)): _without(item, redact) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without(item, redact) for item in value]
    return value


@contextmanager
def _second(plan: ServerPlan, pause: Callable[[float], None]) -> Iterator[Client | None]:
    """Yield the way to the second server, None if there is none. The key of the first one is not sent to it."""
    if plan.against is None:
        yield None
        return
    key = key_from_environment({KEY_VARIABLES[0]: os.environ.get(AGAINST_KEY_VARIABLE, "")})
    with Client(plan.against, key=key, timeout_s=plan.timeout_s, max_requests=plan.max_requests, pause=pause) as client:
        yield client


def audit_server(
    url: str,
    plan: ServerPlan | None = None,
    *,
    prompts: Prompts | None = None,
    out: Path | None = None,
    command: str | None = None,
    progress: Progress | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> ServerAudit:
    """Audit the server at `url`. The API key comes from KVDRIFT_API_KEY or OPENAI_API_KEY, and from nowhere else.

    Raises:
        UsageError: the address, the model, a prompt or an option is not usable.
        EngineUnavailable: nobody answers there, or the server offers no logprobs of prompts.
        CaptureError: the server failed, or its answers cannot be read.
    """
    plan = plan or ServerPlan()
    given = DEFAULT_PROMPTS if prompts is None else prompts
    if not given:
        raise UsageError("no prompts were given; pass at least one (--prompt TEXT, prompts={...})")
    for name, prompt in given.items():
        if not prompt:
            raise UsageError(f"the prompt {name!r} is empty; give at least one token")
    key = key_from_environment()
    with (
        RunDirectory(out) as directory,
        Client(url, key=key, timeout_s=plan.timeout_s, max_requests=plan.max_requests, pause=pause) as client,
    ):
        dialect = detect(client, plan.model, plan.dtype)
        with _second(plan, pause) as second:
            other = None if second is None else detect(second, None, plan.dtype)
            captured = capture_server(dialect, client, plan, given, progress or Silent(), other)
        decision = judge(captured, dialect.facts, plan)
        view = build_server_view(
            captured,
            decision,
            dialect.facts,
            plan,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=command,
        )
        audit = ServerAudit(
            decision,
            view,
            directory.target,
            lambda text: client.redact(text if second is None else second.redact(text)),
        )
        if directory.work is not None:
            (directory.work / "report.json").write_text(audit.to_json(), encoding="utf-8")
            (directory.work / "report.md").write_text(audit.to_markdown(), encoding="utf-8")
            (directory.work / "report.html").write_text(audit.to_html(), encoding="utf-8")
            directory.commit()
    return audit
