"""Records of a float model on some inputs, for choosing scales and for judging the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops._eval_mode import call_model, in_eval
from moe_ops.expert_weights import ExpertInputs, ExpertsHook

from .bank import check_whole_bank, find_banks

MAX_TOKENS = 512


@dataclass
class BankRecord:
    """One bank: inputs it saw, its output y [T, H] fp32 (None when not asked for), its size."""

    inputs: ExpertInputs
    y: Tensor | None
    num_bytes: int


@dataclass
class CalibrationData:
    """Calibration data, as :func:`collect_calibration` returns it.

    banks: name of a module -> its record. tokens, perplexity, forward, context: of the perplexity,
    where it was asked for.
    """

    banks: dict[str, BankRecord]
    tokens: Tensor | None = None
    perplexity: float | None = None
    context: int = 256
    forward: Callable[[nn.Module, Tensor], Any] | None = field(default=None, repr=False)


@torch.no_grad()
def collect_calibration(
    model: nn.Module,
    inputs: Iterable[Any] | Callable[[nn.Module], Any],
    *,
    max_tokens: int = MAX_TOKENS,
    outputs: bool = True,
    tokens: Tensor | None = None,
    context: int = 256,
    forward: Callable[[nn.Module, Tensor], Any] | None = None,
) -> CalibrationData:
    """Runs a float model and keeps what its banks of experts saw and gave.

    Args:
        model: a model whose experts `quantize` can replace; not changed.
        inputs: batches to call the model with (a tensor, a tuple of positional or a dict of keyword
            arguments each), or a function that is given the model and runs it.
        max_tokens: tokens kept a bank, spread evenly over the batches and within each.
        outputs: also keep the banks' outputs, which :func:`compare_quality` compares with.
        tokens: [N] ids of a text to measure the perplexity of.
        context, forward: of :func:`perplexity`.

    Banks that have no quantized form are passed over.

    Raises:
        ValueError: no bank of float experts, a bank that saw no token, or, with `outputs`, weights
            that are sharded over processes.
    """
    chunks: dict[str, list[ExpertInputs]] = {}
    handles = []
    batches = [] if callable(inputs) else list(inputs)
    quota = max_tokens  # What a bank may have kept by the end of the present batch.

    def keep(name: str, experts: ExpertsHook) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept = chunks[name]
            room = quota - sum(c.x.shape[0] for c in kept)
            if room <= 0:
                return
            call = experts.inputs(module, args, kwargs)
            count = call.x.shape[0]
            if count:
                index = torch.arange(min(room, count), device=call.x.device)
                some = call.take(index * count // min(room, count))
                kept.append(some._replace(x=some.x.clone()))

        return hook

    for found in find_banks(model, unsupported="skip"):
        if outputs:
            check_whole_bank("collect_calibration", found.name, found.module, found.bank)
        chunks[found.name] = []
        hook = keep(found.name, found.hook)
        handles.append(found.module.register_forward_pre_hook(hook, with_kwargs=True))
        del found
    if not chunks:
        raise ValueError(
            f"collect_calibration: model must hold a bank of float experts, got "
            f"{type(model).__name__} without one."
        )
    with in_eval(model):
        try:
            if callable(inputs):
                inputs(model)
            else:
                for i, batch in enumerate(batches, start=1):
                    quota = math.ceil(max_tokens * i / len(batches))
                    call_model(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        quality = (
            None if tokens is None else perplexity(model, tokens, context=context, forward=forward)
        )
    banks = {}
    for found in find_banks(model, unsupported="skip"):
        kept = chunks[found.name]
        if not kept:
            raise ValueError(
                f"collect_calibration: inputs must reach every bank, got no token for "
                f"{found.name!r}."
            )
        together = ExpertInputs(
            torch.cat([c.x for c in kept]),
            torch.cat([c.topk_weights for c in kept]),
            torch.cat([c.topk_ids for c in kept]),
            kept[0].apply_router_weight_on_input,
        )
        y = found.bank.run(together) if outputs else None
        banks[found.name] = BankRecord(together, y, found.bank.num_bytes)
        del found
    return CalibrationData(banks, tokens, quality, context, forward)


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokens: Tensor,
    *,
    context: int = 256,
    batch_size: int = 8,
    forward: Callable[[nn.Module, Tensor], Any] | None = None,
) -> float:
    """exp of the mean negative log-probability that a language model gives each next token.

    The text is cut into pieces of `context` tokens (the last may be shorter); the first token of
    each is not predicted.

    Args:
        model: called as it is; put it into `eval()` first.
        tokens: [N] integers, N >= 2.
        context: tokens a piece, at least 2.
        batch_size: pieces a call.
        forward: (model, ids [B, S]) -> logits [B, S, V]. Without one, the model is called with ids,
            and its output may be the logits, an object with ``.logits``, or a tuple that begins
            with them.

    Raises:
        ValueError: too few tokens, or a context below 2.
    """
    if tokens.dim() != 1 or tokens.numel() < 2 or tokens.is_floating_point():
        raise ValueError(
            f"perplexity: tokens must be at least 2 integers [N], got shape {list(tokens.shape)}."
        )
    if context < 2:
        raise ValueError(f"perplexity: context must be at least 2, got {context}.")
    pieces = list(tokens.long().split(context))
    total, count = 0.0, 0
    whole = [p for p in pieces if p.numel() == context]
    batches = [torch.stack(whole[i : i + batch_size]) for i in range(0, len(whole), batch_size)]
    batches += [p[None] for p in pieces if 2 <= p.numel() < context]
    for ids in batches:
        logits = _logits(model, ids, forward)
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
        )
        total += float(loss.double())
        count += ids[:, 1:].numel()
    return math.exp(total / count)


def _logits(
    model: nn.Module, ids: Tensor, forward: Callable[[nn.Module, Tensor], Any] | None
) -> Tensor:
    output = model(ids) if forward is None else forward(model, ids)
    if hasattr(output, "logits"):
        return output.logits
    return output[0] if isinstance(output, tuple) else output
