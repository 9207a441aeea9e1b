"""Grouping of similar experts for merging, and alignment of their hidden neurons.

Letters: E experts, G groups, H hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._optional import optional
from .profile import ExpertProfile, expert_weights_of
from .routed_layers import find_routed_layers

# Name of a layer -> lists of ids.
Groups = dict[str, list[list[int]]]
_KMEANS_RUNS = 10
_KMEANS_STEPS = 100


def uncurl_groups(profile: ExpertProfile, num_groups: int, *, seed: int = 0) -> Groups:
    """Groups experts that the router prefers for the same tokens, like UNCURL.

    It runs spectral clustering on each layer's experts: their affinity is the correlation of their
    router logits over tokens, clamped to at least 0; features are the eigenvectors of the G
    smallest eigenvalues of the normalized Laplacian, scaled to length 1, which k-means clusters.
    The paper does not state its affinity and has no published code.

    Args:
        profile: profile of the model.
        num_groups: G, in [1, E]; each group has at least one expert.
        seed: of k-means, which runs 10 times.

    Returns:
        Name of a layer -> groups for `merge_experts`; groups start with their most used member and
        are sorted by it.

    Raises:
        ValueError: `num_groups` out of range.

    Source: Sarkar et al. 2024 (UNCURL, arXiv 2409.01483); Ng et al. 2001 (spectral clustering).
    """
    groups = {}
    for name, layer in profile.layers.items():
        _check_groups("uncurl_groups", num_groups, layer.num_experts, name)
        affinity = layer.correlation().clamp(min=0).fill_diagonal_(1.0)
        labels = spectral_clusters(affinity, num_groups, seed=seed)
        groups[name] = _grouped(labels, layer.load)
    return groups


def hc_smoe_groups(profile: ExpertProfile, num_groups: int) -> Groups:
    """Groups experts with similar mean outputs, by hierarchical clustering with average linkage of
    Euclidean distances.

    An expert's mean output is over all tokens if the profile has `all_outputs`, as in the paper,
    and otherwise over its own tokens. Needs scipy.

    Args, returns, raises: see `uncurl_groups`.

    Source: Chen et al. 2024 (HC-SMoE, arXiv 2410.08589).
    """
    hierarchy = optional("hc_smoe_groups", "scipy.cluster.hierarchy")
    groups = {}
    for name, layer in profile.layers.items():
        _check_groups("hc_smoe_groups", num_groups, layer.num_experts, name)
        mean = layer.output / layer.output_count.clamp(min=1)[:, None]
        labels = torch.zeros(1, dtype=torch.int64)
        if layer.num_experts > 1:
            tree = hierarchy.linkage(mean.numpy(), method="average", metric="euclidean")
            cut = hierarchy.cut_tree(tree, n_clusters=num_groups)[:, 0]
            labels = torch.as_tensor(cut, dtype=torch.int64)
        groups[name] = _grouped(labels, layer.load)
    return groups


@torch.no_grad()
def align_neurons(
    model: nn.Module, groups: Mapping[str, Sequence[Sequence[int]]]
) -> dict[str, Tensor]:
    """Returns orders of hidden neurons in which the experts of a group match best, for
    `merge_experts`.

    Each expert's neurons are matched one to one with those of the first expert of its group,
    maximizing the sum of the inner products of their weights (rows of gate and up, biases, and
    columns of the down projection): a linear assignment problem, solved by scipy. A copy with
    permuted neurons is matched exactly.

    Args:
        model: the model.
        groups: name of a layer -> lists of ids.

    Returns:
        Name of a layer -> neuron_order [E, I] int64; experts of no group are not reordered.

    Raises:
        ValueError: a layer without float experts.
        ImportError: scipy is missing.

    Source: Ainsworth et al. 2022 (weight matching, arXiv 2209.04836), as used by UNCURL.
    """
    solve = optional("align_neurons", "scipy.optimize").linear_sum_assignment
    orders = {}
    for layer in find_routed_layers(model, list(groups), caller="align_neurons"):
        weights = expert_weights_of(model, layer)
        if weights is None:
            raise ValueError(f"align_neurons: {layer.name!r} must have float experts, got none.")
        size = weights.intermediate_size
        order = torch.arange(size).repeat(weights.num_experts, 1)
        for group in groups.get(layer.name, ()):
            first = _neurons(weights, group[0])
            for expert in group[1:]:
                gain = first @ _neurons(weights, expert).t()
                _, columns = solve(gain.double().cpu().numpy(), maximize=True)
                order[expert] = torch.as_tensor(columns)
        orders[layer.name] = order
    return orders


def _neurons(weights: Any, expert: int) -> Tensor:
    """Returns [I, features] fp32: all weights of each hidden neuron of an expert."""
    gate_up = weights.gate_up_of(expert)
    bias = weights.biases_of(expert).get("b_gate_up")
    if bias is not None:
        gate_up = torch.cat([gate_up, bias[0, :, None]], 1)
    size = weights.intermediate_size
    if len(gate_up) == 2 * size:
        interleaved = weights.activation.get("interleaved", False)
        halves = (gate_up[0::2], gate_up[1::2]) if interleaved else gate_up.split(size)
        gate_up = torch.cat(halves, 1)
    return torch.cat([gate_up, weights.down_of(expert).t()], 1)


def spectral_clusters(affinity: Tensor, num_groups: int, *, seed: int = 0) -> Tensor:
    """Returns labels [E] int64 in [0, G) from an affinity [E, E] >= 0; each label is used.

    Source: Ng et al. 2001, On Spectral Clustering.
    """
    affinity = affinity.double()
    scale = affinity.sum(1).clamp(min=1e-300).rsqrt()
    normalized = scale[:, None] * affinity * scale
    # The largest eigenvalues of this matrix are the smallest of the Laplacian.
    vectors = torch.linalg.eigh(normalized).eigenvectors[:, -num_groups:]
    vectors = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp(min=1e-300)
    return k_means(vectors, num_groups, seed=seed)


def k_means(points: Tensor, num_groups: int, *, seed: int = 0) -> Tensor:
    """Returns labels [n] int64 in [0, G), the best of 10 runs of Lloyd's algorithm from k-means++
    starts.

    An empty group gets the point that is farthest from its own center.
    """
    generator = torch.Generator().manual_seed(seed)
    best: tuple[float, Tensor] | None = None
    for _ in range(_KMEANS_RUNS):
        centers = points[_starts(points, num_groups, generator)]
        labels = torch.full((len(points),), -1)
        for _ in range(_KMEANS_STEPS):
            distances = torch.cdist(points, centers)
            new = distances.argmin(1)
            for group in range(num_groups):
                if not bool((new == group).any()):
                    own = distances.gather(1, new[:, None])[:, 0]
                    alone = new.bincount(minlength=num_groups)[new] == 1
                    new[own.masked_fill(alone, -1.0).argmax()] = group
            if torch.equal(new, labels):
                break
            labels = new
            centers = torch.stack([points[labels == g].mean(0) for g in range(num_groups)])
        cost = float((points - centers[labels]).square().sum())
        if best is None or cost < best[0] - 1e-12:
            best = cost, labels
    assert best is not None
    return best[1]


def _starts(points: Tensor, num_groups: int, generator: torch.Generator) -> list[int]:
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    for _ in range(num_groups - 1):
        weight = torch.cdist(points, points[chosen]).min(1).values.square()
        weight[chosen] = 0.0
        if float(weight.sum()) == 0:  # Only copies of selected points are left.
            weight = torch.ones_like(weight)
            weight[chosen] = 0.0
        chosen.append(int(torch.multinomial(weight, 1, generator=generator)))
    return chosen


def _grouped(labels: Tensor, load: Tensor) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for expert in load.argsort(descending=True, stable=True).tolist():
        groups.setdefault(int(labels[expert]), []).append(expert)
    return sorted(groups.values(), key=lambda group: group[0])


def _check_groups(caller: str, num_groups: int, num_experts: int, layer: str) -> None:
    if not 1 <= num_groups <= num_experts:
        raise ValueError(
            f"{caller}: num_groups must be in [1, {num_experts}], the experts of {layer!r}, got "
            f"{num_groups}."
        )
