"""The traces of an audit of kvdrift: that all its pairs are there, and that each joins the right traces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from kvdrift.errors import TraceError
from kvdrift.trace.manifest import Manifest, PairEntry, ScenarioEntry
from kvdrift.trace.model import PassPair
from kvdrift.trace.recording import REFERENCE, SHARED, RecordedPair, Recording, perturbed_label
from kvdrift.trace.store import MANIFEST, read_manifest, read_pairs
from kvdrift.vocabulary.facts import EngineFacts, Plant, Prompt
from kvdrift.vocabulary.plan import REPEATED, Mode, PairRole, name_of_length
from kvdrift.vocabulary.precision import UNIT_ROUNDOFF, UPPER
from kvdrift.vocabulary.schedule import is_specified, modes_of, rungs_of, unobserved_prompt

TRACES = "traces"  # the folder of a run directory that holds them


def is_own(directory: Path) -> bool:
    """Return whether a directory is that of an audit that kept its traces."""
    return (directory / TRACES).is_dir() and not (directory / MANIFEST).is_file()


def open_own(directory: Path) -> Recording:
    """Open the traces of an audit.

    Raises:
        TraceError: traces are missing, damaged or of another version, or are not those that the run's plan calls for.
    """
    traces = directory / TRACES
    if not traces.is_dir():
        raise TraceError(
            f"{directory} holds no traces to judge; it is not a run directory, or was made with --no-traces"
        )
    manifest = read_manifest(traces)
    try:
        _require_known_precision(manifest.engine)
        if not 0 < manifest.engine.n_layers <= 1 << 16:
            raise ValueError(f"the engine has {manifest.engine.n_layers} layers")
        own = [pair for pair in manifest.pairs if pair.scenario is None]
        if manifest.has_decode:
            _require_all_pairs(manifest, own)
        elif others := [pair for pair in own if pair.role not in REPEATED]:
            raise ValueError(f"{len(others)} pairs are of plain decode, which is not part of the run")
        elif not manifest.scenarios:
            raise ValueError("it holds neither plain decode nor a scenario")
        elif own or manifest.unobserved:
            _require_repeated(manifest, own, _prompts(manifest))
        _require_scenario_pairs(manifest)
    except ValueError as error:
        raise TraceError(inconsistent(directory, error)) from error

    def pairs() -> Iterator[RecordedPair]:
        planted = iter(_planted(manifest))
        for entry, pair in read_pairs(traces, manifest):
            if entry.scenario is None:
                _require_roles(manifest, entry, pair)
                plant = next(planted) if entry.role is PairRole.CONTROL else None
            else:
                plant = _require_scenario_roles(manifest, entry, pair)
            own = plant if entry.role is PairRole.CONTROL else None
            yield RecordedPair(entry.role, pair, entry.scenario, own, shift=entry.shift)

    return Recording(
        kind="traces of an audit",
        facts=manifest.engine,
        prompts=tuple(manifest.prompts),
        modes=modes_of(manifest.plan, manifest.engine),
        pairs=pairs,
        n_pairs=len(manifest.pairs),
        command=manifest.command,
        created=manifest.created,
        manifest=manifest,
    )


def inconsistent(directory: Path, error: Exception) -> str:
    """Return what to say of traces of an audit that contradict themselves."""
    return f"the traces in {directory / TRACES} are not consistent: {error}; record the run again"


def _require_known_precision(facts: EngineFacts) -> None:
    """Check that how coarsely every rung rounds is known: a dtype, or roundoffs of the native precision's own."""
    ladder = facts.ladder
    coarse, fine = UNIT_ROUNDOFF.get(ladder.lower), UNIT_ROUNDOFF.get(ladder.upper)
    if coarse is None or fine is None or not coarse > fine:
        raise ValueError(f"{ladder.lower} and {ladder.upper} are not a coarse and a fine rung of a ladder")
    if not 0.0 <= ladder.pinned <= coarse:
        raise ValueError(f"nothing can be pinned at {ladder.pinned} above the rung {ladder.lower}")
    if facts.roundoffs is None and facts.dtype not in UNIT_ROUNDOFF:
        raise ValueError(f"unknown dtype {facts.dtype!r}")
    if facts.roundoffs is not None and not all(0.0 < unit < 1.0 for unit in facts.roundoffs.all):
        raise ValueError("the roundoffs of the native precision are not between 0 and 1")


