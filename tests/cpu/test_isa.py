"""Every instruction set this machine has: the same results within the same bounds."""

from __future__ import annotations

import os

import pytest
import torch
from tests.helpers.ffn import (
    activation_magnitude,
    ffn_operands,
    gated_act_magnitude,
    moe_ffn_magnitude,
)
from tests.helpers.fp8 import (
    check_grouped_gemm_fp8,
    check_moe_ffn_fp8,
    fp8_gemm_operands,
    fp8_operands,
)
from tests.helpers.fresh_python import run_python
from tests.helpers.isas import ISAS, has_own_kernels, run_python_at
from tests.helpers.quantized import (
    STORED_GROUPS,
    STORED_RECORDS,
    bits_of_tokens,
    check_stored_gemm,
    moe_ffn_in_integers,
    moe_ffn_quantized_magnitude,
    quantized_operands,
    stored_gemm_call,
)
from tests.helpers.routing import Routing

import moe_ops
from moe_ops import _library, reference
from moe_ops.ops.gated_act import GATED_ACTIVATIONS, PLAIN_ACTIVATIONS
from moe_ops.reference._scores import SCORE_FUNCS
from moe_ops.testing import (
    DTYPES,
    acc_dtype,
    as_strided_copy,
    assert_identical,
    check_against_reference,
    eps,
)


def all_experts_ffn_magnitude(x, w_up, w_down, input_ids, b_up, b_down, activation):
    h = torch.einsum("teh,eih->tei", x[:, input_ids.long()], w_up) + b_up
    h = h if activation == "none" else activation_magnitude(h, activation)
    return torch.einsum("tei,eoi->teo", h, w_down) + b_down


def mix_expert_outputs_magnitude(outputs, weights, factor, activation):
    n = 1 + 1.1 * outputs + 0.3 * outputs**2
    return torch.einsum("tme,teo->tmo", weights, n) * factor.repeat_interleave(3, 0)


