"""Dynamic-DINO: an open-vocabulary detector whose decoder networks become experts.

Example:
    dense = zoo.create_model("dynamicdino", num_copies=0)  # train it, or take one of transformers
    sparse = dense.with_experts(num_copies=4, num_slices=2)

Source: Lu et al. 2025 (Dynamic-DINO: Fine-Grained Mixture of Experts Tuning for Real-time
Open-Vocabulary Object Detection, arXiv 2507.17436); Liu et al. 2023 (Grounding DINO, arXiv
2303.05499).

Letters: B images, Q queries of the decoder, H hidden size, N copies of a network, n slices of each,
E = N * n experts, K experts per query, P phrases.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    ConvNextConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
)
from transformers.loss.loss_grounding_dino import (
    GroundingDinoHungarianMatcher,
    GroundingDinoImageLoss,
)
from transformers.models.grounding_dino.modeling_grounding_dino import (
    build_label_maps,
    build_text_mask,
)

from moe_ops import upcycle
from moe_ops._fields import check_choice, check_least
from moe_ops.layers import MoE
from moe_ops.layers.losses import load_balancing_loss
from moe_ops.layers.routing import Routing

from ._presets import preset

__all__ = ["DynamicDino", "DynamicDinoConfig", "moe_tuning"]

CLASS_WEIGHT = 2.0  # As in transformers; the box weights are in the config.


def detection_loss(out: Any, labels: Sequence[dict[str, Tensor]], config: Any) -> Tensor:
    """Returns the focal, L1 and GIoU losses of all decoder layers (or only the last, if the config
    disables auxiliary_loss) and of the proposals: a scalar.

    transformers' proposal loss has no gradient for their boxes, and its scores are of query
    embeddings computed without the image, so it is omitted. Instead, proposals are matched with
    objects like queries, which trains query selection as in the authors' code.

    transformers' loss uses the phrases of the second image for all later ones. Phrases of all
    images must have equal numbers of tokens.

    Args:
        out: output of the detector for these labels.
        labels: an image's "class_labels" and "boxes".

    Raises:
        ValueError: phrases have different numbers of tokens.
    """
    maps: Sequence[Tensor] = build_label_maps(out.logits, out.input_ids)
    if any(m.shape != maps[0].shape or not torch.equal(m, maps[0]) for m in maps[1:]):
        raise ValueError(
            "detection_loss: phrases must have as many tokens in all images, got others; "
            "transformers' loss does not tell them apart."
        )
    weights = {
        "loss_ce": CLASS_WEIGHT,
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
    }
    found = {name: term for name, term in out.loss_dict.items() if not name.endswith("_enc")}
    matcher = GroundingDinoHungarianMatcher(
        class_cost=config.class_cost, bbox_cost=config.bbox_cost, giou_cost=config.giou_cost
    )
    criterion = GroundingDinoImageLoss(matcher, config.focal_alpha, ["labels", "boxes"])
    rows = out.enc_outputs_class.amax(-1).topk(config.num_queries, dim=1).indices[..., None]
    logits = out.enc_outputs_class.gather(1, rows.expand(-1, -1, out.enc_outputs_class.shape[-1]))
    boxes = out.enc_outputs_coord_logits.gather(1, rows.expand(-1, -1, 4)).sigmoid()
    mask = build_text_mask(logits, torch.ones_like(out.input_ids))
    proposals = {
        "logits": logits, "pred_boxes": boxes, "label_maps": maps, "text_mask": mask,
    }  # fmt: skip
    found |= {f"{name}_proposals": term for name, term in criterion(proposals, labels).items()}
    total = out.logits.new_zeros(())
    for name, term in found.items():
        kind = "_".join(name.split("_")[:2])
        if kind in weights:
            total = total + weights[kind] * term
    return total


DETECTORS: dict[str, tuple[Any, Any]] = {
    "mm-grounding-dino": (MMGroundingDinoConfig, MMGroundingDinoForObjectDetection),
    "grounding-dino": (GroundingDinoConfig, GroundingDinoForObjectDetection),
}
# The log-odds of 1 in 100: a new detector finds nothing rather than everything.
_RARE = -4.6


@dataclass(frozen=True)
class DynamicDinoConfig:
    """Sizes and options.

    Attributes:
        detector: "mm-grounding-dino" or "grounding-dino", of transformers.
        num_copies: N; 0: a dense detector.
        num_slices: n.
        top_k: K; 0: n, as many neurons as the dense network has.
        router_std: of the router's rows.
        balance_coefficient: of the balance loss, summed over layers.
        hidden_size: H, a multiple of 32. ffn_size, num_layers, num_heads, num_queries: of the
            detector; num_layers, 2 or more, are those of encoder and decoder each.
        backbone: "convnext", a small one, with a small BERT; "swin": transformers' defaults,
            Swin-T and BERT base.
    """

    detector: str = "mm-grounding-dino"
    num_copies: int = 4
    num_slices: int = 2
    top_k: int = 0
    router_std: float = 0.02
    balance_coefficient: float = 0.01
    hidden_size: int = 64
    ffn_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_queries: int = 16
    backbone: str = "convnext"

    def __post_init__(self) -> None:
        check_choice("DynamicDinoConfig", "detector", self.detector, DETECTORS)
        check_choice("DynamicDinoConfig", "backbone", self.backbone, ("convnext", "swin"))

    tiny = preset("Images of 64 x 64, 0.5 million parameters: trains on a CPU.")
    grounding_dino_tiny = preset(
        "The sizes of IDEA-Research/grounding-dino-tiny, with the paper's 16 copies in halves.",
        detector="grounding-dino",
        num_copies=16,
        hidden_size=256,
        ffn_size=2048,
        num_layers=6,
        num_heads=8,
        num_queries=900,
        backbone="swin",
    )

    def make_detector(self) -> Any:
        """Returns the dense detector, with newly initialized weights."""
        config_class, model_class = DETECTORS[self.detector]
        sizes: dict[str, Any] = {
            f"{part}_{name}": value
            for part in ("encoder", "decoder")
            for name, value in (
                ("layers", self.num_layers),
                ("ffn_dim", self.ffn_size),
                ("attention_heads", self.num_heads),
            )
        }
        if self.backbone == "convnext":
            width = self.hidden_size
            backbone: dict[str, Any] = {
                "hidden_sizes": [width // 4, width // 2, width],
                "depths": [1, 1, 1],
                "num_stages": 3,
                "out_features": ["stage2", "stage3"],
            }
            sizes |= {
                "backbone_config": ConvNextConfig(**backbone),
                "text_config": BertConfig(
                    vocab_size=1030,
                    hidden_size=32,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    intermediate_size=64,
                    max_position_embeddings=64,
                    hidden_dropout_prob=0.0,
                    attention_probs_dropout_prob=0.0,
                ),
                "num_feature_levels": 2,
                "max_text_len": 64,
                "auxiliary_loss": True,
                "dropout": 0.0,
                "fusion_droppath": 0.0,
            }
        made = model_class(
            config_class(d_model=self.hidden_size, num_queries=self.num_queries, **sizes)
        )
        for name, parameter in made.named_parameters():
            if "class_embed" in name:
                nn.init.constant_(parameter, _RARE)
        return made


class DecoderExperts(nn.Module):
    """Module that replaces the first linear map of a decoder layer; x [B, Q, H] to [B, Q, H]. The
    activation and the second map after it become identities."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.moe(x, return_routing=True).y
        return y


