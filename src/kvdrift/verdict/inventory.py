"""What a directory of traces holds, what it lacks and what that costs, before anything is judged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvdrift.instruments.directed import Replay
from kvdrift.measure.measured import Measured
from kvdrift.trace.recording import Recording
from kvdrift.verdict.coverage import Chain, chain_of, scope_that_holds
from kvdrift.vocabulary.facts import is_absent
from kvdrift.vocabulary.plan import SELF_NOISE, Mode
from kvdrift.vocabulary.precision import LOWER, UPPER
from kvdrift.vocabulary.scope import Scope, parse_scope
from kvdrift.vocabulary.sites import CACHE_SITES, EXPECTED_SITES, PARENTS, Site


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a verdict uses: whether it is there, in words, and what its absence costs; "" if it is there."""

    what: str
    found: str
    cost: str = ""

    @property
    def is_there(self) -> bool:
        """Whether nothing of it is missing."""
        return not self.cost


@dataclass(frozen=True, slots=True)
class Inventory:
    """The page: what was opened, what is there, and the largest verdict that it can carry.

    Attributes:
        kind: the format, in words.
        facts: names and values of what the files say of the engine.
        findings: what a verdict uses.
        chains: by mode, the chain from the cache to the logits.
        obstacles: what keeps the recording from any pass, in words.
        scope: the largest claim that its chain carries: "" for everything, None for nothing.
    """

    kind: str
    facts: tuple[tuple[str, str], ...]
    findings: tuple[Finding, ...]
    chains: dict[str, Chain]
    obstacles: tuple[str, ...]
    scope: str | None


def take_inventory(measured: Measured, recording: Recording) -> Inventory:
    """Say what a recording holds, of which everything was compared."""
    chains: dict[str, Chain] = {mode: chain_of(measured, mode) for mode in measured.modes}
    return Inventory(
        recording.kind,
        tuple(_facts(recording)),
        tuple(_findings(recording, measured, chains)),
        chains,
        tuple(_obstacles(measured, chains)),
        _scope(recording, measured, chains),
    )


def _facts(recording: Recording) -> Iterator[tuple[str, str]]:
    facts = recording.facts
    plausible = f"not named; judged as {recording.plausible}"
    own = recording.manifest is not None
    yield "engine", f"{facts.engine}, {facts.device or 'unknown device'}"
    yield "model", f"{facts.model} ({facts.model_hash or 'weights unknown'})"
    yield "computes in", facts.dtype if own else recording.computed_in or plausible
    yield "layers", str(facts.n_layers) if recording.last_layer_known else f"unknown; {facts.n_layers} are recorded"
    for prompt in recording.prompts:
        probed = f"{prompt.probed[0]}-{prompt.probed[-1]}" if prompt.probed else "none"
        yield f"prompt {prompt.name}", f"{len(prompt.tokens)} tokens; positions {probed} were decoded"


def _findings(recording: Recording, measured: Measured, chains: dict[str, Chain]) -> Iterator[Finding]:
    yield from _routes(measured)
    rungs = measured.table.rungs
    has_ladder = {LOWER, UPPER} <= rungs
    cost = "bounds at one precision decide, and at half precision none covers a site whose inputs drift"
    yield Finding("precision ladder", ", ".join(sorted(rungs)) or "none", "" if has_ladder else cost)
    for mode in Mode:
        cost = "drift through the cache and drift of the decode path are not told apart"
        yield Finding(f"mode {mode}", *(("recorded",) if mode in measured.modes else ("not recorded", cost)))
    n = len(recording.prompts)
    cost = "" if n > 1 else "nothing shows that the recording is not stale"
    yield Finding("prompts", str(n), cost)
    noise = measured.table.select(SELF_NOISE, measured.info.dtype)
    cost = "" if len(noise) else "sites with unequal inputs have no noise of the engine's own to be compared with"
    yield Finding("second prefill", f"{len(noise)} values" if len(noise) else "not recorded", cost)
    yield from _attention(measured)
    yield from _sites(measured)
    unpaired = measured.table.unpaired
    if unpaired:
        value = unpaired[0][2]
        yield Finding(
            "partners",
            f"{len(unpaired)} values lack one; first: {value.address}, {value.only_in}: {value.why}",
            "no pass (TRACE_OFFSET)",
        )
    else:
        yield Finding("partners", "every value has one")
    if recording.sampled is not None:
        yield Finding("whole tensors", recording.sampled, "a pass of the scope `sampled` alone")
    if recording.manifest is None and recording.computed_in is None:
        yield Finding("dtype", f"not named; taken as {recording.plausible}", "a run with drift cannot pass")
    for name, chain in chains.items():
        if not chain.is_whole:
            yield Finding(
                f"chain ({name})",
                f"holds up to {chain.last or 'nothing'}; {chain.missing} is missing at some probed position",
                "the verdict ends there, or claims a smaller scope",
            )
    for code, text in recording.remarks:
        if code in ("NO_CHECKSUM", "PASSED_OVER", "MODE_UNMARKED", "LAYER_ORDER"):
            yield Finding(code, text, "a limit that the report names")


