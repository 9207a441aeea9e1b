"""Specialization of a trained model's experts, and the entropy of simple text models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moe_ops.demo import data
from moe_ops.demo.data import Corpus
from moe_ops.zoo.deepseek import DeepSeek

VOCABULARY = 256
_NUM_WINDOWS = 64
# Added to every count, so that a byte or pair absent from the training text costs about log2(count
# / 0.01) bits instead of infinitely many.
_SMOOTHING = 0.01


@dataclass(frozen=True)
class RoutingSample:
    """Statistics of the first experts selected by a model's routers.

    information: by layer, the mutual information in bits between a byte and its first expert;
    `max_information`, log2 E, is reached if the byte alone determines the expert and all experts
    are equally busy. favorites: by layer and expert, the bytes that the expert takes most beyond
    its share.
    """

    information: list[float]
    max_information: float
    favorites: list[list[str]]


@torch.no_grad()
def inspect_routing(model: DeepSeek, heldout: torch.Tensor) -> RoutingSample:
    """Routes held-out text through the model."""
    config = model.eval().config
    counts = np.zeros((config.num_layers, VOCABULARY, config.num_experts))
    windows, _ = data.heldout_windows(heldout, count=_NUM_WINDOWS, context=config.context)
    for block in windows.split(8):
        flat = block.flatten().numpy()
        for layer, called in enumerate(model(block, return_routing=True).routing):
            np.add.at(counts[layer], (flat, called.routing.topk_ids[:, 0].numpy()), 1)
    return RoutingSample(
        information=[_mutual_information(table) for table in counts],
        max_information=math.log2(config.num_experts),
        favorites=[_favorites(table) for table in counts],
    )


def entropies(corpus: Corpus) -> dict[str, float]:
    """Computes the cross-entropy of the held-out bytes, in bits per byte, under counts of the
    training bytes.

    unigram: ``-mean log2 p(b)`` with ``p(b) = (count(b) + 0.01) / (n + 2.56)``.
    bigram: ``-mean log2 p(b | a)``, ``a`` the byte before, with
    ``p(b | a) = (count(ab) + 0.01) / (count(a) + 2.56)``.
    """
    train, heldout = corpus.train.numpy(), corpus.heldout.numpy()
    unigram = np.bincount(train, minlength=256) + _SMOOTHING

    def pairs(text: np.ndarray) -> np.ndarray:
        index = text[:-1].astype(np.int64) * 256 + text[1:]
        return np.bincount(index, minlength=256 * 256).reshape(256, 256)

    bigram, seen = pairs(train) + _SMOOTHING, pairs(heldout)
    log_bigram = np.log2(bigram / bigram.sum(axis=1, keepdims=True))
    return {
        "unigram": float(-np.log2(unigram / unigram.sum())[heldout].mean()),
        "bigram": float(-(seen * log_bigram).sum() / seen.sum()),
    }


def max_violation(load: Sequence[Sequence[Sequence[int]]]) -> list[float]:
    """Returns MaxVio by layer, max load / mean load - 1, of tokens per expert [steps, layers,
    experts]."""
    total = torch.tensor(load).sum(0).double()
    return (total.amax(-1) / total.mean(-1).clamp_min(1e-9) - 1).tolist()


def _mutual_information(table: np.ndarray) -> float:
    joint = table / table.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum())


def _favorites(table: np.ndarray, count: int = 6) -> list[str]:
    """Returns for every expert the bytes with the largest excess over independence."""
    excess = table - table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    result = []
    for column in excess.T:
        order = np.argsort(-column, kind="stable")[:count]
        result.append("".join(_name(int(b)) for b in order if column[b] > 0))
    return result


def _name(byte: int) -> str:
    shown = {0x20: "␣", 0x0A: "⏎"}
    return shown.get(byte, chr(byte) if 0x20 < byte < 0x7F else "·")
