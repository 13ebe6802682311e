"""What a verdict is about, where it is about less than every layer from the cache to the logits.

The user names the scope, and a pass of it carries its name. A scope never makes a mismatch smaller: what is beyond
rounding anywhere is a MISMATCH.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from kvdrift.errors import UsageError
from kvdrift.vocabulary.plan import parse_layers
from kvdrift.vocabulary.sites import CACHE_SITES, FORWARD_ORDER, Site

HELP = "attention, layers=0-3, up-to=SITE or sampled"
_ATTENTION = frozenset({Site.Q_ROPE, Site.K_ROPE, *CACHE_SITES, Site.ATTN_SCORES, Site.ATTN_PROBS, Site.ATTN_CTX})


@dataclass(frozen=True, slots=True)
class Scope:
    """What is claimed of a recording; the default is everything.

    Attributes:
        attention: only what attention makes of the queries and the cache.
        layers: only these layers, None for all.
        up_to: in every layer only the sites up to this one in forward order, None for all.
        sampled: only the recorded elements, at the one precision they were recorded at.
    """

    attention: bool = False
    layers: tuple[int, ...] | None = None
    up_to: Site | None = None
    sampled: bool = False

    def __bool__(self) -> bool:
        """Whether less than everything is claimed."""
        return self != Scope()

    @property
    def is_partial(self) -> bool:
        """Whether some layers or sites are left out."""
        return self.attention or self.layers is not None or self.up_to is not None

    @property
    def name(self) -> str:
        """The scope in words, "" for everything.

        >>> Scope(attention=True, layers=(0, 1, 2, 5)).name
        'attention; layers 0-2, 5'
        """
        parts = ["attention"] if self.attention else []
        if self.layers is not None:
            parts.append(f"layer{'s' if len(self.layers) > 1 else ''} {_runs(self.layers)}")
        if self.up_to is not None:
            parts.append(f"up to {self.up_to}")
        if self.sampled:
            parts.append("sampled, one rung")
        return "; ".join(parts)

    def has_layer(self, layer: int) -> bool:
        """Whether something is claimed of a layer."""
        return self.layers is None or layer in self.layers

    def has_site(self, site: Site) -> bool:
        """Whether something is claimed of a site, in the layers that are in the scope."""
        if self.attention:
            return site in _ATTENTION
        return self.up_to is None or FORWARD_ORDER[site] <= FORWARD_ORDER[self.up_to]


def parse_scope(texts: Iterable[str]) -> Scope:
    """Return the scope that the values of --scope name together.

    Raises:
        UsageError: one of them names none.

    >>> parse_scope(["layers=0-3", "up-to=attn_ctx"]).name
    'layers 0-3; up to attn_ctx'
    """
    scope = Scope()
    for text in texts:
        name, _, value = text.strip().partition("=")
        if text == "attention":
            scope = Scope(True, scope.layers, scope.up_to, scope.sampled)
        elif text == "sampled":
            scope = Scope(scope.attention, scope.layers, scope.up_to, True)
        elif name == "layers" and value:
            scope = Scope(scope.attention, parse_layers(value), scope.up_to, scope.sampled)
        elif name == "up-to" and value in Site.__members__.values():
            scope = Scope(scope.attention, scope.layers, Site(value), scope.sampled)
        elif name == "up-to":
            raise UsageError(f"unknown site {value!r} in --scope {text!r}; the sites are {', '.join(Site)}")
        else:
            raise UsageError(f"unknown scope {text!r}; use --scope {HELP} (scope=[...]), several times if need be")
    return scope


def _runs(layers: tuple[int, ...]) -> str:
    """Layer numbers as ranges."""
    starts = [layers[0], *(b for a, b in pairwise(layers) if b != a + 1)]
    ends = [*(a for a, b in pairwise(layers) if b != a + 1), layers[-1]]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
