"""Shared by the tests and the benchmarks: cases, generators, odd views, poisoned memory, bounds.

Bounds come from the operands: an op is compared with its fp64 reference, and the allowed error of
each element is a small multiple of eps times the same computation on absolute values. No absolute
tolerance is ever chosen by hand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_ops._private_torch import has_kernel, registered_ops
from moe_ops.ops._library import cuda_formulas

from . import _C, reference
from .numerics import is_batch_invariant
from .ops.gated_act import GATED_ACTIVATIONS as GATED_ACTIVATIONS
from .ops.gated_act import PLAIN_ACTIVATIONS as PLAIN_ACTIVATIONS
from .reference._common import acc_dtype as acc_dtype
from .reference.gated_act import plain_act

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ID_DTYPES = (torch.int32, torch.int64)
VIEWS = ("contiguous", "transposed", "offset", "step2", "expanded")

# Ids that no number of experts makes valid. The last three become small valid ids when an int64 is
# cut down to 32 bits.
OUT_OF_RANGE_IDS = (-1, -2, -(2**31), 2**31 - 1)
OUT_OF_RANGE_IDS_64 = (2**32, 2**32 + 1, -(2**32) + 1)


_simulator: torch.library.Library | None = None


def use_simulator() -> None:
    """From now on, ``torch.ops.moe_ops`` runs the CUDA kernels on CPU tensors, on the simulator
    that stands in for the CUDA runtime. Autograd, fake and autocast rules stay what they are.

    Raises:
        RuntimeError: this build is not one with MOE_OPS_CUDART=shared, or lacks a kernel.
    """
    global _simulator
    if _simulator is not None:
        return
    if "shared" not in _C.build_info()["cuda"]:
        raise RuntimeError(
            "use_simulator: this build has no CUDA kernels for a simulator: build with "
            "MOE_OPS_CUDA=on and MOE_OPS_CUDART=shared (make test-sim does)."
        )
    names = registered_ops("moe_ops_sim")
    kernels = {name for name in names if has_kernel(f"moe_ops_sim::{name}", "cpu")}
    missing = sorted(set(names) - kernels - set(cuda_formulas))
    if missing:
        raise RuntimeError(f"use_simulator: no CUDA kernel for {', '.join(missing)}.")
    library = torch.library.Library("moe_ops", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*overrid", category=UserWarning)
        for name in sorted(kernels):
            overload = getattr(torch.ops.moe_ops_sim, name).default
            library.impl(name, overload, "CPU", allow_override=True)
        for name, formula in cuda_formulas.items():
            library.impl(name, formula, "CPU", allow_override=True)
    _simulator = library


def short(dtype: torch.dtype) -> str:
    """The dtype as test ids spell it: fp64, fp32, bf16, fp16, int32, int64."""
    name = str(dtype).removeprefix("torch.")
    return {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(
        name, name
    )


def seed_from(node_id: str) -> int:
    """A seed from the test's own name, so that a test run alone sees what it saw in the crowd."""
    return zlib.crc32(node_id.encode())


# ---------------------------------------------------------------------------------------- routing


