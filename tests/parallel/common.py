"""What the tests of sharded experts share: a small model, its data, one process that is the truth.

Every rank makes the whole data of a step from a seed and takes its part, so that the batch does not
depend on how many ranks there are. Gradients are means over the ranks of data parallelism, and the
loss is a mean over tokens: both then equal those of one process that reads the whole batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_ops.layers import MoE

HIDDEN, EXPERTS, TOKENS = 16, 8, 48


class Block(nn.Module):
    """A residual block with a norm, a dense map and experts."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.dense = nn.Linear(HIDDEN, HIDDEN)
        self.moe = MoE.build(HIDDEN, 8, EXPERTS, 2, num_shared_experts=1, bias=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(self.dense(x)))


class Model(nn.Module):
    def __init__(self, layers: int = 2, seed: int = 0, **options) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(Block(**options) for _ in range(layers))
        self.head = nn.Linear(HIDDEN, 4)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if ".experts.b_" in name:
                    p.normal_(std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def batch(step: int, part: int = 0, parts: int = 1, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Tokens [T / parts, H] and targets of a step: the part `part` of `parts` of them."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    target = torch.randn(tokens, 4, generator=generator)
    return x.chunk(parts)[part], target.chunk(parts)[part]


def loss_of(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return (model(x) - target).square().mean()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank, without the graph."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {n.removeprefix("module."): whole(p.grad) for n, p in named if p.grad is not None}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {n.removeprefix("module."): whole(p) for n, p in model.named_parameters()}


def mean_over_ranks(value: Tensor) -> float:
    value = value.detach().clone()
    dist.all_reduce(value)
    return float(value / dist.get_world_size())


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 2e-5) -> None:
    """Equal up to rounding, relative to the largest element of each tensor."""
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        bound = rtol * float(tensor.abs().max()) + 1e-9
        error = float((got[name] - tensor).abs().max())
        assert error <= bound, f"{name}: {error} > {bound}"
