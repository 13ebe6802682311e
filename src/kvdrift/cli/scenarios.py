"""`kvdrift scenarios`: the routes to a token that an audit can take."""

from __future__ import annotations

import json

import typer

from kvdrift.cli.options import AsJson
from kvdrift.cli.output import print_lines, print_result

app = typer.Typer()


@app.command(
    epilog="Examples:\n\n    kvdrift scenarios\n\n    kvdrift audit --scenario rewind,batch_padded\n\n"
    "Exit codes: 0 printed, 2 usage."
)
def scenarios(as_json: AsJson = False) -> None:
    """List the scenarios: routes to a token, what each can find, and where it applies."""
    from kvdrift.scenarios.catalogue import DECODE, DECODE_FINDS, SCENARIOS

    rows = [(DECODE, DECODE_FINDS, "every model"), *((s.name, s.finds, s.where) for s in SCENARIOS)]
    if as_json:
        print_result(json.dumps([dict(zip(("name", "finds", "where"), row, strict=True)) for row in rows], indent=2))
        return
    width = max(len(name) for name, *_ in rows)
    print_lines(f"{name:{width}}  {finds}\n{'':{width}}  for {where}" for name, finds, where in rows)
