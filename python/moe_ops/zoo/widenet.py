"""WideNet: one block of attention and experts, reused at every depth with separate norms per depth.

Example:
    model = zoo.create_model("widenet")                          # a language model
    model = zoo.create_model("widenet", preset="tiny_vision")    # a classifier of images

Source: Xue et al. 2022 (Go Wider Instead of Deeper, arXiv 2107.11817).

Letters: B sequences, S places of each, T = B * S, H hidden size, E experts, K experts per token, L
depths, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops._fields import check_choice, check_divides, check_least, check_types
from moe_ops.layers import CapacityMixin, Experts, KVCache, MoE, TopKRouter
from moe_ops.layers.rotary import Rope
from moe_ops.layers.self_attention import Attention, MultiHeadAttention

from ._presets import preset
from .lm.blocks import Step
from .lm.checkpoint import Entry
from .lm.config import LMConfig, number, size
from .lm.losses import OF_LAYERS, Routed, sum_over_layers
from .lm.model import CausalLM
from .lm.pretrained import Pretrained

__all__ = ["NoisyRouter", "WideNetConfig", "WideNetLM", "WideNetViT"]

TRUNKS = ("language", "vision")
POOLINGS = ("mean", "token")


@dataclass(frozen=True)
class WideNetConfig(LMConfig):
    """Sizes and options.

    Attributes, beside those of `LMConfig`:
        vocab_size: of the language model; unused for images.
        num_layers: depth: number of uses of the block.
        trunk: "language", causal, or "vision", which classifies images.
        num_heads, intermediate_size: the latter of one expert.
        num_experts, top_k: E and K.
        noise: in training, deviation of the noise added to router logits; None: 1 / E.
        capacity_factor: in training, see `moe_ops.layers.CapacityRouter`; None drops no token.
        dropout: on the outputs of attention and experts.
        balance_coefficient: of the balance loss, summed over depths.
        rope_theta: base of the positions of "language".
        image_size, patch_size, channels, num_classes: of "vision"; images are square.
        pooling: "mean" over all positions including the class token, or the class "token" alone.
        representation: a dense layer with tanh before the classifier.
        norm_eps: of all norms.
    """

    KEYS: ClassVar[dict[str, Any]] = {
        "vocab_size": size("vocab_size"),
        "hidden_size": size("hidden_size"),
        "num_layers": size("num_layers"),
        "num_heads": size("num_heads"),
        "intermediate_size": size("moe_mlp_dim"),
        "num_experts": size("num_experts"),
        "top_k": size("top_k"),
        "dropout": number("dropout_rate", least=0),
        "balance_coefficient": number("aux_loss_alpha"),
    }

    trunk: str = "language"
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 128
    num_experts: int = 4
    top_k: int = 2
    noise: float | None = None
    capacity_factor: float | None = None
    dropout: float = 0.0
    balance_coefficient: float = 0.01
    rope_theta: float = 10_000.0
    image_size: int = 16
    patch_size: int = 4
    channels: int = 1
    num_classes: int = 10
    pooling: str = "mean"
    representation: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_types(self, "WideNetConfig")
        check_choice("WideNetConfig", "trunk", self.trunk, TRUNKS)
        check_choice("WideNetConfig", "pooling", self.pooling, POOLINGS)
        check_divides("WideNetConfig", "patch_size", self.patch_size, "image_size", self.image_size)

    tiny = preset("Bytes, a block four times.")
    tiny_vision = preset("Images of 16 x 16 in 16 patches, a block four times.", trunk="vision")

    b = preset(
        "WideNet-B for ImageNet, 29 million parameters.",
        trunk="vision",
        image_size=224,
        patch_size=16,
        channels=3,
        num_classes=1000,
        representation=True,
        dropout=0.1,
        capacity_factor=1.2,
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        intermediate_size=4096,
    )
    l = b.but("WideNet-L, 40 million.", hidden_size=1024, num_layers=24, num_heads=16)
    h = l.but("WideNet-H, 63 million.", hidden_size=1280, num_layers=32, intermediate_size=5120)

    def aux_coefficients(self) -> dict[str, float]:
        return {"load_balancing": self.balance_coefficient}

    def write_more(self) -> dict[str, Any]:
        return {"architectures": ["WideNet"], "model_type": "widenet"}


class NoisyRouter(CapacityMixin, TopKRouter):
    """Router with Top-K of softmax(x W^T + noise), not renormalized; noise in training, N(0,
    deviation^2).

    Args:
        noise: the deviation, at least 0.
        hidden_size, num_experts, top_k, options: see `CapacityRouter`.
    """

    draws_random_numbers = True

    def __init__(self, *sizes: int, noise: float, **options: Any) -> None:
        super().__init__(*sizes, **options)
        check_least("NoisyRouter", "noise", noise, 0)
        self.noise = noise

    def logits(self, x: Tensor) -> Tensor:
        found = super().logits(x)
        if not self.training or self.noise == 0:
            return found
        return found + self.noise * torch.randn_like(found)


class DepthNorms(nn.Module):
    """The two norms of one use of the block."""

    def __init__(self, config: WideNetConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


class WideBlock(nn.Module):
    """Computes x + attention(norm(x)), then x + ffn(norm(x)), with the given norms."""

    def __init__(
        self, config: WideNetConfig, attention: Attention | MultiHeadAttention, ffn: nn.Module
    ) -> None:
        super().__init__()
        self.attention = attention
        self.ffn = ffn
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, norms: DepthNorms, step: Step, depth: int, name: str) -> Tensor:
        """Returns a tensor shaped like x [B, S, H].

        Args:
            step: positions and caches of causal attention; records routing under `name` with its
                depth.
        """
        y = norms.attention_norm(x)
        if isinstance(self.attention, Attention):
            assert step.rotation is not None
            y = self.attention(y, step.rotation, step.cache(depth))
        else:
            y = self.attention(y)
        x = x + self.dropout(y)
        y = step.through(f"{name}.ffn.depth.{depth}", self.ffn, norms.ffn_norm(x))
        out: Tensor = x + self.dropout(y)
        return out


def through_depths(blocks: Any, norms: Any, depth: int, x: Tensor, step: Step) -> Tensor:
    """Applies `depth` blocks with their norms to x; there is one of each for all depths, or one per
    depth."""
    for i in range(depth):
        block, norm = i % len(blocks), i % len(norms)
        x = blocks[block](x, norms[norm], step, i, f"blocks.{block}")
    return x


class _WideNet(Pretrained):
    """Base of both models.

    Parameters: blocks.0, and layers.0 to layers.(L - 1), the norms of each depth.
    """

    config_class: ClassVar[type[LMConfig]] = WideNetConfig
    blocks: Any
    layers: Any

    def counts(self, config: Any) -> tuple[int, int]:
        """Returns the numbers of blocks and of pairs of norms."""
        return 1, config.num_layers

    def make_ffn(self, config: Any) -> nn.Module:
        """Returns experts with GELU and biases behind a noisy router."""
        hidden, count = config.hidden_size, config.num_experts
        experts = Experts(
            count, hidden, config.intermediate_size, activation="gelu_tanh", bias=True
        )
        noise = 1 / count if config.noise is None else config.noise
        router = NoisyRouter(
            hidden, count, config.top_k, noise=noise, capacity_factor=config.capacity_factor
        )
        return MoE(router, experts)

    def reset_parameters(self) -> None:
        """Draws weights from N(0, init_std); norms are 1, biases 0."""
        for name, parameter in self.named_parameters():
            if name.rpartition(".")[2] in ("bias", "b_gate_up", "b_down"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=self.config.init_std)
            else:
                nn.init.ones_(parameter)

    def entries(self) -> list[Entry]:
        """Returns every tensor under its own name, since there is no published checkpoint to match.
        The first entry is the first tensor created."""
        return [Entry(name, (name,)) for name in self.state_dict()]

    def idle_parameters(self) -> int:
        """Returns the expert parameters that a token does not use if its experts differ at all
        depths of a block."""
        config, uses = self.config, self.config.num_layers // len(self.blocks)
        idle = max(config.num_experts - config.top_k * uses, 0)
        banks = sum(p.numel() for block in self.blocks for p in block.ffn.experts.parameters())
        return banks * idle // config.num_experts


class WideNetLM(_WideNet, CausalLM):
    """The language model; see `CausalLM` for its methods. It has one routing per depth."""

    free_fields = ("context", "image_size", "patch_size", "channels", "num_classes")
    config: WideNetConfig

    def __init__(self, config: WideNetConfig) -> None:
        super().__init__()
        check_choice(type(self).__name__, "trunk", config.trunk, ("language",))
        hidden, heads = config.hidden_size, config.num_heads
        check_divides("WideNetLM", "num_heads", heads, "hidden_size / 2", hidden / 2)
        size = hidden // heads
        rope = Rope(size, config.rope_theta)
        blocks, norms = self.counts(config)
        self.blocks = nn.ModuleList(
            WideBlock(config, Attention(hidden, heads, size, rope), self.make_ffn(config))
            for _ in range(blocks)
        )
        norm = nn.LayerNorm(hidden, eps=config.norm_eps)
        self.assemble(config, (DepthNorms(config) for _ in range(norms)), rope, norm)

    def trunk(self, x: Tensor, step: Step, last: int | None) -> Tensor:
        x = through_depths(self.blocks, self.layers, self.config.num_layers, x, step)
        out: Tensor = self.norm(x if last is None else x[:, -last:])
        return out

    def new_cache(self) -> list[KVCache]:
        """Returns an empty cache for a sequence of calls, one entry per depth."""
        return [KVCache() for _ in range(self.config.num_layers)]


class ViTOutput(NamedTuple):
    """Logits [B, C], and the routing of each depth."""

    logits: Tensor
    routing: list[Routed]


class ViTLoss(NamedTuple):
    """Training loss and its parts.

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
    """Image classifier: patches, a class token that starts at 0, learned positions."""

    free_fields = ("context", "vocab_size", "image_size")
    config: WideNetConfig

    def __init__(self, config: WideNetConfig) -> None:
        super().__init__()
        check_choice(type(self).__name__, "trunk", config.trunk, ("vision",))
        self.config = config
        hidden, patch = config.hidden_size, config.patch_size
        self.patches = nn.Conv2d(config.channels, hidden, patch, patch)
        places = (config.image_size // patch) ** 2 + 1
        self.positions = nn.Parameter(torch.empty(places, hidden))
        self.dropout = nn.Dropout(config.dropout)
        blocks, norms = self.counts(config)
        self.blocks = nn.ModuleList(
            WideBlock(config, MultiHeadAttention(hidden, config.num_heads), self.make_ffn(config))
            for _ in range(blocks)
        )
        self.layers = nn.ModuleList(DepthNorms(config) for _ in range(norms))
        self.norm = nn.LayerNorm(hidden, eps=config.norm_eps)
        self.representation = nn.Linear(hidden, hidden) if config.representation else None
        self.head = nn.Linear(hidden, config.num_classes)
        self.reset_parameters()

    def forward(self, images: Tensor, *, return_routing: bool = False) -> Tensor | ViTOutput:
        """Maps images [B, channels, image_size, image_size] to logits [B, C], or to a ViTOutput.

        Raises:
            ValueError: images have another shape.
        """
        config = self.config
        wanted = (config.channels, config.image_size, config.image_size)
        if images.dim() != 4 or images.shape[1:] != wanted:
            raise ValueError(
                f"WideNetViT: images must be [B, {', '.join(map(str, wanted))}], got shape "
                f"{list(images.shape)}."
            )
        x = self.patches(images).flatten(2).transpose(1, 2)
        # The class token is a position without a patch.
        x = self.dropout(F.pad(x, (0, 0, 1, 0)) + self.positions)
        step = Step(None, None, return_routing)
        x = self.norm(through_depths(self.blocks, self.layers, config.num_layers, x, step))
        x = x.mean(1) if config.pooling == "mean" else x[:, 0]
        if self.representation is not None:
            x = torch.tanh(self.representation(x))
        logits: Tensor = self.head(x)
        return logits if step.routing is None else ViTOutput(logits, step.routing)

    def loss(self, images: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> ViTLoss:
        """Computes the cross-entropy of labels [B] in [0, C), plus the auxiliary losses of
        routing."""
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
    """Builds the model of a config."""
    return WideNetLM(config) if config.trunk == "language" else WideNetViT(config)
