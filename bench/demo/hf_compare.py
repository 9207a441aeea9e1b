"""Hugging Face models with `moe_ops` as experts implementation: equal results, less time."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moe_ops._requirements import TRANSFORMERS_FLOOR, transformers_is_too_old
from moe_ops.bench.timing import measure

IMPLEMENTATIONS = ("eager", "grouped_mm", "moe_ops")
_PASSES = (("forward", "forward"), ("forward_backward", "forward + backward"))


def missing() -> str | None:
    """Returns the packages missing for the comparison; None if there are none."""
    if importlib.util.find_spec("transformers") is None:
        return 'it needs transformers, pip install "torch-moe-ops[hf]"'
    version = importlib.metadata.version("transformers")
    if transformers_is_too_old(version):
        return (
            f"it needs transformers {TRANSFORMERS_FLOOR} or newer and found {version}, "
            f'pip install --upgrade "transformers>={TRANSFORMERS_FLOOR}"'
        )
    return None


def compare(
    *, smoke: bool = False, budget_s: float = 4.0, log: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Returns results for a small random Qwen3-MoE and a small random Mixtral.

    Errors are relative to an fp64 copy of the model with eager experts: ``|a - b| / |b|``,
    Frobenius norm, for the logits and for all gradients together. `bound` is the allowed rounding
    error: n·2^-24, where n is the length of the model's longest dot product inside an expert.
    """
    import moe_ops.hf  # noqa: F401  Registers the implementation.

    results = []
    for name, make in (("Qwen3-MoE", _qwen3_moe), ("Mixtral", _mixtral)):
        log(name)
        torch.manual_seed(0)
        results.append({"model": name, **_compare(make(smoke), smoke=smoke, budget_s=budget_s)})
    return results


def _compare(model: Any, *, smoke: bool, budget_s: float) -> dict[str, Any]:
    for parameter in model.parameters():  # Some router weights are left uninitialized.
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    config = model.config
    batch, length = (1, 32) if smoke else (4, 128)
    tokens = torch.randint(0, config.vocab_size, (batch, length))

    def both(implementation: str) -> tuple[Tensor, list[Tensor]]:
        model.set_experts_implementation(implementation)
        logits = model(input_ids=tokens, use_cache=False).logits
        targets = tokens.roll(-1, 1).flatten()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)
        return logits.detach(), list(torch.autograd.grad(loss, list(model.parameters())))

    @torch.no_grad()
    def forward(implementation: str) -> None:
        model.set_experts_implementation(implementation)
        model(input_ids=tokens, use_cache=False)

    model.double()
    exact_logits, exact_gradients = both("eager")
    model.float()
    found = {implementation: both(implementation) for implementation in IMPLEMENTATIONS}
    eager_logits, eager_gradients = found["eager"]
    errors = {
        implementation: {
            "logits": _relative([logits], [exact_logits]),
            "gradients": _relative(gradients, exact_gradients),
            "max_abs_logits_vs_eager": _largest([logits], [eager_logits]),
            "max_abs_gradient_vs_eager": _largest(gradients, eager_gradients),
        }
        for implementation, (logits, gradients) in found.items()
    }
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    bound = max(config.hidden_size, width) * 2.0**-24
    times = {}
    for key, job in (("forward", forward), ("forward_backward", both)):
        jobs = {name: functools.partial(job, name) for name in IMPLEMENTATIONS}
        seconds = {name: s.median for name, s in measure(jobs, budget_s=budget_s).items()}
        # The ratio of the medians, which are printed next to it.
        speedup = {i: s / seconds["moe_ops"] for i, s in seconds.items() if i != "moe_ops"}
        times[key] = {"seconds": seconds, "speedup": speedup}
    return {
        "shape": f"{batch}x{length} tokens, {config.num_hidden_layers} layers, "
        f"H{config.hidden_size} I{width} E{config.num_local_experts} K{config.num_experts_per_tok}",
        "errors": errors,
        "bound": bound,
        # A NaN is in no range, so it does not pass.
        "passed": all(errors["moe_ops"][key] <= bound for key in ("logits", "gradients")),
        **times,
    }


def _relative(values: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    error = sum(float((a.double() - b).square().sum()) for a, b in zip(values, exact, strict=True))
    norm = sum(float(b.square().sum()) for b in exact)
    return (error / max(norm, 1e-300)) ** 0.5


def _largest(values: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(values, others, strict=True))


def _qwen3_moe(smoke: bool) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64 if smoke else 256,
        "intermediate_size": 64 if smoke else 512,
        "moe_intermediate_size": 32 if smoke else 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16 if smoke else 64,
        "num_experts": 8 if smoke else 32,
        "num_experts_per_tok": 2 if smoke else 4,
        "norm_topk_prob": True,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))


def _mixtral(smoke: bool) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64 if smoke else 384,
        "intermediate_size": 96 if smoke else 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4 if smoke else 16,
        "num_experts_per_tok": 2,
    }
    return MixtralForCausalLM(MixtralConfig(**sizes))


def print_comparison(console: Console, results: list[dict[str, Any]]) -> None:
    """Prints agreement and times of the Hugging Face models."""
    errors = Table(
        title="Distance to the same model in fp64 (relative, Frobenius norm)", title_justify="left"
    )
    for column in ("model", "experts", "logits", "grad.", "Δ logits", "Δ grad."):
        errors.add_column(column, justify="left" if column in ("model", "experts") else "right")
    errors.add_column("bound", justify="right")
    errors.add_column("")
    for result in results:
        verdict = "[green]pass[/]" if result["passed"] else "[red]FAIL[/]"
        first = [result["model"], *[""] * (len(result["errors"]) - 1)]
        last = [("", "")] * (len(first) - 1) + [(f"{result['bound']:.2g}", verdict)]
        rows = zip(first, result["errors"].items(), last, strict=True)
        for model, (implementation, error), end in rows:
            numbers = [f"{value:.2g}" for value in error.values()]
            errors.add_row(model, implementation, *numbers, *end, end_section=end[0] != "")
    console.print(errors)
    console.print("[dim]Δ is the largest difference to eager in fp32; bound is that of fp32.[/]")
    times = Table(title="Whole model, medians in ms; × = their ratio, times faster with moe_ops")
    times.title_justify = "left"
    for column in ("model", "pass", "moe_ops", "eager", "×", "grouped_mm", "×"):
        times.add_column(column, justify="left" if column in ("model", "pass") else "right")
    for result in results:
        for index, (key, label) in enumerate(_PASSES):
            times.add_row(
                result["model"] if index == 0 else "",
                label,
                *_times(result[key], "moe_ops", ("eager", "grouped_mm")),
                end_section=index == 1,
            )
    console.print(times)
    for result in results:
        console.print(f"[dim]{result['model']}: {result['shape']}[/]")


def _times(measured: Mapping[str, Any], ours: str, others: tuple[str, ...]) -> list[str]:
    cells = [f"{measured['seconds'][ours] * 1e3:.2f}"]
    for other in others:
        ratio = measured["speedup"][other]
        style = "green" if ratio >= 1.05 else "red" if ratio < 0.95 else "default"
        cells.append(f"{measured['seconds'][other] * 1e3:.2f}")
        cells.append(f"[{style}]{ratio:.2f}[/]")
    return cells
