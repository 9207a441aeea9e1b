"""Pruning and merging of the experts of a model's layers, with rows, biases and groups of their
routers.

Letters: E experts, G groups of merged experts, I intermediate size, K experts per token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from moe_ops.expert_weights.packing import invalidate
from moe_ops.layers.expert_ops.rows import as_groups, as_ids

from .editing import check_attention, finish, merge_layer, select_layer
from .profile import expert_weights_of
from .routed_layer import RoutedLayer
from .routed_layers import find_routed_layers
from .rules import groups_left


def prune_experts(model: nn.Module, keep: Mapping[str, Sequence[int]]) -> nn.Module:
    """Keeps only some experts, in place; returns the model.

    Router rows, biases and selection biases are those of the kept experts. The number of experts
    per token is unchanged, or all experts if fewer are left. The groups of group-limited routing
    are kept if each has an equal number of experts left (or none), and dropped otherwise. If all
    experts are kept, results are bitwise unchanged. Attention experts
    (`moe_ops.layers.AttentionExperts`, of JetMoE and ModuleFormer in the zoo) are pruned in the
    same way, keeping their keys and values; those of transformers' JetMoE cannot be pruned.

    The config of a language model of the zoo, or of transformers, gets the new numbers, so that
    `save_pretrained` writes a normal checkpoint, which transformers loads without moe_ops. Only
    ModuleFormer can store layers with different numbers of experts: other models work, but their
    `save_pretrained` raises an error.

    Args:
        model: see `find_routed_layers`. Optimizers reference the old parameters and must be
            recreated.
        keep: name of a layer -> ids, from `select_experts`; other layers are unchanged.

    Raises:
        ValueError: an unknown name or one of attention in transformers' JetMoE, ids out of range or
            repeated, quantized or sharded experts. Earlier layers are already pruned.
    """
    check_attention("prune_experts", model, keep)
    layers = {
        layer.name: layer for layer in find_routed_layers(model, list(keep), caller="prune_experts")
    }
    for name, ids in keep.items():
        layer = _named("prune_experts", layers, name)
        index = as_ids("prune_experts", ids, layer.num_experts)
        if len(set(index)) != len(index):
            raise ValueError(f"prune_experts: experts of {name!r} must not repeat, got {index}.")
        select_layer(layer, index, groups_left(layer.rules(), index) or (1, 1))
    finish(model)
    return model


def merge_experts(
    model: nn.Module,
    groups: Mapping[str, Sequence[Sequence[int]]],
    *,
    weights: Mapping[str, Tensor] | None = None,
    neuron_order: Mapping[str, Tensor] | None = None,
    router_rows: str = "mean",
) -> nn.Module:
    """Merges each group of experts into one, their weighted mean, in place; returns the model.

    Hidden neurons have no natural order: `align_neurons` finds one in which those of a group match.
    Everything else is as in `prune_experts`; in group-limited routing, a merged expert belongs to
    the group of its first member.

    Args:
        model: see `prune_experts`.
        groups: name of a layer -> lists of ids, each id at most once; experts in no list are
            dropped.
        weights: name of a layer -> [E] nonnegative weights of the means; None is equal weights.
            Groups with total weight 0 get equal weights.
        neuron_order: name of a layer -> [E, I], from `align_neurons`.
        router_rows: "mean": averages rows with these weights. "first": uses the row of the first
            member.

    Raises:
        ValueError: invalid groups, weights or orders, or arguments that `prune_experts` rejects.

    Source: Sarkar et al. 2024 (UNCURL, arXiv 2409.01483); Li et al. 2023 (M-SMoE, 2310.01334).
    """
    if router_rows not in ("mean", "first"):
        raise ValueError(
            f"merge_experts: router_rows must be 'mean' or 'first', got {router_rows!r}."
        )
    layers = {
        layer.name: layer
        for layer in find_routed_layers(model, list(groups), caller="merge_experts")
    }
    for name, members in groups.items():
        layer = _named("merge_experts", layers, name)
        lists = as_groups("merge_experts", members, layer.num_experts, "mean")
        own = None if weights is None else weights.get(name)
        if own is not None:
            own = own.double().clone()
            for group in lists:
                if float(own[group].sum()) == 0:
                    own[group] = 1.0
        order = None if neuron_order is None else neuron_order.get(name)
        left = groups_left(layer.rules(), [group[0] for group in lists]) or (1, 1)
        merge_layer(layer, lists, own, order, left, router_rows)
    finish(model)
    return model


@contextlib.contextmanager
def ablate_experts(model: nn.Module, experts: Iterable[tuple[str, int]]) -> Iterator[None]:
    """Makes these experts, given as (layer, id), return 0 while the context is open; routing is
    unchanged.

    Their down projection and its bias are temporarily 0. The super experts paper prunes experts in
    this way: no other expert replaces them, and weights are not renormalized.

    Raises:
        ValueError: an unknown layer name, an id out of range, or experts that cannot be read.
    """
    pairs = list(experts)
    names = sorted({name for name, _ in pairs})
    layers = (
        {n.name: n for n in find_routed_layers(model, names, caller="ablate_experts")}
        if names
        else {}
    )
    saved: list[tuple[Tensor, Tensor]] = []
    touched: list[nn.Module] = []
    try:
        for name, expert in pairs:
            layer = _named("ablate_experts", layers, name)
            weights = expert_weights_of(model, layer)
            if weights is None or not 0 <= expert < weights.num_experts:
                raise ValueError(
                    f"ablate_experts: {name!r} must have a float expert {expert}, got none."
                )
            touched += [m for m in (layer.experts, layer.block) if m is not None]
            for tensor in (weights.down, weights.b_down):
                if tensor is not None:
                    row = tensor.detach()[expert]
                    saved.append((row, row.clone()))
                    row.zero_()
        _invalidate(touched)
        yield
    finally:
        for row, old in reversed(saved):
            row.copy_(old)
        _invalidate(touched)


def _invalidate(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        invalidate(module)


def _named(caller: str, layers: Mapping[str, RoutedLayer], name: str) -> RoutedLayer:
    if name not in layers:  # It was interpreted as a pattern.
        raise ValueError(f"{caller}: layers must be named in full, got {name!r}.")
    return layers[name]
