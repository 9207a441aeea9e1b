"""A study of whether adapters on quantized experts reach the loss of adapters on float ones.

    python -m bench.studies.qlora --json bench/notes/qlora.json

A small Qwen3-MoE is trained on the source of Python's standard library and then tuned, by adapters
on attention and on all experts, on its language reference (`pydoc_data.topics`, prose, left out
of the former): by peft alone, by `fuse_adapters` on the same float experts, and on experts of int8,
int4 and MXFP4, whose weights are rounded to the nearest. A seed draws model, batches and adapters,
and all arms of a seed have the same. The claim, fixed before the first run: the held-out loss after
tuning is within 1 % of peft's on float experts, the whole 95 % interval over seeds.

A run goes on where it stopped: trained models are kept in a folder, results in the JSON file.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import pydoc_data.topics
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tests.helpers.quantized import weight_config
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_ops
import moe_ops.hf
from bench.studies.inference import interval
from bench.studies.quantized_quality import fill_rounded
from moe_ops._files import make_folder, write_json
from moe_ops.demo.data import heldout_windows, load_corpus, training_batch
from moe_ops.hf import lora
from moe_ops.quant.bank import find_banks
from moe_ops.quant.convert import new_experts
from moe_ops.weight_formats import WeightFormat

PEFT = "peft, float experts"
ARMS = (PEFT, "fuse_adapters, float experts", "int8", "int4", "mxfp4")
SIZES = {
    "vocab_size": 256,
    "hidden_size": 128,
    "moe_intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
CONTEXT, BATCH, RANK = 128, 16, 8
BOUND = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pretrain", type=int, default=1000, help="steps of the whole model")
    parser.add_argument("--steps", type=int, default=300, help="steps of the adapters")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/qlora"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"pretrain": arguments.pretrain, "steps": arguments.steps, "model": SIZES}
    found: dict[str, Any] = {"settings": settings, "seeds": {}}
    if arguments.json.exists():
        found = json.loads(arguments.json.read_text())
        if found["settings"] != settings:
            parser.error(f"{arguments.json} is of other settings.")
    source, prose, heldout = texts()
    for seed in range(arguments.seeds):
        done = found["seeds"].setdefault(str(seed), {})
        if all(arm in done for arm in ARMS):
            continue
        model = trained(seed, arguments.pretrain, source, arguments.folder)
        for arm in ARMS:
            if arm not in done:
                done[arm] = tuned(copy.deepcopy(model), arm, seed, arguments.steps, prose, heldout)
                write_json(arguments.json, found)
    print("\n".join(table(found["seeds"])))


def texts() -> tuple[Tensor, Tensor, Tensor]:
    """Bytes to train on; prose to tune on, and prose held out."""
    reference = Path(pydoc_data.topics.__file__).read_bytes()
    source = bytes(load_corpus().train.numpy()).replace(reference, b"")
    prose = "".join(pydoc_data.topics.topics.values()).encode()
    cut = len(prose) * 9 // 10
    pieces = (source, prose[:cut], prose[cut:])
    first, second, third = (torch.frombuffer(bytearray(p), dtype=torch.uint8) for p in pieces)
    return first, second, third


def trained(seed: int, steps: int, text: Tensor, folder: Path) -> nn.Module:
    """The float model, with experts of moe_ops."""
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, bos_token_id=0, eos_token_id=1))
    moe_ops.hf.enable(model)
    path = make_folder(folder) / f"{seed}-{steps}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path))
        return model
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1)
    train(model, optimizer, text, seed, steps)
    torch.save(model.state_dict(), path)
    return model


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, text: Tensor, seed: int, steps: int
) -> None:
    """Steps whose rate goes up for a tenth of them and down to zero."""
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(10 * (s + 1) / steps, (steps - s) / (0.9 * steps), 1.0)
    )
    for step in range(steps):
        x, target = training_batch(text, seed=seed, step=step, batch_size=BATCH, context=CONTEXT)
        optimizer.zero_grad()
        loss_of(model, x, target).backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        schedule.step()


def loss_of(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    logits = model(input_ids=x, use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def tuned(
    model: nn.Module, arm: str, seed: int, steps: int, prose: Tensor, heldout: Tensor
) -> dict[str, float]:
    """Bits a byte on held-out prose before and after tuning, and the seconds of that."""
    if arm == PEFT:
        moe_ops.hf.disable(model)
    elif arm in ("int8", "int4"):
        moe_ops.quantize(model, weight_config(arm))
    elif arm == "mxfp4":
        for bank in find_banks(model):
            how = WeightFormat("mxfp4")
            experts = new_experts(bank, how.label)
            fill_rounded(experts, bank.bank, how)
            bank.hook.install(model, bank.module, experts)
    before = judged(model, heldout)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    adapted = get_peft_model(model, config)
    if arm != PEFT:
        lora.fuse_adapters(adapted)
    start = time.process_time()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 3e-3)
    train(adapted, optimizer, prose, seed + 1000, steps)
    seconds = time.process_time() - start
    return {"before": before, "after": judged(adapted, heldout), "seconds": round(seconds, 1)}


@torch.no_grad()
def judged(model: nn.Module, text: Tensor) -> float:
    model.eval()
    x, target = heldout_windows(text, count=256, context=CONTEXT)
    pieces = zip(x.split(32), target.split(32), strict=True)
    losses = [float(loss_of(model, *piece)) for piece in pieces]
    model.train()
    return sum(losses) / len(losses) / math.log(2)


def table(seeds: dict[str, dict[str, Any]]) -> list[str]:
    """Means over seeds, and each arm's difference from peft in parts of peft's loss."""
    lines = [
        f"| experts | before | after | against peft, 95 % interval | within {BOUND:.0%} | time |",
        "|---|---|---|---|---|---|",
    ]
    whole = [arms for arms in seeds.values() if all(arm in arms for arm in ARMS)]
    for arm in ARMS:
        before, after, seconds = (
            sum(arms[arm][key] for arms in whole) / len(whole)
            for key in ("before", "after", "seconds")
        )
        off = [arms[arm]["after"] / arms[PEFT]["after"] - 1 for arms in whole]
        mean, low, high = interval(off)
        within = "yes" if -BOUND < low and high < BOUND else "no"
        numbers = f"{mean:+.2%} ({low:+.2%} to {high:+.2%}) | {within}"
        lines.append(
            f"| {arm} | {before:.4f} | {after:.4f} | {'|' if arm == PEFT else numbers} | "
            f"{seconds:.0f} s |"
        )
    return [*lines, f"\n{len(whole)} seeds"]


if __name__ == "__main__":
    main()
