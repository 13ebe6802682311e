"""The page of `kvdrift trace check`."""

from __future__ import annotations

from collections.abc import Mapping

from kvdrift.report.view import SCHEMA_VERSION, to_strict_json
from kvdrift.verdict.inventory import Finding, Inventory
from kvdrift.vocabulary.sites import Site

_WIDTH = 18


def render_inventory(inventory: Inventory) -> str:
    """Return what is there, what is missing and what that costs, as one page of text."""
    lines = [inventory.kind, ""]
    lines += [f"  {name:{_WIDTH}} {value}" for name, value in inventory.facts]
    there = [item for item in inventory.findings if item.is_there]
    lines += ["", "There:", *(_line(item) for item in there)] if there else []
    missing = [item for item in inventory.findings if not item.is_there]
    lines += ["", "Missing, and what that costs:", *(_line(item) for item in missing)] if missing else []
    for mode, chain in inventory.chains.items():
        state = "whole" if chain.is_whole else f"up to {chain.last or 'nothing'}"
        lines += ["", f"Chain from the cache to the logits, {mode}: {state}"]
        lines += [f"  {text}" for text in _drawn(chain.layers)]
        behind = " ".join(f"{site}{'' if seen else ' (no)'}" for site, seen in chain.outside.items())
        lines.append(f"  behind the layers: {behind}")
    return "\n".join([*lines, "", _ending(inventory)]) + "\n"


def inventory_json(inventory: Inventory) -> str:
    """Return the same as strict JSON."""
    return to_strict_json(
        {
            "schema_version": SCHEMA_VERSION,
            "kind": inventory.kind,
            "facts": dict(inventory.facts),
            "findings": [
                {"what": item.what, "found": item.found, "is_there": item.is_there, "cost": item.cost}
                for item in inventory.findings
            ],
            "chains": {
                mode: "whole" if chain.is_whole else f"up to {chain.last or 'nothing'}"
                for mode, chain in inventory.chains.items()
            },
            "obstacles": list(inventory.obstacles),
            "scope": inventory.scope,
        }
    )


def _line(item: Finding) -> str:
    cost = f"\n  {'':{_WIDTH}} -> {item.cost}" if item.cost else ""
    return f"  {item.what:{_WIDTH}} {item.found}{cost}"


def _drawn(layers: Mapping[int, Mapping[Site, bool | None]]) -> list[str]:
    """The links of every layer; layers that are alike stand in one line."""
    found: list[tuple[int, int, str]] = []
    words = {True: "", False: " (no)", None: " (absent)"}
    for layer, sites in layers.items():
        text = " -> ".join(f"{site}{words[seen]}" for site, seen in sites.items())
        if found and found[-1][2] == text:
            found[-1] = (found[-1][0], layer, text)
        else:
            found.append((layer, layer, text))
    return [f"layer {a if a == b else f'{a}-{b}'}: {text}" for a, b, text in found]


def _ending(inventory: Inventory) -> str:
    if inventory.obstacles:
        return f"Can be a MISMATCH, and cannot pass: {'; '.join(inventory.obstacles)}."
    if inventory.scope is None:
        return "Can be a MISMATCH, and cannot pass: no chain of sites in every layer."
    if inventory.scope:
        return f"Can be a MISMATCH, or pass in the scope: {inventory.scope}."
    return "Can be a MISMATCH, or pass as a whole, if what differs can be bounded."