@dataclasses.dataclass(frozen=True)
class Routing:
    """How slots fall on experts.

    kind: uniform, skewed (Zipf), one_expert, half_empty (odd experts get nothing), last_only (all
    but the last expert empty), dropped (about a third of the slots are -1), out_of_range (about a
    third hold assorted invalid ids), all_dropped, repeated (a token may name an expert twice).
    """

    num_tokens: int
    num_experts: int
    top_k: int
    kind: str = "uniform"
    id_dtype: torch.dtype = torch.int32

    def __str__(self) -> str:
        return (
            f"T{self.num_tokens}E{self.num_experts}K{self.top_k}-{self.kind}-{short(self.id_dtype)}"
        )

    @property
    def num_slots(self) -> int:
        return self.num_tokens * self.top_k

    def ids(self) -> Tensor:
        """topk_ids [T, K] drawn from the global generator."""
        t, e, k = self.num_tokens, self.num_experts, self.top_k
        if self.kind in ("one_expert", "last_only", "all_dropped"):
            value = {"one_expert": e // 2, "last_only": e - 1, "all_dropped": -1}[self.kind]
            return torch.full((t, k), value, dtype=self.id_dtype)
        if self.kind == "repeated" or k > e:
            return torch.randint(e, (t, k)).to(self.id_dtype)
        popularity = torch.zeros(e)
        if self.kind == "skewed":
            popularity = -2.0 * torch.arange(1, e + 1).log()
        elif self.kind == "half_empty":
            popularity[1::2] = -1e4
        # Gumbel top-k: k distinct experts a token, drawn by popularity.
        gumbel = -torch.empty(t, e).exponential_().log()
        ids = (popularity + gumbel).argsort(1, descending=True)[:, :k].to(torch.int64)
        if self.kind == "half_empty" and e > 1:
            ids = torch.where(ids % 2 == 1, -1, ids)
        if self.kind in ("dropped", "out_of_range"):
            invalid = torch.tensor([-1])
            if self.kind == "out_of_range":
                wide = OUT_OF_RANGE_IDS_64 if self.id_dtype == torch.int64 else ()
                invalid = torch.tensor([*OUT_OF_RANGE_IDS, e, e + 1, *wide])
            drop = torch.rand(t, k) < 1 / 3
            ids = torch.where(drop, invalid[torch.randint(len(invalid), (t, k))], ids)
        return ids.to(self.id_dtype)

    def sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        """(expert_offsets, row_to_slot, slot_to_row) of fresh ids, by the reference."""
        return reference.sort_slots(self.ids(), self.num_experts)


# Few enough to multiply by dtypes, varied enough that each edge of the contract appears.
ROUTINGS = (
    Routing(1, 1, 1),
    Routing(1, 4, 2, "uniform", torch.int64),
    Routing(7, 1, 1, "dropped"),
    Routing(17, 3, 3, "uniform", torch.int64),
    Routing(33, 8, 2, "skewed"),
    Routing(31, 8, 2, "half_empty", torch.int64),
    Routing(29, 5, 2, "out_of_range"),
    Routing(29, 5, 2, "out_of_range", torch.int64),
    Routing(65, 6, 1, "last_only"),
    Routing(9, 4, 2, "one_expert", torch.int64),
    Routing(13, 4, 3, "all_dropped"),
    Routing(40, 16, 4, "dropped", torch.int64),
    Routing(23, 4, 6, "repeated"),
    Routing(5, 64, 3, "uniform"),
)
EMPTY_ROUTINGS = (
    Routing(0, 4, 2),
    Routing(0, 1, 1, "uniform", torch.int64),
    Routing(3, 4, 0),
)


def random_logits(num_tokens: int, num_experts: int, dtype: torch.dtype, kind: str = "normal"):
    """Router logits: normal, wide (some probabilities underflow), tied (few distinct values)."""
    logits = torch.randn(num_tokens, num_experts, dtype=torch.float64)
    if kind == "wide":
        logits = logits * 40
    elif kind == "tied":
        logits = logits.round()
    elif kind == "skewed":
        logits = logits - torch.arange(1, num_experts + 1, dtype=torch.float64).log() * 2
    return logits.to(dtype)


def decided_logits(make: Callable[[], Tensor], decide: Callable[[Tensor, float], Tensor]) -> Tensor:
    """Logits whose choice survives rounding: redrawn until `decide` agrees with itself.

    `decide(logits64, factor)` returns the ids after scaling every operand by `factor`; scaling
    keeps exact ties tied, so tie-breaking is still exercised.
    """
    for _ in range(200):
        logits = make()
        wide = logits.double()
        ids = decide(wide, 1.0)
        if all(torch.equal(ids, decide(wide, 1 + d)) for d in (-4e-6, -1e-6, 1e-6, 4e-6)):
            return logits
    raise AssertionError("no logits found whose choice is stable against rounding")


def logit_spread(logits: Tensor) -> Tensor:
    """[T, 1] factor of a softmax bound: exp's argument carries the rounding of logit - maximum."""
    wide = logits.detach().double()
    if wide.numel() == 0:
        return wide[:, :1]
    finite = torch.where(wide.isfinite(), wide, 0)
    return 1 + (finite.amax(1, keepdim=True) - finite.amin(1, keepdim=True)) / 8


# ------------------------------------------------------------------------------------------ views


def as_strided_copy(t: Tensor, kind: str) -> Tensor:
    """A tensor equal to `t` with another layout in memory. What lies between its elements is NaN.

    contiguous; transposed (the last two dimensions swapped in memory); offset (starts one element
    into its storage, so vector loads are misaligned); step2 (every second line of the first
    dimension); step2_last (every second element of the last dimension); expanded (the first line
    repeated with stride 0: equal to `t` only in its first line, so callers use the result's
    values).
    """
    hole = torch.nan if t.is_floating_point() else -7
    if kind == "contiguous":
        return t.contiguous()
    if kind == "transposed":
        return t if t.dim() < 2 else t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "offset":
        flat = t.new_full((t.numel() + 1,), hole)
        view = flat[1:].view(t.shape)
        return view.copy_(t)
    if kind == "step2":
        if t.dim() == 0:
            return t
        holes = t.new_full((2 * t.shape[0], *t.shape[1:]), hole)
        return holes[::2].copy_(t)
    if kind == "step2_last":
        holes = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), hole)
        return holes[..., ::2].copy_(t)
    if kind == "expanded":
        return t if t.dim() == 0 or t.shape[0] == 0 else t[:1].clone().expand(t.shape)
    raise ValueError(f"as_strided_copy: unknown kind {kind!r}")


_POISONED_SCRATCH = 256 << 10  # bytes of each block; small calls reach no further


