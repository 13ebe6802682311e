"""`kvdrift audit http://...`: the audit of a server, whose options are those of the command that are meant for one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from kvdrift.cli.output import command_line
from kvdrift.cli.progress import terminal_progress
from kvdrift.errors import EngineUnavailable, UsageError
from kvdrift.server.plan import ServerPlan, dtype_name
from kvdrift.vocabulary.plan import Prompts

# The fields of a plan by the parameters of the command; prompts and places are not part of a plan.
_FIELDS = {
    "served": "model",
    "span": "span",
    "dtype": "dtype",
    "alpha": "alpha",
    "seed": "seed",
    "resolution": "resolution",
    "max_requests": "max_requests",
    "timeout": "timeout_s",
    "against": "against",
}


def is_address(model: str) -> bool:
    """Whether the MODEL of the command is the address of a server.

    >>> is_address("HTTP://127.0.0.1:8000/v1"), is_address("Qwen/Qwen2.5-0.5B")
    (True, False)
    """
    return model.lower().startswith(("http://", "https://"))


def server_plan(typed: Mapping[str, Any]) -> ServerPlan:
    """Return the plan for options that were typed, by the names of their parameters.

    Raises:
        UsageError: an option does not fit a server.
    """
    fields = {_FIELDS[name]: value for name, value in typed.items() if name in _FIELDS}
    if "dtype" in fields:
        dtype = dtype_name(fields["dtype"])
        if dtype is None:
            raise UsageError(
                f"unknown dtype {fields['dtype']!r} for a server; use --dtype float32, float16 or bfloat16 (dtype=...)"
            )
        fields["dtype"] = dtype
    return ServerPlan(**fields)


def audit_address(
    url: str, typed: Mapping[str, Any], prompts: Prompts | None, out: Path | None, as_json: bool = False
) -> tuple[str, int]:
    """Audit the server at `url`, and return the summary, or the report as JSON, and the exit code.

    Args:
        url: its address.
        typed: the options that were typed, by the names of their parameters; all others have the defaults of a server.
        prompts: text or token ids by prompt id, None for the default ones.
        out: the run directory, None for the default place.
        as_json: whether to return the report instead of the summary.

    Raises:
        UsageError: an option does not fit a server, or `out` cannot be written.
        EngineUnavailable: httpx is not installed, or the server is not to be had.
    """
    plan = server_plan(typed)
    try:
        import httpx  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "httpx":
            raise
        raise EngineUnavailable("auditing a server needs 'httpx'; pip install 'kvdrift[server]'") from error
    from kvdrift.cli.panel import panel
    from kvdrift.cli.screen import Screen
    from kvdrift.report.run_directory import check_target, default_target
    from kvdrift.report.view import figure
    from kvdrift.server.audit import audit_server

    with nullcontext(out) if out is not None else default_target() as target:
        check_target(target)
        with terminal_progress() as progress:
            progress.say(f"asking {url} what it is")
            result = audit_server(url, plan, prompts=prompts, out=target, command=command_line(), progress=progress)
    if as_json:
        return result.to_json(), result.exit_code
    screen = Screen.of_stdout()
    view = result.clean_view
    routes = [
        f"{route['name']}: {route['status']}, drift {figure(route['typical'])} nats rms, bound {figure(route['bound'])}"
        for route in view["routes"]
    ]
    lines = [*routes, *(f"- {line}" for line in view["recommendations"])]
    return screen.lines(lines) + panel(view, result.path, screen), result.exit_code
