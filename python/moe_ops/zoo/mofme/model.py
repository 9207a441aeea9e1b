"""A transformer that restores images, with experts in the place of its feed-forward networks.

Letters: B images, S tokens of an image, H hidden size, C channels of the convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops._fields import check_choice
from moe_ops.layers.routing import Routing

from .._presets import preset
from .layers import MoFME, feed_forward

EXPERTS = ("film", "ffn", "dense")
ROUTERS = ("uncertainty", "plain")


@dataclass(frozen=True)
class MoFMEConfig:
    """Sizes and choices.

    Attributes:
        channels: of the convolutions before the transformer; those behind it have `tail_scale`
            times as many.
        patch_size: pixels of a token's side.
        hidden_size, num_layers, num_heads, head_size: of the transformer.
        mlp_ratio: inner size of feed-forward networks over H.
        experts: "film", "ffn" or "dense" (one network, no experts).
        num_experts, top_k: E and K.
        router: "uncertainty" or "plain". passes, router_dropout: of `UncertaintyRouter`.
        dropout: behind attention and networks, in training.
        residual: the network's output is added to the image, and starts as 0; False, as published:
            it is the image, by a sigmoid.
    """

    channels: int = 8
    tail_scale: int = 1
    patch_size: int = 4
    hidden_size: int = 96
    num_layers: int = 2
    num_heads: int = 4
    head_size: int = 24
    mlp_ratio: int = 4
    experts: str = "film"
    num_experts: int = 8
    top_k: int = 2
    router: str = "uncertainty"
    passes: int = 5
    router_dropout: float = 0.1
    dropout: float = 0.0
    residual: bool = True

    def __post_init__(self) -> None:
        check_choice("MoFMEConfig", "experts", self.experts, EXPERTS)
        check_choice("MoFMEConfig", "router", self.router, ROUTERS)

    tiny = preset("For crops of 32 pixels.")
    e4 = preset(
        "The authors' sizes with four experts.",
        channels=32,
        tail_scale=4,
        patch_size=8,
        hidden_size=384,
        num_heads=8,
        head_size=64,
        num_experts=4,
        dropout=0.1,
        residual=False,
    )
    e8 = e4.but("With eight.", num_experts=8)
    e16 = e4.but("With sixteen.", num_experts=16)


class Attention(nn.Module):
    """Softmax attention of all tokens of an image to each other."""

    def __init__(self, config: MoFMEConfig) -> None:
        super().__init__()
        inner = config.num_heads * config.head_size
        self.num_heads = config.num_heads
        self.norm = nn.LayerNorm(config.hidden_size)
        self.qkv = nn.Linear(config.hidden_size, 3 * inner, bias=False)
        self.out = nn.Linear(inner, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.dropout(self.out(attended))
        return out


class DenseFFN(nn.Module):
    """A feed-forward network behind a norm."""

    def __init__(self, config: MoFMEConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.norm = nn.LayerNorm(hidden)
        self.ffn = feed_forward(hidden, config.mlp_ratio * hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.dropout(self.ffn(self.norm(x))), None


class RestorationBlock(nn.Module):
    """x + attention(x), then x + what follows it."""

    def __init__(self, config: MoFMEConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.ffn: nn.Module
        if config.experts == "dense":
            self.ffn = DenseFFN(config)
        else:
            self.ffn = MoFME(
                config.hidden_size,
                config.mlp_ratio * config.hidden_size,
                config.num_experts,
                config.top_k,
                experts=config.experts,
                router=config.router,
                passes=config.passes,
                router_dropout=config.router_dropout,
                dropout=config.dropout,
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        x = x + self.attention(x)
        y, routing = self.ffn(x)
        return x + y, routing


class ResidualConvolutions(nn.Module):
    """x + conv(relu(conv(x)))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(channels, channels), nn.ReLU(), conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.body(x)
        return y


class RestorationTransformer(nn.Module):
    """Images [B, 3, h, w] in [0, 1], h and w multiples of the patch, to images of their shape.

    Convolutions, patches to tokens, blocks, tokens to patches, convolutions. There is no positional
    embedding, as published: images of any size are fine.
    """

    def __init__(self, config: MoFMEConfig) -> None:
        super().__init__()
        self.config = config
        width, patch, hidden = config.channels, config.patch_size, config.hidden_size
        wide = width * config.tail_scale
        self.head = nn.Sequential(
            conv(3, width), ResidualConvolutions(width), ResidualConvolutions(width)
        )
        self.patches = nn.Conv2d(width, hidden, patch, stride=patch)
        self.patch_norm = nn.LayerNorm(hidden)
        self.layers = nn.ModuleList(RestorationBlock(config) for _ in range(config.num_layers))
        self.unpatch = nn.Linear(hidden, wide * patch**2)
        self.tail = nn.Sequential(
            ResidualConvolutions(wide),
            conv(wide, wide // 2),
            ResidualConvolutions(wide // 2),
            conv(wide // 2, 3),
        )
        if config.residual:
            for parameter in self.tail[-1].parameters():
                nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Routing]]:
        """The restored images, and the routing of each layer that has experts, whose tokens are
        those of the first image, row by row, then those of the second, and so on.

        Raises:
            ValueError: a shape that does not fit.
        """
        patch = self.config.patch_size
        if images.dim() != 4 or images.shape[1] != 3 or any(n % patch for n in images.shape[2:]):
            raise ValueError(
                f"RestorationTransformer: images must be [B, 3, h, w], h and w multiples of "
                f"{patch}, got shape {list(images.shape)}."
            )
        tokens = self.patches(self.head(images))
        rows = tokens.shape[2]
        x = self.patch_norm(tokens.flatten(2).transpose(1, 2))
        routing = []
        for layer in self.layers:
            x, routed = layer(x)
            if routed is not None:
                routing.append(routed)
        cells = self.unpatch(x).unflatten(1, (rows, -1)).unflatten(-1, (-1, patch, patch))
        # [B, rows, columns, C, patch, patch] to [B, C, h, w].
        made = cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        out = self.tail(made)
        return (images + out if self.config.residual else out.sigmoid()), routing

    def num_parameters(self) -> dict[str, int]:
        """ "total", "experts" (what there is once an expert, in all layers) and "active": without
        those of the experts that a token does not use."""
        config = self.config
        total = sum(p.numel() for p in self.parameters())
        mixtures = [module for module in self.modules() if isinstance(module, MoFME)]
        experts = sum(mixture.expert_parameters() for mixture in mixtures)
        unused = experts * (config.num_experts - config.top_k) // config.num_experts
        return {"total": total, "experts": experts, "active": total - unused}


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)
