"""Attention experts on the CPU against torch and transformers.

    python -m bench.cpu.moa_attention [op] [block] [memory] [--tokens 512] [--dtype float32]

op: moa_attention against scaled_dot_product_attention with repeated heads, and stick-breaking
against its formula in torch. block: JetMoE's decoder layer (H 512, 8 experts, 2 per token, 8 heads
of 64) in transformers and on moe_ops. memory: peak memory of forward and backward of stick-breaking
beyond its operands, by length. Everything runs interleaved in one process; values are medians, in
ms.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

import moe_ops
from bench.harness.medians import median_ms

BATCH, SLOTS, HEADS, HEAD_SIZE = 1, 2, 8, 64


def operands(tokens: int, dtype: torch.dtype, shift: float = 0.0) -> list[Tensor]:
    """Returns q, k, v; `shift` moves every logit by about that much."""
    q = torch.randn(BATCH, tokens, SLOTS, HEADS, HEAD_SIZE)
    k, v = (torch.randn(BATCH, tokens, HEADS, HEAD_SIZE) for _ in range(2))
    if shift:
        q[..., 0], k[..., 0] = HEAD_SIZE**0.5, shift
    return [t.to(dtype).requires_grad_() for t in (q, k, v)]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes attention as transformers does for JetMoE, with keys and values repeated for each
    slot."""
    k, v = (t.transpose(1, 2).repeat(1, SLOTS, 1, 1) for t in (k, v))
    out = F.scaled_dot_product_attention(q.flatten(2, 3).transpose(1, 2), k, v, is_causal=True)
    return out.transpose(1, 2).unflatten(2, q.shape[2:4])


def stick_in_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes ModuleFormer's formula on whole matrices, in log space."""
    q = q.flatten(2, 3).transpose(1, 2)
    k, v = (t.transpose(1, 2).repeat(1, SLOTS, 1, 1) for t in (k, v))
    logits = (q @ k.transpose(2, 3) * HEAD_SIZE**-0.5).float()
    seen = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    rest = F.logsigmoid(-logits).masked_fill(~seen, 0)
    left = rest.flip(-1).cumsum(-1).flip(-1) - rest
    weights = (F.logsigmoid(logits) + left).exp().masked_fill(~seen, 0).to(v.dtype)
    return (weights @ v).transpose(1, 2).unflatten(2, (SLOTS, HEADS))


def softmax_ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return moe_ops.moa_attention(q, k, v, kind="softmax")


def stick_ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return moe_ops.moa_attention(q, k, v, kind="stick_breaking")[0]


def bench_op(tokens: int, dtype: torch.dtype, rounds: int) -> None:
    cases = {
        "softmax": (softmax_ours, sdpa, 0.0),
        "stick-breaking, logits around 0": (stick_ours, stick_in_torch, 0.0),
        # Stick remainders stay large, so that no key can be skipped.
        "stick-breaking, logits around -8": (stick_ours, stick_in_torch, -8.0),
    }
    for name, (ours, theirs, shift) in cases.items():
        leaves = operands(tokens, dtype, shift)
        grad = torch.randn(leaves[0].shape).to(dtype)

        def forward(fn, leaves=leaves):
            with torch.no_grad():
                return fn(*leaves)

        def step(fn, leaves=leaves, grad=grad):
            return torch.autograd.grad(fn(*leaves), leaves, grad)

        for what, run in (("forward", forward), ("forward + backward", step)):
            jobs = {
                label: (lambda fn=fn, run=run: run(fn))
                for label, fn in (("moe_ops", ours), ("torch", theirs))
            }
            ms = median_ms(jobs, rounds, warm=1)
            report(f"{name}, S {tokens}, {what}", ms["moe_ops"], ms["torch"])


def bench_decode(keys: int, dtype: torch.dtype, rounds: int) -> None:
    q, k, v = operands(keys, dtype)
    q = q[:, -1:]

    def theirs() -> Tensor:
        k_all, v_all = (t.transpose(1, 2).repeat(1, SLOTS, 1, 1) for t in (k, v))
        return F.scaled_dot_product_attention(q.flatten(2, 3).transpose(1, 2), k_all, v_all)

    with torch.no_grad():
        ms = median_ms(
            {"moe_ops": lambda: softmax_ours(q, k, v), "torch": theirs}, 5 * rounds, warm=1
        )
    report(f"softmax, one token against {keys} keys", ms["moe_ops"], ms["torch"])


