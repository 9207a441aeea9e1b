"""Rounding whose scales are searched: of each group or block the one with the smallest error, where
an error counts by the inputs that it meets.

Letters: O output features, D input features of a weight [..., O, D], G group size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_ops.ops._checks import dtype_name
from moe_ops.weight_formats import WeightFormat

from .published import StoredWeight

_PIECE = 2**18  # Numbers that are rounded at a time: 1 MiB in fp32.
# Steps of 4 bits that are tried, relative to that which makes the largest number exactly -8.
_INT4_STEPS = (1.0, 0.95, 0.9, 0.85, 0.8, 1.05, 1.1, -1.0, -1.05, -1.1, -1.15)
# Steps of q4_K that are tried: the range of a run divided by so many.
_Q4_K_STEPS = (15.0, 14.5, 14.0, 13.0, 15.5, 16.0, 17.0)


def search_int4(
    w: Tensor,
    group_size: int,
    importance: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> StoredWeight:
    """Rounds a weight to 4 bits with the scale of each group that has the smallest squared error.

    Steps around the one of `quantize_weight` are tried, of either sign, and the best one is then
    fitted to its codes by least squares. With importance, an error also counts by the size of its
    weight, as ``sqrt(w ** 2 + mean(row ** 2))``: large weights carry most of an output.

    Args:
        w: [O, D], float.
        group_size: of inputs that share a scale; divides D.
        importance: [D], nonnegative: how much the error of each input counts; None is 1.
        scale_dtype: of the scales. Codes are those for the rounded scales.
    """
    importances = _weights(w, importance, group_size)
    how = WeightFormat("int4", group_size, dtype_name(scale_dtype))

    def one(rows: Tensor) -> tuple[Tensor, Tensor]:
        groups = rows.unflatten(-1, (-1, group_size))
        counts = importances
        if importance is not None:
            squares = groups.square()
            counts = (squares.mean((-2, -1), keepdim=True) + squares).sqrt_().mul_(importances)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        base = torch.where(high > -low, high, low) / -8
        best_error = torch.full_like(base, torch.inf)
        best = base.clone()

        def rounded(step: Tensor) -> tuple[Tensor, Tensor]:
            step = step.to(scale_dtype).float()
            return step, (groups / torch.where(step == 0, 1.0, step)).round_().clamp_(-8, 7)

        def consider(step: Tensor) -> Tensor:
            nonlocal best_error, best
            step, q = rounded(step)
            error = (groups - q * step).square_().mul_(counts).sum(-1, keepdim=True)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = torch.where(better, step, best)
            return q

        for factor in _INT4_STEPS:
            consider(base * factor)
        _, q = rounded(best)
        weighted = q * counts
        norm = (weighted * q).sum(-1, keepdim=True)
        fitted = (weighted * groups).sum(-1, keepdim=True) / norm.clamp(min=1e-30)
        consider(torch.where(norm > 0, fitted, best))
        step, q = rounded(best)
        codes = q.add_(8).to(torch.uint8).flatten(-2)
        return codes[..., 0::2] | codes[..., 1::2] << 4, step.squeeze(-1).to(scale_dtype)

    return StoredWeight(how, *_by_rows(one, w))


def search_q4_k(w: Tensor, importance: Tensor | None = None) -> StoredWeight:
    """Rounds a weight to ggml's q4_K: for each run of 32 inputs a step and a low with the smallest
    squared error, both of 6 bits times a float16 of the block of 256.

    Args:
        w: [O, D], float; D is a multiple of 256.
        importance: [D], nonnegative: how much the error of each input counts; None is 1.
    """
    counts = _weights(w, importance, 32)

    def one(rows: Tensor) -> tuple[Tensor, Tensor]:
        runs = rows.unflatten(-1, (-1, 32))  # [O, D/32, 32]
        total = counts.expand_as(runs[:1]).sum(-1, keepdim=True)
        sum_x = (runs * counts).sum(-1, keepdim=True)
        low = runs.amin(-1, keepdim=True).clamp_(max=0)
        span = runs.amax(-1, keepdim=True) - low
        step, offset = span / 15, low
        best_error = torch.full_like(span, torch.inf)
        for steps in _Q4_K_STEPS:
            tried = span / steps
            q = ((runs - low) / torch.where(tried == 0, 1.0, tried)).round_().clamp_(0, 15)
            weighted = q * counts
            sum_q = weighted.sum(-1, keepdim=True)
            sum_qq = (weighted * q).sum(-1, keepdim=True)
            sum_qx = (weighted * runs).sum(-1, keepdim=True)
            # Least squares of x = s * q + b with b at most 0.
            det = total * sum_qq - sum_q * sum_q
            s = (total * sum_qx - sum_q * sum_x) / torch.where(det > 0, det, 1.0)
            b = (sum_x - s * sum_q) / total.clamp(min=1e-30)
            alone = (det <= 0) | (b > 0)
            s = torch.where(alone, sum_qx / sum_qq.clamp(min=1e-30), s)
            b = torch.where(alone, 0.0, b)
            error = (runs - q * s - b).square_().mul_(counts).sum(-1, keepdim=True)
            better = (error < best_error) & (s > 0)
            best_error = torch.where(better, error, best_error)
            step, offset = torch.where(better, s, step), torch.where(better, b, offset)
        return _q4_k_record(runs, step.squeeze(-1), -offset.squeeze(-1))

    return StoredWeight(WeightFormat("q4_k"), *_by_rows(one, w))


def _q4_k_record(runs: Tensor, steps: Tensor, lows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns codes and records of runs [O, D/32, 32] with these steps and lows [O, D/32]."""
    steps, lows = steps.unflatten(-1, (-1, 8)), lows.unflatten(-1, (-1, 8))

    def in_six_bits(numbers: Tensor) -> tuple[Tensor, Tensor]:
        factor = (numbers.amax(-1, keepdim=True) / 63).half()
        divisor = factor.float()
        codes = numbers / torch.where(divisor == 0, 1.0, divisor)
        return factor, codes.round_().clamp_(0, 63).to(torch.uint8)

    (d, s), (m, b) = in_six_bits(steps), in_six_bits(lows)
    step, low = d.float() * s.float(), m.float() * b.float()
    blocks = runs.unflatten(-2, (-1, 8))
    shifted = (blocks + low.unsqueeze(-1)) / torch.where(step == 0, 1.0, step).unsqueeze(-1)
    codes = shifted.round_().clamp_(0, 15).to(torch.uint8)
    packed = (codes[..., 0::2, :] | codes[..., 1::2, :] << 4).flatten(-3)
    first = s[..., :4] | s[..., 4:] >> 4 << 6
    second = b[..., :4] | b[..., 4:] >> 4 << 6
    third = s[..., 4:] & 15 | (b[..., 4:] & 15) << 4
    head = torch.cat((d, m), -1).view(torch.uint8)
    return packed, torch.cat((head, first, second, third), -1)


def _weights(w: Tensor, importance: Tensor | None, group_size: int) -> Tensor:
    """Returns [D/G, G], or ones [1, 1]; groups without any importance count evenly."""
    if importance is None:
        return w.new_ones(1, 1, dtype=torch.float32)
    groups = importance.float().unflatten(-1, (-1, group_size))
    # A channel that no token used still has to be stored as well as its group allows.
    floor = groups.amax(-1, keepdim=True) * 1e-6
    return torch.where(floor > 0, torch.maximum(groups, floor), 1.0)


def _by_rows(one: Callable[[Tensor], tuple[Tensor, Tensor]], w: Tensor) -> tuple[Tensor, Tensor]:
    """Applies a function to some rows at a time, which stay in the cache."""
    pieces = w.detach().split(max(1, _PIECE // w.shape[-1]))
    parts = [one(piece.float()) for piece in pieces]
    codes, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return codes, scales
