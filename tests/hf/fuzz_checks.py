"""Checks of one drawn model: `moe_ops.hf.optimize` against the model as transformers runs it.

In float32 each token's logits must be the eager model's up to rounding. A token that differs counts
only if rounding does not explain it: the eager model in float64, and with weights changed in their
last digits, must stay close to itself there (two experts with all but equal scores may change
places). Quantized models are compared with themselves while a global hook turns fast paths off.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from tests.helpers.quantized import weight_config
from torch import Tensor
from transformers import PreTrainedModel

import moe_ops.hf

from .families import NOT_GENERATIVE
from .fuzz_draws import Draw
from .models import CACHE

TOLERANCE = 1e-4  # Relative to the norm of a token's logits, in float32.
CODES_TOLERANCE = 0.02  # The median token's, between two paths of a quantized model.
INT8_TOLERANCE = 0.7  # The median token's, between int8 and float32 weights; experts may flip.
STEPS = 5
# Sequences, tokens of each, and how many of them are padding in the last one.
PROMPTS = {"few tokens": (2, 7, 3), "many tokens": (3, 30, 11)}
WAYS = {
    **PROMPTS,
    "decoding": (1, 4, 0),
    "decoding with padding": (3, 6, 2),
    "decoding after many tokens": (1, 70, 0),
}


class Refused(Exception):
    """transformers cannot build or run the model, or optimize says that it takes none such."""


def fault_of(draw: Draw) -> str:
    """Returns what is wrong, "" for nothing.

    Raises:
        Refused: there is nothing to compare.
    """
    try:
        plain = draw.build()
        ids = token_ids(plain, draw.seed)
        wanted = Runs(plain, draw.family, ids).run_what_works()
    except Exception as error:
        raise Refused(f"{type(error).__name__}: {str(error)[:100]}") from error
    if not all(t.isfinite().all() for t in wanted.results.values()):
        raise Refused("the eager model overflows")
    refused = []
    for mode in draw.modes:
        try:
            fault = _check(mode, draw, plain, wanted)
        except Refused as error:
            refused.append(f"{mode}: {error}")
            continue
        if fault:
            return f"{mode}: {fault}"
    if len(refused) == len(draw.modes):
        raise Refused("; ".join(refused))
    return ""


def _check(mode: str, draw: Draw, plain: PreTrainedModel, wanted: Runs) -> str:
    model = copy.deepcopy(plain)
    if mode == "bf16":
        model = model.bfloat16()
        try:
            eager = Runs(copy.deepcopy(model), draw.family, wanted.ids).run(wanted.results)
        except Exception as error:
            raise Refused(f"eager in bfloat16: {type(error).__name__}") from error
    weights = mode if mode.startswith("int") else None
    try:
        moe_ops.hf.optimize(model, quantization=weight_config(weights, 32))
    except ValueError as error:
        raise Refused(f"optimize: {error}") from error
    except Exception as error:
        return f"optimize raises {type(error).__name__}: {str(error)[:150]}"
    runs = Runs(model, draw.family, wanted.ids)
    try:
        runs.run(wanted.results)
        if mode == "bf16":
            return _bf16_fault(runs, eager, wanted) if _is_steady(draw) else ""
        if mode != "none":
            return _codes_fault(mode, runs, wanted, draw)
        return _float_fault(runs, wanted, plain)
    except Exception as error:
        return f"after optimize, {type(error).__name__}: {str(error)[:200]}"


# ------------------------------------------------------------------------------------------- runs


def token_ids(model: PreTrainedModel, seed: int) -> Tensor:
    """Returns ids that are no special token of any family's."""
    most = min(model.config.get_text_config().vocab_size, 60)
    return torch.randint(1, most, (3, 80), generator=torch.Generator().manual_seed(seed))


