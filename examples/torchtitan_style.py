"""Parallelizes a model with `layers.MoE` as torchtitan does: one function, over the meshes of its
ParallelDims, that applies expert parallelism and then FSDP2.

    torchrun --nproc-per-node 4 examples/torchtitan_style.py --ep 2
    torchrun --nproc-per-node 1 examples/torchtitan_style.py

`parallelize` is what a model's parallelize.py has in torchtitan, whose ParallelDims it takes;
`Dims` stands in for that where torchtitan is not installed. As there, FSDP2 adds gradients up, and
a loss is a sum over this process's tokens, divided by the number of tokens of all.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from moe_ops import zoo
from moe_ops.demo import data
from moe_ops.layers import MoE, update_expert_bias
from moe_ops.parallel import clip_grad_norm_, fully_shard_moe, init_moe_meshes, shard_experts


class ExpertParallel(ParallelStyle):
    """For plans of `parallelize_module`: shares the experts of a `MoE` out over the mesh."""

    def __init__(self, dispatch: str = "auto", **options: Any) -> None:
        super().__init__()
        self.dispatch, self.options = dispatch, options

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return shard_experts(module, device_mesh, self.dispatch, **self.options)


def parallelize(
    model: nn.Module,
    *,
    parallel_dims: Any,
    dispatch: str = "auto",
    param_dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Args: parallel_dims: has `ep_enabled` and `get_mesh`; param_dtype: of computation."""
    fsdp_mesh = parallel_dims.get_mesh("fsdp")
    efsdp_mesh = fsdp_mesh
    if parallel_dims.ep_enabled:
        apply_moe_ep(model, parallel_dims.get_mesh("ep"), dispatch)
        efsdp_mesh = parallel_dims.get_mesh("efsdp")
    apply_fsdp(model, fsdp_mesh, efsdp_mesh, param_dtype)
    return model


def apply_moe_ep(model: nn.Module, ep_mesh: DeviceMesh, dispatch: str) -> None:
    for block in model.layers:
        if isinstance(block.mlp, MoE):
            parallelize_module(block, ep_mesh, {"mlp": ExpertParallel(dispatch)})


def apply_fsdp(
    model: nn.Module, fsdp_mesh: DeviceMesh, efsdp_mesh: DeviceMesh, param_dtype: torch.dtype
) -> None:
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    for block in model.layers:
        fully_shard_moe(block, fsdp_mesh, efsdp_mesh, mp_policy=policy)
    fully_shard(model, mesh=fsdp_mesh, mp_policy=policy)
    # A dispatch waits for the device, so FSDP2 would ask for the next weights too late by itself.
    for block, following in zip(model.layers, model.layers[1:], strict=False):
        block.set_modules_to_forward_prefetch(groups_of(following))
        following.set_modules_to_backward_prefetch(groups_of(block))
    # Gradients are sums over ranks: the loss is divided by the number of tokens already.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            experts = getattr(module, "sharding", None) is not None
            if (efsdp_mesh if experts else fsdp_mesh).size() > 1:
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other.


def groups_of(block: nn.Module) -> list[nn.Module]:
    """Returns the modules that FSDP2 gathers for a block."""
    return [module for module in block.modules() if isinstance(module, FSDPModule)]


class Dims:
    """The meshes of moe_ops.parallel by torchtitan's names."""

    def __init__(self, ep: int) -> None:
        meshes = init_moe_meshes(ep)
        self.meshes = {"fsdp": meshes.dp, "efsdp": meshes.efsdp, "ep": meshes.ep}
        self.ep_enabled = ep > 1

    def get_mesh(self, name: str) -> DeviceMesh:
        return self.meshes[name]


def train(parallel_dims: Any, text: torch.Tensor, args: argparse.Namespace) -> list[float]:
    """The loss of each step, over the tokens of all processes."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # The same weights on all ranks, each of which then keeps its part.
    model = zoo.create_model("deepseek", "tiny", vocab_size=256, expert_bias=True)
    parallelize(model, parallel_dims=parallel_dims, dispatch=args.dispatch)
    # Parameters lie on two meshes, which the fused and foreach forms cannot take together.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    optimizer.register_step_post_hook(lambda *_: update_expert_bias(model, rate=1e-2))

    losses = []
    for step in range(args.steps):
        inputs, targets = (
            t.chunk(ranks)[rank]
            for t in data.training_batch(
                text, seed=0, step=step, batch_size=args.batch_size, context=args.context
            )
        )
        tokens = args.batch_size * args.context
        logits = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / tokens
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss = loss.detach().clone()
        dist.all_reduce(loss)
        losses.append(float(loss))
    return losses


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ep", type=int, default=1, help="processes that share the experts out")
    parser.add_argument("--dispatch", default="auto", help="see moe_ops.parallel.make_dispatcher")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a step, of all ranks")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument(
        "--data", default=None, help="a text file or folder; None: Python's sources"
    )
    return parser.parse_args()


if __name__ == "__main__":
    args = arguments()
    dist.init_process_group("gloo")  # The model of this example is too small for a GPU.
    losses = train(Dims(args.ep), data.load_corpus(args.data).train, args)
    if dist.get_rank() == 0:
        for step, loss in enumerate(losses, start=1):
            print(f"step {step}  loss {loss:.6f}")
    dist.destroy_process_group()
    # A thread of gloo may still drop tensors, and aborts the process if Python ends meanwhile.
    time.sleep(0.2)
