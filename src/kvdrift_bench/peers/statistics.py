"""The statistics on which other tools decide, each written from its documented formula.

x is prefill's value and the expected one, y that of decode, d = y - x, r the reference at float64; all in float64.
A function returns one number, for one tensor or for several. What is broken (`PairedTensor.is_broken`) is left to the
caller.
"""

from __future__ import annotations

import math

import numpy as np

from kvdrift_bench.peers.tensors import Floats, PairedTensor

_TINY_TENSOR = 1000  # elements below which torch._dynamo allows more
_BINS = 100

# Relative and absolute tolerance by dtype.
_ASSERT_CLOSE = {
    "float16": (1e-3, 1e-5),
    "bfloat16": (1.6e-2, 1e-5),
    "float32": (1.3e-6, 1e-5),
    "float64": (1e-7, 1e-7),
}
# Relative tolerance by how many of the largest logits are looked at; 0 stands for all of them.
_NEURON_TOP_K = {5: 0.011, 50: 0.02, 1000: 0.03, 0: 0.05}


def over(error: float, allowed: float) -> float:
    """Return error / allowed; 0 for no error, infinity for an error where none is allowed."""
    if error <= 0.0:
        return 0.0
    return error / allowed if allowed > 0.0 else math.inf


def bits_differ(tensor: PairedTensor) -> float:
    """1 if any bit differs, else 0."""
    return 0.0 if tensor.has_equal_bits else 1.0


def gretacore_gate(tensor: PairedTensor) -> float:
    """max(p99(|d|) / 1e-3, max|d| / 5e-3); p99 is the smallest value that 99 % of the elements do not exceed."""
    rank = math.ceil(0.99 * tensor.size) - 1
    p99 = float(np.partition(tensor.distance, rank)[rank])
    return max(p99 / 1e-3, tensor.max_abs / 5e-3)


def calc_diff(tensor: PairedTensor) -> float:
    """1 - 2 sum(x y) / sum(x^2 + y^2)."""
    total = float(tensor.x @ tensor.x + tensor.y @ tensor.y)
    return tensor.energy / total if total > 0.0 else 0.0  # the same number without the cancellation


def tolerance_ratio(tensor: PairedTensor, relative: float, absolute: float) -> float:
    """max over elements of |d| / (absolute + relative |x|)."""
    return float((tensor.distance / (absolute + relative * np.abs(tensor.x))).max())


def elementwise_1e_5(tensor: PairedTensor) -> float:
    """max over elements of |d| / (1e-5 + 1e-5 |x|)."""
    return tolerance_ratio(tensor, 1e-5, 1e-5)


def l2_distance(tensor: PairedTensor) -> float:
    """sqrt(sum d^2)."""
    return math.sqrt(tensor.energy)


def cosine(tensor: PairedTensor) -> float:
    """sum(x y) / (|x| |y|)."""
    return tensor.cosine


def signal_to_noise(tensor: PairedTensor) -> float:
    """10 log10(sum x^2 / sum d^2) in dB; infinite if nothing differs."""
    if tensor.energy == 0.0:
        return math.inf
    signal = float(tensor.x @ tensor.x)
    return 10.0 * math.log10(signal / tensor.energy) if signal > 0.0 else -math.inf


def msprobe(tensor: PairedTensor) -> float:
    """The rule `(cos < 0.99 and max|d| > 0.001) or cos < 0.9 or max|d| > 1` as one number, above 1 where it holds:
    max(min((1 - cos) / 0.01, max|d| / 0.001), (1 - cos) / 0.1, max|d| / 1)."""
    away = 1.0 - tensor.cosine
    return max(min(away / 0.01, tensor.max_abs / 0.001), away / 0.1, tensor.max_abs)


def assert_close(tensor: PairedTensor) -> float:
    """max over elements of |d| / (absolute + relative |x|), with the tolerances of the tensor's dtype."""
    relative, absolute = _ASSERT_CLOSE.get(tensor.dtype, (0.0, 0.0))
    if relative == 0.0:
        return 0.0 if tensor.has_equal_bits else math.inf
    return tolerance_ratio(tensor, relative, absolute)


def dynamo_same(tensor: PairedTensor) -> float:
    """0 if |d| <= 1e-4 + 1e-4 |y| everywhere, else (rmse(y, r) - 1e-5) / (k rmse(x, r)), k = 3 at half precision and
    for fewer than 1000 elements, else 2."""
    if bool((tensor.distance <= 1e-4 + 1e-4 * np.abs(tensor.y)).all()):
        return 0.0
    of_prefill, of_decode = _errors(tensor)
    multiplier = 3.0 if tensor.dtype in ("float16", "bfloat16") or tensor.size < _TINY_TENSOR else 2.0
    return over(_rms(of_decode) - 1e-5, multiplier * _rms(of_prefill))


