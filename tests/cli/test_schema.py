"""The machine form of every verb is of the schema in the package, and the schema is that of the types."""

from __future__ import annotations

import json
import tarfile
from importlib.metadata import version
from pathlib import Path

import msgspec
import pytest
from typer.main import get_command

from kvdrift.cli.app import app
from kvdrift.report.schema import SCHEMAS, build_schema, check, read_schema, to_text
from kvdrift.report.view import SCHEMA_VERSION
from tests.support.audits import audited
from tests.support.command import ROOT, kvdrift, refused
from tests.support.logprobs import simulate, write_all
from tests.support.serving import MODEL, Engine, Vllm, serving

pytestmark = pytest.mark.xdist_group("slot_stale")

ARCHIVES = sorted((ROOT / "tests" / "golden" / "traces").glob("*.tar.xz"))
# The schema of each verb that takes --json; a test asserts that there are no others.
OF_VERB = {
    "audit": "report",
    "judge": "report",
    "show": "report",
    "gate": "report",
    "compare": "logprobs",
    "diff": "diff",
    "determinism": "determinism",
    "scenarios": "scenarios",
    "trace check": "inventory",
    "sweep": "sweep",
    "zoo": "zoo",
}


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


def test_every_verb_with_json_has_a_schema() -> None:
    found = set()
    for verb, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        for name, each in ({verb: command} if inner is None else {f"{verb} {k}": v for k, v in inner.items()}).items():
            if any("--json" in option.opts for option in each.params):
                found.add(name)

    assert found == set(OF_VERB)
    assert set(OF_VERB.values()) | {"server"} == set(SCHEMAS)


def test_what_the_verbs_print_is_of_their_schema(here: Path, llama: Path, prompts: Path) -> None:
    options = ("--prompts", prompts, "--span", "1", "--json")
    printed = {"audit": kvdrift("audit", llama, *options, "--out", "run", "--scenario", "decode,rewind")}
    assert printed["audit"].code == 0
    for verb in ("judge", "show", "gate", "trace check"):
        printed[verb] = kvdrift(*verb.split(), "run", "--json")
    dumps = write_all(here, simulate())
    printed["compare"] = kvdrift("compare", dumps["sampler"], dumps["trainer"], "--out", "dumps", "--json")
    check("logprobs", kvdrift("show", "dumps", "--json").out)
    assert "about:" in kvdrift("show", "dumps").out
    printed["diff"] = kvdrift("diff", "run", "run", "--json")
    printed["determinism"] = kvdrift("determinism", llama, "--prompts", prompts, "--runs", "2", "--json")
    printed["scenarios"] = kvdrift("scenarios", "--json")
    # No cell of it applies, so that no worker starts; tests/sweep has those that run.
    (here / "s.toml").write_text(f"[matrix]\nmodels = ['{llama}']\ncaches = ['q8_0']\n")
    printed["sweep"] = kvdrift("sweep", "s.toml", "--json")
    # Its file holds the row already, so that no worker starts; tests/zoo has those that run.
    row = {"type": "xlnet", "scenarios": [], "transformers": version("transformers"), "state": "NOT_APPLICABLE"}
    (here / "zoo.jsonl").write_text(json.dumps(row) + "\n")
    printed["zoo"] = kvdrift("zoo", "--model-type", "xlnet", "--rows", "zoo.jsonl", "--json")

    assert set(printed) == set(OF_VERB)
    for verb, done in printed.items():
        check(OF_VERB[verb], done.out)
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
    refused(kvdrift("schema", "x"), 2, f"there is no schema 'x'; there are {', '.join(SCHEMAS)}")
