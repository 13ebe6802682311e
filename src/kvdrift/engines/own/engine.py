"""The engine that a caller writes, in whatever framework: one method, and what else it can do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvdrift.engines.base import OpenEngine
from kvdrift.errors import UsageError
from kvdrift.vocabulary.facts import AttentionSpec
from kvdrift.vocabulary.plan import AuditPlan

if TYPE_CHECKING:
    from kvdrift.engines.own.watched import WatchedCall


class Engine:
    """Base class of an engine of your own. Write `extend`; each other method that you write lets more be measured.

    Inside `extend`, hand over what is computed: `x = self.see(layer, "layer_in", x)`. Go on with what `see` returns:
    it is the same value, but for the runs in which kvdrift puts another in its place to isolate a layer, to measure
    noise or to plant its positive control. Values are arrays of any framework.

    Attributes:
        name: what reports call the engine; default: the name of the class.
        dtype: what it computes in: bfloat16, float16, float32 or float64; default: that of what it hands over.
        max_length: the most tokens that a cache may hold; None for no limit.
        versions: of what it runs on, by name, for reports.
    """

    name: str | None = None
    dtype: str | None = None
    max_length: int | None = None
    versions: Mapping[str, str] = {}

    _seen: WatchedCall | None = None  # while a call is watched

    def extend(self, tokens: list[int], cache: Any, start: int) -> Any:
        """Run the model on `tokens`, on top of a cache that holds `start` tokens.

        Return the logits [token, vocabulary] of all of them and the cache to go on with, (logits, cache); or the logits
        alone, where the cache was changed in place.
        """
        raise NotImplementedError

    def new_cache(self, max_length: int) -> Any:
        """Return an empty cache for so many tokens, in the dtype that the engine now computes in; default: None."""
        return None

    def rewind(self, cache: Any, length: int) -> Any:
        """Keep the first `length` tokens; return the cache to go on with, or None for the same one."""
        raise NotImplementedError

    def copy(self, cache: Any) -> Any:
        """Return a copy that shares nothing with this cache: what an engine without `rewind` may have."""
        raise NotImplementedError

    def cast(self, dtype: str) -> None:
        """Compute in another dtype from now on, with the same weights: "float64", and later the engine's own again."""
        raise NotImplementedError

    def weights(self) -> Mapping[str, Any]:
        """Return all weights by name, as arrays."""
        raise NotImplementedError

    def record(self) -> Mapping[tuple[int | None, str], Any]:
        """Return what the last call computed, by (layer, site): for engines that keep it, in the place of `see`."""
        raise NotImplementedError

    def see(self, layer: int | None, site: str, values: Any, *, slots: Sequence[int] | None = None) -> Any:
        """Hand over the values of a site, and return what to go on with.

        Args:
            layer: its number; None outside the layers (embed_out, final_norm_out).
            site: `kvdrift.Site`, by name.
            values: [token, ...] of all tokens of the call, [1, token, ...] too. k_cache and v_cache are what attention
                reads, [slot, kv head, dim]; attn_scores and attn_probs are [token, head, slot].
            slots: of these, the position of the token that each slot holds; default 0, 1, 2 ..., or the last ones where
                there are fewer slots than tokens.
        """
        return values if self._seen is None else self._seen.see(layer, site, values, slots)

    def attends(
        self,
        layer: int,
        *,
        scale: float,
        softcap: float | None = None,
        window: int | None = None,
        sinks: Sequence[float] | None = None,
        slopes: Sequence[float] | None = None,
    ) -> None:
        """Say how a layer attends (`kvdrift.vocabulary.facts.AttentionSpec`), so that it can be computed again."""
        if self._seen is not None:
            sinks, slopes = (None if given is None else tuple(map(float, given)) for given in (sinks, slopes))
            self._seen.attends(layer, AttentionSpec(float(scale), softcap, window, sinks=sinks, slopes=slopes))

    def can(self, ability: str) -> bool:
        """Whether a method of that name was written: rewind, copy, cast, weights, record."""
        method = getattr(self, ability)
        return getattr(method, "__func__", method) is not getattr(Engine, ability)

    @contextmanager
    def opened(self, plan: AuditPlan) -> Iterator[OpenEngine]:
        """Watch the engine while the context is open; see `kvdrift.engines.base.CanBeOpened`.

        Raises:
            UsageError: it has no `extend`, or --ladder asks for one layer at a time.
        """
        from kvdrift.engines.own.running import RunningEngine

        if not self.can("extend"):
            raise UsageError(
                f"{type(self).__name__} has no extend; write extend(tokens, cache, start), which returns (logits, "
                "cache): docs/engines/own.md"
            )
        if plan.ladder == "layer":
            raise UsageError("--ladder layer is for models in torch; leave it out, or use --ladder off (ladder='off')")
        with RunningEngine(self, plan.layers) as engine:
            yield OpenEngine(engine, None)


__all__ = ["Engine"]
