"""Faults of recurrent state: convolution windows and state matrices that a decode step reads or leaves behind."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvdrift_bench.planted.torch.parts import needs_states
from kvdrift_bench.planted.torch.registry import fault
from kvdrift_bench.planted.torch.ways import Way, beside
from kvdrift_bench.planted.torch.ways_modules import StateCall, in_states_after, in_states_before

State = Literal["conv", "ssm"]


def _noting(state: State) -> Way:
    """Keep what a state was before the step."""

    @in_states_before
    def note(call: StateCall) -> bool:
        call.commits.memory[state, call.layer] = getattr(call, state).clone()
        return False

    return note


def _put_back(call: StateCall, state: State) -> bool:
    getattr(call, state).copy_(call.commits.memory[state, call.layer])
    return True


def _put(state: Tensor, new: Tensor) -> bool:
    state.copy_(new)
    return True


@fault(needs_states)
@beside(_noting("conv"))
@in_states_after
def conv_state_not_advanced(call: StateCall) -> bool:
    return _put_back(call, "conv")


@fault(needs_states)
@in_states_before
def conv_state_after_convolution(call: StateCall) -> bool:
    conv = call.module.conv1d
    width, rows = conv.weight.shape[-1] - 1, call.conv.to(conv.weight.dtype)
    out = F.conv1d(rows, conv.weight, conv.bias, padding=width, groups=conv.weight.shape[0])
    return _put(call.conv, F.silu(out[..., : call.conv.shape[-1]]))


@fault(needs_states)
@beside(_noting("ssm"))
@in_states_after
def ssm_state_not_updated(call: StateCall) -> bool:
    return _put_back(call, "ssm")


@fault(needs_states)
@in_states_before
def ssm_state_transposed(call: StateCall) -> bool:
    return _put(call.ssm, call.ssm.transpose(-1, -2).reshape(call.ssm.shape).clone())


@fault(needs_states)
@in_states_before
def ssm_state_decayed_twice(call: StateCall) -> bool:
    return _put(call.ssm, call.ssm * 0.99)


@fault(needs_states)
@in_states_after
def ssm_state_bf16(call: StateCall) -> bool:
    return _put(call.ssm, call.ssm.to(torch.bfloat16).to(call.ssm.dtype))
