"""MoFME: image restoration by experts that modulate one shared network.

Example:
    model = zoo.create_model("mofme")                                # or preset="e8"
    restored, routing = model(images)

Source: Zhang et al. 2024 (Efficient Deweather Mixture-of-Experts with Uncertainty-aware
Feature-wise Linear Modulation, AAAI, arXiv 2312.16610).

Letters: T tokens, H hidden size, I intermediate size, E experts, K experts per token, M passes of
the router, B images, S tokens of an image, C channels of the convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops._fields import check_least
from moe_ops.layers import TopKRouter
from moe_ops.layers.routing import Routing, drop_masked
from moe_ops.layers.self_attention import JointAttention
from moe_ops.ops import moe_linear_reduce

from ._presets import preset

__all__ = ["FiLMExperts", "MoFME", "MoFMEConfig", "RestorationTransformer", "UncertaintyRouter"]


class FiLMExperts(nn.Module):
    """FiLM experts, feature-wise modulations of one h: y = sum_k w_k (a_k * h + c_k), a_k = W1_e h
    + b1_e and c_k = W2_e h + b2_e.

    The modulations are summed over experts, then applied to h once: one matmul per slot.

    Parameters:
        weight: [E, 2H, H], W1 first. bias: [E, 2H].

    Args:
        num_experts, hidden_size: E and H, at least 1.
        device, dtype: of the parameters.

    Initialization: each map as `nn.Linear`, uniform in +-1/sqrt(H).
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_least("FiLMExperts", "num_experts", num_experts, 1)
        check_least("FiLMExperts", "hidden_size", hidden_size, 1)
        self.num_experts, self.hidden_size = num_experts, hidden_size
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_experts, 2 * hidden_size, hidden_size, **where))
        self.bias = nn.Parameter(torch.empty(num_experts, 2 * hidden_size, **where))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial values described above."""
        bound = self.hidden_size**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, h: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """Maps h [T, H], topk_weights and topk_ids [T, K] to y [T, H], in the dtype of h; ids
        outside [0, E) contribute nothing."""
        slots = h[:, None].expand(-1, topk_ids.shape[1], -1)
        modulation = moe_linear_reduce(slots, self.weight, topk_weights, topk_ids, bias=self.bias)
        scale, shift = modulation.chunk(2, dim=-1)
        return scale * h + shift

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, hidden_size={self.hidden_size}"


class UncertaintyRouter(TopKRouter):
    """Softmax over the K best logits; in training, averaged over M passes with dropout (Monte-Carlo
    dropout).

    Pass m drops features of x and gives logits z_m. The K best experts by mean_m z_m are selected.
    Each pass has weights softmax(z_m) over those; w = mean_m / (1 + deviation_m), divided by its
    sum: experts on which the passes disagree weigh less. No gradient flows through the deviation.
    Eval mode uses one pass without dropout.

    With dropout 0 all passes are equal, and the router is `TopKRouter(..., topk_first=True)`.

    Args:
        hidden_size, num_experts, top_k, options: see `TopKRouter`.
        passes: M, at least 2. dropout: probability, in [0, 1).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        passes: int = 5,
        dropout: float = 0.1,
        **options: Any,
    ) -> None:
        check_least("UncertaintyRouter", "passes", passes, 2)
        if not 0 <= dropout < 1:
            raise ValueError(f"UncertaintyRouter: dropout must be in [0, 1), got {dropout}.")
        super().__init__(hidden_size, num_experts, top_k, **{"topk_first": True, **options})
        self.passes, self.dropout = passes, dropout

    @property
    def draws_random_numbers(self) -> bool:  # type: ignore[override]
        return self.dropout > 0

    def forward(
        self, x: Tensor, *, topk_ids: Tensor | None = None, expert_mask: Tensor | None = None
    ) -> Routing:
        if not self.training:
            return super().forward(x, topk_ids=topk_ids, expert_mask=expert_mask)
        logits = self.pass_logits(x)
        mean = logits.mean(0)
        if topk_ids is None:
            ids = self.choose(mean, expert_mask=expert_mask)
            self.count(ids, mean, expert_mask)
        else:
            ids = drop_masked(topk_ids, expert_mask)
        each = torch.stack([self.weights_at(z, ids, expert_mask=expert_mask) for z in logits])
        return Routing(mean, calibrated(each), ids)

    def pass_logits(self, x: Tensor) -> Tensor:
        """Returns logits of M passes with dropout, [M, T, E]."""
        dropped = F.dropout(x.expand(self.passes, *x.shape), self.dropout, training=True)
        return self.logits(dropped.flatten(0, 1)).unflatten(0, (self.passes, -1))


def calibrated(weights: Tensor) -> Tensor:
    """Returns weights [T, K] from M passes [M, T, K]: their mean over 1 + their deviation, divided
    by the sum; 0 for a token without weights."""
    made = weights.mean(0) / (1 + weights.detach().std(0))
    return made / made.sum(-1, keepdim=True).clamp(min=1e-20)


