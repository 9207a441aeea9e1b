"""Profiles of the experts of a trained model on a text, in one pass and without storing the text.

Letters: T tokens, H hidden size, E experts, K experts per token, P positions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops._eval_mode import call_model, in_eval
from moe_ops.expert_weights import ExpertInputs, ExpertWeights, hooks_for
from moe_ops.layers import Routing
from moe_ops.layers.routing import valid_ids

from ._optional import names_in, save_tensors, saved_by
from .routed_layer import RoutedLayer
from .routed_layers import find_routed_layers

_FORMAT = "moe_ops.surgery.ExpertProfile 1"


@dataclass
class LayerProfile:
    """Sums over the tokens of one layer; float64 on the CPU unless stated.

    A layer that routes several times (Chain-of-Experts) sums over all its calls.

    Attributes:
        tokens: T, a scalar int64: the number of routed tokens.
        load: [E] int64, slots per expert.
        probability: [E], sum of softmax(router_logits) over all experts, whatever the layer's
            scores.
        weight: [E], sum of the slots' routing weights.
        logit: [K, E], sum of the router logits of experts that are the token's k-th best selected
            expert, by logits.
        share: [E], sum of the softmax over the logits of a token's K experts.
        gate_norm: [E], sum of weight * |f(x)|, the norm of the expert's output before weighting.
        output_norm: [E], sum of |f(x)|.
        output: [E, H], sum of f(x): over slots, or over all tokens with `all_outputs`.
        output_count: [E] int64, the divisor of `output` for the mean.
        max_output: [P + 1, E], largest |f(x)_h| over tokens at position 0, 1, ... P - 1 of their
            sequences, and over all later ones; 0 without tokens.
        max_channel: [E] int64, the h of an expert's largest output; -1 without tokens.
        together: [E, E] int64, number of tokens with both experts; the diagonal is `load`.
        logit_sum: [E], sum of router_logits.
        logit_products: [E, E], sum of router_logits^T router_logits over tokens.
    """

    tokens: Tensor
    load: Tensor
    probability: Tensor
    weight: Tensor
    logit: Tensor
    share: Tensor
    gate_norm: Tensor
    output_norm: Tensor
    output: Tensor
    output_count: Tensor
    max_output: Tensor
    max_channel: Tensor
    together: Tensor
    logit_sum: Tensor
    logit_products: Tensor

    @classmethod
    def empty(
        cls, num_experts: int, top_k: int, hidden_size: int, positions: int, device: Any = "cpu"
    ) -> LayerProfile:
        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        e, whole = num_experts, torch.int64
        return cls(
            tokens=zeros(dtype=whole),
            load=zeros(e, dtype=whole),
            probability=zeros(e),
            weight=zeros(e),
            logit=zeros(top_k, e),
            share=zeros(e),
            gate_norm=zeros(e),
            output_norm=zeros(e),
            output=zeros(e, hidden_size),
            output_count=zeros(e, dtype=whole),
            max_output=zeros(positions + 1, e),
            max_channel=zeros(e, dtype=whole) - 1,
            together=zeros(e, e, dtype=whole),
            logit_sum=zeros(e),
            logit_products=zeros(e, e),
        )

    @property
    def num_experts(self) -> int:
        return self.load.shape[0]

    def largest_output(self) -> Tensor:
        """Returns [E], the largest output over all positions."""
        return self.max_output.max(0).values

    def correlation(self) -> Tensor:
        """Returns [E, E], the correlation over tokens of the router logits of pairs of experts; 0
        for constant ones."""
        count = max(int(self.tokens), 1)
        mean = self.logit_sum / count
        covariance = self.logit_products / count - mean[:, None] * mean
        scale = covariance.diagonal().clamp(min=0).sqrt()
        product = scale[:, None] * scale
        tiny = 1e-12 * self.logit_products.diagonal().abs().max().clamp(min=1e-300) / count
        return torch.where(product > tiny, covariance / product.clamp(min=1e-300), 0.0).clamp(-1, 1)

    def add(self, other: LayerProfile) -> None:
        """Adds the sums of `other`."""
        newer = other.largest_output() > self.largest_output()
        self.max_channel = torch.where(newer, other.max_channel, self.max_channel)
        self.max_output = torch.maximum(self.max_output, other.max_output)
        for field in fields(self):
            if field.name not in ("max_channel", "max_output"):
                setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def to(self, device: Any) -> LayerProfile:
        return LayerProfile(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


@dataclass
class ExpertProfile:
    """Result of `profile_experts`: name of a routed layer -> its sums, in the order of the
    model."""

    layers: dict[str, LayerProfile]

    def __getitem__(self, layer: str) -> LayerProfile:
        return self.layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def add(self, other: ExpertProfile) -> ExpertProfile:
        """Adds the sums of a profile of the same model on other text; returns self.

        Raises:
            ValueError: the layers or their sizes differ.
        """
        for name, mine in self.layers.items():
            theirs = other.layers.get(name)
            if theirs is None or theirs.logit.shape != mine.logit.shape or len(other) != len(self):
                raise ValueError(
                    f"Profile.add: other must be of the same layers and sizes as {name!r} is of, "
                    f"got {list(other.layers)}."
                )
            mine.add(theirs)
        return self

    def draw(self, path: Path | str | None = None) -> Any:
        """Returns a matplotlib Figure with heat maps of load, gate x output norm and largest
        output, layers by experts; saves it if a path is given. Needs the extra `viz`."""
        from moe_ops import viz

        layers = self.layers.values()
        panels = {
            "load (1 is even)": [
                layer.load * layer.num_experts / max(int(layer.load.sum()), 1) for layer in layers
            ],
            "mean of weight x |f(x)|": [
                layer.gate_norm / layer.load.clamp(min=1) for layer in layers
            ],
            "log10 of the largest |f(x)|": [
                torch.where(a > 0, a.clamp(min=1e-30).log10(), torch.nan)
                for a in (layer.largest_output() for layer in layers)
            ],
        }
        tokens = int(next(iter(layers)).tokens) if self.layers else 0
        title = f"Experts on {tokens} tokens"
        return viz.plot_expert_scores(panels, layer_names=list(self), title=title, path=path)

    def save(self, path: Path | str) -> None:
        """Writes one safetensors file with a tensor per layer and sum."""
        tensors, names = {}, list(self.layers)
        for index, layer in enumerate(self.layers.values()):
            for field in fields(layer):
                tensors[f"{index}.{field.name}"] = getattr(layer, field.name)
        metadata = {"format": _FORMAT, "layers": json.dumps(names)}
        save_tensors("ExpertProfile", path, tensors, metadata)

    @classmethod
    def load(cls, path: Path | str) -> ExpertProfile:
        """Loads a file of `save`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is another kind of file, or does not match its checksum.
        """
        with saved_by("ExpertProfile", path, _FORMAT) as (tensors, metadata):
            layers = {}
            for index, name in enumerate(names_in(metadata["layers"])):
                own = {f.name: tensors[f"{index}.{f.name}"] for f in fields(LayerProfile)}
                top_k, hidden = own["logit"].shape[0], own["output"].shape[1]
                empty = LayerProfile.empty(own["load"].numel(), top_k, hidden, 0, "meta")
                for key, tensor in own.items():
                    start = int(key == "max_output")  # Its number of positions is free.
                    if tensor.shape[start:] != getattr(empty, key).shape[start:]:
                        raise ValueError(f"{key} of {name} is {list(tensor.shape)}")
                layers[name] = LayerProfile(**own)
            return cls(layers)


@torch.no_grad()
def profile_experts(
    model: nn.Module,
    inputs: Iterable[Any] | Callable[[nn.Module], Any],
    *,
    layers: Sequence[str] | None = None,
    positions: int = 8,
    outputs: bool = True,
    all_outputs: bool = False,
) -> ExpertProfile:
    """Runs a trained model on a text and sums up statistics of its routers and experts.

    Memory does not grow with the text. The model runs unchanged, in eval mode and without
    gradients; the outputs of experts are computed a second time, one expert at a time in fp32,
    because the model only returns their sum.

    Args:
        model: see `find_routed_layers`; attention experts and others without feed-forward experts
            are ignored.
        inputs: batches to call the model with (each a tensor of tokens [B, S], a tuple of
            positional or a dict of keyword arguments), or a function that gets the model and runs
            it. In a dict, tokens with `attention_mask` [B, S] 0 are not counted.
        layers: shell patterns of the names of layers; None is all.
        positions: P, the number of first positions with separate largest outputs.
        outputs: False skips sums of experts' outputs, which are then 0, and is about as fast as the
            model.
        all_outputs: `LayerProfile.output` is the sum over all tokens instead of the expert's
            tokens, like HC-SMoE's mean outputs. This runs all experts on all tokens.

    Raises:
        ValueError: no routed layer with readable experts, or a layer without tokens.
    """
    if positions < 1:
        raise ValueError(f"profile_experts: positions must be at least 1, got {positions}.")
    watched, handles = {}, []
    for layer in find_routed_layers(model, layers, caller="profile_experts"):
        weights = expert_weights_of(model, layer)
        if weights is not None:
            watched[layer.name] = _Watch(layer, model, positions, outputs, all_outputs)
    if not watched:
        raise ValueError(
            f"profile_experts: model must hold a routed layer with float experts, got "
            f"{type(model).__name__} without one. Of a quantized model, profile the float model "
            f"that it was made from."
        )
    try:
        for watch in watched.values():
            handles += watch.layer.watch(watch)
        with in_eval(model):
            if callable(inputs):
                inputs(model)
            else:
                for batch in inputs:
                    for watch in watched.values():
                        watch.begin(batch)
                    call_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, watch in watched.items():
        if watch.sums is None:
            raise ValueError(
                f"profile_experts: inputs must reach every layer, got no token for {name!r}."
            )
    return ExpertProfile(
        {name: watch.sums.to("cpu") for name, watch in watched.items() if watch.sums}
    )


def expert_weights_of(model: nn.Module, layer: RoutedLayer) -> ExpertWeights | None:
    """Returns the feed-forward experts of a layer; None without experts, or for quantized ones.

    Raises:
        ValueError: experts whose activation moe_ffn does not support.
    """
    for hook in hooks_for(model):
        for module in (layer.experts, layer.block):
            weights = None if module is None else hook.weights(module)
            if weights is not None:
                return weights
    return None


class _Watch:
    """Sums up the calls of one layer."""

    def __init__(
        self, layer: RoutedLayer, model: nn.Module, positions: int, outputs: bool, every: bool
    ) -> None:
        self.layer = layer
        self.model = model
        self.positions = positions
        self.outputs = outputs
        self.every = every
        self.sums: LayerProfile | None = None
        self.shape: tuple[int, ...] = ()
        self.mask: Tensor | None = None

    def begin(self, batch: Any) -> None:
        """Stores the sequence lengths of a batch, to compute positions in the following calls."""
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        self.mask = mask.reshape(-1).bool() if isinstance(mask, Tensor) else None
        if isinstance(batch, Mapping):
            batch = batch.get("input_ids", next(iter(batch.values()), None))
        first = batch[0] if isinstance(batch, tuple) else batch
        self.shape = tuple(first.shape[:2]) if isinstance(first, Tensor) else ()

    def __call__(self, x: Tensor, routing: Routing) -> None:
        place = torch.arange(len(x), device=x.device)
        if len(self.shape) == 2 and self.shape[0] * self.shape[1] == len(x):
            place = place % self.shape[1]
        logits, weights, ids = routing
        if self.mask is not None and len(self.mask) == len(x):
            keep = self.mask.to(x.device)
            x, logits, weights = x[keep], logits[keep], weights[keep]
            ids, place = ids[keep], place[keep]
        if not len(x):
            return
        latent = getattr(self.layer.block, "latent", None)
        if latent is not None:  # The experts' width differs from the router's.
            x = latent.enter(x)
        if self.sums is None:
            sizes = logits.shape[1], ids.shape[1], x.shape[1]
            self.sums = LayerProfile.empty(*sizes, self.positions, x.device)
        add_routing(self.sums, Routing(logits, weights, ids))
        if self.outputs:
            bank = expert_weights_of(self.model, self.layer)
            assert bank is not None
            on_input = getattr(self.layer.rules(), "apply_router_weight_on_input", False)
            inputs = ExpertInputs(x, weights, ids, on_input)
            add_outputs(self.sums, bank, inputs, place, self.every)


def add_routing(sums: LayerProfile, routing: Routing) -> None:
    """Adds the routing of T tokens, with the K' of the sums."""
    logits, weights = routing.router_logits.double(), routing.topk_weights.double()
    num_experts = sums.num_experts
    valid, ids = valid_ids(routing.topk_ids, num_experts)
    sums.tokens += len(logits)
    chosen = logits.gather(1, ids).masked_fill(~valid, -torch.inf)
    share = chosen.softmax(-1).nan_to_num(0.0)  # A token without experts has no softmax.
    _add_by_expert(sums.load, ids, valid.to(sums.load.dtype))
    _add_by_expert(sums.weight, ids, weights.masked_fill(~valid, 0.0))
    _add_by_expert(sums.share, ids, share)
    sums.probability += logits.softmax(-1).sum(0)
    best, order = chosen.sort(dim=-1, descending=True, stable=True)
    ranked = ids.gather(1, order)
    for k in range(ids.shape[1]):
        there = torch.isfinite(best[:, k])
        _add_by_expert(sums.logit[k], ranked[:, k], best[:, k].masked_fill(~there, 0.0))
    hot = torch.zeros_like(logits).scatter_add(1, ids, valid.to(logits.dtype)).clamp(max=1)
    sums.together += (hot.t() @ hot).round().long()
    sums.logit_sum += logits.sum(0)
    sums.logit_products += logits.t() @ logits


