"""WideNet as a language model and as a classifier of images.

Letters: B images or sequences, S places of each, H hidden size, C classes.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops.layers import KVCache
from moe_ops.layers.rotary import Rope
from moe_ops.layers.self_attention import Attention, MultiHeadAttention

from ..lm.blocks import Step
from ..lm.checkpoint import Entry
from ..lm.config import LMConfig
from ..lm.losses import OF_LAYERS, Routed, sum_over_layers
from ..lm.model import CausalLM
from ..lm.pretrained import Pretrained
from .config import WideNetConfig
from .layers import DepthNorms, WideBlock, counts, idle_parameters, same_entries, through_depths


class _WideNet(Pretrained):
    """What both trunks share.

    Parameters: blocks.0 (with sharing "none" one of each depth) and layers.0 to layers.(L - 1),
    the norms of each depth (with "shared_norms" layers.0 alone).
    """

    config_class: ClassVar[type[LMConfig]] = WideNetConfig
    blocks: Any
    layers: Any

    def reset_parameters(self) -> None:
        """Weights N(0, init_std), norms 1, biases 0."""
        for name, parameter in self.named_parameters():
            if name.rpartition(".")[2] in ("bias", "b_gate_up", "b_down"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=self.config.init_std)
            else:
                nn.init.ones_(parameter)

    def entries(self) -> list[Entry]:
        return same_entries(self)

    def idle_parameters(self) -> int:
        return idle_parameters(self.config, self.blocks)


class WideNetLM(_WideNet, CausalLM):
    """The language model; see `CausalLM` for what it can do. Routing is that of each depth."""

    free_fields = ("context", "image_size", "patch_size", "channels", "num_classes")
    config: WideNetConfig

    def __init__(self, config: WideNetConfig) -> None:
        super().__init__()
        _check_trunk(config, "language")
        hidden, heads = config.hidden_size, config.num_heads
        if heads < 1 or hidden % (2 * heads):
            raise ValueError(
                f"WideNetLM: num_heads must divide hidden_size / 2 = {hidden / 2:g}, got {heads}."
            )
        rope = Rope(hidden // heads, config.rope_theta)
        blocks, norms = counts(config)
        self.blocks = nn.ModuleList(
            WideBlock(config, Attention(hidden, heads, hidden // heads, rope))
            for _ in range(blocks)
        )
        norm = nn.LayerNorm(hidden, eps=config.norm_eps)
        self.assemble(config, (DepthNorms(config) for _ in range(norms)), norm, rope)

    def trunk(self, x: Tensor, step: Step, last: int | None) -> Tensor:
        x = through_depths(self.blocks, self.layers, self.config.num_layers, x, step)
        out: Tensor = self.norm(x if last is None else x[:, -last:])
        return out

    def new_cache(self) -> list[KVCache]:
        """An empty cache for a sequence of calls, one a depth."""
        return [KVCache() for _ in range(self.config.num_layers)]


class ViTOutput(NamedTuple):
    """logits [B, C], and the routing of each depth."""

    logits: Tensor
    routing: list[Routed]


class ViTLoss(NamedTuple):
    """What training minimises, and its parts.

    loss: smoothed cross-entropy plus each auxiliary loss times its coefficient, a scalar.
    cross_entropy: mean over images, in nats, not smoothed.
    aux_losses: name -> sum over depths, not multiplied by its coefficient.
    logits, routing: as in ViTOutput.
    """

    loss: Tensor
    cross_entropy: Tensor
    aux_losses: dict[str, Tensor]
    logits: Tensor
    routing: list[Routed]


class WideNetViT(_WideNet):
    """The classifier of images: patches, a class token that starts at 0, learnt positions."""

    free_fields = ("context", "vocab_size", "image_size")
    config: WideNetConfig

    def __init__(self, config: WideNetConfig) -> None:
        super().__init__()
        _check_trunk(config, "vision")
        self.config = config
        hidden, patch = config.hidden_size, config.patch_size
        self.patches = nn.Conv2d(config.channels, hidden, patch, patch)
        places = (config.image_size // patch) ** 2 + 1
        self.positions = nn.Parameter(torch.empty(places, hidden))
        self.dropout = nn.Dropout(config.dropout)
        blocks, norms = counts(config)
        self.blocks = nn.ModuleList(
            WideBlock(config, MultiHeadAttention(hidden, config.num_heads)) for _ in range(blocks)
        )
        self.layers = nn.ModuleList(DepthNorms(config) for _ in range(norms))
        self.norm = nn.LayerNorm(hidden, eps=config.norm_eps)
        self.representation = nn.Linear(hidden, hidden) if config.representation else None
        self.head = nn.Linear(hidden, config.num_classes)
        self.reset_parameters()

    def forward(self, images: Tensor, *, return_routing: bool = False) -> Tensor | ViTOutput:
        """images [B, channels, image_size, image_size] to logits [B, C], or to a ViTOutput.

        Raises:
            ValueError: images of another shape.
        """
        config = self.config
        wanted = (config.channels, config.image_size, config.image_size)
        if images.dim() != 4 or images.shape[1:] != wanted:
            raise ValueError(
                f"WideNetViT: images must be [B, {', '.join(map(str, wanted))}], got shape "
                f"{list(images.shape)}."
            )
        x = self.patches(images).flatten(2).transpose(1, 2)
        # The class token is a place without a patch.
        x = self.dropout(F.pad(x, (0, 0, 1, 0)) + self.positions)
        step = Step(None, None, return_routing)
        x = self.norm(through_depths(self.blocks, self.layers, config.num_layers, x, step))
        x = x.mean(1) if config.pooling == "mean" else x[:, 0]
        if self.representation is not None:
            x = torch.tanh(self.representation(x))
        logits: Tensor = self.head(x)
        return logits if step.routing is None else ViTOutput(logits, step.routing)

    def loss(self, images: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> ViTLoss:
        """Cross-entropy of labels [B] in [0, C), plus the auxiliary losses of routing."""
        found: Any = self(images, return_routing=True)
        logits, routing = found
        total = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        plain = F.cross_entropy(logits.detach(), labels)
        aux = {}
        for name, weight in self.config.aux_coefficients().items():
            aux[name] = sum_over_layers(name, OF_LAYERS[name], routing, len(images), None)
            total = total + weight * aux[name]
        return ViTLoss(total, plain, aux, logits, routing)


WideNet = WideNetLM | WideNetViT


def build(config: WideNetConfig) -> WideNetLM | WideNetViT:
    """The model of a config."""
    return WideNetLM(config) if config.trunk == "language" else WideNetViT(config)


def _check_trunk(config: WideNetConfig, trunk: str) -> None:
    if config.trunk != trunk:
        raise ValueError(f"WideNet: trunk must be {trunk!r} here, got {config.trunk!r}.")