class SharedBase(nn.Module):
    """Base of all FiLM experts: h = gelu(W_a x) * (W_b x)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.a = nn.Linear(hidden_size, hidden_size)
        self.b = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = F.gelu(self.a(x)) * self.b(x)
        return product


class MoFME(nn.Module):
    """Mixture that replaces a feed-forward network: y = adaptor(sum_k w_k FiLM_e(h)), h =
    base(norm(x)).

    The router reads x itself, as published.

    Args:
        hidden_size, intermediate_size, num_experts, top_k: H, I (of the adaptor), E, K.
        passes, router_dropout: of `UncertaintyRouter`. dropout: behind the output.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        passes: int = 5,
        router_dropout: float = 0.1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.router: TopKRouter = UncertaintyRouter(
            hidden_size, num_experts, top_k, bias=True, passes=passes, dropout=router_dropout
        )
        self.experts = FiLMExperts(num_experts, hidden_size)
        self.base = SharedBase(hidden_size)
        self.adaptor = feed_forward(hidden_size, intermediate_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Returns y, shaped like x [..., H], and the routing of its T tokens."""
        flat = x.flatten(0, -2)
        routing = self.router(flat)
        h = self.base(self.norm(flat))
        y = self.adaptor(self.experts(h, routing.topk_weights, routing.topk_ids))
        return self.dropout(y).view(x.shape), routing


def feed_forward(hidden_size: int, intermediate_size: int) -> nn.Sequential:
    """Returns a network of linear map, gelu and linear map."""
    return nn.Sequential(
        nn.Linear(hidden_size, intermediate_size),
        nn.GELU(),
        nn.Linear(intermediate_size, hidden_size),
    )


@dataclass(frozen=True)
class MoFMEConfig:
    """Sizes and options.

    Attributes:
        channels: of the convolutions before the transformer; those behind it have `tail_scale`
            times as many.
        patch_size: pixels of a token's side.
        hidden_size, num_layers, num_heads, head_size: of the transformer.
        mlp_ratio: inner size of feed-forward networks over H.
        num_experts, top_k: E and K.
        passes, router_dropout: of `UncertaintyRouter`.
        dropout: behind attention and networks, in training.
        residual: if true, the network's output is added to the image and starts at 0; if false, as
            published, a sigmoid of it is the image.
    """

    channels: int = 8
    tail_scale: int = 1
    patch_size: int = 4
    hidden_size: int = 96
    num_layers: int = 2
    num_heads: int = 4
    head_size: int = 24
    mlp_ratio: int = 4
    num_experts: int = 8
    top_k: int = 2
    passes: int = 5
    router_dropout: float = 0.1
    dropout: float = 0.0
    residual: bool = True

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


class Attention(JointAttention):
    """Softmax attention between all tokens of an image, after a norm."""

    def __init__(self, config: MoFMEConfig) -> None:
        super().__init__(config.hidden_size, config.num_heads, config.head_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        out: Tensor = self.dropout(super().forward(self.norm(x), **options))
        return out


class RestorationBlock(nn.Module):
    """Computes x + attention(x), then x + the feed-forward part."""

    def __init__(self, config: MoFMEConfig, make_ffn: Callable[[Any], nn.Module]) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.ffn = make_ffn(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        x = x + self.attention(x)
        y, routing = self.ffn(x)
        return x + y, routing


class ResidualConvolutions(nn.Module):
    """Computes x + conv(relu(conv(x)))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(channels, channels), nn.ReLU(), conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.body(x)
        return y


class RestorationTransformer(nn.Module):
    """Restores images [B, 3, h, w] in [0, 1], h and w multiples of the patch.

    It consists of convolutions, patches to tokens, blocks, tokens to patches, and convolutions.
    There is no positional embedding, as published: images of any size are supported.
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
        self.layers = nn.ModuleList(
            RestorationBlock(config, self.make_ffn) for _ in range(config.num_layers)
        )
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

    def make_ffn(self, config: Any) -> nn.Module:
        """Returns the feed-forward part of a block."""
        return MoFME(
            config.hidden_size,
            config.mlp_ratio * config.hidden_size,
            config.num_experts,
            config.top_k,
            passes=config.passes,
            router_dropout=config.router_dropout,
            dropout=config.dropout,
        )

    def forward(self, images: Tensor) -> tuple[Tensor, list[Routing]]:
        """Returns the restored images, and the routing of each layer. Tokens are ordered by image,
        then by row.

        Raises:
            ValueError: unsupported shape.
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
            routing.append(routed)
        cells = self.unpatch(x).unflatten(1, (rows, -1)).unflatten(-1, (-1, patch, patch))
        # [B, rows, columns, C, patch, patch] to [B, C, h, w].
        made = cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        out = self.tail(made)
        return (images + out if self.config.residual else out.sigmoid()), routing


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)
