"""Faults of recurrent state: convolution windows and state matrices that a decode step reads or leaves behind."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.torch.model import Fault
from kvdrift_bench.planted.torch.parts import needs_states
from kvdrift_bench.planted.torch.ways import Way, planted
from kvdrift_bench.planted.torch.ways_modules import StateCall, in_states

_CONV = (Site.CONV_STATE, Site.SSM_STATE)
_SSM = (Site.SSM_STATE, Site.LAYER_OUT)


def recurrent_faults() -> tuple[Fault, ...]:
    """Return the faults of recurrent state, planted in every layer that has one."""

    def fault(
        name: str,
        reference: str,
        where: str,
        cause: str,
        sites: tuple[Site, ...],
        *ways: Way,
        lacking: str | None = None,
    ) -> Fault:
        return Fault(
            name=name,
            mechanism="M22",
            reference=reference,
            where=where,
            sites=sites,
            cause=cause,
            plant=planted(*ways),
            applies=needs_states,
            undiagnosable=lacking,
        )

    inputs = "the state before the step and what the step adds to it"
    return (
        fault(
            "conv_state_not_advanced",
            "sgl-project/sglang#37836",
            "The convolution window of every layer, put back to what it was before the step.",
            "conv_state_stale",
            _CONV,
            in_states(before=_remember("conv"), after=_put_back("conv")),
        ),
        fault(
            "conv_state_after_convolution",
            "state-spaces/mamba#1027",
            "The convolution window of every layer, holding what came out of the convolution instead of what went in.",
            "conv_state_post_conv",
            _CONV,
            in_states(before=_convolved),
            lacking="the weights of the convolution",
        ),
        fault(
            "ssm_state_not_updated",
            "vllm-project/vllm#56196",
            "The state matrix of every layer, put back to what it was before the step.",
            "ssm_state_stale",
            _SSM,
            in_states(before=_remember("ssm"), after=_put_back("ssm")),
        ),
        fault(
            "ssm_state_transposed",
            "vllm-project/vllm#41292",
            "The state matrix of every layer, read with its two axes exchanged.",
            "ssm_state_transposed",
            _SSM,
            in_states(before=_change_ssm(_transposed)),
            lacking=inputs,
        ),
        fault(
            "ssm_state_decayed_twice",
            "ml-explore/mlx-lm#1736",
            "The state matrix of every layer, decayed by 1 % before the step.",
            "ssm_state_scale",
            _SSM,
            in_states(before=_change_ssm(lambda state: state * 0.99)),
            lacking=inputs,
        ),
        fault(
            "ssm_state_bf16",
            "ml-explore/mlx-lm#1189",
            "The state matrix of every layer, rounded to bf16 after the step.",
            "ssm_state_rounded",
            _SSM,
            in_states(after=_change_ssm(lambda state: state.to(torch.bfloat16).to(state.dtype))),
        ),
    )


def _remember(name: str) -> Callable[[StateCall], bool]:
    def remember(call: StateCall) -> bool:
        call.commits.memory[name, call.layer] = getattr(call, name).clone()
        return False

    return remember


def _put_back(name: str) -> Callable[[StateCall], bool]:
    def put_back(call: StateCall) -> bool:
        getattr(call, name).copy_(call.commits.memory[name, call.layer])
        return True

    return put_back


def _change_ssm(change: Callable[[Tensor], Tensor]) -> Callable[[StateCall], bool]:
    def apply(call: StateCall) -> bool:
        call.ssm.copy_(change(call.ssm))
        return True

    return apply


def _transposed(state: Tensor) -> Tensor:
    return state.transpose(-1, -2).reshape(state.shape).clone()


def _convolved(call: StateCall) -> bool:
    conv = call.module.conv1d
    width, rows = conv.weight.shape[-1] - 1, call.conv.to(conv.weight.dtype)
    out = F.conv1d(rows, conv.weight, conv.bias, padding=width, groups=conv.weight.shape[0])
    call.conv.copy_(F.silu(out[..., : call.conv.shape[-1]]))
    return True
