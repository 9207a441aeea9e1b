"""A Trainer run of adapters on placed int8 experts, in a process of its own:

    python -m tests.hf.placed_training FOLDER [kill]

It resumes from the last checkpoint in FOLDER, if there is one. With `kill`, the process ends itself
by SIGKILL in the backward of step 5, inside the experts of the first layer; checkpoints are written
after every second step. It prints the losses of all steps as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import moe_ops
import moe_ops.hf
from moe_ops.hf import lora

from .models import build

KILLED_IN = 5
IDS = torch.randint(1, 60, (32, 12), generator=torch.Generator().manual_seed(1))
ROWS = [{"input_ids": row, "labels": row} for row in IDS]


def tuned_model() -> torch.nn.Module:
    """Returns a model with int8 experts on the CPU, and adapters on them and on attention."""
    model = build("qwen3_moe", hidden_size=64, moe_intermediate_size=32)
    moe_ops.hf.place(model, "cpu", quantization=moe_ops.Int8WeightConfig())
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_dropout=0.0, target_modules=["q_proj"], target_parameters=experts)
    tuned = get_peft_model(model, config)
    lora.fuse_adapters(tuned)
    return tuned


def kill_in_backward(model: torch.nn.Module) -> None:
    """Kills the process when step `KILLED_IN` has the gradient of an adapter of the experts."""
    (parameter,) = (p for n, p in model.named_parameters() if "layers.0.mlp.experts.lora_A" in n)
    calls = []

    def count(gradient: torch.Tensor) -> None:
        calls.append(gradient)
        if len(calls) == KILLED_IN:
            os.kill(os.getpid(), signal.SIGKILL)

    parameter.register_hook(count)


def main(folder: str, *options: str) -> None:
    model = tuned_model()
    if "kill" in options:
        kill_in_backward(model)
    arguments = TrainingArguments(
        folder,
        max_steps=8,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=ROWS)
    checkpoint = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    trainer.train(resume_from_checkpoint=checkpoint)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(json.dumps({"losses": losses, "resumed": checkpoint}))


if __name__ == "__main__":
    main(*sys.argv[1:])
