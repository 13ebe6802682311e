"""`kvdrift-bench gallery`: one real report of each verdict, for the documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvdrift.cli.errors import errors_as_messages
from kvdrift_bench.cli.console import measuring


def gallery(
    out: Annotated[Path, typer.Option(help="The directory for the pages.")] = Path("build/gallery"),
) -> None:
    """Audit a tiny model in four ways, one for each verdict, and write the reports."""
    with errors_as_messages():
        with measuring():
            from kvdrift_bench.run.gallery import write_gallery

            paths = list(write_gallery(out))
        for path in paths:
            typer.echo(str(path))


__all__ = ["gallery"]
