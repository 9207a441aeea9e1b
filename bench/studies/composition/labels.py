"""Label propagation from a few prompts, and selection of the generalist's threshold.

Letters: N prompts, D size of an embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def propagate_labels(embeddings: Tensor, labels: Tensor, *, neighbors: int = 5) -> Tensor:
    """Propagates labels from a few prompts to all, by semi-supervised nearest neighbors.

    The unlabeled prompt most similar to a labeled one takes the label with the largest sum of
    cosines among its nearest labeled prompts, at most `neighbors` of them, and then counts as
    labeled. Takes O(N^2) time and memory for N prompts.

    Args:
        embeddings: [N, D]. labels: [N] int, -1 where unknown; at least one is known.

    Returns:
        [N], with the known labels unchanged. Ties go to the smaller label.
    """
    if not bool((labels >= 0).any()):
        raise ValueError("propagate_labels: labels must hold a known one, got none.")
    unit = F.normalize(embeddings.double(), dim=-1)
    likeness = unit @ unit.T
    labels = labels.clone()
    num_labels = int(labels.max()) + 1
    known = labels >= 0
    nearest = likeness.masked_fill(~known, -2.0).amax(-1).masked_fill(known, -3.0)
    for _ in range(int((~known).sum())):
        row = int(nearest.argmax())
        to_known = likeness[row].masked_fill(~known, -2.0)
        values, places = to_known.topk(min(neighbors, int(known.sum())))
        votes = values.new_zeros(num_labels).index_add_(0, labels[places], values)
        seen = torch.zeros(num_labels, dtype=torch.bool).index_fill_(0, labels[places], True)
        labels[row] = votes.masked_fill(~seen, -torch.inf).argmax()
        known[row] = True
        nearest = torch.maximum(nearest, likeness[row]).masked_fill(known, -3.0)
    return labels


def choose_threshold(confidence: Tensor, routed: Tensor, generalist: Tensor) -> float:
    """Returns the confidence below which prompts should use the generalist.

    Args:
        confidence: [N], for validation prompts. routed, generalist: [N], their losses with their
            category's model and with the generalist.

    Returns:
        The threshold with the lowest mean loss, the smallest of these: 0 sends no prompt to the
        generalist. Above the largest confidence all go there.
    """
    order = confidence.argsort(stable=True)
    # Mean loss with the n least confident prompts sent to the generalist.
    gain = (routed - generalist)[order].double().cumsum(0)
    gain = torch.cat([gain.new_zeros(1), gain])
    ordered = confidence[order].double()
    limits = torch.cat([ordered, torch.full_like(ordered[:1], torch.inf)])
    limits[0] = 0.0
    # Prompts of equal confidence are sent together.
    whole = torch.cat([torch.tensor([True]), ordered[1:] > ordered[:-1], torch.tensor([True])])
    return float(limits[gain.masked_fill(~whole, -torch.inf).argmax()])