def _sites(measured: Measured) -> Iterator[Finding]:
    """Which sites the model does not have, and which it may have that were not recorded anywhere."""
    recorded = {site for sites in measured.seen_sites.values() for site in sites}
    absent = [site for site in Site if is_absent(measured.info, site)]
    if absent and measured.foreign is not None:
        yield Finding("absent", f"{', '.join(absent)}: the model does not have them")
    inputs = {site for parents in PARENTS.values() for site in parents}
    unknown = [site for site in EXPECTED_SITES if site in inputs - recorded and site not in absent]
    if unknown:
        cost = "bounds behind them are wider (name those that the model does not have as absent)"
        yield Finding("not recorded", ", ".join(unknown), cost)


def _routes(measured: Measured) -> Iterator[Finding]:
    problems = list(dict.fromkeys(problem for route in measured.routes for problem in route.problems))
    n = len(measured.routes)
    if problems:
        yield Finding(
            "path proof", "; ".join(problems[:3]), "no EXACT and no STRUCTURAL_DRIFT: two routes are not proven"
        )
    else:
        yield Finding("path proof", f"the calls of {n} pairs of passes show two routes")


def _attention(measured: Measured) -> Iterator[Finding]:
    places = {(layer, site) for layer, sites in measured.seen_sites.items() for site in sites}
    n_layers = measured.info.n_layers
    cached = sum(all((layer, site) in places for site in CACHE_SITES) for layer in range(n_layers))
    cost = "" if cached == n_layers else "stale and shifted rows are seen through attn_ctx alone, and no slot is named"
    yield Finding("cached rows", f"K and V of {cached} of {n_layers} layers", cost)
    table = measured.instrument(Replay).table
    replayed = {row.layer for row in table.rows}
    why = "; ".join(dict.fromkeys(table.abstained.values()))
    lacking = [str(site) for site in (Site.Q_ROPE, *CACHE_SITES, Site.ATTN_CTX) if not _everywhere(measured, site)]
    why = why or (f"not in every layer: {', '.join(sorted(lacking))}" if lacking else "")
    cost = "" if len(replayed) == n_layers else f"causes inside attention are not told apart ({why or 'no attention'})"
    yield Finding("replay of attention", f"{len(replayed)} of {n_layers} layers", cost)


def _everywhere(measured: Measured, site: Site) -> bool:
    return all(site in measured.seen_sites.get(layer, set()) for layer in range(measured.info.n_layers))


def _obstacles(measured: Measured, chains: dict[str, Chain]) -> Iterator[str]:
    """What keeps the recording from a pass in any scope."""
    if not chains or not len(measured.table):
        yield "nothing can be compared"
    if measured.table.unpaired:
        yield "values without a partner"
    if any(route.problems for route in measured.routes):
        yield "no path proof"


def _scope(recording: Recording, measured: Measured, chains: dict[str, Chain]) -> str | None:
    if not chains:
        return None
    if recording.sampled is not None:
        return parse_scope(["sampled"]).name
    broken = [chain for chain in chains.values() if not chain.is_whole]
    if not broken:
        return Scope().name
    found = scope_that_holds(measured, broken[0])
    return None if found is None else parse_scope([found]).name
