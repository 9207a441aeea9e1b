"""Trains a Hugging Face mixture of experts with its experts shared out over processes, beside
FSDP2: by transformers' Trainer, or by a loop on accelerate.

    torchrun --nproc-per-node 4 examples/train_hf.py --ep 2
    torchrun --nproc-per-node 4 examples/train_hf.py --ep 2 --loop accelerate
    python examples/train_hf.py

All print the same losses up to rounding, since the batch of a step is the same however many
processes share it. Needs transformers 5.23 and accelerate 1.12.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

import moe_ops.hf  # noqa: F401  It registers "moe_ops", for experts and expert parallelism.
from moe_ops.demo import data

CPU = not torch.cuda.is_available()


def main(arguments: list[str] | None = None) -> list[float]:
    args = parse(arguments)
    state = PartialState(cpu=CPU)  # The process group, where torchrun started several.
    ranks = state.num_processes
    if args.batch_size % ranks:
        raise SystemExit(
            f"train_hf: --batch-size must be a multiple of the {ranks} processes, got "
            f"{args.batch_size}."
        )
    if args.model is None:
        args.model = args.folder / "start"
        with state.main_process_first():
            if state.is_main_process:
                tiny_model().save_pretrained(args.model)

    # Each process reads the rows that it keeps. fsdp_size is the number of processes with tokens
    # of their own, ep_size of those that share the experts out.
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        experts_implementation="moe_ops",
        distributed_config=DistributedConfig(
            fsdp_size=ranks, ep_size=args.ep, ep_implementation="moe_ops"
        ),
    )
    # Parameters lie on two meshes, which the fused and foreach forms cannot take together.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    windows = Windows(data.load_corpus(args.data).train, args.context)
    loop = with_trainer if args.loop == "trainer" else with_accelerate
    losses = loop(model, optimizer, windows, args, args.batch_size // ranks)
    if state.is_main_process:
        for step, loss in enumerate(losses, start=1):
            print(f"step {step}  loss {loss:.5f}", flush=True)
    model.save_pretrained(args.folder / "trained")  # All processes; one writes.
    return losses


def with_trainer(model, optimizer, windows, args, batch_size) -> list[float]:
    options = TrainingArguments(
        output_dir=args.folder / "trainer",
        max_steps=args.steps,
        per_device_train_batch_size=batch_size,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=CPU,
    )
    trainer = Trainer(model, options, train_dataset=windows, optimizers=(optimizer, None))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def with_accelerate(model, optimizer, windows, args, batch_size) -> list[float]:
    accelerator = Accelerator(cpu=CPU)
    loader = torch.utils.data.DataLoader(
        windows,
        batch_size,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(0),  # The same order on all processes.
    )
    # evaluation_mode: without DDP or FSDP around it, since transformers has sharded it.
    model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    optimizer, loader = accelerator.prepare(optimizer, loader)
    losses = []
    for _, batch in zip(range(args.steps), loader, strict=False):
        loss = model(**batch).loss
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    return losses


class Windows(torch.utils.data.Dataset):
    """A text of bytes in pieces of `context`."""

    def __init__(self, text: torch.Tensor, context: int) -> None:
        self.pieces = text[: len(text) // context * context].view(-1, context)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        piece = self.pieces[index].long()
        return {"input_ids": piece, "labels": piece}


def tiny_model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=64,
            moe_intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None, help="a checkpoint; None: a tiny Qwen3-MoE")
    parser.add_argument("--ep", type=int, default=1, help="processes that share the experts out")
    parser.add_argument("--loop", choices=("trainer", "accelerate"), default="trainer")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8, help="of all processes together")
    parser.add_argument("--context", type=int, default=64, help="bytes in a row of the batch")
    parser.add_argument("--data", default=None, help="a text file or folder; None: Python's own")
    parser.add_argument("--folder", type=Path, default=Path("train_hf"), help="for what is written")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        # A thread of gloo may still drop tensors, and aborts the process if Python ends meanwhile.
        time.sleep(0.2)
