"""Transformer that renders novel views, with view experts in every second view transformer.

Letters: S scenes, V source views, R rays, P points of a ray, H hidden size, F image features, h and
w height and width of an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops._fields import check_choice, check_divides, check_least
from moe_ops.layers.self_attention import JointAttention

from .._presets import preset
from .cameras import Cameras, project, ray_differences, rays, sample_images
from .layers import FeedForward, ViewExperts, ViewRouted, consistency_loss, neighbors

FFNS = ("moe", "dense")


@dataclass(frozen=True)
class GNTMoveConfig:
    """Sizes and options.

    Attributes:
        hidden_size, num_layers, num_heads: H, pairs of a view and a ray transformer, heads of the
            latter.
        features: F. num_freqs: of the sine and cosine encodings of points and directions.
        num_points: P.
        mlp_ratio: inner size of networks and experts over H.
        ffn: "moe": view experts in the view transformers 1, 3, ...; "dense": GNT.
        dense_ratio: inner size over H of the networks that replace the experts, with "dense"; 0:
            `mlp_ratio`. A baseline of equal compute is wider.
        num_experts, top_k: E and K. permanent: if true, adds an expert applied to every point.
        noise: of the routers in training, times 1 / E.
        balance_weight, consistency_weight: of the two losses, mean over layers.
        dropout: behind attention and networks, in training.
        near, far: depths of the first and the last point of a ray.
    """

    hidden_size: int = 32
    num_layers: int = 4
    num_heads: int = 4
    features: int = 16
    num_freqs: int = 4
    num_points: int = 16
    mlp_ratio: int = 4
    ffn: str = "moe"
    dense_ratio: int = 0
    num_experts: int = 4
    top_k: int = 2
    permanent: bool = True
    noise: float = 1.0
    balance_weight: float = 0.0001
    consistency_weight: float = 0.2
    dropout: float = 0.0
    near: float = 2.0
    far: float = 6.5

    def __post_init__(self) -> None:
        check_choice("GNTMoveConfig", "ffn", self.ffn, FFNS)
        check_least("GNTMoveConfig", "hidden_size", self.hidden_size, 8)
        whole = self.hidden_size
        check_divides("GNTMoveConfig", "num_heads", self.num_heads, "hidden_size", whole)

    tiny = preset("For images of 48 pixels.")
    gnt = preset(
        "The authors' sizes.",
        hidden_size=64,
        num_layers=8,
        features=32,
        num_freqs=10,
        num_points=192,
        dropout=0.1,
    )


class Views(NamedTuple):
    """Input views of S scenes: images [S, V, 3, h, w] in [0, 1], and their cameras [S, V]."""

    images: Tensor
    cameras: Cameras


class Rendered(NamedTuple):
    """Rendered rays. colors: [S, R, 3]. points: [S * R, P, 3], the sampled points. routed: one
    entry per layer of experts, whose tokens are the points, ray by ray."""

    colors: Tensor
    points: Tensor
    routed: list[ViewRouted]


class RenderLoss(NamedTuple):
    """Loss = color + balance_weight * balance + consistency_weight * consistency. color: mean
    squared error. balance, consistency: mean over layers, 0 for a dense model."""

    loss: Tensor
    color: Tensor
    balance: Tensor
    consistency: Tensor


class ViewAttention(nn.Module):
    """Attention of each point to the source views, per feature: weights are softmax over views of a
    network of k - q + p, where p is a network of the direction differences."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.q = nn.Linear(size, size, bias=False)
        self.k = nn.Linear(size, size, bias=False)
        self.v = nn.Linear(size, size, bias=False)
        self.place = small_network(4, size // 8, size)
        self.score = small_network(size, size // 8, size)
        self.out = nn.Linear(size, size)

    def forward(self, x: Tensor, views: Tensor, differences: Tensor, seen: Tensor) -> Tensor:
        """Computes attention of x [..., P, H] to views [..., P, V, H], with differences [..., P, V,
        4] and seen [..., P, V]."""
        k = self.k(views)
        v = self.v(k)
        place = self.place(differences)
        scores = self.score(k - self.q(x)[..., None, :] + place)
        # A large negative number as in GNT: a point that no view sees averages all of them.
        weights = scores.masked_fill(~seen[..., None], -1e9).softmax(-2)
        out: Tensor = self.out(((v + place) * weights).sum(-2))
        return out


class ViewBlock(nn.Module):
    """Computes x + view attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: GNTMoveConfig, with_experts: bool) -> None:
        super().__init__()
        size = config.hidden_size
        inner = config.mlp_ratio * size
        self.attention_norm = nn.LayerNorm(size, eps=1e-6)
        self.attention = ViewAttention(size)
        self.ffn_norm = nn.LayerNorm(size, eps=1e-6)
        self.ffn: nn.Module
        if with_experts and config.ffn == "moe":
            self.ffn = ViewExperts(
                size, inner, config.num_experts, config.top_k, permanent=config.permanent,
                noise=config.noise,
            )  # fmt: skip
        else:
            wide = with_experts and config.dense_ratio
            self.ffn = FeedForward(size, config.dense_ratio * size if wide else inner)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, views: Tensor, differences: Tensor, seen: Tensor
    ) -> tuple[Tensor, ViewRouted | None]:
        x = x + self.dropout(self.attention(self.attention_norm(x), views, differences, seen))
        out = self.ffn(self.ffn_norm(x))
        y, routed = out if isinstance(out, tuple) else (out, None)
        return x + self.dropout(y), routed


class RayBlock(nn.Module):
    """Computes x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: GNTMoveConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.attention_norm = nn.LayerNorm(size, eps=1e-6)
        self.attention = JointAttention(size, config.num_heads)
        self.ffn_norm = nn.LayerNorm(size, eps=1e-6)
        self.ffn = FeedForward(size, config.mlp_ratio * size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        y: Tensor = x + self.dropout(self.ffn(self.ffn_norm(x)))
        return y


class GNTMove(nn.Module):
    """Colors of rays, from images of a scene outside the training set.

    Each point of a ray is projected into the source images. View transformers mix the colors and
    convolutional features sampled there; ray transformers mix the points of a ray. The color is a
    linear map of the mean over points.
    """

    def __init__(self, config: GNTMoveConfig) -> None:
        super().__init__()
        self.config = config
        size, encoded = config.hidden_size, 2 * 3 * (1 + 2 * config.num_freqs)
        self.features = nn.Sequential(
            nn.Conv2d(3, config.features, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(config.features, config.features, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(config.features, config.features, 3, padding=1),
        )
        self.enter = small_network(config.features + 3, size, size)
        layers = range(config.num_layers)
        self.view_blocks = nn.ModuleList(ViewBlock(config, i % 2 == 1) for i in layers)
        # Points and directions enter before every second ray transformer.
        self.places = nn.ModuleList(small_network(size + encoded, size, size) for _ in layers[::2])
        self.ray_blocks = nn.ModuleList(RayBlock(config) for _ in layers)
        self.norm = nn.LayerNorm(size)
        self.color = nn.Linear(size, 3)

    def forward(
        self,
        views: Views,
        target: Cameras,
        pixels: Tensor,
        *,
        depths: Tensor | None = None,
        features: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Rendered:
        """Returns the colors of pixels [S, R, 2] of target cameras [S].

        Args:
            depths: of the points, [S, R, P]; None: see `draw_depths`.
            features: of the source images, see `image_features`; None: computed.
            generator: of the depths in training; None: torch's.
        """
        if features is None:
            features = self.image_features(views.images)
        origins, directions = rays(target, pixels)
        if depths is None:
            depths = self.draw_depths(len(pixels), pixels.shape[1], generator)
        points = origins[..., None, :] + depths[..., None] * directions[..., None, :]
        seen_there, differences, seen = self.look(views, features, target, points)
        x, routed = self._blocks(seen_there, differences, seen, points, directions)
        colors = self.color(self.norm(x).mean(-2)).view(*pixels.shape[:2], 3)
        return Rendered(colors, points.flatten(0, 1), routed)

    def image_features(self, images: Tensor) -> Tensor:
        """Returns features [S, V, F, h', w'] of images [S, V, 3, h, w], at half their size."""
        made: Tensor = self.features(images.flatten(0, 1))
        return made.unflatten(0, images.shape[:2])

    def draw_depths(
        self, scenes: int, count: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Returns depths [S, R, P]: the midpoints of equal intervals from near to far; in training
        a random position in each."""
        config = self.config
        place = torch.full((scenes, count, config.num_points), 0.5)
        if self.training:
            place = torch.rand(place.shape, generator=generator)
        part = (torch.arange(config.num_points) + place) / config.num_points
        depths = config.near + (config.far - config.near) * part
        return depths.to(self.color.weight)

    def look(
        self, views: Views, features: Tensor, target: Cameras, points: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Samples source views at points [S, R, P, 3]: colors and features [S * R, P, V, 3 + F],
        differences of directions [S * R, P, V, 4], and bool [S * R, P, V], True inside the
        image."""
        count, num_views = views.images.shape[:2]
        rows, places = points.shape[1:3]
        flat = points.flatten(1, 2)
        repeated = flat[:, None].expand(-1, num_views, -1, -1)
        where, inside = project(views.cameras, repeated)
        size = (views.cameras.height, views.cameras.width)
        shown = [
            sample_images(maps.flatten(0, 1), where.flatten(0, 1), *size)
            for maps in (views.images, features)
        ]
        # [S * V, R * P, C] to [S * R, P, V, C].
        found = torch.cat(shown, -1).view(count, num_views, rows, places, -1)
        found = found.permute(0, 2, 3, 1, 4).flatten(0, 1)
        seen = inside.view(count, num_views, rows, places).permute(0, 2, 3, 1).flatten(0, 1)
        differences = ray_differences(flat, target.position, views.cameras.position)
        return found, differences.view(count * rows, places, num_views, 4), seen

    def _blocks(
        self, found: Tensor, differences: Tensor, seen: Tensor, points: Tensor, directions: Tensor
    ) -> tuple[Tensor, list[ViewRouted]]:
        freqs = self.config.num_freqs
        flat = points.flatten(0, 1)
        way = encode(directions.flatten(0, 1), freqs)[:, None].expand(-1, flat.shape[1], -1)
        place = torch.cat([encode(flat, freqs), way], -1)
        views = self.enter(found)
        x = views.amax(-2)
        routed = []
        blocks: Any = zip(self.view_blocks, self.ray_blocks, strict=True)
        for number, (view_block, ray_block) in enumerate(blocks):
            x, of_layer = view_block(x, views, differences, seen)
            if of_layer is not None:
                routed.append(of_layer)
            if number % 2 == 0:
                x = self.places[number // 2](torch.cat([x, place], -1))
            x = ray_block(x)
        return x, routed

    def loss(
        self,
        views: Views,
        target: Cameras,
        pixels: Tensor,
        colors: Tensor,
        pairs: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> RenderLoss:
        """Computes the loss of pixels [S, R, 2] with target colors [S, R, 3].

        Args:
            pairs: [N, 2], indices in [0, S * R) of neighboring rays.
        """
        out = self(views, target, pixels, generator=generator)
        color = F.mse_loss(out.colors, colors)
        balance = consistency = color.new_zeros(())
        if out.routed:
            balance = torch.stack([routed.balance for routed in out.routed]).mean()
            if self.config.consistency_weight:
                consistency = self.disagreement(out, pairs)
        config = self.config
        loss = color + config.balance_weight * balance
        return RenderLoss(
            loss + config.consistency_weight * consistency, color, balance, consistency
        )

    def disagreement(self, out: Rendered, pairs: Tensor) -> Tensor:
        """Computes `consistency_loss`, averaged over layers of experts."""
        near = neighbors(out.points, pairs)
        shape = out.points.shape[:2]
        found = [consistency_loss(r.logits.unflatten(0, shape), pairs, near) for r in out.routed]
        return torch.stack(found).mean()


def encode(x: Tensor, num_freqs: int) -> Tensor:
    """Encodes [..., 3] as [..., 3 (1 + 2 n)]: x, then sin and cos of x, 2 x, 4 x, ..."""
    parts = [x]
    for number in range(num_freqs):
        parts += [(2**number * x).sin(), (2**number * x).cos()]
    return torch.cat(parts, -1)


def small_network(inputs: int, inner: int, outputs: int) -> nn.Sequential:
    """Returns a network of linear map, relu and linear map."""
    return nn.Sequential(nn.Linear(inputs, inner), nn.ReLU(), nn.Linear(inner, outputs))
