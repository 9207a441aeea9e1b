"""Image quality metrics, and mutual information of experts and image content."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio in dB of each image, [B]; infinite for equal images.

    images, truth: [B, ...] of numbers in [0, 1].
    """
    error = (images - truth).square().flatten(1).mean(1)
    return -10 * error.log10()


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Returns the structural similarity of each image, [B], at most 1.

    images, truth: [B, 3, H, W] of numbers in [0, 1], H and W at least 11.

    Raises:
        ImportError: torchmetrics is not installed.
    """
    measure: Any = import_ssim()
    found: Tensor = measure(images, truth, data_range=1.0, reduction="none")
    return found


def import_ssim() -> Any:
    """Returns torchmetrics' function; an ImportError names the extra to install."""
    try:
        module = importlib.import_module("torchmetrics.functional.image")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"bench.studies: SSIM needs {error.name}, which is not installed: "
            "pip install torch-moe-ops[studies]"
        ) from error
    return module.structural_similarity_index_measure


def mutual_information(counts: Tensor) -> float:
    """Returns the mutual information of the row and the column of a table of counts, in nats."""
    joint = counts.double() / counts.sum()
    independent = joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True)
    return float((torch.xlogy(joint, joint) - torch.xlogy(joint, independent)).sum())
