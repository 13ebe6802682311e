"""The passes of one prompt in one mode, put together from what was kept of its GRETA records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec
import numpy as np

from kvdrift.errors import TraceError
from kvdrift.trace.model import PassPair, Trace
from kvdrift.trace.readers.greta.records import HASHED
from kvdrift.trace.recording import UNKNOWN_TOKEN, RecordedPair
from kvdrift.vocabulary.address import Spot
from kvdrift.vocabulary.facts import Call
from kvdrift.vocabulary.plan import Mode, PairRole
from kvdrift.vocabulary.sites import Site

# Another distance is another text rather than a wrong count.
_FARTHEST = 8


class Kept(msgspec.Struct, array_like=True):
    """What is kept of a line; `data` are its float32 values, `width` the elements of the whole tensor."""

    where: str
    phase: str  # prefill or decode
    origin: str | None
    point: str
    site: str
    layer: int | None
    position: int
    token: int | None
    seq_len: int | None
    total: int | None
    hash: int | None
    width: int
    is_exact: bool  # whether `data` are the bits of the engine; else they are near them, by what was printed
    data: bytes


@dataclass(slots=True)
class Assembly:
    """Builds the passes of one prompt in one mode from its records."""

    prompt: str
    mode: Mode
    kept: list[Kept]
    shift: int = 0  # by how much decode's positions stand behind those that prefill gives to the same tokens

    def pairs(self) -> Iterator[RecordedPair]:
        """Yield the decode pass against prefill, and a prefill of the decode run as self-noise."""
        prefill = [kept for kept in self.kept if kept.phase == "prefill"]
        origins = {kept.origin for kept in prefill}
        again: list[Kept] = []
        if "decode" in origins and len(origins) > 1:
            again = [kept for kept in prefill if kept.origin == "decode"]
            prefill = [kept for kept in prefill if kept.origin != "decode"]
        decoded = [kept for kept in self.kept if kept.phase != "prefill"]
        for kept in decoded:
            kept.position -= self.shift
        first, second, third = (_unique(records) for records in (prefill, decoded, again))
        last = max(kept.position for kept in self.kept)
        tokens = _agreed_tokens(prefill, decoded)
        reference = self._trace("prefill", "full", first, tokens_up_to(tokens[0], last))
        positions = tuple(sorted({place[2] for place in (*first, *second)}))
        common = tuple(sorted({place[2] for place in first} & {place[2] for place in third}))
        if common:
            alone = self._trace("prefill", "prompt_alone", third, tokens_up_to(tokens[0], last))
            pair = PassPair(Mode.AS_DESIGNED, reference, alone, common)
            yield RecordedPair(PairRole.SELF_NOISE, pair, unequal=_unequal(first, third))
        decode_pass = self._trace("decode", str(self.mode), second, tokens_up_to(tokens[1], last))
        yield RecordedPair(
            PairRole.PAIR, PassPair(self.mode, reference, decode_pass, positions), unequal=_unequal(first, second)
        )

    def _trace(self, name: str, label: str, records: dict[Spot, Kept], tokens: tuple[int, ...]) -> Trace:
        trace = Trace(self.prompt, "prefill" if name == "prefill" else "decode", label, "float32", tokens)
        calls: dict[Call, None] = {}
        for (layer, site, position), kept in records.items():
            values = np.frombuffer(kept.data, dtype=np.float32)[np.newaxis]
            trace.add_rows(layer, site, (position,), values)
            if kept.seq_len is not None and kept.total is not None and 0 < kept.seq_len <= kept.total:
                before = kept.total - kept.seq_len
                calls.setdefault(Call(before, kept.seq_len, before, None, "unknown", ()))
        trace.calls.extend(calls)
        return trace


def _unique(records: list[Kept]) -> dict[Spot, Kept]:
    """Records by place. One point may be written under two names, and a dump holds the whole of the logits."""
    found: dict[Spot, Kept] = {}
    for kept in records:
        place = (kept.layer, Site(kept.site), kept.position)
        known = found.get(place)
        if known is not None and known.point == kept.point:
            raise TraceError(
                f"{kept.where}: the record of {_words(kept)} is there a second time; the first is {known.where}"
            )
        if known is None or kept.point == "logits_dump":
            found[place] = kept
    return found


def _words(kept: Kept) -> str:
    layer = "" if kept.layer is None else f" of layer {kept.layer}"
    return f"{kept.point}{layer} at position {kept.position} in {kept.phase}"


def _unequal(first: dict[Spot, Kept], second: dict[Spot, Kept]) -> frozenset[Spot]:
    """Places whose bits differ by the engine's own hashes, or are not known to agree beyond the printed digits."""
    found = []
    for place, kept in first.items():
        other = second.get(place)
        if other is None:
            continue
        hashes = {kept.hash, other.hash}
        same = len(hashes) == 1 and None not in hashes
        # A hash covers the front of a tensor; it proves all of a short one.
        proven = (kept.is_exact and other.is_exact) or (same and kept.width <= HASHED)
        if (len(hashes) > 1 and None not in hashes) or not proven:
            found.append(place)
    return frozenset(found)


def _agreed_tokens(prefill: list[Kept], decoded: list[Kept]) -> tuple[dict[int, int], dict[int, int]]:
    """Token ids by position of both passes; one that only one of them names holds for both."""
    known = [
        {kept.position: kept.token for kept in records if kept.token is not None} for records in (prefill, decoded)
    ]
    return {**known[1], **known[0]}, {**known[0], **known[1]}


def shift_of(prefill: Mapping[int, int], decode: Mapping[int, int]) -> int:
    """Return by how many positions all tokens of decode stand behind those of prefill; 0 if they do not.

    Both are token ids by position, UNKNOWN_TOKEN where a pass does not say. A token at its own place, or one that is
    not known, rules every shift out.

    >>> shift_of({4: 7, 5: 9}, {6: 9})
    1
    >>> shift_of({4: 7, 5: 9}, {6: 3})
    0
    """
    if not decode or UNKNOWN_TOKEN in decode.values():
        return 0
    if any(prefill[at] in (token, UNKNOWN_TOKEN) for at, token in decode.items() if at in prefill):
        return 0
    near = sorted(range(-_FARTHEST, _FARTHEST + 1), key=abs)
    return next((s for s in near if s and all(prefill.get(p - s) == token for p, token in decode.items())), 0)


def tokens_up_to(known: dict[int, int], last: int) -> tuple[int, ...]:
    """Return the token ids of all positions up to `last`; one that is not known is UNKNOWN_TOKEN."""
    return tuple(known.get(position, UNKNOWN_TOKEN) for position in range(last + 1))
