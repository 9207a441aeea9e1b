"""Counter-Current Learning: a network learns layer by layer from a second one that runs the other
way, from classes to features, and no gradient leaves a layer.

Letters: N examples, C classes, L layers, d width of a layer.

Source: Kao and Hariharan 2024 (Counter-Current Learning: A Biologically Plausible Dual Network
Approach for Deep Learning, NeurIPS, arXiv 2409.19841).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def local_loss(features: Tensor, signals: Tensor, y: Tensor, scale: float = 128.0) -> Tensor:
    """scale / d * mean over [N, C] of (features signals^T - [y = class])^2.

    Args:
        features: [N, d] of the forward network. signals: [C, d] of the feedback network.
        y: [N] classes.
        scale: 128 in the authors' code (half of its batch of 256).
    """
    wanted = F.one_hot(y, signals.shape[0]).to(features.dtype)
    return F.mse_loss(features @ signals.T, wanted) * (scale / features.shape[1])


class CounterCurrent(nn.Module):
    """A chain of L blocks, and a chain of L - 1 that runs from the classes down to the first block.

    `forward` is the first chain alone; `losses` is what trains both.

    Args:
        blocks: modules [N, d_(l-1)] -> [N, d_l], with experts or without; the last one gives logits
            [N, C].
        feedback: modules in the order of their use: the first maps one-hot classes [C, C] to
            [C, d_(L-1)], the last gives [C, d_1].
        num_classes: C.
        scale: of `local_loss`.

    Raises:
        ValueError: not one feedback block fewer than blocks.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        feedback: Iterable[nn.Module],
        num_classes: int,
        scale: float = 128.0,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.feedback = nn.ModuleList(feedback)
        self.num_classes = num_classes
        self.scale = scale
        if len(self.feedback) != len(self.blocks) - 1:
            raise ValueError(
                f"CounterCurrent: feedback must have {len(self.blocks) - 1} blocks, got "
                f"{len(self.feedback)}."
            )

    @classmethod
    def mlp(cls, sizes: Sequence[int], num_classes: int, scale: float = 128.0) -> CounterCurrent:
        """Linear maps without bias and ELU, as the authors' networks for MNIST.

        Args:
            sizes: of the input, then of the hidden layers.
        """

        def layer(a: int, b: int) -> nn.Module:
            return nn.Sequential(nn.Linear(a, b, bias=False), nn.ELU())

        blocks = [layer(a, b) for a, b in pairwise(sizes)]
        blocks.append(nn.Linear(sizes[-1], num_classes, bias=False))
        down = [num_classes, *reversed(sizes[1:])]
        return cls(blocks, [layer(a, b) for a, b in pairwise(down)], num_classes, scale)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, C]."""
        for block in self.blocks:
            x = block(x)
        return x

    def chains(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the outputs of blocks 1 to L ([N, d_l] each), and the signals [C, d_l] of layers
        1 to L - 1; the input of every block is detached."""
        features, signals = [], []
        for block in self.blocks:
            x = block(x.detach())
            features.append(x)
        signal = torch.eye(self.num_classes, dtype=x.dtype, device=x.device)
        for block in self.feedback:
            signal = block(signal.detach())
            signals.append(signal)
        return features, signals[::-1]

    def losses(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """`local_loss` of layers 1 to L - 1, then the cross-entropy of the logits. Minimize their
        sum: a block's gradient comes from its own loss alone.

        Args:
            x: [N, d_0]. y: [N] classes.
        """
        (*features, logits), signals = self.chains(x)
        local = [local_loss(f, s, y, self.scale) for f, s in zip(features, signals, strict=True)]
        return [*local, F.cross_entropy(logits, y)]

    @torch.no_grad()
    def alignment(self, x: Tensor, y: Tensor) -> list[float]:
        """Mean cosine of an example's features and its class's signal, in layers 1 to L - 1."""
        features, signals = self.chains(x)
        pairs = zip(features, signals, strict=False)
        return [float(F.cosine_similarity(f, s[y], dim=1).mean()) for f, s in pairs]
