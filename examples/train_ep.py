"""Trains the demo's language model with its experts shared out over processes, beside FSDP2.

Two processes, then one that goes on from their checkpoint:

    torchrun --nproc-per-node 2 examples/train_ep.py --ep 2 --steps 20 --folder run
    torchrun --nproc-per-node 1 examples/train_ep.py --steps 40 --folder run

The batch of a step and its learning rate depend on the step only, so the losses are the same
however many processes share a batch and wherever a run was interrupted, up to rounding. A
checkpoint is written under another name first, so it is complete or absent. A run that goes on
from one must have the same data, batch size and schedule.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import time
from datetime import timedelta
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
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check(args, ranks)
    corpus = data.load_corpus(args.data)
    run = {
        "data": hashlib.sha256(corpus.train.numpy().tobytes()).hexdigest(),
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "warmup_steps": args.warmup_steps,
        "schedule_steps": args.schedule_steps,
    }
    last = last_checkpoint(args.folder)
    done = 0 if last is None else check_run(last, run)

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    device = torch.accelerator.current_accelerator() if torch.cuda.is_available() else "cpu"
    meshes = init_moe_meshes(args.ep)
    torch.manual_seed(0)  # The same weights on all ranks, each of which then keeps its part.
    model = make_model(CONFIG).to(device)
    shard_experts(model, meshes.ep, args.dispatch)
    for block in model.layers:
        fully_shard_moe(block, meshes.dp, meshes.efsdp)
    fully_shard(model, mesh=meshes.dp)
    # Parameters lie on two meshes, which the fused and foreach forms cannot take together.
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), foreach=False)
    if last is not None:
        load(last, model, optimizer)

    tokens = args.batch_size * CONFIG.context
    if rank == 0:
        count = sum(p.numel() for p in model.parameters())
        print(
            f"{count:,} parameters, {CONFIG.num_experts} experts per layer on {args.ep} of {ranks} "
            f"processes ({device}), {tokens:,} tokens per step, steps {done + 1} to {args.steps}",
            flush=True,
        )
    started = time.perf_counter()
    for step in range(done, args.steps):
        inputs, targets = data.training_batch(
            corpus.train, seed=0, step=step, batch_size=args.batch_size, context=CONFIG.context
        )
        inputs, targets = (t.chunk(ranks)[rank].to(device) for t in (inputs, targets))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step)
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
            seconds = (time.perf_counter() - started) / (step + 1 - done)
            left = timedelta(seconds=round(seconds * (args.steps - step - 1)))
            print(
                f"step {step + 1}  loss {float(loss) / ranks:.6f}  norm {float(norm):.4f}  "
                f"busiest rank +{busiest:.0%}  {tokens / seconds:,.0f} tokens/s  {left} left",
                flush=True,
            )
        if step + 1 == args.steps or (args.save_every and (step + 1) % args.save_every == 0):
            save(args.folder, step + 1, run, model, optimizer)
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
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="the largest one")
    parser.add_argument("--warmup-steps", type=int, default=0, help="the rate grows linearly")
    parser.add_argument(
        "--schedule-steps",
        type=int,
        default=1000,
        help="a cosine ends here, at a tenth of the rate",
    )
    parser.add_argument("--folder", type=Path, default=Path("train_ep"), help="for checkpoints")
    parser.add_argument(
        "--save-every", type=int, default=0, help="steps between checkpoints; 0: only the last"
    )
    return parser.parse_args()


def refuse(sentence: str) -> None:
    """Ends all processes, of which the first says why."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"train_ep: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def check(args: argparse.Namespace, ranks: int) -> None:
    if args.ep < 1 or ranks % args.ep or CONFIG.num_experts % args.ep:
        refuse(
            f"--ep must divide the {ranks} processes and the {CONFIG.num_experts} experts, got "
            f"{args.ep}."
        )
    if args.batch_size < 1 or args.batch_size % ranks:
        refuse(f"--batch-size must be a multiple of the {ranks} processes, got {args.batch_size}.")
    if not 0 <= args.warmup_steps < args.schedule_steps:
        refuse(
            f"--warmup-steps must be at least 0 and below --schedule-steps, got "
            f"{args.warmup_steps} and {args.schedule_steps}."
        )
    if args.save_every < 0:
        refuse(f"--save-every must be at least 0, got {args.save_every}.")


def learning_rate(args: argparse.Namespace, step: int) -> float:
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    part = (step - args.warmup_steps) / (args.schedule_steps - args.warmup_steps)
    return args.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(part, 1.0)))


def state_of(model, optimizer):
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def save(folder: Path, step: int, run: dict, model, optimizer) -> None:
    unfinished = folder / "unfinished"
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    dist.barrier()
    dcp.save(state_of(model, optimizer), checkpoint_id=unfinished)
    if dist.get_rank() == 0:
        (unfinished / "run.json").write_text(json.dumps({**run, "step": step}))
        unfinished.rename(folder / f"step-{step}")
    dist.barrier()


def last_checkpoint(folder: Path) -> Path | None:
    found = folder.glob("step-*")
    return max(found, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def check_run(checkpoint: Path, run: dict) -> int:
    """Returns the step of a checkpoint of the same run."""
    saved = json.loads((checkpoint / "run.json").read_text())
    for name, value in run.items():
        if saved[name] != value:
            refuse(
                f"{name} must be that of {checkpoint}, {saved[name]!r}, got {value!r}; use another "
                "--folder for another run."
            )
    return saved["step"]


def load(checkpoint: Path, model, optimizer) -> None:
    """Loads a checkpoint of any number of processes."""
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=checkpoint)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


if __name__ == "__main__":
    main()
