"""Training of JetMoE's tiny preset on the CPU against transformers' JetMoeForCausalLM.

    python -m bench.cpu.jetmoe_training [--sizes 4x128 8x256 2x512] [--dtypes float32 bfloat16]
        [--threads 1 2] [--rounds 15] [--parts] [--compile] [--cpp-wrapper]

All models start from equal weights and see equal tokens; transformers runs with its two attentions
that need no other library ("eager", "sdpa"), and its only form of JetMoE's experts, a loop.
"cross-entropy": that loss alone is minimized. "with losses": each library's own auxiliary losses
are added, load balancing in transformers, load balancing and the z-loss in moe_ops. Everything runs
interleaved in one process; values are medians, ms of CPU time with one thread and of wall time
otherwise. Ratios are to moe_ops in the corresponding form.

--compile: also runs all of them under torch.compile, as users write it: `torch.compile` of a
function that returns the loss, `fullgraph=True` for ours. transformers' experts read their sizes on
the host (`.tolist()`), so its graph breaks in each of them; the recompilation limit is high enough
that none falls back, and calls that compile are not counted. "of the best": speed-up of ours over
the fastest form of transformers. With --cpp-wrapper all are compiled with `options={"cpp_wrapper":
True}`: the code that calls the kernels is then C++ too.

--parts: also measures the work of any trainer of this model outside of its blocks: embedding, last
norm, head, cross-entropy and AdamW.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

import moe_ops
from bench.harness.medians import median_ms
from moe_ops import zoo
from moe_ops.zoo.lm.model import CausalLM

ATTENTIONS = ("eager", "sdpa")


def make_models(dtype: torch.dtype) -> dict[str, nn.Module]:
    """Returns our model and transformers' with equal weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    ours = zoo.create_model("jetmoe")
    models: dict[str, nn.Module] = {"moe_ops": ours.to(dtype).train()}
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        for name in ATTENTIONS:
            models[name] = transformers.JetMoeForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation=name
            ).train()
    return models


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor, losses: bool) -> Tensor:
    if isinstance(model, CausalLM):
        return model.loss(inputs, targets, coefficients=None if losses else {}).loss
    return model(
        inputs,
        labels=inputs,
        shift_labels=targets,
        output_router_logits=losses,
        use_cache=False,
    ).loss


def make_step(
    parameters: list[Tensor], loss: Callable[[], Tensor], rate: float = 1e-4
) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW(parameters, lr=rate, fused=True)

    def step() -> Tensor:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


class Rest(nn.Module):
    """Model without its blocks, whose optimizer still has their parameters."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        for p in self.model.layers.parameters():
            p.grad = torch.zeros_like(p)
        self.blocks_grads = [(p, p.grad) for p in self.model.layers.parameters()]

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        for p, grad in self.blocks_grads:
            p.grad = grad
        x = self.model.norm(self.model.embed_tokens(inputs))[0]
        logits = F.linear(x, self.model.embed_tokens.weight).flatten(0, 1)
        return F.cross_entropy(logits.float(), targets.flatten())


def bench(batch: int, length: int, dtype: torch.dtype, options: argparse.Namespace) -> None:
    threads = torch.get_num_threads()
    clock = time.process_time if threads == 1 else time.perf_counter
    tokens = torch.randint(256, (batch, length + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    kind = str(dtype).removeprefix("torch.")
    for losses in (False, True):
        models = make_models(dtype)
        steps = {}
        for name, model in models.items():

            def loss(model: nn.Module = model, losses: bool = losses) -> Tensor:
                return loss_of(model, inputs, targets, losses)

            steps[name] = make_step(list(model.parameters()), loss)
            if options.compile:
                # Another copy, since an optimizer moves the weights.
                twin = copy.deepcopy(model)
                compiled = torch.compile(
                    partial(loss_of, twin, losses=losses),
                    fullgraph=isinstance(twin, CausalLM),
                    options={"cpp_wrapper": True} if options.cpp_wrapper else None,
                )
                steps[f"{name} compiled"] = make_step(
                    list(twin.parameters()), partial(compiled, inputs, targets)
                )
        if options.parts:
            rest = Rest(models["moe_ops"])
            steps["rest"] = make_step(
                list(rest.parameters()), lambda rest=rest: rest.loss(inputs, targets)
            )
        ms = median_ms(steps, options.rounds, warm=20 if options.compile else 3, clock=clock)
        peers = [name for name in ms if name.startswith(ATTENTIONS)]
        best = min(peers, key=ms.__getitem__)
        what = "with losses" if losses else "cross-entropy"
        line = f"{batch}x{length} {kind}, {threads} threads, {what}: {ms['moe_ops']:.2f} ms"
        for name in ATTENTIONS:
            line += f", {name} {ms[name]:.2f} ({ms[name] / ms['moe_ops']:.2f}x)"
        if options.compile:
            mine = ms["moe_ops compiled"]
            line += f"; compiled: {mine:.2f} ms"
            for name in ATTENTIONS:
                theirs = ms[f"{name} compiled"]
                line += f", {name} {theirs:.2f} ({theirs / mine:.2f}x)"
            line += f"; of the best, {best}: {ms[best] / ms['moe_ops']:.2f}x eager, "
            line += f"{ms[best] / mine:.2f}x compiled"
        if options.parts:
            ceiling = ms[best] / ms["rest"]
            line += f", outside of blocks {ms['rest']:.2f} (ceiling {ceiling:.1f}x)"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", default=["4x128", "8x256", "2x512"])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cpp-wrapper", action="store_true")
    options = parser.parse_args()
    print(f"{moe_ops._library.cpu_isa()}, torch {torch.__version__}")
    torch._dynamo.config.recompile_limit = 64
    for threads in options.threads:
        torch.set_num_threads(threads)
        for dtype in options.dtypes:
            for size in options.sizes:
                batch, length = map(int, size.split("x"))
                bench(batch, length, getattr(torch, dtype), options)


if __name__ == "__main__":
    main()