# ------------------------------------------------------------------------------------------------------- plain decode


def _require_all_pairs(manifest: Manifest, pairs: Sequence[PairEntry]) -> None:
    """Check that the manifest lists what the plan calls for, once: a pair that was taken out is not a pair that agrees.

    A rung that could not run, away from the native one, may lack pairs: the ladder says then that it is incomplete.
    """
    prompts = _prompts(manifest)
    wanted = _wanted(manifest, prompts)
    apart = REPEATED | {PairRole.CONTROL, PairRole.PERTURBED}
    found = [(pair.role, pair.mode, pair.prompt, pair.rung) for pair in pairs if pair.role not in apart]
    _require_both_signs([pair for pair in pairs if pair.role is PairRole.PERTURBED])
    native = manifest.engine.dtype
    missing = [key for key in sorted(wanted - set(found)) if key[3] == native or key[3] not in manifest.failures]
    if missing:
        raise ValueError(f"{len(missing)} pairs of passes are missing, such as {_words(missing[0])}")
    if surplus := sorted(set(found) - wanted):
        raise ValueError(f"{_words(surplus[0])} is not part of the run")
    if len(found) != len(set(found)):
        raise ValueError("a pair of passes is listed twice")
    controls = [pair for pair in pairs if pair.role is PairRole.CONTROL]
    planted = len(_planted(manifest))
    if len(controls) != planted:
        raise ValueError(f"{len(controls)} positive controls are listed, and {planted} was planted")
    _require_repeated(manifest, pairs, prompts)


def _require_repeated(manifest: Manifest, pairs: Sequence[PairEntry], prompts: dict[str, Prompt]) -> None:
    """Check that both passes of one prompt were run unobserved and repeated, once at each rung that says so."""
    prompt = unobserved_prompt(list(prompts.values())).name
    native = manifest.engine.dtype
    passes = {trace.name: trace.pass_name for trace in manifest.traces}
    found = sorted(
        (pair.role, pair.prompt, pair.rung, str(passes.get(pair.decode))) for pair in pairs if pair.role in REPEATED
    )
    wanted = sorted(
        (role, prompt, rung, name)
        for role in REPEATED
        for rung in manifest.unobserved
        for name in ("prefill", "decode")
    )
    if found != wanted or (manifest.unobserved and native not in manifest.unobserved):
        raise ValueError(
            f"{len(found)} pairs are of unobserved passes, which ran at {', '.join(manifest.unobserved) or 'no rung'}: "
            f"{len(wanted)} are called for, of {prompt!r}"
        )


def _planted(manifest: Manifest) -> list[Plant]:
    """The faults of the positive control of plain decode, in the order of their pairs."""
    return [*([] if manifest.plant is None else [manifest.plant]), *manifest.plants]


def _require_both_signs(pairs: Sequence[PairEntry]) -> None:
    """Check that perturbed passes come with either sign, each once.

    Without them there is no noise to judge by, and the ladder says so; fewer of them make its bounds smaller.
    """
    found = [(str(pair.scenario), pair.mode, pair.prompt, pair.shift) for pair in pairs]
    if len(found) != len(set(found)):
        raise ValueError("a perturbed pass is listed twice")
    lonely = [key for key in found if (*key[:3], -key[3]) not in found]
    if lonely or any(not 0.0 < abs(pair.shift) < 1.0 for pair in pairs):
        raise ValueError("a perturbed pass has no counterpart")


def _prompts(manifest: Manifest) -> dict[str, Prompt]:
    """Return the prompts by name, checked against the plan."""
    plan, prompts = manifest.plan, {prompt.name: prompt for prompt in manifest.prompts}
    if len(prompts) != len(manifest.prompts) or not prompts:
        raise ValueError("the prompts have no ids, or one id twice")
    for prompt in manifest.prompts:
        if not prompt.prompt or len(prompt.continuation) != plan.span:
            raise ValueError(f"the prompt {prompt.name!r} has no tokens, or is not continued by {plan.span}")
    if plan.lengths is not None and {name: len(p.prompt) for name, p in prompts.items()} != {
        name_of_length(length): length for length in plan.lengths
    }:
        raise ValueError(f"the prompts are not those of the lengths {list(plan.lengths)}")
    return prompts