def moe_tuning(
    detector: Any,
    num_copies: int = 16,
    num_slices: int = 2,
    *,
    top_k: int = 0,
    router_std: float = 0.02,
    generator: torch.Generator | None = None,
) -> list[MoE]:
    """Replaces the feed-forward networks of a detector's decoder with experts.

    Each network is copied N times and each copy cut into n slices (granularity decomposition): the
    output's bias is divided by n, so that the slices of a copy add up to the network. The slices of
    a copy share a router row and are selected together, and if n divides K the detector's outputs
    are unchanged, up to rounding.

    Args:
        detector: a GroundingDino or MMGroundingDino of transformers with its head; changed in
            place.
        num_copies: N. num_slices: n, a divisor of the network's size.
        top_k: K; 0: n.
        generator: of the router's rows.

    Returns:
        The layers' mixtures, first layer first.

    Raises:
        ValueError: not a supported model, one that already has experts, dropout between the two
            maps of the networks, or incompatible numbers.

    Source: Lu et al. 2025 (Dynamic-DINO, arXiv 2507.17436).
    """
    layers = decoder_layers(detector)
    if any(isinstance(layer.fc1, DecoderExperts) for layer in layers):
        raise ValueError("moe_tuning: detector must be dense, got one with experts.")
    if any(layer.activation_dropout for layer in layers):
        raise ValueError(
            "moe_tuning: detector must have activation_dropout 0, got "
            f"{layers[0].activation_dropout}."
        )
    check_least("moe_tuning", "num_copies", num_copies, 1)
    made = []
    for layer in layers:
        moe = upcycle.upcycle_ffn(
            layer,
            num_copies * num_slices,
            top_k or num_slices,
            num_slices=num_slices,
            router_std=router_std,
            generator=generator,
        )
        layer.fc1 = DecoderExperts(moe)
        layer.activation_fn, layer.fc2 = nn.Identity(), nn.Identity()
        made.append(moe)
    return made


