"""Sizes and choices of WideNet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from moe_ops._fields import check_choice, check_types

from .._presets import preset
from ..lm.config import LMConfig, number, size

TRUNKS = ("language", "vision")
SHARINGS = ("own_norms", "shared_norms", "none")
POOLINGS = ("mean", "token")


@dataclass(frozen=True)
class WideNetConfig(LMConfig):
    """Sizes and choices.

    Attributes, beside those of `LMConfig`:
        vocab_size: of the language model; not used by images.
        num_layers: depth: how often the block is used.
        trunk: "language", causal, or "vision", which classifies images.
        sharing: "own_norms", one block with norms of each depth; "shared_norms", one block and one
            pair of norms (as in ALBERT); "none", a block of each depth.
        num_heads, intermediate_size: the latter of one expert.
        num_experts, top_k: E and K; with E = 1 the block has a dense network and no router.
        noise: in training, deviation of what is added to router logits; None: 1 / E.
        capacity_factor: in training, see `moe_ops.layers.CapacityRouter`; None drops no token.
        dropout: of what attention and experts add to the stream.
        balance_coefficient: of the balance loss, summed over depths.
        rope_theta: base of the positions of "language".
        image_size, patch_size, channels, num_classes: of "vision"; images are square.
        pooling: "mean" over all places, that of the class token among them, or the "token" alone.
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
    sharing: str = "own_norms"
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
        check_choice("WideNetConfig", "sharing", self.sharing, SHARINGS)
        check_choice("WideNetConfig", "pooling", self.pooling, POOLINGS)
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise ValueError(
                f"WideNetConfig: patch_size must divide image_size = {self.image_size}, got "
                f"{self.patch_size}."
            )

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
        return {"load_balancing": self.balance_coefficient} if self.num_experts > 1 else {}

    def write_more(self) -> dict[str, Any]:
        return {"architectures": ["WideNet"], "model_type": "widenet"}
