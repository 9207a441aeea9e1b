"""Average precision of a detector's boxes, by pycocotools."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .shapes import TOKENS_A_PHRASE, Scenes

BOXES_AN_IMAGE = 100  # Sizes defined by COCO.


class Found(NamedTuple):
    """Detections. boxes [B, D, 4], center and size as fractions of the side; scores [B, D]; pairs
    [B, D]."""

    boxes: Tensor
    scores: Tensor
    pairs: Tensor


def check_installed() -> None:
    """Raises ImportError with installation instructions if pycocotools is missing."""
    if importlib.util.find_spec("pycocotools") is None:
        raise ImportError(
            "bench.studies: average precision needs pycocotools, which is not installed: "
            "pip install torch-moe-ops[studies]"
        )


@torch.no_grad()
def detect(model: Any, scenes: Scenes, *, batch_size: int = 64) -> Found:
    """Returns the best hundred (or all) pairs of a query and a phrase. The score of a phrase is the
    mean of its tokens' probabilities."""
    before = model.training
    model.eval()
    parts = []
    for start in range(0, len(scenes.images), batch_size):
        some = scenes.take(start, start + batch_size)
        out = model(some.images, some.input_ids)
        count = some.phrases.shape[1]
        tokens = out.logits[..., 1 : 1 + count * (TOKENS_A_PHRASE + 1)].sigmoid()
        scores = tokens.unflatten(-1, (count, -1))[..., :TOKENS_A_PHRASE].mean(-1)
        flat = scores.flatten(1)
        best = flat.topk(min(BOXES_AN_IMAGE, flat.shape[1]), dim=1)
        boxes = out.pred_boxes.gather(1, (best.indices // count)[..., None].expand(-1, -1, 4))
        pairs = some.phrases.gather(1, best.indices % count)
        parts.append(Found(boxes, best.values, pairs))
    model.train(before)
    return Found(*(torch.cat(part) for part in zip(*parts, strict=True)))


def average_precision(
    found: Found, scenes: Scenes, pairs: Sequence[int] | None = None
) -> dict[str, float]:
    """Returns COCO's box AP: "AP" over IoU 0.5 to 0.95, "AP50" and "AP75"; means over pairs that
    occur.

    Args:
        found: result of `detect`.
        pairs: pairs to count; None: all.

    Raises:
        ImportError: pycocotools is not installed.
        ValueError: there is no object of these pairs.
    """
    check_installed()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    side = scenes.images.shape[-1]
    objects: list[dict[str, Any]] = []
    for image, (phrases, labels) in enumerate(zip(scenes.phrases, scenes.labels, strict=True)):
        boxes = _corner_and_size(labels["boxes"], side)
        for pair, box in zip(phrases[labels["class_labels"]].tolist(), boxes, strict=True):
            objects.append({
                "id": len(objects) + 1, "image_id": image, "category_id": pair, "bbox": box,
                "area": box[2] * box[3], "iscrowd": 0,
            })  # fmt: skip
    categories = sorted({o["category_id"] for o in objects} & set(pairs or range(10**6)))
    if not categories:
        raise ValueError("average_precision: scenes must have objects of pairs, got none.")
    results = [
        {"image_id": image, "category_id": pair, "bbox": box, "score": score}
        for image in range(len(scenes.images))
        for pair, box, score in zip(
            found.pairs[image].tolist(),
            _corner_and_size(found.boxes[image], side),
            found.scores[image].tolist(),
            strict=True,
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": i} for i in range(len(scenes.images))],
            "annotations": objects,
            "categories": [{"id": pair} for pair in categories],
        }
        truth.createIndex()
        judged = COCOeval(truth, truth.loadRes(results), "bbox")
        judged.params.catIds = categories
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return dict(zip(("AP", "AP50", "AP75"), (float(value) for value in judged.stats), strict=False))


def _corner_and_size(boxes: Tensor, side: int) -> list[list[float]]:
    """Converts [n, 4] of center and size to left, top, width and height in pixels."""
    center, size = boxes.double().split(2, dim=-1)
    corners: list[list[float]] = (torch.cat([center - size / 2, size], dim=-1) * side).tolist()
    return corners


def co_selection(topk_ids: Tensor, num_experts: int) -> Tensor:
    """Returns [E, E]: how often two experts were selected for one query; the diagonal counts each
    expert.

    Args:
        topk_ids: [T, K].
    """
    used = torch.zeros(len(topk_ids), num_experts).scatter_(1, topk_ids.long(), 1.0)
    return used.T @ used


def pairs_kept(topk_ids: Tensor, num_slices: int) -> float:
    """Returns the fraction of queries that use only whole copies, 1 at the published
    initialization.

    Args:
        topk_ids: [T, K].
    """
    copies = (topk_ids // num_slices).sort(1).values
    groups = copies.unflatten(1, (-1, num_slices))
    return float((groups == groups[..., :1]).all(-1).all(-1).double().mean())
