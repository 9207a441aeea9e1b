"""Building blocks of HoME: features, gates over experts, towers.

Letters: T rows of a batch, V width of a row's features, G inputs, E experts, M mixtures, K tasks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops._fields import check_least
from moe_ops.layers import ExpertBatchNorm, Experts, mix_outputs
from moe_ops.layers.all_experts import grouped_linear, low_rank_maps, segments


def spread(x: Tensor, input_ids: Sequence[int] | None) -> Tensor:
    """Returns x[:, input_ids] for non-decreasing ids, as views: indexing would gather and
    scatter."""
    if input_ids is None:
        return x
    counts = Counter(input_ids)
    return torch.cat([x[:, i, None].expand(-1, n, -1) for i, n in sorted(counts.items())], dim=1)


class Features(nn.Module):
    """Feature vector: embeddings of the categorical features, then the dense ones.

    Args:
        cardinalities: number of values of each categorical feature.
        num_dense: number of dense features.
        embedding_size: width of every embedding.

    Attributes:
        size: V = embedding_size * len(cardinalities) + num_dense.

    All embeddings are in one table, read by one lookup. They are normal with deviation 0.01, so
    that interactions start small, as is common in recommenders.

    Raises:
        ValueError: no features, or a size below 1 (0 for num_dense).
    """

    offsets: Tensor
    limits: Tensor

    def __init__(self, cardinalities: Sequence[int], num_dense: int, embedding_size: int) -> None:
        super().__init__()
        counts = [int(c) for c in cardinalities]
        if any(c < 1 for c in counts) or num_dense < 0 or not (counts or num_dense):
            raise ValueError(
                "Features: cardinalities must be at least 1, num_dense at least 0 and one of them "
                f"given, got {counts} and {num_dense}."
            )
        check_least("Features", "embedding_size", embedding_size, 1)
        self.num_dense = num_dense
        self.size = embedding_size * len(counts) + num_dense
        self.table = nn.Embedding(max(sum(counts), 1), embedding_size)
        nn.init.normal_(self.table.weight, std=0.01)
        limits = torch.tensor(counts, dtype=torch.long)
        self.register_buffer("limits", limits, persistent=False)
        self.register_buffer("offsets", limits.cumsum(0) - limits, persistent=False)

    def forward(self, categorical: Tensor, dense: Tensor) -> Tensor:
        """Maps categorical [T, F] of integers and dense [T, D] to [T, V].

        Raises:
            ValueError: wrong number of features.
        """
        wide = (self.limits.shape[0], self.num_dense)
        if (categorical.shape[-1], dense.shape[-1]) != wide:
            raise ValueError(
                f"Features: categorical and dense must have {wide[0]} and {wide[1]} columns, got "
                f"shapes {list(categorical.shape)} and {list(dense.shape)}."
            )
        if not wide[0]:
            return dense
        rows = self.table(categorical.long() + self.offsets).flatten(1)
        return torch.cat([rows, dense.to(rows.dtype)], dim=-1) if wide[1] else rows


class GroupedLinear(nn.Module):
    """G linear maps of one shape, each with its own input, as one batched matmul.

    Parameters: weight [G, O, H], bias [G, O]. Initialized as `nn.Linear`, bias 0.
    """

    def __init__(self, groups: int, in_size: int, out_size: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, out_size, in_size))
        self.bias = nn.Parameter(torch.zeros(groups, out_size)) if bias else None
        nn.init.uniform_(self.weight, -(in_size**-0.5), in_size**-0.5)

    def forward(
        self, x: Tensor, input_ids: Sequence[int] | None = None, closed: Tensor | None = None
    ) -> Tensor:
        """Maps [T, H], read by all, or [T, G, H], to [T, G, O].

        With input_ids, map g reads x[:, id]; where closed [G, O] is True, results are -inf.
        """
        bias: Tensor | None = self.bias
        if closed is not None and bias is not None:
            bias = bias.masked_fill(closed, -torch.inf)
        return linear_maps(x, self.weight, bias, input_ids)


def linear_maps(
    x: Tensor, weight: Tensor, bias: Tensor | None, input_ids: Sequence[int] | None
) -> Tensor:
    """Maps [T, H], read by all, or [T, G, H] (with input_ids map g reads x[:, id]) to [T, G, O], by
    weight [G, O, H] and bias [G, O]."""
    if x.dim() == 3:
        plan = None if input_ids is None else segments(input_ids)
        return grouped_linear(x, weight, bias, plan)
    groups, out_size, _ = weight.shape
    flat = None if bias is None else bias.flatten()
    return F.linear(x, weight.flatten(0, 1), flat).view(-1, groups, out_size)


class Gates(nn.Module):
    """M gates over E experts, each restricted to some of them.

    weights[m] = softmax over the experts allowed to gate m of a linear map of its input. Experts
    not allowed get weight 0 exactly, and no gradient reaches them or the logit. A gate with one
    expert is a sigmoid, so that it can disable the expert.

    Args:
        mask: [M, E] bool, True where allowed.
        in_size: width of a gate's input.
    """

    mask: Tensor
    closed: Tensor
    lone_rows: Tensor

    def __init__(self, mask: Tensor, in_size: int) -> None:
        super().__init__()
        if mask.dim() != 2 or mask.dtype != torch.bool:
            raise ValueError(
                f"Gates: mask must be [M, E] of bool, got shape {list(mask.shape)} of {mask.dtype}."
            )
        few = mask.sum(1) < 2
        self.has_lone, self.all_lone = bool(few.any()), bool(few.all())
        self.linear = GroupedLinear(mask.shape[0], in_size, mask.shape[1])
        # A row of only -inf has no softmax: such rows, and lone experts, are handled separately.
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("closed", ~mask & ~few[:, None], persistent=False)
        self.register_buffer("lone_rows", few[:, None], persistent=False)

    def forward(self, x: Tensor, input_ids: Sequence[int] | None = None) -> Tensor:
        """Maps [T, H] or [T, M, H] to weights [T, M, E]; with input_ids, gate m reads x[:, id]."""
        # A bias of -inf disables a logit: its softmax or sigmoid and their gradients are then 0.
        if not self.has_lone:
            return softmax_of_rows(self.linear(x, input_ids, closed=self.closed))
        if self.all_lone:
            return self.linear(x, input_ids, closed=~self.mask).sigmoid()
        logits = self.linear(x, input_ids)
        mixed = softmax_of_rows(logits.masked_fill(self.closed, -torch.inf))
        return torch.where(self.lone_rows, logits.sigmoid() * self.mask, mixed)


def softmax_of_rows(x: Tensor) -> Tensor:
    """Computes softmax over the last dimension of [T, M, E].

    torch's softmax is slow on rows shorter than a vector register. After transposing, tokens are
    contiguous and fill the registers, which is faster even with both transpositions.
    """
    if x.shape[-1] >= 16 or x.device.type != "cpu":
        return x.softmax(-1)
    return x.movedim(0, -1).softmax(-2).movedim(-1, 0)


class FeatureGate(nn.Module):
    """Element-wise gates of features that start as the identity (HoME's FeaGate).

    gate(v) = sum_l softmax(v S)_l * 2 * sigmoid(v B_l A_l), with L low-rank pairs of rank V / L.
    A starts at 0, so that every gate starts at 2 * sigmoid(0) = 1.

    Args:
        groups: G gates.
        size: V.
        num_lora: L, from 1 to V.
    """

    def __init__(self, groups: int, size: int, num_lora: int = 2) -> None:
        super().__init__()
        if not 1 <= num_lora <= size:
            raise ValueError(f"FeatureGate: num_lora must be in [1, {size}], got {num_lora}.")
        self.groups, self.num_lora, self.rank = groups, num_lora, max(size // num_lora, 1)
        self.down = GroupedLinear(groups, size, num_lora * self.rank, bias=False)
        self.up = GroupedLinear(groups * num_lora, self.rank, size, bias=False)
        self.select = GroupedLinear(groups, size, num_lora)
        nn.init.zeros_(self.up.weight)

    def forward(self, v: Tensor, input_ids: Sequence[int] | None = None) -> Tensor:
        """Returns v times its gates, [T, G, V].

        Args:
            v: [T, V], read by all gates, or [T, G, V].
            input_ids: index of the input of each gate, non-decreasing; None: gate g reads input g.
        """
        # Each gate of a token is treated as a token.
        maps = self._maps(v, input_ids).reshape(-1, self.num_lora, v.shape[-1])
        share = self._share(v, input_ids).reshape(-1, self.num_lora)
        if v.dim() == 3 and input_ids is not None:
            # If all inputs have equally many gates, they need not be copied for each.
            counts = Counter(input_ids)
            even = len(set(counts.values())) == 1 and len(counts) == v.shape[1]
            v = v if even else spread(v, input_ids)
        gated = mix_outputs(maps, share, activation="sigmoid", factor=v.reshape(-1, v.shape[-1]))
        return gated.view(v.shape[0], self.groups, v.shape[-1])

    def _share(self, v: Tensor, input_ids: Sequence[int] | None) -> Tensor:
        """Returns twice the softmax over pairs, [T, G, L]."""
        if self.num_lora != 2:
            return 2 * self.select(v, input_ids).softmax(-1)
        # The softmax of two values is the sigmoid of their difference, again a linear map.
        assert self.select.bias is not None
        weight = self.select.weight[:, :1] - self.select.weight[:, 1:]
        bias = self.select.bias[:, :1] - self.select.bias[:, 1:]
        apart = linear_maps(v, weight, bias, input_ids)
        return 2 * torch.cat([apart, -apart], dim=-1).sigmoid()

    def _maps(self, v: Tensor, input_ids: Sequence[int] | None) -> Tensor:
        """Returns v B_l A_l of every gate and pair: [T, G * L, V]."""
        down = self.down.weight.unflatten(1, (self.num_lora, self.rank)).flatten(0, 1)
        if self.num_lora > 2:
            reads = range(self.groups) if input_ids is None else input_ids
            ids = [g if v.dim() == 3 else 0 for g in reads for _ in range(self.num_lora)]
            return low_rank_maps(v if v.dim() == 3 else v[:, None], down, self.up.weight, ids)
        # Two matmuls with a map of rank V / 2 cost V * V / 2 each per token, as much as one with
        # their V * V product, which is computed once per batch and saves no activation for
        # backward.
        full = torch.bmm(self.up.weight, down).view(self.groups, -1, v.shape[-1])
        return linear_maps(v, full, None, input_ids)


class Trace(NamedTuple):
    """Outputs [T, E, O] and gate weights [T, M, E] (without self gate) of a `GatedLayer`."""

    outputs: Tensor
    weights: Tensor


class GatedLayer(nn.Module):
    """Experts and M gated mixtures of their outputs.

    Args:
        in_size, hidden_size, out_size: of an expert: in_size -> hidden_size, ReLU, -> out_size,
            followed by `norm`.
        input_ids: index of the input of each of the E experts.
        mask: [M, E], True where a mixture may use an expert.
        gate_size: width of the gates' inputs.
        norm: True: batch normalization and Swish on an expert's output (HoME); False: ReLU.
        self_mask: [M, E], experts of a second gate whose mixture is added (HoME's self gate), or
            None.
        self_gate_size: width of the self gates' inputs; None: `gate_size`.
        gates: class of both gates.
    """

    def __init__(
        self,
        in_size: int,
        hidden_size: int,
        out_size: int,
        input_ids: Sequence[int],
        mask: Tensor,
        gate_size: int,
        *,
        norm: bool = False,
        self_mask: Tensor | None = None,
        self_gate_size: int | None = None,
        gates: type[Gates] = Gates,
    ) -> None:
        super().__init__()
        self.input_ids = tuple(input_ids)
        self.experts = Experts(
            len(self.input_ids),
            in_size,
            hidden_size,
            output_size=out_size,
            activation="relu",
            bias=True,
        )
        self.norm = ExpertBatchNorm(len(self.input_ids), out_size) if norm else None
        self.gates = gates(mask, gate_size)
        self.self_gates = None
        if self_mask is not None:
            self.self_gates = gates(self_mask, self_gate_size or gate_size)

    def forward(
        self,
        x: Tensor,
        gate_x: Tensor,
        *,
        self_x: Tensor | None = None,
        gate_ids: Sequence[int] | None = None,
        trace: list[Trace] | None = None,
    ) -> Tensor:
        """Returns mixtures [T, M, O].

        Args:
            x: [T, G, H], the inputs, indexed by `input_ids`.
            gate_x: [T, Hg], read by all gates, or [T, M, Hg].
            self_x: input of the self gates, shaped like gate_x; None: `gate_x`.
            gate_ids: index of the input of each gate (and self gate); None: gate m reads input m.
            trace: a list to which a `Trace` is appended.
        """
        same_input = x.shape[1] == 1
        y = self.experts.outputs(
            x[:, 0] if same_input else x, None if same_input else self.input_ids
        )
        weights = self.gates(gate_x, gate_ids)
        total = weights
        if self.self_gates is not None:
            total = weights + self.self_gates(gate_x if self_x is None else self_x, gate_ids)
        if trace is not None:
            y = F.relu(y) if self.norm is None else F.silu(self.norm(y))
            trace.append(Trace(y.detach(), weights.detach()))
            return mix_outputs(y, total)
        if self.norm is None:
            return mix_outputs(y, total, activation="relu")
        return self.norm.mix(y, total)


class Towers(nn.Module):
    """K small networks, one per task with its own input: [T, K, O] to logits [T, K].

    They are K experts, each with its own input and one output.
    """

    def __init__(self, num_tasks: int, in_size: int, hidden_size: int) -> None:
        super().__init__()
        self.bank = Experts(
            num_tasks, in_size, hidden_size, output_size=1, activation="relu", bias=True
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.bank.outputs(x)[..., 0]


def ownership(owners: Sequence[str], wanted: Sequence[Collection[str]]) -> Tensor:
    """Returns an [M, E] mask: mixture m may use the experts whose owner is in wanted[m]."""
    return torch.tensor([[owner in some for owner in owners] for some in wanted], device="cpu")
