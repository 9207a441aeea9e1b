"""The loss of detectors of transformers, with a loss of their proposals that has a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_grounding_dino import (
    GroundingDinoHungarianMatcher,
    GroundingDinoImageLoss,
)
from transformers.models.grounding_dino.modeling_grounding_dino import (
    build_label_maps,
    build_text_mask,
)

CLASS_WEIGHT = 2.0  # As in transformers; the weights of the boxes are in the config.


def detection_loss(out: Any, labels: Sequence[dict[str, Tensor]], config: Any) -> Tensor:
    """Focal, L1 and GIoU losses of all decoder layers (or the last, by the config's
    auxiliary_loss), and of the proposals: a scalar.

    transformers' own loss of the proposals has no gradient by their boxes, and its scores are of
    query embeddings that have not seen the image: it is left out. Proposals are matched with the
    objects as the queries are instead, which trains the choice of queries as in the authors' code.

    transformers' loss takes the phrases of the second image for those of all later ones. Phrases of
    all images must have as many tokens.

    Args:
        out: what the detector returned for these labels.
        labels: an image's "class_labels" and "boxes".

    Raises:
        ValueError: phrases of other numbers of tokens.
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
