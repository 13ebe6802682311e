"""The walk from a site to what it is computed from, for many pairs at once, through what was not recorded.

There is one walk, `Walk.follow`. What is asked on the way is a `Rule`: whether the inputs have the same bits, by how
much they differ, or, for foreign traces, by how much they may.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvdrift.pairing.rows import Bools, Floats, Ints, Rows, beside, unit_keys
from kvdrift.vocabulary.precision import Arithmetic
from kvdrift.vocabulary.sites import CACHE_SITES, PARENTS, Site

# The most by which an operation enlarges a relative difference of its inputs. A matrix with inputs along its small
# singular directions, or a residual that cancels, enlarges it. The largest that clean runs showed beyond the rounding
# of the operation itself is written in decision 15, by `./run bench growth`.
GROWTH = 32.0
COPIED = 2.0
_COPIES = frozenset({Site.Q_ROPE, Site.K_ROPE}) | CACHE_SITES

# Of what a site is made through, what is a product or attention of every decoder layer.
_IN_EVERY_LAYER = frozenset({Site.ATTN_CTX, Site.ATTN_OUT, Site.MLP_OUT})
_BEHIND_ATTENTION = frozenset({Site.ATTN_OUT, Site.RESID_ATTN})

Index = NDArray[np.intp]  # which pairs of the rows
W = TypeVar("W", contravariant=True)  # how a rule names a place


@dataclass(frozen=True, slots=True)
class Walk:
    """Pairs of one mode and rung.

    Attributes:
        rows: the pairs.
        lost: keys [address] of those addresses that one pass has and that could not be compared.
    """

    rows: Rows
    lost: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def find(self, at: Index, site: Site) -> Index:
        """Return the index [pair of at] of the pair of `site` at the prompt, position and layer of each of `at`; -1
        where that was not compared."""
        return self.rows.find(beside(self.rows.key[at], site))

    def is_recorded(self, at: Index, site: Site) -> Bools:
        """Return [pair of at] whether `site` was compared at the prompt, position and layer of each."""
        return np.asarray(self.find(at, site) >= 0)

    def is_lost(self, at: Index, site: Site) -> Bools:
        """Return [pair of at] whether `site` was recorded beside each and could not be compared."""
        return np.isin(beside(self.rows.key[at], site), self.lost)

    def has_parent(self, at: Index, site: Site) -> Bools:
        """Return [pair of at] whether anything that `site` is computed from was compared beside each."""
        found = np.zeros(len(at), dtype=bool)
        for parent in PARENTS[site]:
            found |= self.is_recorded(at, parent)
        return found

    def is_inside_recorded(self, at: Index) -> Bools:
        """Return [pair of at] whether anything between the boundaries of its layer was compared beside each."""
        found = np.zeros(len(at), dtype=bool)
        for site in PARENTS:
            if site is not Site.LAYER_OUT:
                found |= self.is_recorded(at, site)
        return found

    def is_fresh(self) -> Bools:
        """Return [pair] whether everything that its site is computed from has the same bits in both passes."""
        fresh = np.zeros(len(self.rows), dtype=bool)
        for site in {place.site for place in self.rows.places}:
            here = self.rows.is_at(site)
            outside = np.flatnonzero(here & self.rows.is_outside)
            inside = np.flatnonzero(here & ~self.rows.is_outside)
            fresh[outside] = self._is_fresh_outside(outside, site)
            if site in PARENTS:
                fresh[inside] = self._are_equal(inside, PARENTS[site])
            if site is Site.LAYER_OUT:
                # Of a layer that was not recorded the boundaries alone are known, and all of it lies between them.
                fresh[inside] &= self.is_inside_recorded(inside)
        return fresh

    def _is_fresh_outside(self, at: Index, site: Site) -> Bools:
        # Layer isolation gives the final norm what prefill's last layer handed on; the embedding reads token ids.
        if site is Site.FINAL_NORM_OUT:
            ends = unit_keys(self.rows.key[self.rows.is_at(Site.LAYER_OUT)])
            return np.isin(unit_keys(self.rows.key[at]), ends)
        return np.ones(len(at), dtype=bool) if site is not Site.LOGITS else self._is_equal(at, Site.FINAL_NORM_OUT)

    def _are_equal(self, at: Index, sites: tuple[Site, ...]) -> Bools:
        return np.asarray(np.logical_and.reduce([self._is_equal(at, site) for site in sites]))

    def _is_equal(self, at: Index, site: Site) -> Bools:
        """Whether `site` beside `at` has the same bits, or all that it is computed from where it was not recorded."""
        return np.asarray(self.follow(at, site, _Equality()))

    def passed_through(self, at: Index, site: Site, arithmetic: Arithmetic) -> Floats:
        """Return [pair of at] what rounding may do, relative and in the 2-norm, in attention and products of a layer
        that `site` is computed from and that were not recorded; 0 where there are none."""
        rule = _Passed(arithmetic)
        return np.asarray(np.sqrt(np.add.reduce([self.follow(at, parent, rule) for parent in PARENTS[site]])))

    def difference_of_inputs(self, at: Index, site: Site, arithmetic: Arithmetic) -> Floats:
        """Return [pair of at] the largest relative difference, in the 2-norm, of what `site` is computed from.

        It is NaN where the difference of an input is not known or not finite. `arithmetic` must have roundoffs.
        """
        parents = (Site.FINAL_NORM_OUT,) if site is Site.LOGITS else PARENTS[site]
        rule = _Difference(arithmetic)
        return np.asarray(np.maximum.reduce([rule.of(self, at, parent) for parent in parents]))  # which hands a NaN on

    def follow(self, at: Index, where: W, rule: Rule[W]) -> NDArray[Any]:
        """Return [pair of at] what `rule` says of `where`, seen from each pair: of what was recorded there, or, where
        nothing was, of what it is computed from in turn."""
        keys = rule.keys(self.rows.key[at], where)
        found = self.rows.find(keys)
        values = rule.recorded(self.rows, found, where)
        absent = np.flatnonzero(found < 0)
        if len(absent):
            values[absent] = rule.absent(self, at[absent], absent, where)
        return np.where(np.isin(keys, self.lost), rule.unknown, values)  # it is there, and could not be compared


class Rule(Protocol[W]):
    """What is asked on a walk. A place is named as the rule likes: a site beside the pair, or a place anywhere.

    `unknown` is the answer for a value that was recorded and could not be compared.
    """

    unknown: ClassVar[float | bool]

    def keys(self, keys: Ints, where: W) -> Ints:
        """Return the keys [pair] of `where`, seen from pairs with these keys."""
        ...

    def recorded(self, rows: Rows, found: Index, where: W) -> NDArray[Any]:
        """Return the answer [pair] for the pairs `found`, whatever it is where that is -1."""
        ...

    def absent(self, walk: Walk, at: Index, index: Index, where: W) -> NDArray[Any]:
        """Return the answer [pair] for pairs `at`, those of number `index` among all, where nothing was recorded."""
        ...


class _Beside:
    """Rules that name a site at the prompt, position and layer of the pair."""

    def keys(self, keys: Ints, where: Site) -> Ints:
        """Return the keys of the site beside each."""
        return beside(keys, where)


class _Equality(_Beside):
    """Whether a site has the same bits in both passes."""

    unknown: ClassVar[float | bool] = False

    def recorded(self, rows: Rows, found: Index, where: Site) -> Bools:
        # What went into the layer is prefill's own value, whatever the layer below handed over.
        return np.ones(len(found), dtype=bool) if where is Site.LAYER_IN else rows.equal[found]

    def absent(self, walk: Walk, at: Index, index: Index, where: Site) -> Bools:
        # A layer whose input was not recorded was not given prefill's: several streams, or none that was found.
        if where is Site.LAYER_IN or where not in PARENTS:
            return np.full(len(at), where not in (Site.FINAL_NORM_OUT, Site.LAYER_IN))
        return np.asarray(np.logical_and.reduce([walk.follow(at, parent, self) for parent in PARENTS[where]]))


@dataclass(frozen=True, slots=True)
class _Passed(_Beside):
    """The squares of what rounding may do in what was not recorded on the way to what was.

    Only what every layer of a decoder has is counted: a norm or a rotation that was not recorded may not be there.
    """

    unknown: ClassVar[float | bool] = 0.0
    arithmetic: Arithmetic

    def recorded(self, rows: Rows, found: Index, where: Site) -> Floats:
        return np.zeros(len(found))

    def absent(self, walk: Walk, at: Index, index: Index, where: Site) -> Floats:
        own = self.arithmetic.bound(where) ** 2 if where in _IN_EVERY_LAYER else 0.0
        behind = [walk.follow(at, parent, self) for parent in PARENTS.get(where, ()) if where in _BEHIND_ATTENTION]
        return np.full(len(at), own) + np.add.reduce(behind) if behind else np.full(len(at), own)


@dataclass(frozen=True, slots=True)
class _Difference(_Beside):
    """How far a site may differ: as measured, or, where it was not recorded, as far as its own inputs allow."""

    unknown: ClassVar[float | bool] = math.nan
    arithmetic: Arithmetic

    def of(self, walk: Walk, at: Index, where: Site) -> Floats:
        """Return it for `where` beside each of `at`; what goes into a layer is prefill's own value."""
        return np.zeros(len(at)) if where is Site.LAYER_IN else walk.follow(at, where, self)

    def recorded(self, rows: Rows, found: Index, where: Site) -> Floats:
        drift = rows.rel_l2[found]
        return np.where(np.isfinite(drift), drift, math.nan)

    def absent(self, walk: Walk, at: Index, index: Index, where: Site) -> Floats:
        if where is Site.ROUTER:
            return np.zeros(len(at))  # no mixture of experts
        if where not in PARENTS:
            return np.full(len(at), math.nan)
        return carried_bound(where, walk.difference_of_inputs(at, where, self.arithmetic), self.arithmetic)


def carried_bound(site: Site, inputs: Floats, arithmetic: Arithmetic) -> Floats:
    """Return the relative difference [pair], in the 2-norm, that rounding may make at `site` where its inputs differ by
    `inputs` [pair], in the same measure. NaN is handed on."""
    return np.asarray(arithmetic.bound(site) + (COPIED if site in _COPIES else GROWTH) * inputs)
