"""Shared parts of the tests of sharded experts: a small model, its data, one process that is the
truth.

Every rank makes the whole data of a step from a seed and takes its part, so that the batch does not
depend on how many ranks there are. Gradients are means over the ranks of data parallelism, and the
loss is a mean over tokens: both then equal those of one process that reads the whole batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.helpers.moe import build_moe
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moe_ops.parallel import (
    canonical_expert_order,
    clip_grad_norm_,
    fully_shard_moe,
    init_moe_meshes,
    prepare_ddp,
    shard_experts,
)

HIDDEN, EXPERTS, TOKENS = 16, 8, 48


class Block(nn.Module):
    """A residual block with a norm, a dense map and experts."""

    def __init__(self, experts: int = EXPERTS, **options) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.dense = nn.Linear(HIDDEN, HIDDEN)
        self.moe = build_moe(
            HIDDEN, 8, experts, min(2, experts), num_shared_experts=1, bias=True, **options
        )

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


class Run:
    """A model in training, sharded for ep ranks beside FSDP2, or DDP, with its optimizer.

    options: of `shard_experts`. model: of `Model`.
    """

    def __init__(self, rank, ep, seed=0, *, fsdp=True, model=None, **options):
        self.rank = rank
        meshes = init_moe_meshes(ep)
        self.model = shard_experts(Model(seed=seed, **(model or {})), meshes.ep, **options)
        self.call = self.model
        if fsdp:
            for block in self.model.layers:
                fully_shard_moe(block, meshes.dp, meshes.efsdp)
            fully_shard(self.model, mesh=meshes.dp)
        else:
            prepare_ddp(self.model, efsdp_mesh=meshes.efsdp)
            self.call = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, foreach=False)

    def steps(self, first, last):
        losses = []
        for step in range(first, last):
            x, target = batch(step, self.rank, dist.get_world_size())
            loss = loss_of(self.call, x, target)
            self.optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(self.model.parameters(), 0.5)
            self.optimizer.step()
            losses.append(mean_over_ranks(loss))
        return losses

    def save(self, folder):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer}
        with canonical_expert_order(self.model, state):
            dcp.save(state, checkpoint_id=folder)

    def load(self, folder):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer}
        with canonical_expert_order(self.model, state):
            dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )

    def everything(self):
        """Weights and Adam's state by name, whole, in the order of experts."""
        found = parameters(self.model)
        names = {p: name for name, p in self.model.named_parameters()}
        for p, state in self.optimizer.state.items():
            found |= {f"{names[p]} {key}": whole(value) for key, value in state.items()}
        for prefix, bank in self.model.named_modules():
            if getattr(bank, "sharding", None) is not None:
                first = list(bank.sharding.placement.first_places)
                for name in [n for n in found if n.startswith(f"{prefix}.")]:
                    if found[name].ndim:
                        found[name] = found[name][first]
        return found
