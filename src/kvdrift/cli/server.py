"""`kvdrift audit http://...`: the options of the command that concern a server, checked, and the audit run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvdrift.errors import EngineUnavailable, UsageError
from kvdrift.server.plan import ServerPlan, dtype_name

# Options of `kvdrift audit` that reach into an engine, which an address does not let anybody do.
INSIDE = {
    "mode": "--mode",
    "attn": "--attn",
    "cache": "--cache",
    "device": "--device",
    "layers": "--layers",
    "lengths": "--lengths",
    "traces": "--traces/--no-traces",
    "kv_type": "--kv-type",
    "flash_attn": "--flash-attn",
    "threads": "--threads",
    "n_batch": "--n-batch",
}


def is_address(model: str) -> bool:
    """Whether the MODEL of the command is the address of a server.

    >>> is_address("HTTP://127.0.0.1:8000/v1"), is_address("Qwen/Qwen2.5-0.5B")
    (True, False)
    """
    return model.lower().startswith(("http://", "https://"))


def server_plan(given: Mapping[str, Any]) -> ServerPlan:
    """Return the plan for options that were given, by the names of their parameters.

    Raises:
        UsageError: an option does not fit a server.
    """
    if "lengths" in given:
        raise UsageError(
            "--lengths cuts a prompt to exact numbers of tokens, and tokens are the server's own affair; leave it out "
            "and give prompts of several lengths (--prompts FILE)"
        )
    for name in given:
        if name in INSIDE:
            raise UsageError(
                f"{INSIDE[name]} reaches into an engine, and a server gives nothing but logprobs; leave it out"
            )
    options = {name: value for name, value in given.items() if value is not None}
    if "dtype" in options:
        found = dtype_name(options["dtype"])
        if found is None:
            raise UsageError(
                f"unknown dtype {options['dtype']!r} for a server; use --dtype float32, float16 or bfloat16 (dtype=...)"
            )
        options["dtype"] = found
    return ServerPlan(**options)


def run_audit(url: str, given: Mapping[str, Any], prompts: Mapping[str, Any] | None, *, out: Path, command: str) -> Any:
    """Audit the server at `url` and return the result.

    Raises:
        EngineUnavailable: httpx is not installed.
    """
    plan = server_plan(given)
    try:
        import httpx  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "httpx":
            raise
        raise EngineUnavailable("auditing a server needs 'httpx'; pip install 'kvdrift[server]'") from error
    from kvdrift.cli.progress import terminal_progress
    from kvdrift.report.run_directory import check_target
    from kvdrift.server.audit import audit_server

    check_target(out)
    with terminal_progress() as progress:
        progress.say(f"asking {url} what it is")
        return audit_server(url, plan, prompts=prompts, out=out, command=command, progress=progress)