def _wanted(manifest: Manifest, prompts: dict[str, Prompt]) -> set[tuple[str, str, str, str]]:
    """The role, mode, prompt and rung of every pair that the plan calls for, the control apart."""
    plan, facts = manifest.plan, manifest.engine
    rungs = rungs_of(plan, facts)
    wanted: set[tuple[str, str, str, str]] = {
        (PairRole.PAIR, mode, name, rung) for mode in modes_of(plan, facts) for name in prompts for rung in rungs
    }
    wanted |= {
        (PairRole.SELF_NOISE, Mode.AS_DESIGNED, name, rung)
        for name, prompt in prompts.items()
        for rung in rungs
        if len(prompt.prompt) > 1
    }
    if manifest.specification and is_specified(plan, facts):
        wanted |= {(PairRole.SPECIFICATION, Mode.KV_ALIGNED, name, UPPER) for name in prompts}
    return wanted


def _words(key: tuple[str, str, str, str]) -> str:
    role, mode, prompt, rung = key
    return f"{role} of {prompt!r} in {mode} at {rung}"


def _require_roles(manifest: Manifest, entry: PairEntry, pair: PassPair) -> None:
    """Check that two traces are what the pair says they are: the right passes over the right tokens."""
    prompt = next((prompt for prompt in manifest.prompts if prompt.name == entry.prompt), None)
    if prompt is None:
        raise ValueError(f"a pair is of the prompt {entry.prompt!r}, which the run does not have")
    last = len(prompt.prompt) - 1
    first, second = pair.prefill, pair.decode
    label, lengths, positions = str(entry.role), (len(prompt.tokens),) * 2, prompt.probed
    if entry.role is PairRole.PAIR:
        label = pair.mode
    elif entry.role is PairRole.SELF_NOISE:
        label, lengths, positions = "prompt_alone", (len(prompt.tokens), len(prompt.prompt)), (last,)
    elif entry.role is PairRole.CONTROL:
        position = pair.positions[0]
        lengths, positions = (position + 1,) * 2, (position,)
        if position not in prompt.probed or entry.rung != rungs_of(manifest.plan, manifest.engine)[-1]:
            raise ValueError(f"the positive control is at position {position} and {entry.rung}")
    elif entry.role in REPEATED:
        right = (
            first.pass_name == second.pass_name
            and first is not second
            and second.label == ("unobserved" if entry.role is PairRole.UNOBSERVED else "unobserved_again")
            and {first.rung, second.rung} == {entry.rung}
            and {first.prompt, second.prompt} == {entry.prompt}
            and first.tokens == second.tokens == prompt.tokens
            and pair.positions == (prompt.probed if first.pass_name == "decode" else prompt.probed[-1:])
        )
        if not right:
            raise ValueError(f"{_words((entry.role, entry.mode, entry.prompt, entry.rung))} joins other traces")
        return
    elif entry.role is PairRole.PERTURBED:
        label, positions = perturbed_label(pair.mode, entry.shift), tuple(sorted({*pair.positions} & {*positions}))
        if entry.rung != manifest.engine.ladder.upper or not positions:
            raise ValueError(f"a perturbed pass is at {entry.rung} and compares nothing")
    passes = ("prefill", "prefill" if entry.role in (PairRole.SELF_NOISE, PairRole.SPECIFICATION) else "decode")
    right = (
        (first.pass_name, second.pass_name) == passes
        and (first is not second) == (entry.role is not PairRole.SPECIFICATION)
        and second.label == label
        and {first.rung, second.rung} == {entry.rung}
        and {first.prompt, second.prompt} == {entry.prompt}
        and pair.positions == positions
        and (first.tokens, second.tokens) == (prompt.tokens[: lengths[0]], prompt.tokens[: lengths[1]])
    )
    if not right:
        raise ValueError(f"{_words((entry.role, entry.mode, entry.prompt, entry.rung))} joins traces of something else")


# ---------------------------------------------------------------------------------------------------------- scenarios