def check_floats(dtype):
    for counts, k, o in [
        ((7, 0, 13, 1), 33, 31),
        ((6, 12), 64, 32),
        ((1, 35), 17, 97),
        ((2, 3), 1, 1),
        ((19,), 129, 15),
        ((8, 16, 5), 16, 48),
    ]:
        n, e = sum(counts) + 2, len(counts)
        offsets = torch.tensor([0, *counts]).cumsum(0).int()
        a, b = torch.randn(n, k).to(dtype), torch.randn(e, o, k).to(dtype)
        for view in ("contiguous", "transposed", "offset"):
            check_against_reference(
                moe_ops.grouped_gemm,
                reference.grouped_gemm,
                {
                    "a": as_strided_copy(a, view),
                    "b": as_strided_copy(b, view),
                    "expert_offsets": offsets,
                    "bias": torch.randn(e, o).to(dtype),
                },
                ["a", "b", "bias"],
                sum_length=max(n, k, o),
            )
    for activation in GATED_ACTIVATIONS:
        for interleaved in (False, True):
            check_against_reference(
                moe_ops.gated_act,
                reference.gated_act,
                {
                    "gate_up": 3 * torch.randn(5, 2 * 37).to(dtype),
                    "activation": activation,
                    "interleaved": interleaved,
                },
                ["gate_up"],
                magnitude=gated_act_magnitude,
            )
    for size in (1, 16, 37, 64):
        call = [torch.randn(s).to(dtype) for s in ((70, size), (size,), (70, size))]
        runs = []
        for fn, wide in ((moe_ops.add_rms_norm, False), (reference.add_rms_norm, True)):
            leaves = [t.double() if wide else t.clone() for t in call]
            leaves = [t.requires_grad_() for t in leaves]
            y, total = fn(*leaves, bias=leaves[1], eps=0.1)
            grads = torch.autograd.grad((y * total).sum(), leaves)
            runs.append([t.double() for t in (y, total, *grads)])
        for got, want in zip(*runs, strict=True):
            # Sums of 70 rows of numbers rounded once or twice.
            assert (got - want).norm() <= 8 * eps(dtype) * want.norm() + 1e-6
    for hidden, width in ((64, 32), (33, 17), (7, 128)):
        routing = Routing(150, 4, 2, "dropped")
        x, ids = torch.randn(150, hidden).to(dtype), routing.ids()
        w = torch.randn(4, width, hidden).to(dtype)
        check_against_reference(
            moe_ops.moe_linear_map,
            reference.moe_linear_map,
            {"x": x, "w": w, "topk_ids": ids},
            ["x", "w"],
            sum_length=300,
            grad_steps=1,
        )
        h, weights = torch.randn(150, 2, width).to(dtype), torch.rand(150, 2)
        check_against_reference(
            moe_ops.moe_linear_reduce,
            reference.moe_linear_reduce,
            {"h": h, "w": w.mT, "topk_weights": weights.to(acc_dtype(dtype)), "topk_ids": ids},
            ["h", "w", "topk_weights"],
            sum_length=300,
            steps=1,
            grad_steps=2,
        )
    # More rows of an expert than a block of the sums of weight gradients, each with a weight.
    for rows, hidden, width in ((193, 33, 8), (385, 193, 8), (385, 8, 130), (769, 65, 17)):
        routing = Routing(rows, 1, 1)
        check_against_reference(
            moe_ops.moe_linear_reduce,
            reference.moe_linear_reduce,
            {
                "h": torch.randn(rows, 1, width).to(dtype),
                "w": torch.randn(1, hidden, width).to(dtype),
                "topk_weights": torch.rand(rows, 1).to(acc_dtype(dtype)),
                "topk_ids": routing.ids(),
            },
            ["h", "w", "topk_weights"],
            sum_length=rows,
            steps=1,
            grad_steps=2,
        )
        call = ffn_operands(routing, hidden, width, dtype)
        check_against_reference(
            moe_ops.moe_ffn,
            reference.moe_ffn,
            {**call, "apply_router_weight_on_input": True},
            ["x", "w_gate_up", "w_down", "topk_weights"],
            magnitude=moe_ffn_magnitude,
            sum_length=rows,
            steps=2,
            grad_steps=5,
        )
    for experts, k in ((4, 2), (8, 2), (7, 3), (16, 2), (16, 4), (40, 4)):
        for options in (
            {},
            {"topk_first": True},
            *({"score_func": f, "renormalize": True} for f in SCORE_FUNCS),
        ):
            logits = torch.randn(75, experts).to(dtype)
            runs = []
            for fn, wide in ((moe_ops.topk_router, False), (reference.topk_router, True)):
                leaf = (logits.double() if wide else logits.clone()).requires_grad_()
                weights, ids = fn(leaf, k, **options)
                grad = torch.autograd.grad((weights**3).sum(), leaf)[0]
                runs.append((weights.double(), ids, grad.double()))
            (w, i, g), (want_w, want_i, want_g) = runs
            assert torch.equal(i, want_i)  # ties go to the smaller id in both
            assert (w - want_w).norm() <= 1e-6 * want_w.norm()
            assert (g - want_g).norm() <= (4 * eps(dtype) + 1e-6) * want_g.norm()
    for size, experts in ((16, 4), (37, 5), (64, 9)):
        call = [torch.randn(s).to(dtype) for s in ((70, size), (experts, size), (experts,))]
        check_against_reference(
            moe_ops.router_linear,
            reference.router_linear,
            dict(zip(("x", "weight", "bias"), call, strict=True)),
            ["x", "weight", "bias"],
            sum_length=71,
        )
    for activation in (*GATED_ACTIVATIONS, *PLAIN_ACTIVATIONS):
        call = ffn_operands(
            Routing(21, 4, 2, "dropped"), 33, 31, dtype, activation=activation, bias=True
        )
        check_against_reference(
            moe_ops.moe_ffn,
            reference.moe_ffn,
            call,
            ["x", "w_gate_up", "w_down", "topk_weights", "b_gate_up", "b_down"],
            magnitude=moe_ffn_magnitude,
            sum_length=64,
            steps=2,
            grad_steps=5,
        )
    for activation, interleaved, hidden, intermediate in (
        ("swiglu", False, 64, 64),
        ("swiglu_oai", True, 33, 31),
        ("geglu", False, 7, 48),
        ("relu2", False, 128, 128),
        ("gelu", False, 17, 97),
    ):
        for on_input in (False, True):
            call = ffn_operands(
                Routing(150, 4, 2, "dropped"),
                hidden,
                intermediate,
                dtype,
                activation=activation,
                bias=True,
            )
            call |= {"interleaved": interleaved, "apply_router_weight_on_input": on_input}
            check_against_reference(
                moe_ops.moe_ffn,
                reference.moe_ffn,
                call,
                ["x", "w_gate_up", "w_down", "topk_weights", "b_gate_up", "b_down"],
                magnitude=moe_ffn_magnitude,
                sum_length=300,
                steps=2,
                grad_steps=5,
            )
    for activation, interleaved in (("swiglu", False), ("swiglu_oai", True), ("relu2", False)):
        for tokens, hidden, intermediate in (
            (1, 33, 31),
            (21, 64, 65),
            (90, 129, 48),
            (21, 2101, 24),
        ):
            call = ffn_operands(
                Routing(tokens, 4, 2, "dropped"),
                hidden,
                intermediate,
                dtype,
                activation=activation,
                bias=True,
            )
            halves = activation == "swiglu"
            call["packed_gate_up"] = moe_ops.pack_experts(call["w_gate_up"], halves=halves)
            call["packed_down"] = moe_ops.pack_experts(call["w_down"])
            check_against_reference(
                moe_ops.moe_ffn_packed,
                reference.moe_ffn_packed,
                {**call, "interleaved": interleaved},
                magnitude=moe_ffn_magnitude,
                sum_length=max(hidden, intermediate),
                steps=2,
            )
            assert _library.stale_panels() == 0
    offsets, row_to_slot, slot_to_row = Routing(29, 5, 2, "out_of_range").sorted()
    for size in (1, 7, 16, 33, 129):
        x = torch.randn(29, size).to(dtype)
        check_against_reference(
            moe_ops.permute,
            reference.permute,
            {"x": x, "expert_offsets": offsets, "row_to_slot": row_to_slot},
            ["x"],
            sum_length=2,
        )
        check_against_reference(
            moe_ops.unpermute,
            reference.unpermute,
            {
                "rows": torch.randn(58, size).to(dtype),
                "expert_offsets": offsets,
                "slot_to_row": slot_to_row,
                "topk_weights": torch.rand(29, 2),
            },
            ["rows", "topk_weights"],
            sum_length=size,
        )
    for tokens, slots, size in ((1, 2, 24), (70, 2, 64), (40, 3, 200), (130, 1, 7), (90, 3, 16)):
        for kind, cap in (("softmax", 9.0), ("softmax", None), ("stick_breaking", 9.0)):
            call = {
                "q": torch.randn(1, tokens, slots, 2, size).to(dtype),
                "k": torch.randn(1, tokens + 3, 2, size).to(dtype),
                "v": torch.randn(1, tokens + 3, 2, size).to(dtype),
            }
            found = []
            for fn, to in (
                (moe_ops.moa_attention, dtype),
                (reference.moa_attention, torch.float64),
            ):
                leaves = [t.to(to).requires_grad_() for t in call.values()]
                out = fn(*leaves, kind=kind, softcap=cap, window=90)
                out = out if kind == "softmax" else out[0] + out[1][..., None].to(to)
                torch.manual_seed(1)
                grad = torch.randn(out.shape).to(dtype).to(to)
                found.append((out.detach(), *torch.autograd.grad(out, leaves, grad)))
            # Logits of `size` products, sums of tokens; the sum rounds once more, in half types.
            bound = 2 * eps(dtype) + 30 * eps(torch.float32 if dtype != torch.float64 else dtype)
            for ours, exact in zip(*found, strict=True):
                error = (ours.double() - exact).norm() / exact.norm()
                assert error <= bound, (kind, cap, dtype, tokens, size, error)
    for h, i, o in ((33, 31, 17), (32, 64, 32), (130, 200, 5), (1, 1, 1)):
        for activation in ("none", "relu", "silu"):
            call = {
                "x": torch.randn(150, 2, h).to(dtype),
                "w_up": (torch.randn(3, i, h) / h**0.5).to(dtype),
                "w_down": (torch.randn(3, o, i) / i**0.5).to(dtype),
                "input_ids": torch.tensor([1, 0, 1]),
                "b_up": torch.randn(3, i).to(dtype),
                "b_down": torch.randn(3, o).to(dtype),
                "activation": activation,
            }
            check_against_reference(
                moe_ops.all_experts_ffn,
                reference.all_experts_ffn,
                call,
                ["x", "w_up", "w_down", "b_up", "b_down"],
                magnitude=all_experts_ffn_magnitude,
                sum_length=200,
            )
    for e, o, m in ((1, 1, 1), (2, 32, 1), (3, 17, 5), (5, 64, 9), (8, 33, 4), (23, 8, 2)):
        call = {
            "outputs": torch.randn(90, e, o).to(dtype),
            "weights": torch.randn(90, m, e).to(dtype),
            "factor": torch.randn(30, m, o).to(dtype),
        }
        for activation in ("none", "relu", "silu", "sigmoid"):
            check_against_reference(
                lambda **kw: moe_ops.mix_expert_outputs(**kw)[0],
                lambda **kw: reference.mix_expert_outputs(**kw)[0],
                {**call, "activation": activation},
                ["outputs", "weights", "factor"],
                magnitude=mix_expert_outputs_magnitude,
                sum_length=90,
            )
    for e, top_k in ((1, 1), (7, 3), (16, 4), (61, 6), (128, 8)):
        logits = torch.randn(9, e).to(dtype)
        assert_identical(
            moe_ops.topk_router(logits, top_k)[1], reference.topk_router(logits, top_k)[1]
        )


