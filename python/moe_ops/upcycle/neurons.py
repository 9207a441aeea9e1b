"""Orders of hidden neurons whose contiguous runs are clusters.

Letters: T tokens, H hidden size, I intermediate size, E experts, N clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops.layers import Experts
from moe_ops.ops import gated_act

from .experts import neuron_matrices

_STEPS = 30


@torch.no_grad()
def k_means_order(bank: Experts, num_slices: int, *, seed: int = 0) -> Tensor:
    """Orders neurons by clusters of their gate weights (or of their weights without a gate).

    Args:
        num_slices: N, a divisor of I: clusters of I / N neurons each.
        seed: seed of k-means.

    Returns:
        [E, I] int64 for `slice_experts`.

    Source: Zhang et al. 2022 (MoEfication, arXiv 2110.01786), which also clusters these rows.
    """
    rows = [neuron_matrices(bank, e)[0].float() for e in range(bank.num_experts)]
    return torch.stack([_order(r, num_slices, seed) for r in rows])


@torch.no_grad()
def coactivation_order(
    bank: Experts, num_slices: int, x: Tensor, *, share: float = 0.1, seed: int = 0
) -> Tensor:
    """Orders neurons by clusters of neurons that are active on the same tokens.

    A neuron is active on a token if it is among the fraction `share` of neurons with the largest
    absolute output after the gate.

    Args:
        num_slices: N, a divisor of I.
        x: [T, H], T >= 1, inputs of the network.
        share: in (0, 1].
        seed: seed of k-means.

    Returns:
        [E, I] int64 for `slice_experts`.

    Raises:
        ValueError: x of another shape, or a share out of range.

    Source: Pei et al. 2025 (CMoE, arXiv 2502.04416); Zhang et al. 2022 (arXiv 2110.01786), which
    cuts the graph of co-activations instead.
    """
    if x.dim() != 2 or x.shape[1] != bank.hidden_size or not len(x):
        raise ValueError(
            f"coactivation_order: x must be [T, {bank.hidden_size}] with T >= 1, got shape "
            f"{list(x.shape)}."
        )
    if not 0 < share <= 1:
        raise ValueError(f"coactivation_order: share must be in (0, 1], got {share}.")
    if not bank.gated:
        raise ValueError("coactivation_order: bank must have a gated activation, got none.")
    number = max(1, round(share * bank.intermediate_size))
    orders = []
    for e in range(bank.num_experts):
        preact = x.to(bank.w_gate_up) @ bank.w_gate_up[e].t()
        if bank.b_gate_up is not None:
            preact = preact + bank.b_gate_up[e]
        h = gated_act(
            preact, bank.activation, interleaved=bank.interleaved, alpha=bank.alpha,
            limit=bank.limit,
        )  # fmt: skip
        best = h.abs().topk(number, dim=-1).indices
        active = torch.zeros(h.shape, device=h.device).scatter_(1, best, 1.0)
        orders.append(_order(active.t(), num_slices, seed))
    return torch.stack(orders)


def _order(points: Tensor, num_slices: int, seed: int) -> Tensor:
    labels = balanced_k_means(points, num_slices, seed=seed)
    return labels.argsort(stable=True)


def balanced_k_means(points: Tensor, num_clusters: int, *, seed: int = 0) -> Tensor:
    """Returns labels [n] int64 of equal-sized clusters of nearby points.

    Runs Lloyd's algorithm from k-means++ starts. In each step, points are assigned in turn to the
    nearest center that has room, starting with those whose second-nearest center is much farther;
    it ends when no label changes.

    Args:
        points: [n, features] float.
        num_clusters: N, a divisor of n.

    Raises:
        ValueError: a number that does not divide n.
    """
    n = len(points)
    if num_clusters < 1 or n % num_clusters:
        raise ValueError(
            f"balanced_k_means: num_clusters must divide the {n} points, got {num_clusters}."
        )
    generator = torch.Generator().manual_seed(seed)
    centers = points[_starts(points, num_clusters, generator)]
    labels = torch.full((n,), -1)
    for _ in range(_STEPS):
        new = _assign(torch.cdist(points, centers).cpu(), n // num_clusters)
        if torch.equal(new, labels):
            break
        labels = new
        centers = torch.stack([points[labels == c].mean(0) for c in range(num_clusters)])
    return labels


def _starts(points: Tensor, num_clusters: int, generator: torch.Generator) -> list[int]:
    """Returns k-means++ starts: each is drawn with probability proportional to its squared distance
    from the previous ones."""
    starts = [int(torch.randint(len(points), (1,), generator=generator))]
    while len(starts) < num_clusters:
        distance = torch.cdist(points, points[starts]).amin(1).square().double().cpu()
        if not float(distance.sum()):
            distance = torch.ones_like(distance)
        starts.append(int(torch.multinomial(distance, 1, generator=generator)))
    return starts


def _assign(distances: Tensor, room: int) -> Tensor:
    """Returns labels [n] from distances [n, N], with `room` points per cluster."""
    n, num_clusters = distances.shape
    if num_clusters == 1:
        return torch.zeros(n, dtype=torch.int64)
    ranked = distances.sort(dim=1, stable=True)
    loss = ranked.values[:, 1] - ranked.values[:, 0]
    left, labels = [room] * num_clusters, [0] * n
    wishes = ranked.indices.tolist()
    for point in loss.argsort(descending=True, stable=True).tolist():
        label = next(c for c in wishes[point] if left[c])
        labels[point] = label
        left[label] -= 1
    return torch.tensor(labels)