class Runs:
    """Calls of a model, each once: the logits of all tokens that are no padding."""

    def __init__(self, model: PreTrainedModel, family: str, ids: Tensor) -> None:
        self.model, self.ids, self.family = model, ids, family
        self.results: dict[str, Tensor] = {}

    @property
    def generates(self) -> bool:
        return self.family not in NOT_GENERATIVE

    def run(self, names: Iterable[str]) -> Runs:
        for name in names:
            self.results[name] = self._run(name)
        return self

    def run_what_works(self) -> Runs:
        """Some models refuse padding beside a cache, or have none."""
        for name in WAYS if self.generates else PROMPTS:
            try:
                self.results[name] = self._run(name)
            except Exception:
                if name == "few tokens":
                    raise
        return self

    def _run(self, name: str) -> Tensor:
        torch.manual_seed(0)  # DiffusionGemma draws what it denoises.
        for module in self.model.modules():  # Kept from the last prompt, whatever its batch was.
            if hasattr(module, "rope_deltas"):
                module.rope_deltas = None
        batch, length, padding = WAYS[name]
        parts = (self._prompt if name in PROMPTS else self._decode)(batch, length, padding)
        return torch.cat(tuple(parts))

    def inputs(self, batch: int, length: int, padding: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns ids, and a mask that hides the first tokens of all sequences but the first."""
        if not padding:
            return self.ids[:batch, :length], {}
        mask = torch.ones(batch, length, dtype=torch.long)
        for row in range(1, batch):
            mask[row, : padding * row // max(1, batch - 1)] = 0
        return self.ids[:batch, :length] * mask, {"attention_mask": mask}

    @torch.no_grad()
    def _prompt(self, batch: int, length: int, padding: int) -> Iterator[Tensor]:
        ids, mask = self.inputs(batch, length, padding)
        logits = self.model(input_ids=ids, **mask).logits
        if logits.shape[1] == length and mask:
            yield logits[mask["attention_mask"].bool()]
        else:
            yield logits.flatten(0, 1)

    @torch.no_grad()
    def _decode(self, batch: int, length: int, padding: int) -> Iterator[Tensor]:
        ids, mask = self.inputs(batch, length + STEPS, padding)
        output = self.model(
            input_ids=ids[:, :length], use_cache=True, **{k: m[:, :length] for k, m in mask.items()}
        )
        yield output.logits[:, -1]
        for at in range(length, length + STEPS):
            output = self.model(
                input_ids=ids[:, at : at + 1],
                use_cache=True,
                **{CACHE: output[CACHE]},
                **{k: m[:, : at + 1] for k, m in mask.items()},
            )
            yield output.logits[:, -1]


def errors(actual: Tensor, expected: Tensor) -> Tensor:
    """Returns the relative error of each token's logits."""
    actual, expected = actual.double(), expected.double()
    return (actual - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)


# ------------------------------------------------------------------------------------------ float32


def _float_fault(runs: Runs, wanted: Runs, plain: PreTrainedModel) -> str:
    bad = {}
    for name, expected in wanted.results.items():
        error = errors(runs.results[name], expected)
        if not error.max() <= TOLERANCE:
            bad[name] = error
    if bad:
        noise = _noise(plain, wanted)
        for name, error in bad.items():
            if not (error <= 30 * noise[name] + TOLERANCE).all():
                worst = error - 30 * noise[name] - TOLERANCE
                count = int((~(worst <= 0)).sum())
                return f"{name}: {count} of {len(error)} tokens off, by up to {error.max():.2g}"
    if runs.generates and not bad and (fault := _greedy_fault(runs, wanted, plain)):
        return fault
    moe_ops.hf.restore(runs.model)
    # Again, as dynamic rotary embeddings keep the longest prompt so far.
    first = wanted.run(["few tokens"]).results["few tokens"]
    restored = runs.run(["few tokens"]).results["few tokens"]
    if not torch.equal(restored, first):
        return f"restore: logits off by {errors(restored, first).max():.2g}"
    return ""


def _noise(plain: PreTrainedModel, wanted: Runs) -> dict[str, Tensor]:
    """Returns how far each token's logits of the eager model move in float64, and when its weights
    change by a few units in the last place."""
    try:
        exact = Runs(copy.deepcopy(plain).double(), wanted.family, wanted.ids).run(wanted.results)
        finite = all(t.isfinite().all() for t in exact.results.values())
    except Exception:
        finite = False
    if not finite:  # Some models mix float32 in; others make NaN of padding in float64.
        exact = wanted
    noise = _moved(exact, 1e-6)
    for name, result in wanted.results.items():
        noise[name] = torch.maximum(noise[name], errors(result, exact.results[name]))
    return noise


def _moved(exact: Runs, size: float) -> dict[str, Tensor]:
    """Returns the largest of each token's errors when weights change by `size` of themselves."""
    noise = {name: torch.zeros(len(result)) for name, result in exact.results.items()}
    for seed in range(4):
        model = copy.deepcopy(exact.model)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + size * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        for name, result in Runs(model, exact.family, exact.ids).run(noise).results.items():
            noise[name] = torch.maximum(noise[name], errors(result, exact.results[name]))
    return noise


@torch.no_grad()
def _greedy_fault(runs: Runs, wanted: Runs, plain: PreTrainedModel) -> str:
    ids, mask = runs.inputs(2, 6, padding=2)
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, **mask}
    try:
        theirs = plain.generate(ids, **options, output_logits=True, return_dict_in_generate=True)
    except Exception:
        return ""
    ours = runs.model.generate(ids, **options)
    for row in range(len(ids)):
        new = theirs.sequences[row, ids.shape[1] :].tolist()
        for at, (a, b) in enumerate(zip(ours[row, ids.shape[1] :].tolist(), new, strict=False)):
            logits = theirs.logits[at][row]
            top = logits.topk(2).values
            if a != b and top[0] - top[1] > 1e-2 * logits.std():
                return f"generate: token {at} of sequence {row} is {a}, not {b}"
            if a != b:
                break
    return ""


# ---------------------------------------------------------------------------------- other weights


@contextmanager
def fast_paths_off() -> Iterator[None]:
    """Turns off what passes modules by: with a hook on all modules each one must be called."""
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


def _is_steady(draw: Draw) -> bool:
    """Returns whether rounding moves outputs a little. In a model with large weights, or one that
    chooses the keys of its attention, another choice of an expert or a key moves them far."""
    return not draw.scales and "indexed_attention" not in str(draw)


def _codes_fault(mode: str, runs: Runs, wanted: Runs, draw: Draw) -> str:
    slow = Runs(runs.model, draw.family, runs.ids)
    with fast_paths_off():
        slow.run(wanted.results)
    for name, expected in slow.results.items():
        error = errors(runs.results[name], expected).median()
        if not error <= CODES_TOLERANCE:
            return f"{name}: half of the tokens off by {error:.2g} or more from the slow path"
        error = errors(runs.results[name], wanted.results[name]).median()
        if not error <= (INT8_TOLERANCE if mode == "int8" and _is_steady(draw) else 1e9):
            return f"{name}: half of the tokens off by {error:.2g} or more from float32"
    return ""


def _bf16_fault(runs: Runs, eager: Runs, wanted: Runs) -> str:
    moved: dict[str, Tensor] = {}
    for name, exact in wanted.results.items():
        ours = errors(runs.results[name], exact).median()
        theirs = errors(eager.results[name], exact).median()
        if ours <= 2.5 * theirs + 0.01:
            continue
        moved = moved or _moved(wanted, 2.0**-8)
        if not ours <= 2.5 * torch.maximum(theirs, moved[name].median()) + 0.01:
            return (
                f"{name}: the median token is off by {ours:.2g} from float32, {theirs:.2g} before"
            )
    return ""