def check_eight_bits(dtype):
    for bits, group, hidden, intermediate in (
        (8, 0, 33, 31),
        (8, 0, 64, 65),
        (8, 0, 129, 200),
        (4, 32, 96, 160),
        (4, 64, 64, 192),
        (4, 128, 256, 128),
    ):
        for tokens in (1, 2, 3, 5, 8, 40):
            call = quantized_operands(
                Routing(tokens, 2, 2),
                hidden,
                intermediate,
                dtype,
                bits,
                group,
                bias=tokens == 40,
                x_scale=True,
            )
            if tokens == 40 and bits_of_tokens(call) == {0}:
                check_against_reference(
                    moe_ops.moe_ffn_quantized,
                    reference.moe_ffn_quantized,
                    call,
                    magnitude=moe_ffn_quantized_magnitude,
                    sum_length=400,
                    steps=3 if dtype == torch.bfloat16 else 0,
                )
                continue
            y, expected = moe_ops.moe_ffn_quantized(**call).double(), moe_ffn_in_integers(call)
            # The portable level rounds a product before it rounds it to an integer.
            slack = 5e-3 if _library.cpu_isa() == "portable" else 1e-3
            assert (y - expected).norm() <= (eps(dtype) + slack) * expected.norm(), (bits, group)
    for kind in (*STORED_GROUPS, *STORED_RECORDS):
        unit = STORED_RECORDS[kind] if kind in STORED_RECORDS else STORED_GROUPS[kind][1]
        for depth in (33, 200) if unit == 1 else (unit, 3 * unit):
            for counts in ((1, 0, 3), (9, 8, 20)):
                check_stored_gemm(stored_gemm_call(kind, counts, depth, 35, dtype))
    for width in (1, 7, 33, 128, 200, 300):
        x = (torch.randn(5, width) * torch.rand(5, width) ** 8).to(dtype)
        for got, want in zip(moe_ops.quantize_fp8(x), reference.quantize_fp8(x), strict=True):
            assert_identical(got.float(), want.float())
    for counts, k, o in [
        ((1, 2, 3, 4), 33, 31),
        ((5, 0, 40), 129, 130),
        ((2, 135), 300, 65),
        ((19,), 1, 1),
        ((8, 16), 640, 48),
    ]:
        check_grouped_gemm_fp8(
            fp8_gemm_operands(counts, k, o, tail=2, bias=torch.float32), torch.float32
        )
    for tokens, hidden, intermediate, interleaved in (
        (1, 33, 31, False),
        (21, 130, 150, True),
        (90, 129, 300, False),
    ):
        call = fp8_operands(
            Routing(tokens, 4, 2, "dropped"), hidden, intermediate, dtype, bias=True
        )
        check_moe_ffn_fp8({**call, "interleaved": interleaved})


