"""What the inputs of an address did: the walk from a site to what it is computed from, for many pairs at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvdrift.compare.rows import Bools, Floats, Ints, Rows, beside, unit_keys
from kvdrift.vocabulary.precision import Arithmetic
from kvdrift.vocabulary.sites import CACHE_SITES, PARENTS, Site

# The most by which an operation enlarges a relative difference of its inputs. A matrix with inputs along its small
# singular directions, or a residual that cancels, enlarges it. The largest that clean runs showed beyond the rounding
# of the operation itself is written in decision 15, by `./run bench growth`.
GROWTH = 32.0
COPIED = 2.0
_COPIES = frozenset({Site.Q_ROPE, Site.K_ROPE}) | CACHE_SITES

Index = NDArray[np.intp]  # which pairs of the rows


@dataclass(frozen=True, slots=True)
class Walk:
    """Pairs of one mode and rung with aligned inputs.

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
                fresh[inside] &= self.has_parent(inside, site)
        return fresh

    def _is_fresh_outside(self, at: Index, site: Site) -> Bools:
        # Layer isolation gives the final norm what prefill's last layer handed on; the embedding reads token ids.
        if site is Site.FINAL_NORM_OUT:
            ends = unit_keys(self.rows.key[self.rows.is_at(Site.LAYER_OUT)])
            return np.isin(unit_keys(self.rows.key[at]), ends)
        return np.ones(len(at), dtype=bool) if site is not Site.LOGITS else self._is_equal(at, Site.FINAL_NORM_OUT)

    def _are_equal(self, at: Index, sites: tuple[Site, ...]) -> Bools:
        equal = np.ones(len(at), dtype=bool)
        for site in sites:
            equal &= self._is_equal(at, site)
        return equal

    def _is_equal(self, at: Index, site: Site) -> Bools:
        """Whether `site` beside `at` has the same bits, or all that it is computed from where it was not recorded."""
        found = self.find(at, site)
        # What went into the layer is prefill's own value, whatever the layer below handed over.
        equal = np.ones(len(at), dtype=bool) if site is Site.LAYER_IN else self.rows.equal[found] & (found >= 0)
        absent = np.flatnonzero(found < 0)
        if site is not Site.LAYER_IN and site in PARENTS:
            equal[absent] = self._are_equal(at[absent], PARENTS[site])
        else:
            equal[absent] = site is not Site.FINAL_NORM_OUT
        return equal & ~self.is_lost(at, site)  # it is there, and could not be compared

    def difference_of_inputs(self, at: Index, site: Site, arithmetic: Arithmetic) -> Floats:
        """Return [pair of at] the largest relative difference, in the 2-norm, of what `site` is computed from.

        It is NaN where the difference of an input is not known or not finite. `arithmetic` must have roundoffs.
        """
        parents = (Site.FINAL_NORM_OUT,) if site is Site.LOGITS else PARENTS[site]
        known = [self._difference(at, parent, arithmetic) for parent in parents]
        return np.asarray(np.maximum.reduce(known))  # which hands a NaN on

    def _difference(self, at: Index, site: Site, arithmetic: Arithmetic) -> Floats:
        """How far a site may differ: as measured, or, where it was not recorded, as far as its own inputs allow."""
        if site is Site.LAYER_IN:
            return np.zeros(len(at))  # prefill's own value, whatever the layer below handed over
        found = self.find(at, site)
        drift = self.rows.rel_l2[found]
        drift = np.where(np.isfinite(drift), drift, math.nan)
        absent = np.flatnonzero(found < 0)
        if site is Site.ROUTER:
            drift[absent] = 0.0  # no mixture of experts
        elif site in PARENTS:
            drift[absent] = carried_bound(site, self.difference_of_inputs(at[absent], site, arithmetic), arithmetic)
        else:
            drift[absent] = math.nan
        return np.where(self.is_lost(at, site), math.nan, drift)


def carried_bound(site: Site, inputs: Floats, arithmetic: Arithmetic) -> Floats:
    """Return the relative difference [pair], in the 2-norm, that rounding may make at `site` where its inputs differ by
    `inputs` [pair], in the same measure. NaN is handed on."""
    return np.asarray(arithmetic.bound(site) + (COPIED if site in _COPIES else GROWTH) * inputs)
