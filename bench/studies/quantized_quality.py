"""The cost in quality of int8 and int4 experts: the demo's language model, and one random bank.

    moe-ops demo --no-hf --out moe_demo        # trains the model that is judged, in minutes
    python -m bench.studies.quantized_quality moe_demo

Scales are found on the training files, errors and bits per byte are measured on the held-out files.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from tests.helpers.quantized import weight_config

import moe_ops
from bench.studies.fp8_training import MODEL
from moe_ops import _files, quant
from moe_ops.demo import data
from moe_ops.demo.train import TrainConfig, Trainer
from moe_ops.expert_weights import ExpertWeights
from moe_ops.layers import Experts
from moe_ops.quant import QuantizedExperts
from moe_ops.quant.bank import find_banks
from moe_ops.weight_formats import WeightFormat
from moe_ops.zoo.deepseek import DeepSeek

FORMATS = (("int8", None), ("int4", 32), ("int4", 64), ("int4", 128))
PARTS = ("experts", "published", "model", "bank")
_HELDOUT = 65_536


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="folder that moe-ops demo has written")
    parser.add_argument("--steps", type=int, default=400, help="of training for `published`")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if "experts" in arguments.parts:
        print("| weights | scales | bank error | bits/byte | perplexity | change | memory |")
        print("|---|---|---|---|---|---|---|")
        for line in demo_model(arguments.demo):
            print(line, flush=True)
    if "published" in arguments.parts:
        print("\nFormats of published checkpoints, weights rounded to the nearest:")
        print("| weights | bank error | bits/byte | perplexity | change | memory |")
        print("|---|---|---|---|---|---|")
        for line in published_formats(arguments.steps):
            print(line, flush=True)
    if "model" in arguments.parts:
        print("\nThe same model in transformers, all of it optimized:")
        print("| weights | bits/byte | perplexity | change | memory |")
        print("|---|---|---|---|---|")
        for line in whole_model(arguments.demo):
            print(line, flush=True)
    if "bank" in arguments.parts:
        print("\nA random bank, 16 experts, H 1024, I 512:")
        for line in random_bank():
            print(line, flush=True)


def demo_model(folder: Path) -> Iterator[str]:
    corpus = data.load_corpus(_files.read_json(folder / "summary.json")["data"])
    model = DeepSeek.from_pretrained(folder / "model")
    size = model.config.context
    starts = torch.linspace(0, corpus.train.numel() - size, 16).long().tolist()
    calibration = [corpus.train[s : s + size].long()[None] for s in starts]
    text = corpus.heldout[:_HELDOUT].long()
    judged = [piece[None] for piece in text.split(size)[::16]]
    baseline = quant.collect_calibration(model, judged, max_tokens=1024, tokens=text, context=size)
    before = baseline.perplexity
    assert before is not None
    yield f"| fp32 | | | {math.log2(before):.4f} | {before:.4f} | | 100 % |"
    for format, group_size in FORMATS:
        for scales in (False, True):
            copied = moe_ops.quantize(
                copy.deepcopy(model),
                weight_config(format, group_size),
                calibration=calibration if scales else None,
            )
            report = quant.compare_quality(copied, baseline)
            errors = [b.error for b in report.banks]
            after = report.perplexity_after
            assert after is not None
            yield (
                f"| {report.banks[0].format} | {'yes' if scales else 'no'} "
                f"| {100 * min(errors):.2f} to {100 * max(errors):.2f} % | {math.log2(after):.4f} "
                f"| {after:.4f} | {100 * (after / before - 1):+.2f} % "
                f"| {100 * report.bytes_after / report.bytes_before:.1f} % |"
            )


PUBLISHED = {
    "int8": WeightFormat("int8"),
    "q8_0": WeightFormat("int8", 32, "float16"),
    "fp8 128 x 128": WeightFormat("fp8"),
    "q6_K": WeightFormat("q6_k"),
    "int4 g64": WeightFormat("int4", 64),
    "int4 g64 with zero points (GPTQ, AWQ)": WeightFormat("int4", 64, "float16", True),
    "int4 g128 with zero points": WeightFormat("int4", 128, "float16", True),
    "q4_0": WeightFormat("int4", 32, "float16"),
    "q4_K": WeightFormat("q4_k"),
    "mxfp4": WeightFormat("mxfp4"),
}


def published_formats(steps: int) -> Iterator[str]:
    """Yields rows as `demo_model` does, of a model that is trained here: blocks of q4_K and q6_K
    have 256 inputs, twice as many as weights of the demo."""
    corpus = data.load_corpus()
    trainer = Trainer(TrainConfig(steps=steps, eval_every=steps, model=MODEL), corpus)
    while not trainer.finished:
        trainer.train_step()
    model = trainer.model.eval()
    size = model.config.context
    text = corpus.heldout[:16_384].long()
    judged = [piece[None] for piece in text.split(size)[::16]]
    baseline = quant.collect_calibration(model, judged, max_tokens=1024, tokens=text, context=size)
    before = baseline.perplexity
    assert before is not None
    yield f"| fp32 | | {math.log2(before):.4f} | {before:.4f} | | 100 % |"
    for name, how in PUBLISHED.items():
        copied = copy.deepcopy(model)
        for found in find_banks(copied):
            found.hook.install(copied, found.module, _stored(found.bank, how))
        report = quant.compare_quality(copied, baseline)
        errors = [b.error for b in report.banks]
        after = report.perplexity_after
        assert after is not None
        yield (
            f"| {name} | {100 * min(errors):.2f} to {100 * max(errors):.2f} % "
            f"| {math.log2(after):.4f} | {after:.4f} | {100 * (after / before - 1):+.2f} % "
            f"| {100 * report.bytes_after / report.bytes_before:.1f} % |"
        )


def _stored(bank: ExpertWeights, how: WeightFormat) -> QuantizedExperts:
    experts = QuantizedExperts.for_weights(bank, format=how.label)
    fill_rounded(experts, bank, how)
    return experts


@torch.no_grad()
def fill_rounded(experts: QuantizedExperts, bank: ExpertWeights, how: WeightFormat) -> None:
    """Rounds the weights of a bank to the nearest in a format, which `experts` is of."""
    for e in range(bank.num_experts):
        for name, weight in (("w_gate_up", bank.gate_up_of(e)), ("w_down", bank.down_of(e))):
            for part, value in zip(("", "_scale", "_zero"), _rounded(weight, how), strict=True):
                if value is not None:
                    getattr(experts, name + part)[e].copy_(value)


def _rounded(
    w: torch.Tensor, how: WeightFormat
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scales and zero points of w [O, D]."""
    if how.name == "fp8":
        return *quant.quantize_fp8_blocks(w), None
    if how.name == "int8" and how.group_size is None:
        return *quant.quantize_weight(w, "int8"), None
    if how.name in ("q4_k", "q6_k"):
        return *(_rounded_q4_k(w) if how.name == "q4_k" else _rounded_q6_k(w)), None
    groups = w.unflatten(-1, (-1, how.group_size or 32))
    low, high = groups.amin(-1), groups.amax(-1)
    amax = torch.maximum(-low, high).clamp(min=1e-12)
    scale_dtype = getattr(torch, how.scale_dtype)
    if how.name == "mxfp4":  # The OCP's rule: the largest number is below 8 times its scale.
        exponent = amax.log2().floor() - 2
        values = groups / torch.exp2(exponent)[..., None]
        middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
        codes = torch.bucketize(values.abs(), middles) | (values < 0) << 3
        scale, zero = (exponent + 127).to(torch.uint8), None
    elif how.name == "int8":
        scale, zero = (amax / 127).to(scale_dtype), None
        codes = (groups / scale.float()[..., None]).round().clamp(-127, 127)
        return codes.flatten(-2).to(torch.int8), scale, None
    elif how.zero_points:
        scale = ((high - low) / 15).to(scale_dtype)
        zero = (-low / scale.float()).round().clamp(0, 15)
        codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15)
        zero = zero.to(torch.uint8)
    else:  # As q4_0: the largest becomes -8.
        scale, zero = (torch.where(high > -low, high, low) / -8).to(scale_dtype), None
        codes = (groups / scale.float()[..., None]).round().clamp(-8, 7) + 8
    codes = codes.flatten(-2).to(torch.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4, scale, zero


def _bytes_of_halves(x: torch.Tensor) -> torch.Tensor:
    return x.half().unsqueeze(-1).view(torch.uint8)


def _rounded_q4_k(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The layout is that of `moe_ops.reference._codes`; scales and minima of 32 weights are in 6
    bits, those of 256 in float16."""
    groups = w.unflatten(-1, (-1, 8, 32))
    low = -groups.amin(-1).clamp(max=0)
    step = (groups.amax(-1) + low) / 15
    d, dmin = ((x.amax(-1, keepdim=True) / 63).half().float() for x in (step, low))
    scales = (step / d.clamp(min=1e-12)).round().clamp(0, 63)
    minima = (low / dmin.clamp(min=1e-12)).round().clamp(0, 63)
    step, low = scales * d, minima * dmin
    codes = (groups + low[..., None]) / step.clamp(min=1e-12)[..., None]
    codes = codes.round().clamp(0, 15).to(torch.uint8)
    packed = codes[..., 0::2, :] | codes[..., 1::2, :] << 4
    scales, minima = scales.to(torch.uint8), minima.to(torch.uint8)
    record = [
        _bytes_of_halves(d[..., 0]),
        _bytes_of_halves(dmin[..., 0]),
        scales[..., :4] | scales[..., 4:] >> 4 << 6,
        minima[..., :4] | minima[..., 4:] >> 4 << 6,
        scales[..., 4:] & 15 | (minima[..., 4:] & 15) << 4,
    ]
    return packed.flatten(-3), torch.cat(record, -1)


def _rounded_q6_k(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds weights in the same way, with scales of 16 weights in 8 bits. The largest becomes
    -32."""
    groups = w.unflatten(-1, (-1, 16, 16))
    low, high = groups.amin(-1), groups.amax(-1)
    step = torch.where(high > -low, high, low) / -32
    d = (step.abs().amax(-1, keepdim=True) / 127).half().float()
    scales = (step / d.clamp(min=1e-12)).round().clamp(-128, 127)
    step = scales * d
    codes = (groups / torch.where(step == 0, 1.0, step)[..., None]).round().clamp(-32, 31) + 32
    # [..., blocks, halves, runs of 32]
    codes = codes.to(torch.uint8).flatten(-2).unflatten(-1, (2, 4, 32))
    low_bits = codes[..., :2, :] & 15 | (codes[..., 2:, :] & 15) << 4
    upper = codes >> 4
    high_bits = sum(
        (upper[..., i, :] << 2 * i for i in range(4)), torch.zeros_like(upper[..., 0, :])
    )
    packed = torch.cat([low_bits.flatten(-3), high_bits.flatten(-2)], -1)
    record = torch.cat([scales.to(torch.int8).view(torch.uint8), _bytes_of_halves(d[..., 0])], -1)
    return packed.flatten(-2), record


def whole_model(folder: Path) -> Iterator[str]:
    """Experts, projections and head by `moe_ops.hf.optimize`."""
    import moe_ops.hf

    corpus = data.load_corpus(_files.read_json(folder / "summary.json")["data"])
    trained = DeepSeek.from_pretrained(folder / "model")
    text = corpus.heldout[:_HELDOUT].long()
    before = memory = 0.0
    for weights, group_size in ((None, None), *FORMATS):
        model = _in_transformers(folder, trained.config.context)
        if weights is not None:
            moe_ops.hf.optimize(model, quantization=weight_config(weights, group_size))
        after = quant.perplexity(model, text, context=trained.config.context)
        size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        if weights is None:
            before, memory = after, size
        name = "fp32" if weights is None else weights + (f" g{group_size}" if group_size else "")
        change = f"{100 * (after / before - 1):+.2f} %"
        yield (
            f"| {name} | {math.log2(after):.4f} | {after:.4f} | {change} "
            f"| {100 * size / memory:.1f} % |"
        )


def _in_transformers(folder: Path, context: int) -> torch.nn.Module:
    """The demo's model is what transformers calls a Mixtral: attention with a key-value head for
    each query head, experts chosen by softmax and renormalized."""
    from safetensors.torch import load_file
    from transformers import MixtralConfig, MixtralForCausalLM

    published = json.loads((folder / "model" / "config.json").read_text())
    shared = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    shared += ("num_key_value_heads", "head_dim", "rms_norm_eps", "num_experts_per_tok")
    config = MixtralConfig(
        **{key: published[key] for key in shared},
        intermediate_size=published["moe_intermediate_size"],
        num_local_experts=published["n_routed_experts"],
        max_position_embeddings=context,
        rope_parameters=published["rope_parameters"],
        tie_word_embeddings=published["tie_word_embeddings"],
    )
    state = load_file(folder / "model" / "model.safetensors")
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts"

        def stacked(part: str, prefix: str = prefix) -> torch.Tensor:
            names = (f"{prefix}.{e}.{part}_proj.weight" for e in range(config.num_local_experts))
            return torch.stack([state.pop(name) for name in names])

        state[f"{prefix}.gate_up_proj"] = torch.cat([stacked("gate"), stacked("up")], dim=1)
        state[f"{prefix}.down_proj"] = stacked("down")
    model = MixtralForCausalLM(config)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    model.tie_weights()
    return model.eval()


def random_bank() -> Iterator[str]:
    """Uniform weights, inputs N(0, 1); once with every 32nd channel 20 times as large."""
    torch.manual_seed(0)
    experts = Experts(16, 1024, 512).eval()
    for outliers in (1.0, 20.0):
        size = torch.ones(1024)
        size[::32] = outliers

        def batch(size: torch.Tensor = size) -> tuple[torch.Tensor, ...]:
            weights, ids = torch.randn(256, 16).softmax(-1).topk(4)
            return torch.randn(256, 1024) * size, weights, ids

        judged, calibration = [batch()], [batch()]
        baseline = quant.collect_calibration(experts, judged)
        for format, group_size in FORMATS:
            errors = []
            for scales in (None, calibration):
                quantized = moe_ops.quantize(
                    experts, weight_config(format, group_size), calibration=scales
                )
                errors.append(quant.compare_quality(quantized, baseline).banks[0].error)
            name = quantized.format_name
            yield (
                f"  channels x{outliers:g}, {name}: error {100 * errors[0]:.2f} %, "
                f"with scales {100 * errors[1]:.2f} %"
            )


if __name__ == "__main__":
    main()