def decoder_layers(detector: Any) -> Any:
    """Returns the decoder layers.

    Raises:
        ValueError: the model is not GroundingDinoForObjectDetection or similar.
    """
    known: Any = tuple(model for _, model in DETECTORS.values())
    if not isinstance(detector, known):
        raise ValueError(
            "moe_tuning: detector must be a GroundingDinoForObjectDetection or an "
            f"MMGroundingDinoForObjectDetection of transformers, got {type(detector).__name__}."
        )
    return detector.model.decoder.layers


@dataclass(frozen=True)
class DinoLoss:
    """Loss = detection + coefficient * balance; scalars. routing: one entry per decoder layer."""

    loss: Tensor
    detection: Tensor
    balance: Tensor
    routing: list[Routing]


class DynamicDino(nn.Module):
    """Detector whose decoder has experts.

    Args:
        config: builds a newly initialized detector, if none is given.
        detector: of transformers; changed in place, and config's sizes are not used.
        generator: see `moe_tuning`.
    """

    def __init__(
        self,
        config: DynamicDinoConfig,
        detector: Any = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if torch.get_default_device().type == "meta":
            raise ValueError(
                "DynamicDino: the default device must have memory, because experts are slices of "
                "the detector's weights, got meta."
            )
        self.config = config
        self.detector = config.make_detector() if detector is None else detector
        decoder_layers(self.detector)
        if config.num_copies:
            self._make_experts(generator)

    def _make_experts(self, generator: torch.Generator | None) -> None:
        config = self.config
        moe_tuning(
            self.detector,
            config.num_copies,
            config.num_slices,
            top_k=config.top_k,
            router_std=config.router_std,
            generator=generator,
        )

    @property
    def mixtures(self) -> list[MoE]:
        """Returns the experts of the decoder's layers; empty for a dense detector."""
        layers = decoder_layers(self.detector)
        return [layer.fc1.moe for layer in layers if isinstance(layer.fc1, DecoderExperts)]

    def forward(self, pixel_values: Tensor, input_ids: Tensor, **more: Any) -> Any:
        """Returns the detector's output: "logits" [B, Q, tokens], "pred_boxes" [B, Q, 4], and more.

        Args:
            pixel_values: [B, 3, height, width]. input_ids: [B, tokens], phrases that end with full
                stops. more: see transformers.
        """
        return self.detector(pixel_values=pixel_values, input_ids=input_ids, **more)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[Routing]]:
        """Yields a list that collects the routing of every layer that runs inside the block."""
        found: list[Routing] = []

        def hook(module: nn.Module, args: Any, out: Any) -> None:
            found.append(out.routing)

        handles = [moe.register_forward_hook(hook) for moe in self.mixtures]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def loss(
        self, images: Tensor, input_ids: Tensor, labels: Sequence[dict[str, Tensor]]
    ) -> DinoLoss:
        """Computes `detection_loss` plus the balance loss summed over layers.

        Args:
            images: [B, 3, height, width]. input_ids: [B, tokens]; the phrases of all images have
                as many tokens, see `detection_loss`.
            labels: an image's "class_labels" [n], numbers of its phrases, and "boxes" [n, 4].
        """
        with self.recorded() as routing:
            out = self(images, input_ids, labels=list(labels))
        detection = detection_loss(out, labels, self.detector.config)
        balance = detection.new_zeros(())
        for one in routing:
            assert one.router_logits is not None
            balance = balance + load_balancing_loss(one.router_logits, one.topk_ids)
        total = detection + self.config.balance_coefficient * balance
        return DinoLoss(total, detection, balance, routing)

    def with_experts(self, generator: torch.Generator | None = None, **options: Any) -> DynamicDino:
        """Returns a copy of this dense detector with experts.

        Args:
            options: fields of the config: num_copies, num_slices, top_k and so on.

        Raises:
            ValueError: this detector has experts already.
        """
        if self.config.num_copies:
            raise ValueError("DynamicDino: the detector must be dense, got one with experts.")
        made = copy.deepcopy(self)
        made.config = dataclasses.replace(self.config, **options)
        made._make_experts(generator)
        return made
