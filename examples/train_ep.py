"""Trains the demo's language model with its experts shared out over processes, beside FSDP2.

Two processes, then one that goes on from their checkpoint:

    torchrun --nproc-per-node 2 examples/train_ep.py --ep 2 --steps 20 --folder run
    torchrun --nproc-per-node 1 examples/train_ep.py --steps 40 --folder run

The batch of a step is the same however many processes share it, and so are the losses, up to
rounding. A checkpoint is whole or not there: it is written under another name first.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from moe_ops.demo import data
from moe_ops.demo.train import ModelConfig, make_model
from moe_ops.layers import ExpertLoadStats
from moe_ops.parallel import clip_grad_norm_, fully_shard_moe, init_moe_meshes, shard_experts

COEFFICIENTS = {"load_balancing": 0.01, "router_z": 1e-3}
CONFIG = ModelConfig(num_layers=2, hidden_size=64, intermediate_size=64, context=64)


def main() -> None:
    args = arguments()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    device = torch.accelerator.current_accelerator() if torch.cuda.is_available() else "cpu"
    if args.batch_size % ranks:
        raise SystemExit(
            f"train_ep: --batch-size must be a multiple of the {ranks} processes, got "
            f"{args.batch_size}."
        )

    meshes = init_moe_meshes(args.ep)
    torch.manual_seed(0)  # The same weights on all ranks, each of which then keeps its part.
    model = make_model(CONFIG).to(device)
    shard_experts(model, meshes.ep, args.dispatch)
    for block in model.layers:
        fully_shard_moe(block, meshes.dp, meshes.efsdp)
    fully_shard(model, mesh=meshes.dp)
    # Parameters lie on two meshes, which the fused and foreach forms cannot take together.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), foreach=False)

    corpus = data.load_corpus(args.data)
    done = resume(args.folder, model, optimizer)
    for step in range(done, args.steps):
        inputs, targets = data.training_batch(
            corpus.train, seed=0, step=step, batch_size=args.batch_size, context=CONFIG.context
        )
        inputs, targets = (t.chunk(ranks)[rank].to(device) for t in (inputs, targets))
        # The losses that balance experts are of the tokens of all ranks.
        out = model.loss(inputs, targets, coefficients=COEFFICIENTS, group=dist.group.WORLD)
        optimizer.zero_grad()
        out.loss.backward()
        norm = clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        loss = out.cross_entropy.detach().clone()
        dist.all_reduce(loss)
        stats = ExpertLoadStats()
        for routed in out.routing:
            stats.update(routed.routing.topk_ids, CONFIG.num_experts, layer=routed.layer)
        stats.all_reduce()
        if rank == 0:
            busiest = max(stats.max_rank_violation(args.ep, layer) for layer in stats.layers)
            print(
                f"step {step + 1}  loss {float(loss) / ranks:.6f}  norm {float(norm):.4f}  "
                f"busiest rank +{busiest:.0%}",
                flush=True,
            )
    if done < args.steps:
        save(args.folder, args.steps, model, optimizer)
    dist.destroy_process_group()
    # A thread of gloo may still drop tensors, and aborts the process if Python ends meanwhile.
    time.sleep(0.2)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ep", type=int, default=1, help="processes that share the experts out")
    parser.add_argument("--dispatch", default="auto", help="see moe_ops.parallel.make_dispatcher")
    parser.add_argument("--steps", type=int, default=20, help="the step to train to")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a step, of all ranks")
    parser.add_argument(
        "--data", default=None, help="a text file or folder; None: Python's sources"
    )
    parser.add_argument("--folder", type=Path, default=Path("train_ep"), help="for checkpoints")
    return parser.parse_args()


def state_of(model, optimizer):
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def save(folder: Path, step: int, model, optimizer) -> None:
    unfinished = folder / "unfinished"
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    dist.barrier()
    dcp.save(state_of(model, optimizer), checkpoint_id=unfinished)
    if dist.get_rank() == 0:
        unfinished.rename(folder / f"step-{step}")
    dist.barrier()


def resume(folder: Path, model, optimizer) -> int:
    """Loads the last checkpoint, of any number of processes; returns its step."""
    steps = [int(path.name.removeprefix("step-")) for path in folder.glob("step-*")]
    if not steps:
        return 0
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder / f"step-{max(steps)}")
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    return max(steps)


if __name__ == "__main__":
    main()
