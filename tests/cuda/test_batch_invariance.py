"""The batch-invariant mode on CUDA: a token has bitwise identical results alone, among 6, 63 and
512 others, wherever it stands, and the same kernels make them.

The second half is asked apart: the simulator adds up in one order whatever the shape of a tensor
core's product is, which a card need not do. Cases are those of tests/contract, with sizes that a
simulator can run.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.contract import test_batch_invariance as contract
from tests.ops.test_moa_attention import both, operands
from torch import Tensor

import moe_ops
from moe_ops.testing import assert_identical, short

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HALF = (BF16, FP16)
ALL = (FP32, BF16, FP16)

Build = Callable[[torch.dtype], contract.Case]
CASES: dict[str, tuple[Build, tuple[torch.dtype, ...]]] = {}


def add(
    name: str, dtypes: tuple[torch.dtype, ...], build: Callable[..., Any], **sizes: Any
) -> None:
    CASES[name] = (functools.partial(build, **sizes), dtypes)


ffn = functools.partial(contract.ffn_case, op=moe_ops.moe_ffn)
# Rows of 16 bytes: wgmma, with own kernels for halves and for neighbors; else mma.sync.
add("moe_ffn", ALL, ffn, hidden=64, intermediate=64)
add("moe_ffn-deep", (BF16,), ffn, hidden=200, intermediate=72, bias=True)
add(
    "moe_ffn-interleaved",
    (BF16,),
    ffn,
    hidden=64,
    intermediate=64,
    activation="swiglu_oai",
    interleaved=True,
    bias=True,
)
add("moe_ffn-on-input", (BF16,), ffn, hidden=64, intermediate=64, activation="relu2", on_input=True)
add("moe_ffn-transposed", (BF16,), ffn, hidden=64, intermediate=64, transposed=True)
add("moe_ffn-odd", HALF, ffn, hidden=66, intermediate=67)
add("moe_ffn-many-experts", (BF16,), ffn, hidden=32, intermediate=16, experts=40)
add("moe_ffn_fwd", (BF16,), contract.moe_ffn_fwd_case, hidden=64, intermediate=64)
for bits, group in ((8, 32), (4, 32), (4, 64)):
    sizes = {"bits": bits, "group": group, "hidden": 128, "intermediate": 64}
    add(f"quantized-{bits}-{group}", ALL, contract.moe_ffn_quantized_case, **sizes)
add("quantized-odd", (BF16,), contract.moe_ffn_quantized_case, bits=8, hidden=67, intermediate=35)
add("fp8", (BF16, FP32), contract.moe_ffn_fp8_case, hidden=128, intermediate=128)
add("fp8-interleaved", (BF16,), contract.moe_ffn_fp8_case, hidden=64, intermediate=48,
    activation="swiglu_oai", interleaved=True)  # fmt: skip
add("gemm", ALL, contract.grouped_gemm_case, k=64, o=64)
add("gemm-transposed", (BF16,), contract.grouped_gemm_case, k=64, o=72, transposed=True)
add("gemm-generic", HALF, contract.grouped_gemm_case, k=64, o=70)
add("gemm-odd", HALF, contract.grouped_gemm_case, k=33, o=31)
add("gemm-fp8", (BF16,), contract.grouped_gemm_fp8_case, k=128, o=64)
add("gemm-fp8-odd", (BF16,), contract.grouped_gemm_fp8_case, k=131, o=40)
add("map", ALL, contract.linear_map_case, h=64, o=32, experts=4)
add("reduce", ALL, contract.linear_reduce_case, d=64, h=32, experts=4)
# CUDA formulas: the products are kernels of this package then.
add(
    "all_experts_ffn",
    (FP32, BF16),
    contract.all_experts_ffn_case,
    h=32,
    i=64,
    o=32,
    activation="relu",
    fwd=False,
)
add("router_linear", (FP32, BF16), contract.router_linear_case, h=64, experts=8)
add("add_rms_norm", (FP32, BF16), contract.norm_case, size=200)
# Rows by themselves.
add("topk", (BF16,), contract.topk_case, experts=130, renormalize=True)
add("topk-groups", (BF16,), contract.topk_case, experts=64, bias=True, score_func="sigmoid",
    num_groups=8, num_topk_groups=4, group_score="top2_sum")  # fmt: skip
add("topp", (BF16,), contract.topp_case, experts=70)
add("unpermute", (BF16,), contract.unpermute_case, size=77)
add("gated_act", (BF16,), contract.gated_act_case, activation="swiglu", interleaved=False)
add("quantize_fp8", (BF16,), contract.quantize_fp8_case)

PARAMETERS = [
    pytest.param(build, dtype, id=f"{name}-{short(dtype)}")
    for name, (build, dtypes) in CASES.items()
    for dtype in dtypes
]

# Kernels that round nothing: how a sort is cut up, rows copied.
MOVES = re.compile("place_kernel|count_kernel|copy_rows_kernel")
# Kernels of mma.sync, an instruction of one shape: whatever the height of a tile, a sum is the same
# chain of them.
ONE_CHAIN = re.compile("7generic19grouped_gemm_kernel|quantized_tile_kernel|20moa_attention_kernel")


def chain_of(kernel: str) -> str:
    found = ONE_CHAIN.search(kernel)
    return found[0] if found else kernel


@pytest.fixture
def kernels(simulator, capfd) -> Callable[[Callable[[], Any]], tuple[Any, list[str]]]:
    """A function that makes a call: what it returns, and the kernels that it launched, by name."""

    def run(call: Callable[[], Any]) -> tuple[Any, list[str]]:
        capfd.readouterr()
        with simulator.options(verbose=1):
            result = call()
        # The simulator cuts names short; threads and blocks of a cluster tell tiles apart then.
        line = r"^ptxsim: (\S+) grid \S+ (block \d+ cluster \d+)"
        launched = re.findall(line, capfd.readouterr().err, re.MULTILINE)
        names = [f"{name} {shape}" for name, shape in launched]
        return result, [chain_of(name) for name in names if not MOVES.search(name)]

    return run


@pytest.fixture
def invariant() -> Iterator[None]:
    with moe_ops.batch_invariant():
        yield


def check_invariant(case: contract.Case, kernels: Any) -> None:
    whole, expected = kernels(case.run)
    for rows in contract.some_tokens():
        outputs, names = kernels(lambda rows=rows: case.run(rows))
        assert names == expected, f"{len(rows)} tokens are made by other kernels"
        for i, out in enumerate(outputs):
            assert_identical(out, whole[i][rows], f"output {i} of {len(rows)} tokens")


@pytest.mark.parametrize(("build", "dtype"), PARAMETERS)
def test_op(build, dtype, invariant, kernels):
    check_invariant(build(dtype), kernels)


@pytest.mark.parametrize("name", ["moe_ffn", "quantized-8-32", "fp8"])
def test_the_check_notices_kernels_that_ignore_the_mode(name, kernels):
    build, dtypes = CASES[name]
    with pytest.raises(AssertionError, match="other kernels"):
        check_invariant(build(dtypes[-1]), kernels)


@pytest.mark.parametrize(("name", "products"), [("moe_ffn", 2), ("gemm", 1), ("fp8", 2)])
def test_one_token_takes_the_tile_for_many_rows(name, products, kernels):
    """Two blocks share the weights; tests/cuda/host asks which tile that is."""
    case = CASES[name][0](BF16)

    def pairs() -> int:
        _, names = kernels(lambda: case.run(torch.tensor([contract.RARE])))
        return sum(name.endswith("cluster 2") for name in names)

    assert pairs() == 0
    with moe_ops.batch_invariant():
        assert pairs() == products


def test_values_notice_it_too(kernels):
    """Codes of 4 bits times float32 rows: few rows and many round other numbers."""
    case = CASES["quantized-4-32"][0](FP32)
    with pytest.raises(AssertionError, match="output 0 of 1 tokens"):
        for rows in contract.some_tokens():
            assert_identical(
                case.run(rows)[0], case.run()[0][rows], f"output 0 of {len(rows)} tokens"
            )


def test_mix_expert_outputs(invariant, kernels):
    case = contract.mix_expert_outputs_case(BF16, e=5, o=17, m=3, norm=True)
    case.fixed["activation"] = "relu"  # the others are torch's, which on the CPU has two for a row
    check_invariant(case, kernels)


@pytest.mark.parametrize("op", ["moe_ffn", "grouped_gemm", "moe_linear_map"])
def test_rows_that_start_anywhere(op, invariant, kernels):
    """A view whose rows do not start on 16 bytes is multiplied by the same kernel."""
    x = torch.randn(7, 64).to(BF16)
    memory = torch.empty(7 * 72 + 1, dtype=BF16)
    moved = memory[1:].view(7, 72)[:, :64].copy_(x)
    ids = torch.tensor([[0, 1]] * 7, dtype=torch.int32)
    w = torch.randn(2, 64, 64).to(BF16)

    def call(x: Tensor) -> Tensor:
        if op == "grouped_gemm":
            return moe_ops.grouped_gemm(x, w, torch.tensor([0, 3, 7]))
        if op == "moe_linear_map":
            return moe_ops.moe_linear_map(x, w, ids)
        return moe_ops.moe_ffn(x, w, w[:, :, :32].contiguous(), torch.rand_like(ids.float()), ids)

    torch.manual_seed(0)
    expected, names = kernels(lambda: call(x))
    torch.manual_seed(0)
    got, same = kernels(lambda: call(moved))
    assert names == same
    assert_identical(got, expected)


def test_gradients_of_tokens(invariant, kernels):
    """Those of x and of the routing weights; gradients of weights sum over the batch."""
    case = contract.ffn_case(BF16, moe_ops.moe_ffn, hidden=64, intermediate=64)
    grad_y = torch.randn(contract.NUM_TOKENS, 64).to(BF16)

    def run(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, grad_y: Tensor) -> list[Tensor]:
        inputs = [x.clone().requires_grad_(), topk_weights.clone().requires_grad_()]
        y = moe_ops.moe_ffn(inputs[0], topk_weights=inputs[1], topk_ids=topk_ids, **case.fixed)
        return list(torch.autograd.grad(y, inputs, grad_y))

    check_invariant(contract.Case(run, case.tokens | {"grad_y": grad_y}, {}), kernels)


# --- attention: a token's other tokens are its keys


@pytest.mark.parametrize("kind", ["softmax", "stick_breaking"])
@pytest.mark.parametrize(
    ("dtype", "head_size", "slots", "options"),
    [
        (BF16, 64, 2, {}),
        (BF16, 64, 1, {"window": 70}),
        (FP16, 40, 2, {}),
        (BF16, 64, 1, {"softcap": 2.0}),
        (FP32, 16, 2, {"window": 70}),
    ],
    ids=str,
)
def test_attention(kind, dtype, head_size, slots, options, invariant, kernels):
    call = operands(dtype, 1, 513, slots, 1, head_size, kind=kind, **options)
    whole, expected = kernels(lambda: both(moe_ops.moa_attention(**call)))
    for count, last in ((1, 1), (1, 65), (1, 513), (7, 66), (64, 512)):
        step = {**call, "q": call["q"][:, last - count : last]}
        step |= {name: call[name][:, :last] for name in "kv"}
        got, names = kernels(lambda step=step: both(moe_ops.moa_attention(**step)))
        assert names == expected, f"{count} before {last}"
        for a, b in zip(got, whole, strict=True):
            if a is not None:
                assert_identical(a, b[:, last - count : last], f"{count} before {last}")


def test_attention_of_a_larger_batch(invariant, kernels):
    call = operands(BF16, 3, 300, 1, 1, 64, kind="softmax")
    one = {n: t[1:2] if isinstance(t, Tensor) else t for n, t in call.items()}
    whole, names = kernels(lambda: moe_ops.moa_attention(**call))
    alone, same = kernels(lambda: moe_ops.moa_attention(**one))
    assert names == same
    assert_identical(both(alone)[0], both(whole)[0][1:2])


def test_attention_of_operands_that_lie_anywhere(invariant, kernels):
    """Slots of a token may lie anywhere if there is one token, and not if there are several; keys
    that do not start on 16 bytes are no keys for TMA."""
    call = operands(BF16, 1, 20, 2, 2, 64, kind="softmax")
    expected, names = kernels(lambda: moe_ops.moa_attention(**call))
    slots_last = call["q"].transpose(2, 3).contiguous().transpose(2, 3)
    padded = torch.nn.functional.pad(call["k"], (0, 1))[..., :-1]
    padded_v = torch.nn.functional.pad(call["v"], (0, 1))[..., :-1]
    for moved in ({"q": slots_last}, {"k": padded}, {"v": padded_v}):
        got, same = kernels(lambda moved=moved: moe_ops.moa_attention(**{**call, **moved}))
        assert names == same, moved.keys()
        assert_identical(both(got)[0], both(expected)[0])


def test_attention_splits_its_keys_without_the_mode(kernels):
    call = operands(BF16, 1, 513, 1, 1, 64, kind="softmax")
    call["q"] = call["q"][:, -1:]
    plain = kernels(lambda: moe_ops.moa_attention(**call))[1]
    assert any("combine_splits" in name for name in plain)
