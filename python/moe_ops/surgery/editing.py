"""Changes to the experts of a routed layer, and to the model's config."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from moe_ops.expert_weights.packing import invalidate
from moe_ops.layers import AttentionExperts, Router
from moe_ops.zoo.lm.config import LMConfig

from .routed_layer import RoutedLayer
from .routed_layers import find_routed_layers

# Names in configs of transformers for the experts per layer and per token.
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_TOP_K = "num_experts_per_tok"
_GROUPS = ("n_group", "topk_group")
_JETMOE = (
    "transformers' JetMoE routes attention experts within its attention, which cannot be changed "
    "from outside; load the checkpoint as moe_ops.zoo.jetmoe.JetMoE, prune both kinds, and save it "
    "for transformers"
)


class Sizes(NamedTuple):
    """Sizes in a model's config, which apply to all its layers."""

    num_experts: int
    top_k: int
    num_groups: int
    num_topk_groups: int


def select_layer(layer: RoutedLayer, ids: list[int], groups: tuple[int, int]) -> None:
    """Keeps the experts `ids` of a layer; the router's groups become `groups`."""
    options = {"num_groups": groups[0], "num_topk_groups": groups[1]}
    if isinstance(layer.block, AttentionExperts):
        _select_attention(layer, layer.block, ids, options)
        return

    def select(router: Router) -> Router:
        return router.select(ids, top_k=min(router.top_k, len(ids)), **options)

    layer.edit(lambda bank: bank.select(ids), select)


def _select_attention(
    layer: RoutedLayer, block: AttentionExperts, ids: list[int], options: dict[str, int]
) -> None:
    new: Any = block.select(ids, top_k=min(layer.top_k, len(ids)), **options)
    for name in ("router", "kv_proj"):
        setattr(block, name, getattr(new, name))
    for name, parameter in new.named_parameters(recurse=False):
        setattr(block, name, parameter)
    invalidate(block)
    layer.routers = ((layer.routers[0][0], block.router),)


def check_attention(caller: str, model: nn.Module, names: Iterable[str]) -> None:
    """Rejects attention experts that cannot be changed.

    Raises:
        ValueError: a name of such a layer of transformers' JetMoE.
    """
    modules = dict(model.named_modules())
    for name in names:
        if type(modules.get(name)).__name__ in ("JetMoeAttention", "JetMoeMoA"):
            raise ValueError(f"{caller}: {name!r} must be a feed-forward layer: {_JETMOE}.")


def merge_layer(
    layer: RoutedLayer,
    groups: Sequence[Sequence[int]],
    weights: Tensor | None,
    neuron_order: Tensor | None,
    router_groups: tuple[int, int],
    router_rows: str,
) -> None:
    """Merges the experts of a layer, and the rows of its routers."""
    options: dict[str, Any] = {"num_groups": router_groups[0], "num_topk_groups": router_groups[1]}

    def merge(router: Router) -> Router:
        top_k = min(router.top_k, len(groups))
        if router_rows == "first":
            return router.select([group[0] for group in groups], top_k=top_k, **options)
        return router.merge(groups, weights, top_k=top_k, **options)

    layer.edit(lambda bank: bank.merge(groups, weights, neuron_order=neuron_order), merge)


def finish(model: nn.Module) -> None:
    """Updates a model's config to its layers, or prevents saving the model."""
    config: Any = getattr(model, "config", None)
    note = getattr(model, "note_experts", None)
    if config is None or note is not None:
        if note is not None:  # A config with numbers for every layer, like ModuleFormer's.
            note()
        return
    layers = find_routed_layers(model)
    found = {_sizes_of(layer) for layer in layers}
    vars(model).pop("save_pretrained", None)
    change = _change_fields if isinstance(config, LMConfig) else _change_entries
    if len(found) != 1 or not change(model, config, found.pop()):
        model.save_pretrained = functools.partial(_refuse, type(model).__name__)  # type: ignore[assignment]


def _sizes_of(layer: RoutedLayer) -> Sizes:
    rules = layer.rules()
    return Sizes(layer.num_experts, layer.top_k, rules.num_groups, rules.num_topk_groups)


def _refuse(name: str, *_: Any, **__: Any) -> None:
    if name.startswith("JetMoeFor"):
        raise ValueError(
            f"{name}.save_pretrained: attention experts are as many as before: {_JETMOE}."
        )
    raise ValueError(
        f"{name}.save_pretrained: all layers must have the same number of experts, as the config "
        "says one number for all, got layers that were pruned differently; save the state dict."
    )


def _change_fields(model: Any, config: Any, sizes: Sizes) -> bool:
    """Updates the config of a language model of the zoo."""
    names = {field.name for field in dataclasses.fields(config)}
    if not {"num_experts", "top_k"} <= names and not {"num_experts", "max_experts"} <= names:
        return False  # A config with other entries.
    changes: dict[str, Any] = {n: v for n, v in sizes._asdict().items() if n in names}
    if getattr(config, "num_devices", 1) > 1 and sizes.num_experts % config.num_devices:
        changes["num_devices"] = 1
    if getattr(config, "max_experts", None) is not None:
        changes["max_experts"] = min(config.max_experts, sizes.num_experts)
    model.config = dataclasses.replace(config, **changes)
    return True


def _change_entries(model: Any, config: Any, sizes: Sizes) -> bool:
    """Updates the config of a model of transformers, whose text model may have a separate
    config."""
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "model_type", None) == "jetmoe":
        return False  # Its attention experts, which do not change, share the entry.
    if getattr(text, "model_type", None) == "dbrx":
        text.ffn_config.moe_num_experts, text.ffn_config.moe_top_k = sizes[:2]
        return True
    wanted = {**dict.fromkeys(_NUM_EXPERTS, sizes.num_experts), _TOP_K: sizes.top_k}
    if getattr(text, _GROUPS[0], None) is not None:
        wanted |= dict(zip(_GROUPS, sizes[2:], strict=True))
    known = False
    for name, value in wanted.items():
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, value)
            known = known or name in _NUM_EXPERTS
    # The model stores two of them for its balance loss.
    for name, value in (("num_experts", sizes.num_experts), (_TOP_K, sizes.top_k)):
        if name in vars(model):
            setattr(model, name, value)
    return known
