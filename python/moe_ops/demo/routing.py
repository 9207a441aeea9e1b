"""What the experts of a trained model specialise in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from moe_ops.demo import data
from moe_ops.demo.model import VOCABULARY, ModelConfig
from moe_ops.zoo.deepseek import DeepSeek

_NUM_WINDOWS = 64


@dataclass(frozen=True)
class RoutingSample:
    """A piece of text with its experts, and statistics of first choices on more text.

    topk_ids: [layers, bytes of `text`, K]. information: by layer, the mutual information in bits
    between a byte and the expert chosen first for it; `max_information`, log2 E, would be an expert
    that follows from the byte alone, with all experts equally busy. favourites: by layer and
    expert, the bytes that the expert takes most beyond its share.
    """

    text: bytes
    topk_ids: torch.Tensor
    information: list[float]
    max_information: float
    favourites: list[list[str]]


@torch.no_grad()
def inspect_routing(model: DeepSeek, config: ModelConfig, heldout: torch.Tensor) -> RoutingSample:
    """Route held-out text through the model."""
    model.eval()
    counts = np.zeros((config.num_layers, VOCABULARY, config.num_experts))
    windows, _ = data.heldout_windows(heldout, count=_NUM_WINDOWS, context=config.context)
    for block in windows.split(8):
        flat = block.flatten().numpy()
        for layer, called in enumerate(model(block, return_routing=True).routing):
            np.add.at(counts[layer], (flat, called.routing.topk_ids[:, 0].numpy()), 1)
    # A picture of the window with the most different bytes is worth most.
    text = max(windows, key=lambda window: window.unique().numel())
    routing = model(text[None], return_routing=True).routing
    model.train()
    return RoutingSample(
        text=bytes(text.tolist()),
        topk_ids=torch.stack([called.routing.topk_ids for called in routing]),
        information=[_mutual_information(table) for table in counts],
        max_information=math.log2(config.num_experts),
        favourites=[_favourites(table) for table in counts],
    )


def _mutual_information(table: np.ndarray) -> float:
    joint = table / table.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum())


def _favourites(table: np.ndarray, count: int = 6) -> list[str]:
    """For every expert the bytes with the largest excess over independence."""
    excess = table - table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    result = []
    for column in excess.T:
        order = np.argsort(-column, kind="stable")[:count]
        result.append("".join(_name(int(b)) for b in order if column[b] > 0))
    return result


def _name(byte: int) -> str:
    shown = {0x20: "␣", 0x0A: "⏎"}
    return shown.get(byte, chr(byte) if 0x20 < byte < 0x7F else "·")
