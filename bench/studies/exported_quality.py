"""The perplexity of exported GGUF files, beside those of llama.cpp's own quantizer.

    python -m bench.studies.exported_quality FOLDER --llama PYTHON --seeds 3 4 5

A small Qwen3-MoE over bytes is trained on the source of Python's standard library. Its float file
is quantized by `moe_ops.hf.export` and by llama.cpp (PYTHON has llama-cpp-python), with and without
the importance of inputs on the same text; llama.cpp gets the plain mean squares that its imatrix
holds. All matrices have one type, the embedding and the head q8_0. Files are decoded, and judged
in float32 by the same code on held-out files.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gguf import GGUFReader, dequantize
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_ops.hf
from bench.studies.qlora import train
from moe_ops.demo.data import load_corpus
from moe_ops.quant import perplexity
from moe_ops.quant.importance import Importance, collect_importance

SIZES = {
    "vocab_size": 256,
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
CONTEXT, CALIBRATION, HELDOUT = 256, 2**16, 2**17
_PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llama", required=True, help="a Python with llama-cpp-python")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| seed | type | by | importance | perplexity | change | divergence, mbit |")
    print("|---|---|---|---|---|---|---|")
    for seed in arguments.seeds:
        folder = arguments.folder / str(seed)
        for row in judged(folder, arguments.llama, arguments.steps, seed):
            print(f"| {seed} {row}", flush=True)


def judged(folder: Path, llama: str, steps: int, seed: int) -> Any:
    """Yields rows of the table."""
    corpus = load_corpus()
    model = trained(folder, steps, seed, corpus.train)
    text = corpus.heldout[:HELDOUT].long()
    starts = torch.linspace(0, corpus.train.numel() - CONTEXT, CALIBRATION // CONTEXT).long()
    batches = [corpus.train[s : s + CONTEXT].long()[None] for s in starts.tolist()]
    ours = collect_importance(model, batches)
    plain = collect_importance(model, batches, routing_weights=False)
    np.savez(folder / "importance.npz", **as_imatrix(plain))
    moe_ops.hf.export(model, folder / "float.gguf", format="gguf:f32")
    exact = decoded(model, folder / "float.gguf")
    before = perplexity(exact, text, context=CONTEXT)
    yield f"| f32 | | | {before:.4f} | | |"

    def row(kind: str, by: str, importance: str, path: Path) -> str:
        other = decoded(model, path)
        after = perplexity(other, text, context=CONTEXT)
        numbers = f"{after:.4f} | {after / before - 1:+.3%} | {divergence(exact, other, text):.3f}"
        return f"| {kind} | {by} | {importance} | {numbers} |"

    for kind in ("q4_0", "q4_k"):
        for name, importance in (("none", None), ("squares", plain), ("routed squares", ours)):
            path = folder / f"{kind}.gguf"
            moe_ops.hf.export(model, path, format=f"gguf:{kind}", calibration=importance)
            yield row(kind, "moe_ops", name, path)
        for name in ("none", "squares"):
            extra = [] if name == "none" else [str(folder / "importance.npz")]
            files = [str(folder / "float.gguf"), str(folder / f"{kind}-llama.gguf"), kind]
            script = str(Path(__file__).with_name("llama_quantize.py"))
            subprocess.run([llama, script, *files, *extra], check=True, capture_output=True)
            yield row(kind, "llama.cpp", name, Path(files[1]))


@torch.no_grad()
def divergence(exact: Any, other: Any, text: Tensor) -> float:
    """Returns the mean divergence of next bytes' distributions from the exact ones, in mbit."""
    total = 0.0
    pieces = text[: text.numel() // CONTEXT * CONTEXT].view(-1, CONTEXT).split(32)
    for ids in pieces:
        ours, theirs = (m(ids, use_cache=False).logits.log_softmax(-1) for m in (other, exact))
        total += float(F.kl_div(ours, theirs, log_target=True, reduction="sum"))
    return 1000 * total / math.log(2) / text.numel()


def trained(folder: Path, steps: int, seed: int, text: Tensor) -> Any:
    if not (folder / "model" / "config.json").exists():
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, bos_token_id=0, eos_token_id=1))
        moe_ops.hf.enable(model)
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.1)
        train(model, optimizer, text, seed, steps)
        model.save_pretrained(folder / "model")
    return Qwen3MoeForCausalLM.from_pretrained(folder / "model").eval()


def as_imatrix(found: Importance) -> dict[str, np.ndarray]:
    """Returns the importance by the names of llama.cpp."""
    result = {}
    for name, sums in found.linears.items():
        for theirs, part in _PARTS.items():
            if name.endswith(part):
                layer = re.findall(r"\d+", name)[0]
                result[f"blk.{layer}.{theirs}.weight"] = sums.float().numpy()
    for name, parts in found.experts.items():
        layer = re.findall(r"\d+", name)[0]
        for part, sums in parts.items():
            result[f"blk.{layer}.ffn_{part}_exps.weight"] = sums.float().flatten().numpy()
    return result


@torch.no_grad()
def decoded(model: Any, path: Path) -> Any:
    """Returns a model with the weights of a file."""
    tensors = {
        t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy())
        for t in GGUFReader(str(path)).tensors
    }
    copied = Qwen3MoeForCausalLM(model.config).eval()
    copied.load_state_dict(model.state_dict())
    moe_ops.hf.enable(copied)
    copied.model.embed_tokens.weight.copy_(tensors["token_embd.weight"])
    copied.lm_head.weight.copy_(tensors["output.weight"])
    for i, layer in enumerate(copied.model.layers):
        for theirs, part in _PARTS.items():
            layer.get_submodule(part).weight.copy_(tensors[f"blk.{i}.{theirs}.weight"])
        halves = [tensors[f"blk.{i}.ffn_{part}_exps.weight"] for part in ("gate", "up")]
        layer.mlp.experts.gate_up_proj.copy_(torch.cat(halves, 1))
        layer.mlp.experts.down_proj.copy_(tensors[f"blk.{i}.ffn_down_exps.weight"])
    return copied


if __name__ == "__main__":
    main()
