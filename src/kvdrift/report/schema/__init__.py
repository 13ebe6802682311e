"""JSON Schemas of the machine form of every verb, in the package: `kvdrift schema NAME` prints one.

`python -m kvdrift.report.schema` writes the files anew from the types; a test compares them.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import msgspec

from kvdrift.report.schema.others import (
    DeterminismView,
    DiffView,
    EnginesReport,
    InventoryView,
    LogprobReport,
    ScenarioView,
    SchemaView,
    ServerReport,
    SweepView,
    ZooView,
)
from kvdrift.report.schema.structs import Report
from kvdrift.report.view import SCHEMA_VERSION

# By name: the type, and the verbs whose --json it is.
SCHEMAS: dict[str, tuple[Any, str]] = {
    "report": (Report, "audit, judge, show and gate, of tensors; report.json"),
    "server": (ServerReport, "audit, show and gate, of a server; its report.json"),
    "logprobs": (LogprobReport, "compare and show, of dumps of logprobs; their report.json"),
    "engines": (EnginesReport, "compare and show, of two engines or of their traces; their report.json"),
    "diff": (DiffView, "diff"),
    "determinism": (DeterminismView, "determinism"),
    "scenarios": (list[ScenarioView], "scenarios"),
    "inventory": (InventoryView, "trace check"),
    "sweep": (SweepView, "sweep; its summary.json"),
    "zoo": (ZooView, "zoo"),
    "schemas": (list[SchemaView], "schema; that of a name prints the schema itself"),
}


def build_schema(name: str) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of one machine form, made from its types."""
    kind, verbs = SCHEMAS[name]
    (schema,), parts = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:kvdrift:schema:{name}:{SCHEMA_VERSION}",
        "title": f"kvdrift {name}, version {SCHEMA_VERSION}: {verbs}",
        **schema,
        "$defs": parts,
    }


def to_text(schema: dict[str, Any]) -> str:
    """Return a schema as its file holds it."""
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def view_to_text(view: msgspec.Struct) -> str:
    """Return a machine form as files and `--json` have it."""
    return msgspec.json.format(msgspec.json.encode(view), indent=2).decode() + "\n"


def read_schema(name: str) -> str:
    """Return the text of a schema out of the package."""
    return files("kvdrift.report.schema").joinpath(f"{name}.schema.json").read_text(encoding="utf-8")


def list_schemas() -> str:
    """Return the schemas that there are, as JSON."""
    rows = [SchemaView(name=name, of=of, version=SCHEMA_VERSION) for name, (_, of) in SCHEMAS.items()]
    return msgspec.json.format(msgspec.json.encode(rows), indent=2).decode() + "\n"


def check(name: str, text: str | bytes) -> Any:
    """Return a machine form as the values of its types.

    Raises:
        msgspec.ValidationError: it is not of the schema `name`; the message has the path to what is not.
    """
    return msgspec.json.decode(text, type=SCHEMAS[name][0])