def add_outputs(
    sums: LayerProfile, bank: ExpertWeights, inputs: ExpertInputs, place: Tensor, every: bool
) -> None:
    """Adds the outputs of experts on T tokens at the positions `place` [T]."""
    positions = sums.max_output.shape[0] - 1
    bins = place.clamp(max=positions)
    for expert in range(bank.num_experts):
        slots = inputs.topk_ids == expert
        tokens = slots.any(-1).nonzero().flatten()
        if tokens.numel():
            gate = (inputs.topk_weights * slots).sum(-1)[tokens].double()
            y = _output(bank, expert, inputs, tokens).double()
            norm = torch.linalg.vector_norm(y, dim=-1)
            on_input = inputs.apply_router_weight_on_input  # The gate is already in y.
            sums.gate_norm[expert] += (norm if on_input else gate * norm).sum()
            sums.output_norm[expert] += norm.sum()
            largest, channel = y.abs().max(-1)
            if float(largest.max()) > float(sums.max_output[:, expert].max()):
                sums.max_channel[expert] = channel[largest.argmax()]
            sums.max_output[:, expert] = torch.maximum(
                sums.max_output[:, expert],
                torch.zeros_like(sums.max_output[:, expert]).scatter_reduce(
                    0, bins[tokens], largest, "amax"
                ),
            )
        if every:
            plain = inputs._replace(apply_router_weight_on_input=False)
            y = _output(bank, expert, plain, torch.arange(len(place), device=place.device))
        if every or tokens.numel():
            sums.output[expert] += y.double().sum(0)
            sums.output_count[expert] += len(y)


def _output(bank: ExpertWeights, expert: int, inputs: ExpertInputs, tokens: Tensor) -> Tensor:
    """Returns f(x) [n, H] fp32 for some tokens; f(weight * x) if weights are applied to the
    input."""
    weights = torch.ones(len(tokens), 1, device=inputs.x.device)
    if inputs.apply_router_weight_on_input:
        weights = (inputs.topk_weights * (inputs.topk_ids == expert)).sum(-1)[tokens, None]
    ids = torch.full((len(tokens), 1), expert, dtype=torch.int32, device=inputs.x.device)
    call = ExpertInputs(inputs.x[tokens], weights, ids, inputs.apply_router_weight_on_input)
    return bank.run_expert(expert, call)


def _add_by_expert(target: Tensor, ids: Tensor, values: Tensor) -> None:
    target.scatter_add_(0, ids.reshape(-1), values.reshape(-1).to(target.dtype))
