"""Blocks of experts and decoder layers of transformers, by the names of their submodules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from moe_ops.hf.models.known import add_table, register, unexpected_parts


@dataclass(frozen=True)
class RoutedBlock:
    """Block that computes experts(x, router(x)) + shared(x).

    router: name of the router, which returns logits, weights and ids.
    shared: name of the shared network; None without one.
    optional: True if the shared network may be absent.
    gate: name of the linear layer whose sigmoid multiplies the output of the shared network.
    pair: True if the block also returns routing weights.
    """

    router: str = "gate"
    shared: str | None = None
    optional: bool = False
    gate: str | None = None
    pair: bool = False

    def why_not(self, block: nn.Module) -> str | None:
        """Returns why this module does not compute the formula; None if it does."""
        expected = {self.router, "experts"}
        shared = {name for name in (self.shared, self.gate) if name is not None}
        reason = unexpected_parts(
            block,
            expected if self.optional else expected | shared,
            shared if self.optional else set(),
        )
        if reason is None and any(p is not None for p in block._parameters.values()):
            reason = "it has parameters that the formula does not read"
        return reason

    def shared_of(self, block: Any) -> str | None:
        """Returns the name of the shared network; None if there is none."""
        return self.shared if block._modules.get(self.shared) is not None else None


@dataclass(frozen=True)
class DecoderLayer:
    """Decoder layer that computes y + scale * block(post_attention_layernorm(y)), where y is x +
    scale * self_attn(input_layernorm(x)).

    block: name of the block, which is experts or a dense network.
    scale: name of the attribute with the factor; None for 1.
    pair: True if the block returns a second value.
    attention_only_if: an attribute and its value if self_attn is softmax attention; otherwise it is
    another kind of layer.
    """

    block: str = "mlp"
    scale: str | None = None
    pair: bool = False
    attention_only_if: tuple[str, Any] | None = None

    def why_not(self, layer: nn.Module) -> str | None:
        """Returns why this module does not compute the formula; None if it does."""
        parts = {"input_layernorm", "self_attn", "post_attention_layernorm", self.block}
        reason = unexpected_parts(layer, parts, set())
        if reason is None and self.factor(layer) is None:
            reason = f"{self.scale} must be a number"
        if reason is None and not self.attends(layer):
            reason = "this layer has no softmax attention"
        return reason

    def factor(self, layer: Any) -> float | None:
        """Returns the current value of `scale`."""
        if self.scale is None:
            return 1.0
        factor = layer.__dict__.get(self.scale)
        return float(factor) if type(factor) in (float, int) else None

    def attends(self, layer: Any) -> bool:
        """Returns whether self_attn is softmax attention, which also returns its weights."""
        if self.attention_only_if is None:
            return True
        name, value = self.attention_only_if
        return layer.__dict__.get(name) == value


add_table(
    "block",
    {
        # DeepSeek, GLM-4, Dots, EXAONE, Solar, Kimi, Bailing. Before 5.16 they routed themselves.
        "cebe7e0f7088": RoutedBlock(shared="shared_experts"),
        # Qwen3-MoE, Qwen3-VL, Qwen3-Omni, Mellum
        "3318769fa146": RoutedBlock(),
        # OLMoE
        "019b54df55aa": RoutedBlock(),
        # Mixtral, which adds noise to tokens in training
        "765a617afd6c": RoutedBlock(),
        # Qwen2-MoE
        "f74aff63f340": RoutedBlock(shared="shared_expert", gate="shared_expert_gate"),
        # Flint, Lara
        "ab5434acb615": RoutedBlock(shared="shared_expert"),
        # gpt-oss
        "bf10e8eb6145": RoutedBlock("router", pair=True),
        # Granite (from 5.22 on)
        "2333f6707d6d": RoutedBlock("router"),
        # Aria (from 5.22 on)
        "a26236921b5a": RoutedBlock("router", shared="shared_experts"),
        # Ernie 4.5. Before 5.16 its router returned ids and weights in the other order.
        "ede5e9e68ecc": RoutedBlock(shared="shared_experts", optional=True),
    },
)
_KIMI = DecoderLayer(attention_only_if=("block_type", "full_attention"))
add_table(
    "layer",
    {
        # Qwen, OLMoE, DeepSeek, GLM-4, Dots, EXAONE, Hunyuan, Mellum, Solar, ...
        "b3603d2960c0": DecoderLayer(),
        # Mixtral, MiniMax-M2
        "43a62883504e": DecoderLayer(),
        # gpt-oss
        "bec18e87817d": DecoderLayer(pair=True),
        # Granite
        "820eb6d3cd0a": DecoderLayer("block_sparse_moe", scale="residual_multiplier"),
        # Kimi Linear, Bailing (5.20 to 5.23; from 5.24 on)
        "e0cd48618eab": _KIMI,
        "081ed56fc2c8": _KIMI,
        # Lara
        "ed4cd31154df": _KIMI,
    },
)


def register_block(
    cls: type[nn.Module],
    *,
    router: str = "gate",
    shared: str | None = None,
    gate: str | None = None,
) -> None:
    """Registers a class as a block of experts: experts(x, ids, weights) + shared(x).

    Args:
        cls: a class of modules with these submodules and an `experts` on transformers' interface,
            which returns one tensor.
        router: the name of the router, which returns logits, weights and ids.
        shared: the name of the shared network.
        gate: the name of the linear layer whose sigmoid multiplies the output of the shared
            network.

    Raises:
        TypeError: `cls` is not a class of modules.
    """
    register("block", cls, RoutedBlock(router, shared=shared, gate=gate))


def register_layer(cls: type[nn.Module], *, block: str = "mlp", scale: str | None = None) -> None:
    """Registers a class as a decoder layer: y = x + self_attn(input_layernorm(x)), then y +
    block(post_attention_layernorm(y)).

    Args:
        cls: a class of modules with these submodules and the interface of transformers' decoder
            layers.
        block: the name of the block.
        scale: the name of the attribute with the factor of both residuals.

    Raises:
        TypeError: `cls` is not a class of modules.
    """
    register("layer", cls, DecoderLayer(block, scale=scale))