def three_times(tensor: PairedTensor) -> float:
    """(max|y - r| - 1e-5) / max|x - r|."""
    of_prefill, of_decode = _errors(tensor)
    return over(float(np.abs(of_decode).max()) - 1e-5, float(np.abs(of_prefill).max()))


def nmse(tensor: PairedTensor) -> float:
    """sum d^2 / sum x^2."""
    return over(tensor.energy, float(tensor.x @ tensor.x))


def neuron_module(tensors: list[PairedTensor]) -> tuple[float, PairedTensor]:
    """The module test over all inputs of one module, above 1 where it fails, and the input with the worst error:
    max(min((1 - BC) / 0.01, sigma), worst Linf ratio / 5, worst L2 ratio / 3).

    A ratio is decode's error over prefill's, both against r; sigma takes the root mean square over all inputs.
    """
    pairs = [_errors(tensor) for tensor in tensors]
    largest = [over(float(np.abs(decode).max()), float(np.abs(prefill).max())) for prefill, decode in pairs]
    lengths = [over(_rms(decode), _rms(prefill)) for prefill, decode in pairs]
    worst = max(range(len(tensors)), key=lambda index: max(largest[index] / 5.0, lengths[index] / 3.0))
    spread = _same_spread([p for p, _ in pairs], [d for _, d in pairs])
    return max(spread, max(largest) / 5.0, max(lengths) / 3.0), tensors[worst]


def neuron_logits(tensors: list[PairedTensor]) -> tuple[float, PairedTensor]:
    """The three-way logit test over all tokens, above 1 where it fails, and the token with the worst error:
    min(two-way, (1 - BC) / 0.01, sigma), two-way being the largest over k of
    (max|d| - 1e-5) / (tol_k max|x|) among the k largest expected logits."""
    two_way = [_top_k_error(tensor) for tensor in tensors]
    worst = max(range(len(tensors)), key=lambda index: two_way[index])
    if any(tensor.errors is None for tensor in tensors):
        return two_way[worst], tensors[worst]
    pairs = [_errors(tensor) for tensor in tensors]
    spread = _same_spread([p for p, _ in pairs], [d for _, d in pairs])
    return min(two_way[worst], spread), tensors[worst]


def k3(tensor: PairedTensor) -> float:
    """exp(l) - 1 - l, l being the log-probability of the next token in prefill less that in decode."""
    assert tensor.next_token is not None
    ratio = _log_probability(tensor.x, tensor.next_token) - _log_probability(tensor.y, tensor.next_token)
    return math.expm1(ratio) - ratio


def rank_of_other_choice(tensor: PairedTensor) -> float:
    """The worse of two ranks, from 1: of prefill's most likely token in decode, and of decode's in prefill."""
    choices = int(np.argmax(tensor.x)), int(np.argmax(tensor.y))
    ranks = [1 + int((logits > logits[choice]).sum()) for logits in (tensor.x, tensor.y) for choice in choices]
    return float(max(ranks))


def chooses_another_token(tensor: PairedTensor) -> bool:
    """Whether the most likely token differs."""
    return int(np.argmax(tensor.x)) != int(np.argmax(tensor.y))


def _errors(tensor: PairedTensor) -> tuple[Floats, Floats]:
    errors = tensor.errors
    assert errors is not None
    return errors


def _rms(values: Floats) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _same_spread(prefill: list[Floats], decode: list[Floats]) -> float:
    """min((1 - BC) / 0.01, sigma), BC being the sum of sqrt(p q) over 100 bins that span both sets of errors."""
    expected, target = np.concatenate(prefill), np.concatenate(decode)
    sigma = over(_rms(target), _rms(expected))
    low, high = (
        float(min(expected.min(), target.min())),
        float(max(expected.max(), target.max())),
    )
    if low == high:
        return min(0.0, sigma)
    counts = [np.histogram(errors, bins=_BINS, range=(low, high))[0] / errors.size for errors in (expected, target)]
    overlap = float(np.sqrt(counts[0] * counts[1]).sum())
    return min(max(0.0, 1.0 - overlap) / 0.01, sigma)


def _top_k_error(tensor: PairedTensor) -> float:
    order = np.argsort(-tensor.x, kind="stable")
    worst = 0.0
    for count, tolerance in _NEURON_TOP_K.items():
        top = order[: count or None]
        error = float(tensor.distance[top].max()) - 1e-5
        worst = max(worst, over(error, tolerance * float(np.abs(tensor.x[top]).max())))
    return worst


def _log_probability(logits: Floats, token: int) -> float:
    top = float(logits.max())
    return float(logits[token]) - top - math.log(float(np.exp(logits - top).sum()))