def run_all(every: bool) -> None:
    """A compact subset of calls that reaches each vector kernel: full tiles, every kind of tail,
    each dtype; without `every`, those for which the instruction set has kernels of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    isa = _library.cpu_isa()
    for dtype in DTYPES:
        if every or has_own_kernels(isa, dtype):
            check_floats(dtype)
        if dtype != torch.float64 and (every or has_own_kernels(isa, dtype, eight_bits=True)):
            check_eight_bits(dtype)


@pytest.mark.parametrize("isa", ISAS)
def test_isa(isa, request):
    every = request.config.getoption("--full")
    code = (
        f"from tests.cpu import test_isa; assert test_isa._library.cpu_isa() == {isa!r}; "
        f"test_isa.run_all({every}); print('done')"
    )
    run = run_python_at(isa, "-c", code)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.split() == ["done"]


def entries_that_no_call_reaches(isa: str, below: str) -> list[int]:
    """Entries of a target's tables that the self-test does not miss, by their words of Tables; of
    those that the target `below` has too, if it is named, none."""
    from bench.harness.dev import moe_ops_dev

    assert _library.failing_kernel(isa) is None
    entries = moe_ops_dev.kernel_entries(isa)
    assert len(entries) > 200
    if below:
        entries = sorted(set(entries) - set(moe_ops_dev.kernel_entries(below)))
        assert 0 < len(entries) < 10
    return [entry for entry in entries if moe_ops_dev.failing_kernel(isa, entry) is None]


@pytest.mark.parametrize("isa", ISAS[1:])  # They are compared with the first.
def test_the_self_test_calls_every_kernel(isa, request):
    """The self-test at import notices each entry of a target's tables that does nothing. The others
    of AMX are the functions of AVX512-BF16."""
    from tests.helpers.dev import moe_ops_dev  # noqa: F401  # or skips

    below = "avx512_bf16" if isa == "amx" and not request.config.getoption("--full") else ""
    code = (
        f"from tests.cpu.test_isa import *; print(entries_that_no_call_reaches({isa!r}, {below!r}))"
    )
    run = run_python_at(isa, "-c", code)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.strip() == "[]"


def test_the_best_isa_is_used_unless_told_otherwise():
    if os.environ.get("MOE_OPS_CPU_ISA"):
        pytest.skip("MOE_OPS_CPU_ISA is set")
    assert _library.cpu_isa() == _library.supported_isas()[-1] == _library.detected_isa()


def test_portable_is_always_there():
    assert _library.supported_isas()[0] == "portable"


def test_unknown_isa_warns_and_still_works():
    code = "import moe_ops; print(moe_ops._library.cpu_isa())"
    run = run_python("-c", code, env={"MOE_OPS_CPU_ISA": "mmx"})
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() in _library.supported_isas()
    assert "mmx" in run.stderr