@contextlib.contextmanager
def poisoned(*like: Tensor) -> Iterator[None]:
    """Memory that torch.empty hands out inside the block holds NaN (or 0xff bytes) where it can,
    and so does what this thread's CPU kernels keep between calls.

    Two ways at once: torch's own fill of uninitialised memory, and freed NaN blocks of the sizes of
    `like` for allocations that bypass it.
    """
    _C.poison_scratch(_POISONED_SCRATCH)
    sizes = {256, 4096, 65536} | {max(1, t.numel() * t.element_size()) for t in like}
    blocks = [
        torch.full((size + pad,), 0xFF, dtype=torch.uint8)
        for size in sizes
        for pad in (0, 0, 0, 64, 512)
    ]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    del blocks
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


# ----------------------------------------------------------------------------------------- bounds


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def assert_close_by_norm(
    actual: Tensor,
    expected: Tensor,
    magnitude: Tensor,
    *,
    sum_length: int = 1,
    steps: int = 0,
    step_dtype: torch.dtype | None = None,
    what: str = "output",
) -> None:
    """`actual` is the fp64 `expected` up to the rounding that its dtype and the op's sums justify.

    magnitude: fp64, elementwise: the same computation on absolute values, e.g. |a| @ |b|.
    sum_length: how many products a sum has; its rounding grows like the square root.
    steps: how many intermediate results the op may round to `step_dtype` (that of `actual`).

    NaN and infinities must be at exactly the same places. Beside each element, the norm of the
    whole error is checked: rounding errors are independent, so it is far below the sum of bounds.
    """
    assert actual.shape == expected.shape, (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    if actual.numel() == 0:
        return
    dtype = actual.dtype
    wide = actual.detach().double()
    expected = expected.detach().double()
    magnitude = magnitude.detach().double().expand_as(expected)
    rounded = expected.to(dtype)
    _same_places(wide.isnan(), expected.isnan(), wide, expected, f"{what}: NaN")
    for infinity in (torch.inf, -torch.inf):
        _same_places(wide == infinity, rounded == infinity, wide, expected, f"{what}: {infinity}")

    finite = expected.isfinite() & rounded.isfinite()
    error = torch.where(finite, (wide - expected).abs(), 0)
    expected = torch.where(finite, expected, 0)
    magnitude = torch.where(finite, magnitude, 0)
    terms = 8 + 4 * sum_length**0.5
    step_eps = eps(step_dtype or dtype)
    floor = max(torch.finfo(dtype).smallest_normal, torch.finfo(torch.float32).smallest_normal)
    if dtype == torch.float16:
        floor = 2.0**-24
    bound = (
        0.51 * eps(dtype) * expected.abs()
        + 0.5 * eps(acc_dtype(dtype)) * terms * magnitude
        + 0.5 * step_eps * steps * magnitude
        + floor
    )
    worst = int((error / bound).argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    assert bool((error <= bound).all()), (
        f"{what}: {int((error > bound).sum())} of {error.numel()} elements out of bound; worst at "
        f"{at}: got {wide[at].item()!r}, expected {expected[at].item()!r}, error "
        f"{error[at].item():.3e} is {(error[at] / bound[at]).item():.2f} times the bound "
        f"{bound[at].item():.3e} ({short(dtype)}, sums of {sum_length}, {steps} rounded steps)"
    )
    if error.numel() >= 256:
        norm_bound = (
            (eps(dtype) + step_eps * steps**0.5) * expected.norm()
            + (4 + sum_length**0.5 / 2) * eps(acc_dtype(dtype)) * magnitude.norm()
            + floor * error.numel() ** 0.5
        )
        assert error.norm() <= norm_bound, (
            f"{what}: the error's norm {error.norm().item():.3e} exceeds {norm_bound.item():.3e} "
            f"(norm of the expected value {expected.norm().item():.3e}, {short(dtype)})"
        )


def _same_places(actual: Tensor, wanted: Tensor, got: Tensor, expected: Tensor, what: str) -> None:
    if torch.equal(actual, wanted):
        return
    at = tuple(int(i) for i in (actual != wanted).nonzero()[0])
    raise AssertionError(
        f"{what} at the wrong places, first at {at}: got {got[at].item()!r}, "
        f"expected {expected[at].item()!r}"
    )


def assert_identical(actual: Tensor, expected: Tensor, what: str = "output") -> None:
    """Same dtype, shape and bits (NaN equals NaN)."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
    same = actual == expected
    if actual.is_floating_point():
        same |= actual.isnan() & expected.isnan()
    if not bool(same.all()):
        at = tuple(int(i) for i in (~same).nonzero()[0])
        raise AssertionError(
            f"{what}: {int((~same).sum())} of {same.numel()} differ, first at {at}: got "
            f"{actual[at].item()!r}, expected {expected[at].item()!r}"
        )


# ------------------------------------------------------------------------- running op and reference

Kwargs = dict[str, Any]


def widened(kwargs: Kwargs) -> Kwargs:
    """The same call in fp64."""
    return {k: v.double() if _is_float(v) else v for k, v in kwargs.items()}


def absolute(kwargs: Kwargs) -> Kwargs:
    """The same call in fp64 on absolute values: run on it, a multilinear op gives its magnitude."""
    return {k: v.double().abs() if _is_float(v) else v for k, v in kwargs.items()}


def _is_float(v: Any) -> bool:
    return isinstance(v, Tensor) and v.is_floating_point()


def run_with_grads(
    fn: Callable[..., Tensor], kwargs: Kwargs, wrt: Sequence[str], grad: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """fn(**kwargs) and the gradients of <output, grad> by name."""
    leaves = {name: kwargs[name].detach().requires_grad_() for name in wrt}
    out = fn(**{**kwargs, **leaves})
    if not wrt or grad is None:
        return out.detach(), {}
    grads = torch.autograd.grad(out, list(leaves.values()), grad, allow_unused=True)
    by_name = dict(zip(wrt, grads, strict=True))
    for name, leaf in leaves.items():
        if by_name[name] is None:
            by_name[name] = torch.zeros_like(leaf)
    return out.detach(), by_name


def check_against_reference(
    op: Callable[..., Tensor],
    ref: Callable[..., Tensor],
    kwargs: Kwargs,
    wrt: Sequence[str] = (),
    *,
    magnitude: Callable[..., Tensor] | None = None,
    sum_length: int = 1,
    steps: int = 0,
    grad_steps: int | None = None,
    grad_view: str = "contiguous",
) -> None:
    """Output and gradients of `op` against the fp64 reference, in poisoned memory.

    magnitude: a function of absolute operands whose value and gradients bound the op's; the
    reference itself unless given, which is right for every multilinear op.
    steps, grad_steps: roundings of intermediate results (see assert_close_by_norm) allowed to the
    output and to the gradients, the same unless given.
    """
    magnitude = magnitude or ref
    with torch.no_grad():
        shape = ref(**widened(kwargs))
    lead = next(v for v in kwargs.values() if _is_float(v))
    grad = as_strided_copy(torch.randn(shape.shape).to(lead.dtype), grad_view)
    wide_grad = grad.double()

    expected, expected_grads = run_with_grads(ref, widened(kwargs), wrt, wide_grad)
    bound, bound_grads = run_with_grads(magnitude, absolute(kwargs), wrt, wide_grad.abs())
    with poisoned(lead, expected.to(lead.dtype)):
        out, grads = run_with_grads(op, kwargs, wrt, grad)

    assert out.dtype == lead.dtype, f"output is {out.dtype}, expected {lead.dtype}"
    assert_close_by_norm(out, expected, bound, sum_length=sum_length, steps=steps)
    for name in wrt:
        assert grads[name].dtype == kwargs[name].dtype, f"gradient of {name}: {grads[name].dtype}"
        assert_close_by_norm(
            grads[name],
            expected_grads[name],
            bound_grads[name],
            sum_length=sum_length,
            steps=steps if grad_steps is None else grad_steps,
            # A weight's fp32 gradient made of half rows still carries the rounding of those rows.
            step_dtype=lead.dtype,
            what=f"gradient of {name}",
        )


def activation_magnitude(preact: Tensor, activation: str, interleaved: bool = False) -> Tensor:
    """A bound of the activation on non-negative `preact`; its derivative bounds the derivative.

    g + g^2 bounds |act(g)| with room for |act'| <= 1.13 and the curvature that turns an error in
    the pre-activation into an error of the derivative. The polynomial inside gelu_tanh is cubic.
    """
    if activation in PLAIN_ACTIVATIONS:
        gate, up = preact, None
    elif interleaved:
        gate, up = preact[..., 0::2], preact[..., 1::2]
    else:
        gate, up = preact.chunk(2, dim=-1)
    if activation in ("reglu", "relu"):
        act = gate
    elif activation == "relu2":
        act = gate * gate
    elif activation in ("geglu_tanh", "gelu_tanh"):
        act = 2 * gate + gate**2 + gate**4 / 4
    else:
        act = 2 * gate + gate**2
    if up is None:
        return act
    return act * (up + 1 if activation == "swiglu_oai" else up)


def gated_act_magnitude(
    gate_up: Tensor, activation: str = "swiglu", *, interleaved: bool = False, **_: Any
) -> Tensor:
    return activation_magnitude(gate_up, activation, interleaved)


def moe_ffn_magnitude(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "swiglu",
    interleaved: bool = False,
    apply_router_weight_on_input: bool = False,
    **_: Any,
) -> Tensor:
    """moe_ffn on non-negative operands with the activation replaced by its bound."""
    offsets, row_to_slot, slot_to_row = reference.sort_slots(topk_ids, w_gate_up.shape[0])
    rows = reference.permute(x, offsets, row_to_slot)
    if apply_router_weight_on_input:
        rows = rows * topk_weights.reshape(-1)[row_to_slot.long()][:, None]
    preact = reference.grouped_gemm(rows, w_gate_up, offsets, bias=b_gate_up)
    h = activation_magnitude(preact, activation, interleaved)
    out = reference.grouped_gemm(h, w_down, offsets, bias=b_down)
    weights = None if apply_router_weight_on_input else topk_weights
    return reference.unpermute(out, offsets, slot_to_row, weights)


# ------------------------------------------------------------------------------ operands and shapes


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The sizes of a published model's expert block."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int

    def __str__(self) -> str:
        return self.name


MODEL_SHAPES = (
    ModelShape("mixtral-8x7b", 4096, 14336, 8, 2),
    ModelShape("qwen1.5-moe-a2.7b", 2048, 1408, 60, 4),
    ModelShape("olmoe-1b-7b", 2048, 1024, 64, 8),
    ModelShape("qwen3-30b-a3b", 2048, 768, 128, 8),
    ModelShape("qwen3-next-80b", 2048, 512, 512, 10),
    ModelShape("gpt-oss-20b", 2880, 2880, 32, 4),
    ModelShape("deepseek-v3", 7168, 2048, 256, 8),
    ModelShape("llama-4-scout", 5120, 8192, 16, 1),
    ModelShape("phi-3.5-moe", 4096, 6400, 16, 2),
    ModelShape("gemma-4-26b-a4b", 2816, 704, 128, 8),
)


def ffn_operands(
    routing: Routing,
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype,
    *,
    activation: str = "swiglu",
    bias: bool = False,
    weights_dtype: torch.dtype | None = None,
) -> Kwargs:
    """The tensors of a moe_ffn call, scaled so that every stage has values near one."""
    e = routing.num_experts
    width = intermediate_size * (2 if activation in GATED_ACTIVATIONS else 1)
    if weights_dtype is None:
        weights_dtype = acc_dtype(dtype)
    kwargs: Kwargs = {
        "x": torch.randn(routing.num_tokens, hidden_size).to(dtype),
        "w_gate_up": (torch.randn(e, width, hidden_size) / hidden_size**0.5).to(dtype),
        "w_down": (torch.randn(e, hidden_size, intermediate_size) / intermediate_size**0.5).to(
            dtype
        ),
        "topk_weights": torch.rand(routing.num_tokens, routing.top_k).to(weights_dtype) + 0.1,
        "topk_ids": routing.ids(),
        "activation": activation,
    }
    if bias:
        kwargs["b_gate_up"] = torch.randn(e, width).to(dtype)
        kwargs["b_down"] = torch.randn(e, hidden_size).to(dtype)
    return kwargs


# ------------------------------------------------------------------------------ quantised weights

# Most tokens of an expert whose products are of integers whatever their dtype (moe_ffn_quantized).
INTEGER_ROWS = 8


def token_bits(weight: Tensor, dtype: torch.dtype, counts: Tensor) -> Tensor:
    """Of the integers that moe_ffn_quantized makes of the tokens of experts with `counts` of them:
    8, 16, or 0 where they stay as they are. x has this dtype, `weight` is one of the codes."""
    level, four = _C.cpu_isa(), weight.dtype == torch.uint8
    bits = torch.full_like(counts, 8 if four else 16)
    if is_batch_invariant():
        return bits
    if dtype == torch.float32 or level == "portable":
        bits[counts > INTEGER_ROWS] = 0
    elif not four and level in ("avx512_bf16", "amx"):  # those with VNNI
        bits[counts > min(max(weight.shape[2] // 160, 3), 6)] = 8
    return bits


def slots_of_experts(call: Kwargs) -> Tensor:
    """How many slots of an ffn call each expert has."""
    ids, experts = call["topk_ids"].flatten().long(), call["w_down"].shape[0]
    return torch.bincount(ids[(ids >= 0) & (ids < experts)], minlength=experts)


def rounds_to_bytes(call: Kwargs) -> bool:
    """Whether moe_ffn_quantized makes integers of 8 bits of any token (token_bits)."""
    rows = slots_of_experts(call)
    rows, dtype = rows[rows > 0], call["x"].dtype
    return any(
        bool(token_bits(call[name], dtype, rows).eq(8).any()) for name in ("w_gate_up", "w_down")
    )


def quantized(w: Tensor, bits: int, group: int = 32) -> tuple[Tensor, Tensor]:
    """Codes and scales of w [E, O, D] as moe_ffn_quantized takes them, rounded to nearest."""
    w = w.float()
    if bits == 8:
        scale = w.abs().amax(2) / 127 if w.shape[2] else w.new_zeros(w.shape[:2])
        codes = (w / scale.clamp_min(1e-30)[:, :, None]).round().clamp(-127, 127)
        return codes.to(torch.int8), scale
    experts, features, depth = w.shape
    groups = w.reshape(experts, features, depth // group, group)
    scale = groups.abs().amax(3) / 7 if depth else w.new_zeros(experts, features, 0)
    codes = (groups / scale.clamp_min(1e-30)[..., None]).round().clamp(-8, 7) + 8
    pairs = codes.to(torch.uint8).view(experts, features, depth // 2, 2)
    return pairs[..., 0] | pairs[..., 1] << 4, scale


def quantized_operands(
    routing: Routing,
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype,
    bits: int,
    group: int = 32,
    *,
    x_scale: bool = False,
    **options: Any,
) -> Kwargs:
    """ffn_operands with quantised weights."""
    call = ffn_operands(routing, hidden_size, intermediate_size, dtype, **options)
    for name in ("w_gate_up", "w_down"):
        call[name], call[f"{name}_scale"] = quantized(call[name], bits, group)
    if x_scale:
        call["x_scale"] = torch.rand(hidden_size) + 0.5
    return call


def dequantized(call: Kwargs) -> Kwargs:
    """The moe_ffn call in fp64 that a moe_ffn_quantized call stands for."""
    from .reference.moe_ffn_quantized import _dequantized

    call = widened(call)
    for name in ("w_gate_up", "w_down"):
        call[name] = _dequantized(call[name], call.pop(f"{name}_scale"))
    factors = call.pop("x_scale", None)
    if factors is not None:
        call["x"] = call["x"] * factors
    return call


FFN_FLOATS = ("x", "w_gate_up", "w_down", "topk_weights", "b_gate_up", "b_down")


def differentiable(call: Kwargs) -> list[str]:
    """The operands of a moe_ffn call that have gradients."""
    return [name for name in FFN_FLOATS if call.get(name) is not None]


def check_moe_ffn(
    call: Kwargs, wrt: Sequence[str] | None = None, *, grad_view: str = "contiguous"
) -> None:
    """moe_ffn against its reference, with gradients by all operands unless `wrt` names some. Half
    types may round the pre-activation, the activation and an expert's output, and in backward the
    gradients of the three: that is what `steps` allows."""
    from .ops import moe_ffn

    sizes = (*call["x"].shape, call["w_down"].shape[-1], call["topk_ids"].numel(), 1)
    check_against_reference(
        moe_ffn,
        reference.moe_ffn,
        call,
        differentiable(call) if wrt is None else wrt,
        magnitude=moe_ffn_magnitude,
        sum_length=max(sizes),
        steps=2,
        grad_steps=5,
        grad_view=grad_view,
    )


def moe_ffn_quantized_magnitude(**call: Any) -> Tensor:
    """moe_ffn_magnitude of the weights that codes and scales stand for."""
    return moe_ffn_magnitude(**absolute(dequantized(call)))


def check_moe_ffn_quantized(call: Kwargs) -> None:
    """moe_ffn_quantized on CUDA, where tokens stay as they are, against its reference. Half types
    may round x times x_scale, the activation and an expert's output: that is what `steps` allows."""
    from .ops import moe_ffn_quantized

    depth = call["w_down"].shape[-1] * (2 if call["w_down"].dtype == torch.uint8 else 1)
    check_against_reference(
        moe_ffn_quantized,
        reference.moe_ffn_quantized,
        call,
        magnitude=moe_ffn_quantized_magnitude,
        sum_length=max(1, *call["x"].shape, depth, call["topk_ids"].numel()),
        steps=2 if call.get("x_scale") is None else 3,
    )


def integer_tokens(rows: Tensor) -> Tensor:
    """Each row [N, D] as moe_ffn_quantized rounds it to 8 bits: 255 values in every 32 of its
    columns."""
    depth = rows.shape[1]
    padded = torch.nn.functional.pad(rows.float(), (0, -depth % 32))
    blocks = padded.unflatten(1, ((depth + 31) // 32, 32))
    if blocks.numel() == 0:
        return rows
    most = blocks.abs().amax(2, keepdim=True)
    # In fp64 the product is exact, as it is in the fused multiply-add that rounds it to an integer.
    # Where there is none, a product just beside half an integer may be rounded to that first.
    inverse = torch.full_like(most, 127) / most  # 127 / most would round twice.
    codes = (blocks.double() * inverse).round().nan_to_num(0)
    return (codes * (most / 127)).flatten(1)[:, :depth]


def moe_ffn_in_integers(call: Kwargs) -> Tensor:
    """moe_ffn_quantized in fp64 with tokens rounded to 8 bits where it does that. Those that become
    16 bits are not rounded here: that is at most 1.5e-5 of the largest of a row."""
    exact = dequantized(call)
    on_input = exact.get("apply_router_weight_on_input", False)
    activation, interleaved = exact["activation"], exact.get("interleaved", False)
    offsets, row_to_slot, slot_to_row = reference.sort_slots(
        exact["topk_ids"], exact["w_gate_up"].shape[0]
    )
    rows = reference.permute(exact["x"], offsets, row_to_slot)
    if on_input:
        rows = rows * exact["topk_weights"].reshape(-1)[row_to_slot.long()][:, None]
    counts = offsets.diff().long()

    def rounded(rows: Tensor, weight: Tensor) -> Tensor:
        bytes_of = token_bits(weight, call["x"].dtype, counts) == 8
        bytes_of = bytes_of.repeat_interleave(counts)[:, None]
        used = rows[: len(bytes_of)]
        return torch.cat([torch.where(bytes_of, integer_tokens(used), used), rows[len(used) :]])

    rows = rounded(rows, call["w_gate_up"])
    preact = reference.grouped_gemm(rows, exact["w_gate_up"], offsets, bias=exact.get("b_gate_up"))
    if activation in GATED_ACTIVATIONS:
        options = {k: exact[k] for k in ("alpha", "limit") if k in exact}
        h = reference.gated_act(preact, activation, interleaved=interleaved, **options)
    else:
        h = plain_act(preact, activation)
    h = rounded(h, call["w_down"])
    out = reference.grouped_gemm(h, exact["w_down"], offsets, bias=exact.get("b_down"))
    return reference.unpermute(
        out, offsets, slot_to_row, None if on_input else exact["topk_weights"]
    )


# ------------------------------------------------------------------------------------------ fp8


def fp8_gemm_operands(
    counts: Sequence[int],
    in_features: int,
    out_features: int,
    *,
    tail: int = 0,
    bias: torch.dtype | None = None,
) -> Kwargs:
    """The tensors of a grouped_gemm_fp8 call whose blocks differ in size by up to 1e4."""
    from .quant import quantize_fp8_blocks

    e, n = len(counts), sum(counts) + tail

    def spread(*size: int) -> Tensor:
        return torch.randn(size) * 10 ** (4 * torch.rand(size[0], *[1] * (len(size) - 1)) - 2)

    a, a_scale = reference.quantize_fp8(spread(n, in_features))
    b, b_scale = quantize_fp8_blocks(spread(e, out_features, in_features))
    # Neighbouring blocks would otherwise have nearly the same scale.
    a_scale = a_scale * 2 ** (2 * torch.rand(a_scale.shape))
    b_scale = b_scale * 2 ** (2 * torch.rand(b_scale.shape))
    call: Kwargs = {
        "a": a,
        "a_scale": a_scale,
        "b": b,
        "b_scale": b_scale,
        "expert_offsets": torch.tensor([0, *counts]).cumsum(0).int(),
    }
    if bias is not None:
        call["bias"] = torch.randn(e, out_features).to(bias)
    return call


def check_grouped_gemm_fp8(call: Kwargs, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """Against the fp64 reference on the same codes and scales, in poisoned memory: what is left is
    the rounding of fp32 sums. Returns the output."""
    from .ops import grouped_gemm_fp8

    wide = {**widened(call), "out_dtype": torch.float64}
    expected = reference.grouped_gemm_fp8(**wide)
    magnitude = reference.grouped_gemm_fp8(**{**absolute(call), "out_dtype": torch.float64})
    with poisoned(expected.to(out_dtype)):
        out = grouped_gemm_fp8(**call, out_dtype=out_dtype)
    assert out.dtype == out_dtype
    assert_close_by_norm(out, expected, magnitude, sum_length=max(1, call["a"].shape[1]))
    return out


def fp8_operands(
    routing: Routing,
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype,
    **options: Any,
) -> Kwargs:
    """ffn_operands with weights in e4m3."""
    from .quant import quantize_fp8_blocks

    call = ffn_operands(routing, hidden_size, intermediate_size, dtype, **options)
    for name in ("w_gate_up", "w_down"):
        call[name], call[f"{name}_scale"] = quantize_fp8_blocks(call[name])
    return call


def check_moe_ffn_fp8(call: Kwargs, *, row_steps: int = 0) -> Tensor:
    """moe_ffn_fp8 against its fp64 reference; returns the output.

    Both round x to the same codes. An activated feature that lies within rounding of the middle
    between two codes may become either: what that is worth is bounded feature by feature, and
    everything else as rounding of fp32 sums.

    row_steps: roundings to x's dtype between the down projection and the sum over experts.
    """
    from .ops import moe_ffn_fp8

    expected, bound = moe_ffn_fp8_bound(call, row_steps)
    with poisoned(call["x"], expected.to(call["x"].dtype)):
        y = moe_ffn_fp8(**call)
    assert y.dtype == call["x"].dtype
    assert y.shape == expected.shape
    _same_places(y.isnan(), expected.isnan(), y.double(), expected, "NaN")
    finite = expected.isfinite()
    error = torch.where(finite, (y.double() - expected).abs(), 0)
    bound = torch.where(finite, bound, 0)
    assert bool((error <= bound).all()), (
        f"{int((error > bound).sum())} of {error.numel()} elements out of bound; the worst is "
        f"{(error / bound).max().item():.2f} times its bound"
    )
    if error.numel() >= 256:
        # Single features that take another code are rare, and most of the bound is theirs.
        norm = torch.where(finite, expected, 0).norm()
        slack = (1 + row_steps) * eps(y.dtype) + 1e-3
        assert error.norm() <= slack * norm, f"{error.norm() / norm:.2e} of the norm"
    return y


def moe_ffn_fp8_bound(call: Kwargs, row_steps: int = 0) -> tuple[Tensor, Tensor]:
    """The reference in fp64 and what an output may differ from it (check_moe_ffn_fp8)."""
    wide = widened(call)
    x, ids, weights = wide["x"], wide["topk_ids"], wide["topk_weights"]
    experts, dtype = wide["w_gate_up"].shape[0], call["x"].dtype
    offsets, row_to_slot, slot_to_row = reference.sort_slots(ids, experts)
    end = int(offsets[-1])
    slot = row_to_slot[:end].long()
    on_input = wide.get("apply_router_weight_on_input", False)

    def product(q: Tensor, scale: Tensor, name: str, sign: bool) -> Tensor:
        operands = {"a": q, "a_scale": scale, "b": wide[name], "b_scale": wide[f"{name}_scale"]}
        if (bias := wide.get("b" + name[1:])) is not None:
            operands["bias"] = bias
        return reference.grouped_gemm_fp8(
            **(widened if sign else absolute)(operands),
            expert_offsets=offsets,
            out_dtype=torch.float64,
        )

    def rounding(length: int) -> float:
        return 0.5 * eps(torch.float32) * (12 + 4 * length**0.5)

    codes, scale = reference.quantize_fp8(x)
    rows, scale = codes[slot // max(ids.shape[1], 1)], scale.double()[slot // max(ids.shape[1], 1)]
    if on_input:
        scale = scale * weights.reshape(-1)[slot, None]
    preact = product(rows, scale, "w_gate_up", True).requires_grad_()
    preact_error = rounding(x.shape[1]) * product(rows, scale, "w_gate_up", False)
    activation, interleaved = wide["activation"], wide.get("interleaved", False)
    options = {k: wide[k] for k in ("alpha", "limit") if k in wide}
    if activation in GATED_ACTIVATIONS:
        h = reference.gated_act(preact, activation, interleaved=interleaved, **options)
    else:
        h = plain_act(preact, activation)
    slope = torch.autograd.grad(h.sum(), preact)[0].abs() * preact_error
    h, preact = h.detach(), preact.detach()
    if activation in GATED_ACTIVATIONS:
        halves = (slope[:, 0::2], slope[:, 1::2]) if interleaved else slope.chunk(2, 1)
        slope = halves[0] + halves[1]
    # Curvature, and the activation's own rounding.
    magnitude = activation_magnitude(preact.abs(), activation, interleaved)
    h_error = 2 * slope + 16 * eps(torch.float32) * (h.abs() + magnitude)

    h_codes, h_scale = reference.quantize_fp8(h)
    factors = h_scale.double().repeat_interleave(128, 1)[:, : h.shape[1]]
    value = h.abs() / factors
    step = 2.0 ** (value.clamp(min=2.0**-6).log2().floor() - 3)
    from_middle = ((value / step).frac() - 0.5).abs() * step
    # The scale moves with the largest of a block.
    blocks = torch.nn.functional.pad(h_error, (0, -h.shape[1] % 128)).unflatten(1, (-1, 128))
    block_error = blocks.amax(2).repeat_interleave(128, 1)[:, : h.shape[1]]
    moved = h_error / factors + value * (block_error / (448 * factors) + 4 * eps(torch.float32))
    code_error = torch.where(from_middle <= moved, step * factors, 0) + 2 * moved * factors
    ones = torch.ones(code_error.shape[0], h_scale.shape[1], dtype=torch.float64)
    down = (wide["w_down"].abs(), wide["w_down_scale"])
    out_error = reference.grouped_gemm_fp8(
        code_error, ones, *down, offsets, out_dtype=torch.float64
    )
    out = product(h_codes, h_scale, "w_down", True)
    out_error = out_error + rounding(h.shape[1]) * product(h_codes, h_scale, "w_down", False)
    out_error = out_error + 0.51 * row_steps * eps(dtype) * out.abs()
    combine = None if on_input else weights.abs()
    tail = (0, 0, 0, ids.numel() - end)
    out_error, out = (torch.nn.functional.pad(t, tail) for t in (out_error, out.abs()))
    bound = reference.unpermute(out_error, offsets, slot_to_row, combine)
    sums = reference.unpermute(out, offsets, slot_to_row, combine)
    expected = reference.moe_ffn_fp8(**wide)
    bound = 1.01 * bound + rounding(ids.shape[1]) * sums + 0.51 * eps(dtype) * expected.abs()
    return expected, bound + 2.0**-24
