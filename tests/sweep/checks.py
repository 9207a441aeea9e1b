"""Runs a case: makes the operands, calls the op, and compares with the fp64 reference.

The file is long because it has a function for each op.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from tests.helpers.ffn import differentiable, gated_act_magnitude, moe_ffn_magnitude
from tests.helpers.fp8 import (
    check_grouped_gemm_fp8,
    check_grouped_gemm_fp8_wgrad,
    check_moe_ffn_fp8,
    fp8_wgrad_operands,
)
from tests.helpers.logits import random_logits
from tests.helpers.quantized import (
    check_grouped_gemm_quantized,
    label_of,
    moe_ffn_in_integers,
    quantized,
    quantized_gemm_operands,
)
from torch import Tensor

import moe_ops
from moe_ops import _library, reference
from moe_ops.numerics import batch_invariant
from moe_ops.ops.gated_act import GATED_ACTIVATIONS
from moe_ops.quant import quantize_fp8_blocks
from moe_ops.testing import (
    absolute,
    acc_dtype,
    as_strided_copy,
    assert_close_by_norm,
    assert_identical,
    eps,
    poisoned,
    run_with_grads,
    widened,
)

from .cases import Case

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@functools.lru_cache
def tests_of(op: str) -> ModuleType:
    """tests/ops/test_<op>.py, for the bounds that it has."""
    return importlib.import_module(f"tests.ops.test_{op}")


# ------------------------------------------------------------------------------------- comparing


def assert_rounded_once(
    actual: Tensor, expected: Tensor, steps: int, what: str, most: float
) -> None:
    """The whole error of a half type, beside its bound element by element.

    Rounding to nearest moves a number by eps / 2 / sqrt(3) of its power of two, 0.19 eps of the
    number in the mean of squares; independent roundings add up by squares. 0.3 leaves room for few
    elements and for sums in which terms cancel, up to eps / 2, 0.4 % in bfloat16, times `most`. A
    buffer that is used twice, or a block that is left out, shows here first.
    """
    if actual.dtype.itemsize != 2 or actual.numel() < 512:
        return
    norm = expected.norm()
    error = (actual.double() - expected).norm()
    allowed = most * min(0.3 * (1 + steps) ** 0.5, 0.51) * eps(actual.dtype) * norm
    tiny = torch.finfo(actual.dtype).smallest_normal * eps(actual.dtype) * actual.numel() ** 0.5
    assert error <= allowed + tiny, (
        f"{what}: the error is {error / norm:.2e} of the norm, {allowed / norm:.2e} is allowed"
    )


def compare(
    op: Callable[..., Tensor],
    ref: Callable[..., Tensor],
    call: dict[str, Any],
    wrt: Sequence[str],
    *,
    magnitude: Callable[..., Tensor] | None = None,
    lengths: dict[str, int],
    steps: int = 0,
    grad_steps: int = 0,
    grad_view: str = "contiguous",
    most: float = 1.0,
) -> None:
    """check_against_reference with a length of the sums for each result (``lengths[""]`` for those
    that are not named), and assert_rounded_once on top."""
    with torch.no_grad():
        shape = ref(**widened(call)).shape
    dtype = next(v.dtype for v in call.values() if _is_float(v))
    grad = as_strided_copy(torch.randn(shape).to(dtype), grad_view)
    expected, wanted = run_with_grads(ref, widened(call), wrt, grad.double())
    bound, bounds = run_with_grads(magnitude or ref, absolute(call), wrt, grad.double().abs())
    with poisoned(expected.to(dtype)):
        out, grads = run_with_grads(op, call, wrt, grad)
    assert out.dtype == dtype, f"output is {out.dtype}"
    results = [("output", out, expected, bound, steps)]
    results += [(n, grads[n], wanted[n], bounds[n], grad_steps) for n in wrt]
    for name, got, want, size, rounded in results:
        what = name if name == "output" else f"gradient of {name}"
        assert_close_by_norm(
            got,
            want,
            size,
            sum_length=max(1, lengths.get(name, lengths[""])),
            steps=rounded,
            step_dtype=dtype,
            what=what,
        )
        if name != "topk_weights":
            assert_rounded_once(got, want, rounded, what, most)


def _is_float(v: Any) -> bool:
    return isinstance(v, Tensor) and v.is_floating_point()


# -------------------------------------------------------------------------------------- operands


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


def laid_out(w: Tensor, layout: str) -> Tensor:
    """Weights [E, O, K] dense along k (nt), along features (nn), or with gaps in both (gaps)."""
    if layout == "nn":
        return as_strided_copy(w, "transposed")
    if layout == "gaps":
        holes = w.new_full((w.shape[0], w.shape[1] + 1, w.shape[2] + 3), torch.nan)
        return holes[:, :-1, 1:-2].copy_(w)
    if layout == "even":  # rows start at even elements, which products of pairs ask for
        holes = w.new_full((w.shape[0], w.shape[1], w.shape[2] + w.shape[2] % 2 + 2), torch.nan)
        return holes[..., : w.shape[2]].copy_(w)
    return w


def counts_of(case: Case) -> list[int]:
    """Rows of each expert: the one in question, and others before and after it."""
    rows, experts = case["rows"], case.get("experts", 1)
    if experts == 1:
        return [rows]
    others = [3, 0, 1, 2, 5, 0, 17, 1]
    return [others[e % 8] if e != experts // 2 else rows for e in range(experts)]


def offsets_of(counts: Sequence[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


def ids_of(case: Case) -> Tensor:
    """topk_ids [T, K] of which the expert in question has exactly `rows` slots; some are -1.
    repeat: its slots are all of a token's, so that a block of tokens has more rows than tokens."""
    counts, k = counts_of(case), case.get("top_k", 1)
    main = len(counts) // 2
    rest = [e for e, n in enumerate(counts) if e != main for _ in range(n)]
    tokens = max(case["rows"] + (3 if k == 1 else 0), -(-(case["rows"] + len(rest)) // k))
    if case.get("tokens"):
        tokens = max(tokens, case["tokens"])
    ids = torch.full((tokens, k), -1, dtype=torch.int32)
    flat = torch.tensor(rest, dtype=torch.int32)
    if case.get("repeat", 0):
        last = -(-case["rows"] // k)
        ids = torch.full((last + -(-len(rest) // k), k), -1, dtype=torch.int32)
        ids.view(-1)[: case["rows"]] = main
        ids[last:].view(-1)[: len(rest)] = flat
    elif k == 1:
        tokens = max(tokens, case["rows"] + len(rest))
        ids = torch.full((tokens, 1), -1, dtype=torch.int32)
        ids[: case["rows"], 0] = main
        ids[case["rows"] : case["rows"] + len(rest), 0] = flat
    else:
        ids[: case["rows"], 0] = main
        free = ids[:, 1:].flatten().clone()
        places = torch.randperm(len(free))[: len(rest)]
        free[places] = flat[: len(places)]
        ids[:, 1:] = free.view(len(ids), k - 1)
    return ids[torch.randperm(len(ids))]


def routing_weights(case: Case, ids: Tensor, dtype: torch.dtype) -> Tensor:
    kind = case.get("scales", "random")
    if kind == "ones":
        w = torch.ones(ids.shape)
    elif kind == "half":
        w = torch.full(ids.shape, 0.5)
    elif kind == "mixed":  # negative ones, zeros, and a few ones among them
        w = torch.randn(ids.shape)
        w[torch.rand(ids.shape) < 0.2] = 0
        w[torch.rand(ids.shape) < 0.2] = 1
    else:
        w = torch.rand(ids.shape) + 0.1
    return w.to(acc_dtype(dtype))


def ffn_call(case: Case) -> dict[str, Any]:
    dtype, h, i = DTYPES[case["dtype"]], case["h"], case["i"]
    activation = case.get("act", "swiglu")
    experts = case.get("experts", 1)
    width = i * (2 if activation in GATED_ACTIVATIONS else 1)
    ids = ids_of(case)
    call: dict[str, Any] = {
        "x": drawn(len(ids), h, dtype=dtype),
        "w_gate_up": (torch.randn(experts, width, h) / h**0.5).to(dtype),
        "w_down": (torch.randn(experts, h, i) / i**0.5).to(dtype),
        "topk_weights": routing_weights(case, ids, dtype),
        "topk_ids": ids,
        "activation": activation,
        "interleaved": bool(case.get("interleaved", 0)),
        "apply_router_weight_on_input": bool(case.get("on_input", 0)),
    }
    if activation == "swiglu_oai" and dtype.itemsize == 2:
        # A pre-activation that is rounded across the limit has another gradient: keep away from it.
        call["limit"] = 100.0
    if case.get("bias", 0):
        call["b_gate_up"] = drawn(experts, width, dtype=dtype)
        call["b_down"] = drawn(experts, h, dtype=dtype)
    return call


# --------------------------------------------------------------------------------------- products


def grouped_gemm(case: Case) -> None:
    dtype, k, n = DTYPES[case["dtype"]], case["k"], case["n"]
    counts = counts_of(case)
    call = {
        "a": drawn(sum(counts) + 2, k, dtype=dtype),
        "b": laid_out(drawn(len(counts), n, k, dtype=dtype), case.get("layout", "nt")),
        "expert_offsets": offsets_of(counts),
    }
    if case.get("bias", 0):
        call["bias"] = drawn(len(counts), n, dtype=dtype)
    rows = max(counts)
    compare(
        moe_ops.grouped_gemm,
        reference.grouped_gemm,
        call,
        ["a", "b", *(["bias"] if "bias" in call else [])],
        lengths={"": k + 1, "a": n, "b": rows, "bias": rows},
        grad_view=case.get("grad_view", "contiguous"),
    )


def grouped_gemm_wgrad(case: Case) -> None:
    dtype, k, n = DTYPES[case["dtype"]], case["k"], case["n"]
    counts = counts_of(case)
    rows = sum(counts) + 2
    view = case.get("grad_view", "contiguous")
    call = {
        "grad": as_strided_copy(drawn(rows, n, dtype=dtype), view),
        "a": drawn(rows, k, dtype=dtype),
        "expert_offsets": offsets_of(counts),
    }
    compare(
        moe_ops.grouped_gemm_wgrad,
        reference.grouped_gemm_wgrad,
        call,
        [],
        lengths={"": max(counts)},
    )
    compare(
        moe_ops.grouped_sum,
        reference.grouped_sum,
        {"rows": call["grad"], "expert_offsets": call["expert_offsets"]},
        [],
        lengths={"": max(counts)},
    )


def moe_linear_map(case: Case) -> None:
    dtype, h, o = DTYPES[case["dtype"]], case["h"], case["o"]
    ids, experts = ids_of(case), case.get("experts", 1)
    call = {
        "x": drawn(len(ids), h, dtype=dtype),
        "w": laid_out(drawn(experts, o, h, dtype=dtype), case.get("layout", "nt")),
        "topk_ids": ids,
    }
    if case.get("bias", 0):
        call["bias"] = drawn(experts, o, dtype=dtype)
    compare(
        moe_ops.moe_linear_map,
        reference.moe_linear_map,
        call,
        ["x", "w", *(["bias"] if "bias" in call else [])],
        lengths={"": h + 1, "x": o * ids.shape[1], "w": ids.numel(), "bias": ids.numel()},
        grad_steps=1,
        grad_view=case.get("grad_view", "contiguous"),
    )


def moe_linear_reduce(case: Case) -> None:
    dtype, h, d = DTYPES[case["dtype"]], case["h"], case["d"]
    ids, experts = ids_of(case), case.get("experts", 1)
    call = {
        "h": drawn(*ids.shape, d, dtype=dtype),
        "w": laid_out(drawn(experts, h, d, dtype=dtype), case.get("layout", "nt")),
        "topk_weights": routing_weights(case, ids, dtype),
        "topk_ids": ids,
    }
    if case.get("bias", 0):
        call["bias"] = drawn(experts, h, dtype=dtype)
    compare(
        moe_ops.moe_linear_reduce,
        reference.moe_linear_reduce,
        call,
        ["h", "w", "topk_weights", *(["bias"] if "bias" in call else [])],
        lengths={
            "": ids.shape[1] * d + 1,
            "h": h,
            "w": ids.numel(),
            "topk_weights": h * d,
            "bias": ids.numel(),
        },
        steps=1,
        grad_steps=2,
        grad_view=case.get("grad_view", "contiguous"),
    )


# ------------------------------------------------------------------------------------ whole blocks


def moe_ffn(case: Case) -> None:
    call = ffn_call(case)
    layout = case.get("layout", "nt")
    call["w_gate_up"] = laid_out(call["w_gate_up"], layout)
    call["w_down"] = laid_out(call["w_down"], layout)
    if case.get("main", "none") != "none":
        return _main_grads(case, call)
    h, i, slots = case["h"], case["i"], call["topk_ids"].numel()
    compare(
        moe_ops.moe_ffn,
        reference.moe_ffn,
        call,
        differentiable(call),
        magnitude=moe_ffn_magnitude,
        lengths={"": max(h, 2 * i) + 1, "w_gate_up": slots, "w_down": slots, "topk_weights": h * i},
        steps=2,
        grad_steps=5,
        grad_view=case.get("grad_view", "contiguous"),
        most=_room_for_preact(case),
    )


def _room_for_preact(case: Case) -> float:
    """Returns how far moe_ffn may be beyond the mean of independent roundings: the pre-activation
    is kept in x's dtype, and relu2 doubles its relative error; few rows have too few roundings for
    a mean."""
    return 1.5 if case["rows"] >= 24 else 4.0


def _main_grads(case: Case, call: dict[str, Any]) -> None:
    """Gradients that are added to what buffers of `main` hold."""
    dtype = call["x"].dtype
    kept = dtype if case["main"] == "same" else acc_dtype(dtype)
    names = ["w_gate_up", "w_down"]
    grad = drawn(*call["x"].shape, dtype=dtype)
    expected, wanted = run_with_grads(reference.moe_ffn, widened(call), names, grad.double())
    _, bounds = run_with_grads(moe_ffn_magnitude, absolute(call), names, grad.double().abs())
    before = [drawn(*call[name].shape, dtype=kept) for name in names]
    main = [t.clone() for t in before]
    leaves = {name: call[name].detach().requires_grad_() for name in names}
    with poisoned(expected.to(dtype)):
        out = moe_ops.moe_ffn(**{**call, **leaves}, main_grads=(main[0], main[1]))
        out.backward(grad)
    length = max(call["topk_ids"].numel(), case["h"], 2 * case["i"])
    for name, start, got in zip(names, before, main, strict=True):
        assert leaves[name].grad is None, f"{name} has a gradient of its own"
        assert_close_by_norm(
            got,
            start.double() + wanted[name],
            start.double().abs() + bounds[name],
            sum_length=length,
            steps=5,
            step_dtype=dtype,
            what=f"buffer of {name}",
        )
        # What was added, by itself: the rounding of the sum is that of the buffer's type.
        error = (got.double() - start.double() - wanted[name]).norm()
        total = (start.double() + wanted[name]).norm()
        allowed = 0.6 * _room_for_preact(case) * eps(dtype) * wanted[name].norm()
        allowed = allowed + 0.6 * eps(kept) * total
        allowed = allowed + 4 * eps(acc_dtype(dtype)) * length**0.5 * bounds[name].norm()
        assert error <= allowed, f"buffer of {name}: {error:.3e} off, {allowed:.3e} allowed"


def moe_ffn_packed(case: Case) -> None:
    call = ffn_call(case)
    halves = call["activation"] in GATED_ACTIVATIONS and not call["interleaved"]
    call["packed_gate_up"] = moe_ops.pack_experts(call["w_gate_up"], halves=halves)
    call["packed_down"] = moe_ops.pack_experts(call["w_down"])
    before = _library.stale_panels()
    compare(
        moe_ops.moe_ffn_packed,
        reference.moe_ffn_packed,
        call,
        [],
        magnitude=moe_ffn_magnitude,
        lengths={"": max(case["h"], case["i"]) + 1},
        steps=2,
    )
    assert _library.stale_panels() == before, "the copies were not used"


def moe_ffn_quantized(case: Case) -> None:
    call = ffn_call(case)
    bits, group = case["bits"], case.get("group", 32)
    for name in ("w_gate_up", "w_down"):
        call[name], call[f"{name}_scale"] = quantized(call[name], bits, group)
    call["format"] = label_of(bits, group)
    if case.get("x_scale", 0):
        call["x_scale"] = torch.rand(case["h"]) + 0.5
    expected = moe_ffn_in_integers(call)
    with poisoned(expected.to(call["x"].dtype)):
        y = moe_ops.moe_ffn_quantized(**call)
    assert y.dtype == call["x"].dtype
    # Codes just beside the middle of two may become either, more of them where a product is rounded
    # before it is made an integer.
    slack = 5e-3 if _library.cpu_isa() == "portable" else 1e-3
    # One such code moves its token by half a percent, which few tokens do not average: the token
    # that is furthest off counts below only.
    off, norm = (y.double() - expected).norm(dim=1), expected.norm()
    error = off[off < off.max()].norm() if len(off) > 1 else off.norm()
    assert error <= (eps(y.dtype) + slack) * norm, f"the error is {error / norm:.2e} of the norm"
    # An error in one row or column drowns in the norm of all of them.
    for dim in (0, 1):
        lines, sizes = (y.double() - expected).norm(dim=dim), expected.norm(dim=dim)
        most = (2 * eps(y.dtype) + 12 * slack) * (sizes + sizes.mean())
        assert bool((lines <= most).all()), (
            f"a line along dimension {dim} is {(lines / most).max():.2f} times what is allowed off"
        )


def grouped_gemm_quantized(case: Case) -> None:
    counts, dtype = counts_of(case), DTYPES[case["dtype"]]
    bits, group = case["bits"], case.get("group", 32)
    call = quantized_gemm_operands(
        counts, case["k"], case["n"], dtype, bits, group, tail=2, bias=bool(case.get("bias", 0))
    )
    check_grouped_gemm_quantized(call)


def fp8_weights(call: dict[str, Any]) -> None:
    for name in ("w_gate_up", "w_down"):
        call[name], call[f"{name}_scale"] = quantize_fp8_blocks(call[name])


def moe_ffn_fp8(case: Case) -> None:
    call = ffn_call(case)
    fp8_weights(call)
    check_moe_ffn_fp8(call)


def grouped_gemm_fp8(case: Case) -> None:
    from tests.helpers.fp8 import fp8_gemm_operands

    dtype = DTYPES[case["dtype"]]
    bias = dtype if case.get("bias", 0) else None
    call = fp8_gemm_operands(counts_of(case), case["k"], case["n"], tail=2, bias=bias)
    if case.get("turned", 0):  # dense along features
        call["b"] = call["b"].mT.contiguous().mT
    check_grouped_gemm_fp8(call, dtype)


def grouped_gemm_fp8_wgrad(case: Case) -> None:
    dtype = DTYPES[case["dtype"]]
    call = fp8_wgrad_operands(counts_of(case), case["n"], case["k"])
    call["a_scale"] *= 1e-3  # Away from the largest float16.
    want = check_grouped_gemm_fp8_wgrad(call)
    if case.get("main", 0):
        main = torch.randn(want.shape).to(dtype)
        used = torch.tensor(counts_of(case)) > 0
        want = torch.where(used[:, None, None], (want + main.float()).to(dtype), main)
        assert_identical(moe_ops.grouped_gemm_fp8_wgrad(**call, main_grad=main), want)


def quantize_fp8_columns(case: Case) -> None:
    offsets, width = offsets_of(counts_of(case)), case["h"]
    rows = int(offsets[-1]) + 2
    x = (torch.randn(rows, width) * torch.rand(rows, width) ** 8).to(DTYPES[case["dtype"]])
    found = moe_ops.quantize_fp8_columns(x, offsets)
    expected = reference.quantize_fp8_columns(x, offsets)
    for got, want, what in zip(found, expected, ("codes", "scales"), strict=True):
        assert_identical(got.float(), want.float(), what)


def quantize_fp8(case: Case) -> None:
    rows, width = case["tokens"], case["h"]
    x = (torch.randn(rows, width) * torch.rand(rows, width) ** 8).to(DTYPES[case["dtype"]])
    found, expected = moe_ops.quantize_fp8(x), reference.quantize_fp8(x)
    for got, want, what in zip(found, expected, ("codes", "scales"), strict=True):
        assert_identical(got.float(), want.float(), what)


def all_experts_ffn(case: Case) -> None:
    dtype, h, i, o = DTYPES[case["dtype"]], case["h"], case["i"], case["o"]
    e, t = case.get("experts", 3), case["tokens"]
    call = {
        "x": drawn(t, 2, h, dtype=dtype),
        "w_up": (torch.randn(e, i, h) / h**0.5).to(dtype),
        "w_down": (torch.randn(e, o, i) / i**0.5).to(dtype),
        "input_ids": torch.tensor([1, 0, 1, 0, 0][:e]),
        "activation": case.get("act", "relu"),
    }
    wrt = ["x", "w_up", "w_down"]
    if case.get("bias", 0):
        call["b_up"], call["b_down"] = drawn(e, i, dtype=dtype), drawn(e, o, dtype=dtype)
        wrt += ["b_up", "b_down"]
    compare(
        moe_ops.all_experts_ffn,
        reference.all_experts_ffn,
        call,
        wrt,
        magnitude=tests_of("all_experts_ffn").magnitude,
        lengths={"": max(h, i, o, t) + 1},
    )


def mix_expert_outputs(case: Case) -> None:
    module, dtype = tests_of("mix_expert_outputs"), DTYPES[case["dtype"]]
    t, e, m, o = case["tokens"], case["experts"], case["mixtures"], case["o"]
    call = module.operands(t, e, o, m, dtype, case.get("norm", "plain"), case.get("act", "none"))
    repeats = case.get("repeats", 0)
    if repeats and t % repeats == 0:
        call["factor"] = drawn(t // repeats, m, o, dtype=dtype)
    module.check(call)


# --------------------------------------------------------------------------------------- attention


def moa_attention(case: Case) -> None:
    module, dtype = tests_of("moa_attention"), DTYPES[case["dtype"]]
    slots, tokens = case.get("slots", 1), case["tokens"]
    keys = tokens + case.get("more_keys", 0)
    options: dict[str, Any] = {"kind": case["kind"]}
    if case.get("window", 0):
        options["window"] = case["window"]
    if case.get("softcap", 0):
        options["softcap"] = float(case["softcap"])
    if not case.get("causal", 1):
        options["causal"] = False
    if case.get("sequences", 0) and keys == tokens:
        cuts = sorted({0, tokens // 3, tokens - tokens // 4, tokens})
        options["cu_seqlens"] = torch.tensor(cuts, dtype=torch.int32)
    call = module.operands(
        dtype,
        batch=case.get("batch", 1),
        tokens=tokens,
        slots=slots,
        heads=case.get("heads", 1),
        head_size=case["size"],
        keys=keys,
        **options,
    )
    module.check(call)


def rotary(case: Case) -> None:
    dtype = DTYPES[case["dtype"]]
    half, heads, tokens = case["half"], case.get("heads", 1), case["tokens"]
    angles = torch.randn(*([2] if case.get("batched", 0) else []), tokens, half)
    acc = acc_dtype(dtype)
    call = {
        "t": drawn(2, tokens, heads, 2 * half, dtype=dtype),
        "cos": angles.cos().to(acc),
        "sin": angles.sin().to(acc),
        "inverse": bool(case.get("inverse", 0)),
    }
    compare(
        moe_ops.rotary,
        reference.rotary,
        call,
        ["t"],
        magnitude=tests_of("rotary").magnitude,
        lengths={"": 2},
    )


# ----------------------------------------------------------------------------------------- routers


def router_linear(case: Case) -> None:
    dtype, t, e, h = DTYPES[case["dtype"]], case["tokens"], case["experts"], case["h"]
    call = {"x": drawn(t, h, dtype=dtype), "weight": drawn(e, h, dtype=dtype)}
    if case.get("bias", 0):
        call["bias"] = drawn(e, dtype=dtype)
    compare(
        moe_ops.router_linear,
        reference.router_linear,
        call,
        list(call),
        lengths={"": h + 1, "x": e, "weight": t, "bias": t},
    )


def _routed(case: Case, decided: Callable[[torch.Tensor, float], Tensor], rows: bool) -> Tensor:
    """Logits whose choice no rounding changes: lines that could are drawn again."""
    t, e, dtype = case["tokens"], case["experts"], DTYPES[case["dtype"]]
    for _ in range(50):
        logits = random_logits(t, e, dtype, case.get("logits", "normal"))
        for _ in range(200):
            ids = decided(logits.double(), 1.0)
            off = torch.zeros(t, dtype=torch.bool)
            for d in (-4e-6, -1e-6, 1e-6, 4e-6):
                off |= (decided(logits.double(), 1 + d) != ids).any(1)
            if not bool(off.any()):
                return logits
            if not rows:
                break
            again = random_logits(t, e, dtype, case.get("logits", "normal"))
            logits = torch.where(off[:, None], again, logits)
    raise AssertionError("no logits found whose choice is stable against rounding")


def topk_router(case: Case) -> None:
    e, k = case["experts"], min(case["k"], case["experts"])
    options: dict[str, Any] = {
        "score_func": case.get("score", "softmax"),
        "renormalize": bool(case.get("renormalize", 0)),
        "topk_first": bool(case.get("topk_first", 0)),
        "routed_scaling_factor": 2.5 if case.get("scaled", 0) else 1.0,
    }
    if case.get("bias", 0):
        options["expert_bias"] = torch.randn(e).to(acc_dtype(DTYPES[case["dtype"]])) / 4
    groups = case.get("groups", 1)
    if groups > 1 and e % groups == 0 and e // groups >= 2 and k <= e // 2:
        options["num_groups"], options["num_topk_groups"] = groups, -(-groups // 2)
        options["group_score"] = "top2_sum" if case.get("top2", 0) else "max"

    def decided(logits: Tensor, factor: float) -> Tensor:
        scaled = dict(options)
        if "expert_bias" in scaled:
            scaled["expert_bias"] = scaled["expert_bias"].double() * factor
        return reference.topk_router(logits * factor, k, **scaled)[1]

    tests_of("topk_router").check(_routed(case, decided, True), k, options)


def topp_router(case: Case) -> None:
    top_p = case.get("percent", 70) / 100
    options = {"renormalize": bool(case.get("renormalize", 0))}
    most = min(case["k"], case["experts"])

    def decided(logits: Tensor, factor: float) -> Tensor:
        return reference.topp_router(logits, top_p * factor, most, **options)[1]

    tests_of("topp_router").check(_routed(case, decided, True), top_p, most, **options)


def expert_choice_router(case: Case) -> None:
    score = case.get("score", "softmax")
    capacity = max(1, min(case["k"], case["tokens"]))

    def decided(logits: Tensor, factor: float) -> Tensor:
        return reference.expert_choice_router(logits * factor, capacity, score_func=score)[1]

    logits = _routed(case, decided, False)
    tests_of("expert_choice_router").check(logits, capacity, score_func=score)


# ------------------------------------------------------------------------------ rows, permutations


def sort_by_expert(case: Case) -> None:
    ids = torch.randint(-1, case["experts"] + 1, (case["tokens"], case["k"]))
    found = moe_ops.sort_by_expert(ids, case["experts"])
    expected = reference.sort_by_expert(ids, case["experts"])
    for got, want in zip(found, expected, strict=True):
        assert_identical(got, want)


def permute(case: Case) -> None:
    """And unpermute, on the same routing."""
    t, k, h, dtype = case["tokens"], case["k"], case["h"], DTYPES[case["dtype"]]
    ids = torch.randint(-1, case["experts"], (t, k))
    offsets, row_to_slot, slot_to_row = reference.sort_by_expert(ids, case["experts"])
    compare(
        moe_ops.permute,
        reference.permute,
        {"x": drawn(t, h, dtype=dtype), "expert_offsets": offsets, "row_to_slot": row_to_slot},
        ["x"],
        lengths={"": k},
    )
    call = {
        "rows": drawn(t * k, h, dtype=dtype),
        "expert_offsets": offsets,
        "slot_to_row": slot_to_row,
        "topk_weights": routing_weights(case, ids, dtype),
    }
    compare(
        moe_ops.unpermute,
        reference.unpermute,
        call,
        ["rows", "topk_weights"],
        lengths={"": k, "topk_weights": h},
    )


def peer_ffn(case: Case) -> None:
    """And sparse gradients, which are the dense ones."""
    t, k, h, dtype = case["tokens"], case["k"], case["h"], DTYPES[case["dtype"]]
    module, act = tests_of("peer_ffn"), case.get("act", "gelu")
    ids = torch.randint(-1, case["experts"] + 1, (t, k))
    call = module.operands(module.Routing(t, case["experts"], k), h, dtype, act)
    call |= {"topk_ids": ids, "topk_weights": routing_weights(case, ids, dtype)}
    module.check(call)
    if case.get("sparse", 0):
        grad = drawn(t, h, dtype=dtype)
        runs = [module.gradients(call, grad, sparse_grad=sparse)[1] for sparse in (False, True)]
        for dense, sparse in zip(*runs, strict=True):
            assert_identical(sparse.to_dense() if sparse.is_sparse else sparse, dense)


def gated_act(case: Case) -> None:
    i, dtype = case["h"], DTYPES[case["dtype"]]
    call = {
        "gate_up": (3 * torch.randn(case["tokens"], 2 * i)).to(dtype),
        "activation": case.get("act", "swiglu"),
        "interleaved": bool(case.get("interleaved", 0)),
    }
    compare(
        moe_ops.gated_act,
        reference.gated_act,
        call,
        ["gate_up"],
        magnitude=gated_act_magnitude,
        lengths={"": 1},
    )


def add_rms_norm(case: Case) -> None:
    module = tests_of("add_rms_norm")
    addends = [n for n in ("residual", "bias") if case.get(n, 0)]
    dtype = DTYPES[case["dtype"]]
    module.check(module.operands(case["tokens"], case["h"], dtype=dtype, addends=addends))


OPS: dict[str, Callable[[Case], None]] = {
    f.__name__: f
    for f in (
        grouped_gemm,
        grouped_gemm_wgrad,
        moe_linear_map,
        moe_linear_reduce,
        moe_ffn,
        moe_ffn_packed,
        moe_ffn_quantized,
        grouped_gemm_quantized,
        moe_ffn_fp8,
        grouped_gemm_fp8,
        grouped_gemm_fp8_wgrad,
        quantize_fp8_columns,
        quantize_fp8,
        all_experts_ffn,
        mix_expert_outputs,
        moa_attention,
        rotary,
        router_linear,
        topk_router,
        topp_router,
        expert_choice_router,
        sort_by_expert,
        permute,
        peer_ffn,
        gated_act,
        add_rms_norm,
    )
}


def fault_of(case: Case) -> str:
    """Runs the case. Returns what is wrong, or nothing."""
    torch.manual_seed(case.get("seed", 0))
    try:
        with batch_invariant(bool(case.get("invariant", 0))):
            OPS[case["op"]](case)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