def _require_scenario_pairs(manifest: Manifest) -> None:
    """Check that the manifest lists every pair that the scenarios call for, once.

    A scenario that failed, or a rung that could not run, may lack pairs: the verdict says then that it is incomplete.
    """
    names = [scenario.name for scenario in manifest.scenarios]
    if len(set(names)) != len(names):
        raise ValueError("a scenario is listed twice")
    wanted: set[tuple[str, str, str]] = set()
    optional: set[tuple[str, str, str]] = set()
    for scenario in manifest.scenarios:
        segments = [segment.name for segment in scenario.segments]
        if len(set(segments)) != len(segments):
            raise ValueError(f"the scenario {scenario.name!r} has two rows of one name")
        for rung in rungs_of(manifest.plan, manifest.engine):
            missing_allowed = scenario.failure is not None or rung in manifest.failures
            (optional if missing_allowed else wanted).update((scenario.name, segment, rung) for segment in segments)
    pairs = [pair for pair in manifest.pairs if pair.scenario is not None]
    listed = [(str(pair.scenario), pair.prompt, pair.rung) for pair in pairs if pair.role is PairRole.PAIR]
    if missing := sorted(wanted - set(listed)):
        raise ValueError(f"{len(missing)} pairs of scenarios are missing, such as {' / '.join(missing[0])}")
    if len(set(listed)) != len(listed):
        raise ValueError("a pair of a scenario is listed twice")
    if surplus := [key for key in listed if key not in wanted | optional]:
        raise ValueError(f"{surplus[0]} is not part of the run")
    _require_both_signs([pair for pair in pairs if pair.role is PairRole.PERTURBED])
    controls = [pair.scenario for pair in pairs if pair.role is PairRole.CONTROL]
    planted = {scenario.name for scenario in manifest.scenarios if scenario.plant is not None and scenario.segments}
    failed = {scenario.name for scenario in manifest.scenarios if scenario.failure is not None}
    if len(set(controls)) != len(controls) or set(controls) - planted or planted - set(controls) - failed:
        raise ValueError("the positive controls of the scenarios are not those that were planted")


def _require_scenario_roles(manifest: Manifest, entry: PairEntry, pair: PassPair) -> Plant | None:
    """Check that a pair of a scenario joins the traces that it says it joins, and return the fault planted in it."""
    reference, fine = pair.prefill, manifest.engine.ladder.upper
    perturbed = entry.role is PairRole.PERTURBED
    label = "" if not perturbed or entry.scenario is None else perturbed_label(entry.scenario, entry.shift)
    right = (
        reference.pass_name == "prefill"
        and reference.label == (label if perturbed else REFERENCE)
        and reference is not pair.decode
        and pair.mode is Mode.AS_DESIGNED
        and {reference.rung, pair.decode.rung} == {entry.rung}
        and pair.decode.prompt == entry.prompt
    )
    if entry.scenario == SHARED and entry.role is PairRole.SELF_NOISE:
        if not right or pair.decode.label != "prompt_alone" or entry.rung != fine:
            raise ValueError("the self-noise of the scenarios joins traces of something else")
        return None
    scenario = next((scenario for scenario in manifest.scenarios if scenario.name == entry.scenario), None)
    segment = None if scenario is None else next((s for s in scenario.segments if s.name == entry.prompt), None)
    if scenario is None or segment is None or entry.role in (PairRole.SELF_NOISE, PairRole.SPECIFICATION):
        raise ValueError(f"a pair is of {entry.scenario!r} / {entry.prompt!r}, which the run does not have")
    control = entry.role is PairRole.CONTROL
    right = right and (
        pair.decode.pass_name == "decode"
        and pair.decode.label == (label if perturbed else label_of(scenario, entry.role))
        and reference.tokens == pair.decode.tokens == segment.tokens
        and pair.positions == ((segment.positions[-1],) if control else segment.positions)
        and (entry.rung == fine or not (control or perturbed))
    )
    if not right:
        raise ValueError(
            f"the {entry.role} of {scenario.name} / {entry.prompt} at {entry.rung} joins traces of something else"
        )
    return scenario.plant if control else None


def label_of(scenario: ScenarioEntry, role: PairRole) -> str:
    """Return the label of a decode trace of a scenario."""
    return f"{scenario.name}.control" if role is PairRole.CONTROL else scenario.name
