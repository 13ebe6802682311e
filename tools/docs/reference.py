"""Pages that are made of the code itself: the command line from its commands, JSON forms from their schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

from typer.main import get_command

from kvdrift.cli.app import app
from kvdrift.report.schema import SCHEMAS, read_schema


def cli_page() -> str:
    """Return the reference of the command line as Markdown: every verb with its arguments, options and examples."""
    lines = ["# Command line", "", "Made from the commands themselves; `kvdrift VERB --help` says the same.", ""]
    for name, command in _verbs(get_command(app), "kvdrift"):
        lines += [f"## {name}", "", _text(command.help or ""), ""]
        arguments = [item for item in command.params if item.param_type_name == "argument"]
        options = [item for item in command.params if item.param_type_name == "option"]
        usage = " ".join([name, *("[OPTIONS]" for _ in options[:1]), *(_metavar(item) for item in arguments)])
        lines += ["```text", usage, "```", ""]
        if arguments or options:
            lines += ["| argument or option | meaning |", "|---|---|"]
            lines += [
                f"| {_names(item)} | {_cell(getattr(item, 'help', '') or '')} |" for item in [*arguments, *options]
            ]
            lines.append("")
        if command.epilog:
            lines += [command.epilog, ""]
    return "\n".join(lines)


def _verbs(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    children = getattr(command, "commands", None)
    if children is None:
        yield name, command
        return
    for verb, child in children.items():
        yield from _verbs(child, f"{name} {verb}")


def _metavar(item: Any) -> str:
    name = (item.metavar or item.name).upper()
    return name if item.required else f"[{name}]"


def _names(item: Any) -> str:
    if item.param_type_name == "argument":
        return f"`{_metavar(item)}`".replace("|", "\\|")
    return ", ".join(f"`{name}`" for name in [*item.opts, *item.secondary_opts])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _text(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


def schemas_page() -> str:
    """Return what `--json` prints, by name, as Markdown with every schema."""
    lines = ["# JSON", "", "What every verb prints with `--json`, as JSON Schema (draft 2020-12).", ""]
    for name, (_, verbs) in SCHEMAS.items():
        schema = json.loads(read_schema(name))
        required = schema.get("required") or []
        lines += [f"## {name}", "", f"Of: {verbs}. `kvdrift schema {name}` prints it.", ""]
        if required:
            lines += [f"Top-level keys that are always there: {', '.join(f'`{key}`' for key in required)}.", ""]
    return "\n".join(lines)


def api_page() -> str:
    """Return the page on which mkdocstrings puts the public names of the package."""
    import kvdrift

    names = [name for name in kvdrift.__all__ if name != "__version__"]
    lines = ["# Python", "", "Everything that `import kvdrift` offers, from its docstrings.", ""]
    for name in names:
        value: Any = getattr(kvdrift, name)
        if isinstance(value, ModuleType):  # a package that can be called stands for the function of its name
            value = getattr(import_module(f"kvdrift.pipeline.{name}"), name)
        lines += [f"::: {value.__module__}.{getattr(value, '__qualname__', name)}", ""]
    return "\n".join(lines)


__all__ = ["api_page", "cli_page", "schemas_page"]
