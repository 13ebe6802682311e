"""Faults of the cache as a whole: rows of another layer, and rows read in the wrong layout."""

from __future__ import annotations

import torch

from kvdrift_bench.planted.torch.cache import Rows, reading
from kvdrift_bench.planted.torch.parts import needs_cache, needs_groups, needs_interface
from kvdrift_bench.planted.torch.registry import fault
from kvdrift_bench.planted.torch.ways import AttentionCall, CacheCall, in_attention, in_one_layer, in_writes


@fault(needs_cache)
@reading
@in_one_layer
def cache_of_the_layer_below(call: CacheCall) -> Rows | None:
    donor = call.layers[call.layer - 1]
    return (donor.keys, donor.values) if donor.keys.shape == call.keys.shape else None


@fault(needs_cache)
@in_writes
@in_one_layer
def donor_overwritten(call: CacheCall) -> Rows | None:
    """The layer above writes into the slots of the layer below, which is seen when that one reads them next."""
    donor = call.layers[call.layer - 1]
    rows = call.keys.shape[2]
    if donor.keys.shape[1:] != (*call.keys.shape[1:2], donor.keys.shape[2], call.keys.shape[3]):
        return None
    donor.keys = torch.cat([donor.keys[:, :, :-rows], call.keys], 2)
    donor.values = torch.cat([donor.values[:, :, :-rows], call.values], 2)
    call.commits.take(donor.keys, None)
    return None


@fault(needs_cache)
@reading
@in_one_layer
def values_of_the_layer_below(call: CacheCall) -> Rows | None:
    donor = call.layers[call.layer - 1]
    return (call.keys, donor.values) if donor.values.shape == call.values.shape else None


@fault(needs_cache)
@reading
@in_one_layer
def values_transposed(call: CacheCall) -> Rows:
    return call.keys, call.values.transpose(1, 2).reshape(call.values.shape)


@fault(needs_cache)
@reading
@in_one_layer
def values_rolled(call: CacheCall) -> Rows:
    return call.keys, call.values.roll(1, dims=2)


@fault(needs_cache)
@reading
@in_one_layer
def keys_read_as_values(call: CacheCall) -> Rows:
    return call.keys, call.keys.clone()


@fault(needs_interface)
@in_attention
@in_one_layer
def query_strides_ignored(call: AttentionCall) -> bool:
    shape = call.query.shape
    wrong = call.query.reshape(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)
    call.query = wrong.contiguous()
    return True


@fault(needs_groups)
@in_writes
def kv_heads_written_alike(call: CacheCall) -> Rows:
    """Rows laid out for the query heads, in a buffer for the kv heads: the first kv head fills all of it."""
    return call.keys[:, :1].expand_as(call.keys).clone(), call.values[:, :1].expand_as(call.values).clone()
