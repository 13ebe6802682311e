"""`kvdrift-bench history`: released packages with a known bug, beside the releases that mend it."""

from __future__ import annotations

import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from kvdrift.cli.errors import errors_as_messages
from kvdrift.errors import EngineUnavailable
from kvdrift_bench.cli.console import Markdown, measuring, what_is_left

_LIBRARIES = {"mlx-lm": "mlx", "transformers": "torch"}  # what the releases of a package compute with
_EXTRAS = {"mlx": "mlx", "torch": "hf"}


def history(
    pair: Annotated[list[str] | None, typer.Option(help="Pair to run; repeatable; default: all.")] = None,
    folder: Annotated[
        Path, typer.Option(help="Where wheels lie and are unpacked; fetched ones are kept there.")
    ] = Path("~/.cache/kvdrift/releases"),
    offline: Annotated[bool, typer.Option("--offline", help="Fetch nothing: the wheels lie in --folder.")] = False,
    markdown: Markdown = None,
) -> None:
    """Audit the last release with a known bug and the first one without it, each unmodified and in its own process."""
    with errors_as_messages(what_is_left(None)):
        from importlib.metadata import version

        from kvdrift_bench.figures.history_page import history_page
        from kvdrift_bench.figures.markers import Markers
        from kvdrift_bench.run.history_runs import choose_pairs, history, run_pairs

        pairs = choose_pairs(pair or ())
        libraries = sorted({_LIBRARIES[each.package] for each in pairs})
        for name in libraries:
            _needed(name)
        results = []
        with measuring("llamacpp") as progress:
            progress.start(len(pairs))
            for result in run_pairs(pairs, folder.expanduser(), offline=offline):
                progress.step(result.pair.name)
                results.append(result)
        words = [word for name in pair or () for word in ("--pair", name)]
        versions = ", ".join(f"{name} {version(name)}" for name in ("kvdrift", *libraries, "transformers"))
        command = shlex.join(["kvdrift-bench", "history", *words])
        text = history_page(results, () if pair else history().absent, command, versions)
        if markdown is not None:
            Markers.of("kvdrift-bench history").write(markdown, text)
        typer.echo(text, nl=False)
    raise typer.Exit(0 if all(result.told_apart for result in results) else 1)


def _needed(library: str) -> None:
    """Raise `EngineUnavailable` where the library that releases compute with is not installed."""
    if find_spec(library) is None:
        raise EngineUnavailable(f"the releases need {library}; pip install 'kvdrift[{_EXTRAS[library]}]'")


__all__ = ["history"]