def bench_block(tokens: int, dtype: torch.dtype, rounds: int) -> None:
    from transformers import AutoConfig, AutoModel

    import moe_ops.hf

    for implementation in ("sdpa", "eager"):
        config = AutoConfig.for_model(
            "jetmoe",
            vocab_size=64,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=1,
            num_key_value_heads=HEADS,
            kv_channels=HEAD_SIZE,
            num_local_experts=8,
            num_experts_per_tok=SLOTS,
        )
        torch.manual_seed(0)
        theirs = AutoModel.from_config(config, attn_implementation=implementation).to(dtype)
        with torch.no_grad():
            for p in theirs.parameters():
                if p.dim() > 1:
                    p.normal_(0, p.shape[-1] ** -0.5)
        ours = copy.deepcopy(theirs)
        moe_ops.hf.enable(ours)
        x = torch.randn(BATCH, tokens, 512).to(dtype)
        grad = torch.randn(BATCH, tokens, 512).to(dtype)

        def step(model, x=x, grad=grad):
            model.zero_grad()
            model(inputs_embeds=x.requires_grad_(), use_cache=False).last_hidden_state.backward(
                grad
            )

        def attention_decode(model, x=x, grad=grad, make_mask=MASKS[implementation]):
            """Runs the attention alone, without norms and the feed-forward experts."""
            model.zero_grad()
            attention = model.layers[0].self_attention
            places = model.rotary_emb(x, torch.arange(tokens)[None])
            mask = make_mask(tokens, dtype)
            attention(x.requires_grad_(), mask, position_embeddings=places)[0].backward(grad)

        for what, run in (("layer", step), ("its attention experts", attention_decode)):
            jobs = {
                label: (lambda m=m, run=run: run(m))
                for label, m in (("moe_ops", ours), ("transformers", theirs))
            }
            ms = median_ms(jobs, rounds, warm=1)
            name = f"JetMoE {what} ({implementation}), S {tokens}, forward + backward"
            report(name, ms["moe_ops"], ms["transformers"])


def _added_mask(tokens: int, dtype: torch.dtype) -> Tensor:
    hidden = torch.full((1, 1, tokens, tokens), torch.finfo(dtype).min, dtype=dtype)
    return hidden.triu(1)


MASKS = {"sdpa": lambda tokens, dtype: None, "eager": _added_mask}


def bench_memory(dtype: torch.dtype) -> None:
    """Measures memory in one process per length, because the maximum resident size never falls."""
    for tokens in (2048, 4096, 8192):
        for which in ("moe_ops", "torch"):
            if which == "torch" and tokens > 2048:
                continue
            command = [sys.executable, "-m", __spec__.name, "--peak", which]
            command += ["--tokens", str(tokens), "--dtype", str(dtype).removeprefix("torch.")]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            mib = float(run.stdout)
            print(
                f"stick-breaking forward + backward, S {tokens}, {which}: {mib:.0f} MiB", flush=True
            )


def peak(which: str, tokens: int, dtype: torch.dtype) -> None:
    import resource

    fn = stick_ours if which == "moe_ops" else stick_in_torch
    small = operands(64, dtype)
    torch.autograd.grad(fn(*small).sum(), small)
    leaves = operands(tokens, dtype, -8.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.autograd.grad(fn(*leaves).sum(), leaves)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def report(name: str, ours: float, theirs: float) -> None:
    print(f"{name}: {ours:.2f} ms, beside {theirs:.2f} ms: {theirs / ours:.2f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["op", "block", "memory"])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", choices=("moe_ops", "torch"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    if options.peak:
        return peak(options.peak, options.tokens, dtype)
    isa = moe_ops._library.cpu_isa()
    print(f"{isa}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if "op" in options.parts:
        bench_op(options.tokens, dtype, options.rounds)
        bench_decode(options.tokens, dtype, options.rounds)
    if "block" in options.parts:
        bench_block(options.tokens, dtype, options.rounds)
    if "memory" in options.parts:
        bench_memory(dtype)


if __name__ == "__main__":
    main()
