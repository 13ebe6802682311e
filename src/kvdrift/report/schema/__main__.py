"""Writes the schema files of the package anew."""

from pathlib import Path

from kvdrift.report.schema import SCHEMAS, build_schema, to_text

for name in SCHEMAS:
    Path(__file__).with_name(f"{name}.schema.json").write_text(to_text(build_schema(name)), encoding="utf-8")
