"""The machine form of every verb is of the schema in the package, and the schema is that of the types."""

from __future__ import annotations

import itertools
import json
import tarfile
from pathlib import Path

import msgspec
import pytest

from kvdrift.report.schema import SCHEMAS, build_schema, check, read_schema, to_text
from kvdrift.report.view import SCHEMA_VERSION
from tests.support.audits import audited
from tests.support.command import ROOT, kvdrift, refused
from tests.support.serving import MODEL, Engine, Vllm, serving
from tests.support.verbs import CALLS, OTHER_CALLS, VERBS, arguments_of, filled, verbs

__all__ = ["filled"]

pytestmark = pytest.mark.xdist_group("slot_stale")

ARCHIVES = sorted((ROOT / "tests" / "golden" / "traces").glob("*.tar.xz"))


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_in_the_package_is_that_of_the_types(name: str) -> None:
    """`python -m kvdrift.report.schema` writes it anew."""
    assert read_schema(name) == to_text(build_schema(name))
    assert build_schema(name)["$id"].endswith(f":{SCHEMA_VERSION}")
    assert kvdrift("schema", name).out == read_schema(name)


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name.removesuffix(".tar.xz"))
def test_reports_of_every_kind_are_of_the_schema(archive: Path) -> None:
    with tarfile.open(archive) as file:
        member = file.extractfile(next(item for item in file if item.name.endswith("expected-report.json")))
        assert member is not None
        check("report", member.read())


def test_every_verb_has_json_and_every_schema_a_verb() -> None:
    without = [name for name, command in verbs().items() if not any("--json" in item.opts for item in command.params)]

    assert without == []
    # A server has a test of its own below.
    assert {schema for _, schema in CALLS.values()} | {item[2] for item in OTHER_CALLS} | {"server"} == set(SCHEMAS)


@pytest.mark.parametrize("verb", VERBS)
def test_json_of_every_verb_is_of_its_schema_and_all_that_is_printed(
    verb: str, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(filled)
    _, schema = CALLS[verb]

    done = kvdrift(*arguments_of(verb, itertools.count().__next__), "--json")

    check(schema, done.out)
    assert done.err == ""


@pytest.mark.parametrize(("verb", "arguments", "schema"), OTHER_CALLS)
def test_json_of_what_else_a_verb_takes(
    verb: str, arguments: tuple[str, ...], schema: str, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(filled)

    done = kvdrift(verb, *arguments, "--json")

    check(schema, done.out)
    assert done.err == ""


def test_a_mismatch_with_its_shape_and_runners_up_is_of_the_schema() -> None:
    report = check("report", audited("slot_stale").audit.to_json())

    assert report.diagnosis.runners_up
    assert [mark.state for mark in report.strip].count("first") == 1


def test_a_server_is_of_its_schema(here: Path) -> None:
    with serving(Vllm(Engine())) as server:
        address = f"http://127.0.0.1:{server.server_address[1]}/v1"
        done = kvdrift("audit", address, "--model", MODEL, "--out", "run", "--json")

    assert done.err == ""
    check("server", done.out)
    check("server", kvdrift("show", "run", "--json").out)


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"verdict": "FINE"}, r"\$\.verdict"),
        ({"schema_version": 0}, r"\$\.schema_version"),
        ({"extra": 1}, "extra"),
        ({"strip": [{"name": "0", "state": "odd", "excess": None}]}, r"\$\.strip\[0\]\.state"),
    ],
)
def test_what_is_not_of_the_schema_is_refused(change: dict[str, object], path: str) -> None:
    """The checks above can fail."""
    view = json.loads(audited("slot_stale").audit.to_json()) | change

    with pytest.raises(msgspec.ValidationError, match=path):
        check("report", json.dumps(view))


def test_schemas_are_listed_and_a_wrong_name_is_one_line() -> None:
    assert [line.split()[0] for line in kvdrift("schema").out.splitlines()] == list(SCHEMAS)
    assert [row["name"] for row in json.loads(kvdrift("schema", "--json").out)] == list(SCHEMAS)
    assert kvdrift("schema", "diff", "--json").out == read_schema("diff")
    refused(kvdrift("schema", "x"), 2, f"there is no schema 'x'; there are {', '.join(SCHEMAS)}")
