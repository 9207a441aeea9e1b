"""Conversion of dense language models of transformers to mixture-of-experts models of
transformers."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attention import mean_of
from .experts import experts_from_dense
from .layer import upcycle_ffn
from .neurons import coactivation_order, k_means_order

CLUSTERS = ("contiguous", "k_means", "coactivation")
# Maximum number of tokens of a text for co-activation clusters.
_MAX_TOKENS = 4096


class _Target(NamedTuple):
    """model_type of the result, and its config entries for the width and the number of experts."""

    model_type: str
    width: str
    num_experts: str
    more: dict[str, Any]


_MIXTRAL = _Target("mixtral", "intermediate_size", "num_local_experts", {})
_TARGETS = {
    "llama": _MIXTRAL,
    "mistral": _MIXTRAL,
    "qwen3": _Target("qwen3_moe", "moe_intermediate_size", "num_experts", {"norm_topk_prob": True}),
}
# Entries of a dense config without an equivalent in the results, and their required values.
_MUST_BE = {"mlp_bias": False, "use_sliding_window": False}
# Entries that describe a checkpoint, not the model's computation.
_NOT_KEPT = ("architectures", "model_type", "transformers_version", "layer_types")


@torch.no_grad()
def upcycle_model(
    models: nn.Module | Sequence[nn.Module],
    num_experts: int,
    top_k: int,
    *,
    num_slices: int = 1,
    clusters: str = "contiguous",
    batches: Iterable[Any] = (),
    noise: float = 0.0,
    ratio: float = 0.0,
    router_std: float | None = None,
    seed: int = 0,
) -> Any:
    """Creates a mixture-of-experts model from one or several dense causal language models.

    LlamaForCausalLM and MistralForCausalLM become MixtralForCausalLM, Qwen3ForCausalLM becomes
    Qwen3MoeForCausalLM. Every feed-forward network becomes experts, see `upcycle_ffn`; with several
    models (specialists from one seed), all other parameters are averaged. `save_pretrained` writes
    checkpoints that transformers loads without moe_ops. The factor N of slices, which these models'
    routers do not have, is part of the down projections.

    Args:
        models: in memory, of one architecture and size.
        num_experts, top_k, num_slices, noise, ratio: see `upcycle_ffn`.
        clusters: how neurons are grouped into slices: "contiguous", "k_means" (`k_means_order`) or
            "coactivation" (`coactivation_order`, on the networks' inputs for `batches`).
        batches: inputs of the models: tensors of tokens [B, S], or keyword arguments.
        router_std: None is the config's initializer_range.
        seed: of all random numbers.

    Returns:
        The model, in eval mode, on the device and in the dtype of the first.

    Raises:
        ValueError: another architecture, models that do not match, or invalid numbers.
        ImportError: transformers is missing.

    Source: see `upcycle_ffn`.
    """
    sources: list[Any] = [models] if isinstance(models, nn.Module) else list(models)
    target = _check(sources)
    if clusters not in CLUSTERS:
        raise ValueError(
            f"upcycle_model: clusters must be one of {', '.join(CLUSTERS)}, got {clusters!r}."
        )
    config = sources[0].config
    std = config.initializer_range if router_std is None else router_std
    generator = torch.Generator().manual_seed(seed)
    read = {}
    if num_slices > 1 and clusters == "coactivation":
        read = _read_by_networks(sources, list(batches))
    result = _blank(sources[0], target, num_experts, top_k, num_slices)
    state: dict[str, Tensor] = {}
    for name, _ in sources[0].named_parameters():
        if ".mlp." not in name:
            state[name] = mean_of([_parameter(s, name) for s in sources])
    for index in range(config.num_hidden_layers):
        ffns = [source.model.layers[index].mlp for source in sources]
        order = None
        if num_slices > 1 and clusters != "contiguous":
            orders = []
            for i, ffn in enumerate(ffns):
                bank = experts_from_dense(ffn)
                if clusters == "k_means":
                    orders.append(k_means_order(bank, num_slices, seed=seed))
                else:
                    orders.append(coactivation_order(bank, num_slices, read[i, index], seed=seed))
            order = torch.cat(orders)
        moe = upcycle_ffn(
            ffns,
            num_experts,
            top_k,
            num_slices=num_slices,
            order=order,
            noise=noise,
            ratio=ratio,
            router_std=std,
            generator=generator,
        )
        prefix = f"model.layers.{index}.mlp"
        state[f"{prefix}.gate.weight"] = moe.router.weight.detach()
        state[f"{prefix}.experts.gate_up_proj"] = moe.experts.w_gate_up.detach()
        state[f"{prefix}.experts.down_proj"] = moe.experts.w_down.detach() * num_slices
    _fill(result, state, sources[0])
    return result.eval()


def _check(sources: Sequence[Any]) -> _Target:
    if not sources:
        raise ValueError("upcycle_model: models must hold at least one model, got none.")
    kinds = [getattr(getattr(s, "config", None), "model_type", type(s).__name__) for s in sources]
    if len(set(kinds)) != 1 or kinds[0] not in _TARGETS or not hasattr(sources[0], "lm_head"):
        raise ValueError(
            f"upcycle_model: models must be causal language models of one type, one of "
            f"{', '.join(_TARGETS)}, got {', '.join(map(str, kinds))}."
        )
    config = sources[0].config
    bad = {name: getattr(config, name, value) for name, value in _MUST_BE.items()}
    bad = {name: value for name, value in bad.items() if value != _MUST_BE[name]}
    if kinds[0] != "qwen3" and getattr(config, "attention_bias", False):
        bad["attention_bias"] = True
    if bad:
        raise ValueError(
            f"upcycle_model: models must not have what {_TARGETS[kinds[0]].model_type} lacks, got "
            f"{', '.join(f'{name}={value}' for name, value in bad.items())}."
        )
    shapes = [{n: tuple(p.shape) for n, p in s.named_parameters()} for s in sources]
    if any(shape != shapes[0] for shape in shapes[1:]):
        raise ValueError("upcycle_model: models must be of one size, got several.")
    return _TARGETS[kinds[0]]


def _blank(source: Any, target: _Target, num_experts: int, top_k: int, num_slices: int) -> Any:
    """Returns the result on the meta device."""
    transformers: Any = importlib.import_module("transformers")
    kind = transformers.AutoConfig.for_model(target.model_type)
    known = set(kind.to_dict()) - set(_NOT_KEPT)
    config = source.config
    values = {name: value for name, value in config.to_dict().items() if name in known}
    values |= {
        target.width: config.intermediate_size // num_slices,
        target.num_experts: num_experts,
        "num_experts_per_tok": top_k,
        **target.more,
    }
    if getattr(config, "head_dim", None) is not None:  # Not every config lists it.
        values["head_dim"] = config.head_dim
    made = type(kind)(**values)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(made)


def _fill(result: Any, state: dict[str, Tensor], source: Any) -> None:
    """Sets the parameters of a model on the meta device, and its buffers from its config."""
    first = next(source.parameters())
    unset = {name for name, _ in result.named_parameters()} - set(state)
    if unset:
        raise ValueError(
            f"upcycle_model: {type(source).__name__} lacks {', '.join(sorted(unset))}."
        )
    result.load_state_dict(state, assign=True, strict=False)
    # Angles are a buffer that checkpoints do not contain.
    rotary = result.model.rotary_emb
    result.model.rotary_emb = type(rotary)(config=result.config).to(first.device)
    result.tie_weights()
    for parameter in result.parameters():
        parameter.requires_grad_(True)
    for name, tensor in (*result.named_parameters(), *result.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"upcycle_model: {name} must have a source, got none.")
    if getattr(source, "generation_config", None) is not None:
        result.generation_config = copy.deepcopy(source.generation_config)


def _parameter(model: Any, name: str) -> Tensor:
    return model.get_parameter(name).detach()


def _read_by_networks(
    sources: Sequence[Any], batches: Sequence[Any]
) -> dict[tuple[int, int], Tensor]:
    """Returns, by (model, layer), the rows [T, H] that its feed-forward network reads for a
    text."""
    if not batches:
        raise ValueError("upcycle_model: batches must be given with coactivation, got none.")
    found: dict[tuple[int, int], list[Tensor]] = {}
    for i, source in enumerate(sources):
        with _watched(source, found, i):
            for batch in batches:
                inputs = batch if isinstance(batch, Mapping) else {"input_ids": batch}
                source(**{"use_cache": False, **inputs})
    return {key: torch.cat(rows)[:_MAX_TOKENS] for key, rows in found.items()}


@contextlib.contextmanager
def _watched(model: Any, found: dict[tuple[int, int], list[Tensor]], i: int) -> Iterator[None]:
    def watch(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows = found.setdefault((i, index), [])
            if sum(map(len, rows)) < _MAX_TOKENS:
                rows.append(args[0].detach().flatten(0, -2))

        return hook

    training = model.training
    handles = [
        layer.mlp.register_forward_pre_hook(watch(index))
        for index, layer in enumerate(model.model.layers)
    ]
    try:
        model.eval()
        yield
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
