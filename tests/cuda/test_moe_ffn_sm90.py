"""moe_ffn's own kernels for sm_90a: every tile, values, gradients, schedules, mutants. Bytes are in
test_moe_ffn_sm90_bytes.py."""

from __future__ import annotations

import re

import pytest
import torch
from tests.helpers.ffn import FFN_FLOATS, check_moe_ffn, ffn_operands, stored
from tests.helpers.routing import Routing
from tests.helpers.simulator import noticed_mutants

import moe_ops
from moe_ops.ops.gated_act import GATED_ACTIVATIONS, PLAIN_ACTIVATIONS
from moe_ops.testing import assert_identical, short

# csrc/cuda/moe_ffn/config.h: rows of a tile, columns of w_gate_up, row tiles that share weights.
UP_TILES = {"low": (64, 256, 1), "high": (128, 256, 1), "pair": (128, 256, 2)}
LAYOUTS = {
    "halves": ("swiglu", False),
    "interleaved": ("swiglu_oai", True),
    "plain": ("relu2", False),
}
# Weights as models store them: views of tensors that are dense along the output features.
STORED = {"both": ("w_gate_up", "w_down"), "down": ("w_down",)}
HALF = (torch.bfloat16, torch.float16)
ROUTINGS = (
    Routing(300, 3, 2, "skewed"),
    Routing(200, 5, 2, "dropped"),
    Routing(131, 4, 1, "half_empty", torch.int64),
    Routing(90, 6, 3, "one_expert"),
    Routing(13, 4, 3, "all_dropped"),
    Routing(23, 4, 6, "repeated"),
    Routing(1, 1, 1),
)

tiles = pytest.mark.parametrize("tile", UP_TILES)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
half = pytest.mark.parametrize("dtype", HALF, ids=short)


def operands(routing, hidden_size, intermediate_size, dtype, layout="halves", **kwargs):
    activation, interleaved = LAYOUTS[layout]
    call = ffn_operands(
        routing, hidden_size, intermediate_size, dtype, activation=activation, **kwargs
    )
    return {**call, "interleaved": interleaved}


@pytest.fixture
def force(monkeypatch):
    def set_tile(tile):
        monkeypatch.setenv("MOE_OPS_FFN_TILE", tile)

    return set_tile


# Columns and sums that end inside a tile, on its edge, after one multiple of 8; sums longer than
# the ring.
# The kernels of the two types differ in the type of their products alone.
SIZES = [
    pytest.param(
        *(hidden_size, intermediate_size, dtype),
        marks=() if hidden_size == 72 or dtype == torch.bfloat16 else pytest.mark.full,
        id=f"{hidden_size}-{intermediate_size}-{short(dtype)}",
    )
    for hidden_size, intermediate_size in ((72, 136), (64, 128), (8, 8), (520, 136))
    for dtype in HALF
]


@layouts
@pytest.mark.parametrize(("hidden_size", "intermediate_size", "dtype"), SIZES)
@tiles
def test_sizes(simulator, force, tile, hidden_size, intermediate_size, layout, dtype):
    force(tile)
    check_moe_ffn(
        operands(Routing(150, 3, 2, "dropped"), hidden_size, intermediate_size, dtype, layout)
    )
    assert simulator.warnings() == ""


# Of the other layout. Columns and sums that end inside a box of 64, and on its edge.
@pytest.mark.parametrize(
    ("names", "hidden_size", "intermediate_size", "dtype"),
    [
        ("both", 72, 136, torch.bfloat16),
        ("both", 64, 128, torch.float16),
        ("both", 520, 200, torch.bfloat16),
        ("down", 8, 8, torch.bfloat16),
    ],
)
@layouts
@tiles
def test_stored(simulator, force, tile, layout, names, hidden_size, intermediate_size, dtype):
    force(tile)
    call = operands(Routing(150, 3, 2, "dropped"), hidden_size, intermediate_size, dtype, layout)
    check_moe_ffn(stored(call, STORED[names]))
    assert simulator.warnings() == ""


# layout, stored weights, weights on the input, biases
MODELS = {
    "gpt-oss": ("interleaved", "both", False, True),
    "llama4": ("halves", "both", True, False),
    "dbrx": ("halves", "down", False, False),
}


@pytest.mark.parametrize("num_tokens", [40, 130])
@pytest.mark.parametrize("model", MODELS)
def test_stored_weights_take_the_same_way(simulator, capfd, model, num_tokens):
    """The launches are those of contiguous weights, but for the order of the operands in products
    that are kernels of their own, and so are the bits; gradients lie as the weights do."""
    layout, names, on_input, bias = MODELS[model]
    routing = Routing(num_tokens, 3, 2, "dropped")
    contiguous = operands(routing, 136, 72, torch.bfloat16, layout, bias=bias)
    contiguous["apply_router_weight_on_input"] = on_input
    grad_y = torch.randn_like(contiguous["x"])

    def infer_and_train(call):
        leaves = {n: call[n].clone().requires_grad_() for n in FFN_FLOATS if n in call}
        y = moe_ops.moe_ffn(**{**call, **leaves})
        grads = torch.autograd.grad(y, list(leaves.values()), grad_y)
        inferred = moe_ops.moe_ffn(**call)
        return {"y": y.detach(), "inferred": inferred, **dict(zip(leaves, grads, strict=True))}

    expected = infer_and_train(contiguous)
    got = infer_and_train(stored(contiguous, STORED[names]))
    for name, want in expected.items():
        assert_identical(got[name], want, name)
    for name in STORED[names]:
        assert got[name].mT.is_contiguous()

    def kernels(call):
        launched = simulator.launched(lambda: infer_and_train(call), capfd)
        return [re.sub(r"ProductE\d", "Product", name) for name in launched]

    launched = kernels(stored(contiguous, STORED[names]))
    assert launched == kernels(contiguous)
    inferring = ["few_rows", "few_rows"] if num_tokens <= 64 else ["UpConfig"]
    own = ("UpConfig", "DownBwdConfig", "few_rows")
    stages = [stage for name in launched for stage in own if stage in name]
    assert stages == ["UpConfig", "DownBwdConfig", *inferring]


@pytest.mark.parametrize("main_dtype", [torch.bfloat16, torch.float32], ids=short)
def test_stored_main_grads(simulator, main_dtype):
    call = operands(Routing(60, 4, 2, "half_empty"), 72, 136, torch.bfloat16)
    grad_y = torch.randn_like(call["x"])

    def added(call):
        main = [torch.full_like(call[n], 0.5, dtype=main_dtype) for n in STORED["both"]]
        leaves = {n: call[n].clone().requires_grad_() for n in STORED["both"]}
        moe_ops.moe_ffn(**{**call, **leaves}, main_grads=tuple(main)).backward(grad_y)
        return main

    for got, want in zip(added(stored(call)), added(call), strict=True):
        assert got.mT.is_contiguous()
        assert_identical(got, want)


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
@tiles
def test_routings(simulator, force, tile, routing):
    force(tile)
    check_moe_ffn(operands(routing, 72, 136, torch.bfloat16, bias=True))


@tiles
def test_more_experts_than_a_warp_scans_at_once(simulator, force, tile):
    force(tile)
    call = operands(Routing(9, 270, 2), 16, 8, torch.bfloat16)
    call["topk_ids"][0] = torch.tensor([269, 130])
    check_moe_ffn(call)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("activation", [*GATED_ACTIVATIONS, *PLAIN_ACTIVATIONS])
@half
def test_activations(simulator, force, activation, interleaved, bias, dtype):
    if interleaved and activation in PLAIN_ACTIVATIONS:
        pytest.skip("Nothing to interleave.")
    force("high")
    call = ffn_operands(
        Routing(40, 3, 2, "dropped"), 72, 40, dtype, activation=activation, bias=bias
    )
    check_moe_ffn({**call, "interleaved": interleaved})


@half
@layouts
@tiles
def test_weight_on_input(simulator, force, tile, layout, dtype):
    force(tile)
    call = operands(Routing(140, 3, 2, "dropped"), 72, 136, dtype, layout, bias=True)
    check_moe_ffn({**call, "apply_router_weight_on_input": True})


@pytest.mark.parametrize("wanted", FFN_FLOATS)
@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
def test_one_gradient_at_a_time(simulator, on_input, wanted):
    call = operands(Routing(40, 3, 2, "dropped"), 72, 136, torch.bfloat16, bias=True)
    check_moe_ffn({**call, "apply_router_weight_on_input": on_input}, [wanted])


@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("main_dtype", [torch.bfloat16, torch.float32], ids=short)
def test_main_grads(simulator, main_dtype, on_input):
    call = operands(Routing(60, 4, 2, "half_empty"), 72, 136, torch.bfloat16)
    call["apply_router_weight_on_input"] = on_input
    leaves = {n: call[n].clone().requires_grad_() for n in ("x", "w_gate_up", "w_down")}
    grad_y = torch.randn_like(call["x"])
    expected = torch.autograd.grad(
        moe_ops.moe_ffn(**{**call, **leaves}), list(leaves.values()), grad_y
    )
    before = [torch.randn_like(w, dtype=main_dtype) for w in expected[1:]]
    main = tuple(b.clone() for b in before)
    moe_ops.moe_ffn(**{**call, **leaves}, main_grads=main).backward(grad_y)
    assert_identical(leaves["x"].grad, expected[0])
    for got, start, gradient in zip(main, before, expected[1:], strict=True):
        # One rounding of the gradient to compare with, and one of the sum.
        bound = torch.finfo(torch.bfloat16).eps * gradient.double().abs()
        bound += torch.finfo(main_dtype).eps * (start.double().abs() + gradient.double().abs())
        error = (got.double() - start.double() - gradient.double()).abs()
        assert bool((error <= bound + torch.finfo(main_dtype).tiny).all())


@half
@layouts
@pytest.mark.parametrize("names", [(), STORED["both"]], ids=["contiguous", "stored"])
@pytest.mark.parametrize("num_tokens", [1, 9, 33, 64])
def test_few_tokens(simulator, num_tokens, names, layout, dtype):
    """Inference of at most 64 tokens has kernels of its own."""
    call = operands(Routing(num_tokens, 3, 2, "dropped"), 328, 136, dtype, layout, bias=True)
    call = stored(call, names)
    check_moe_ffn(call, [])
    check_moe_ffn({**call, "apply_router_weight_on_input": True}, [])
    # One expert takes more rows than a tile holds.
    routing = Routing(num_tokens, 140, 2, "repeated")
    call |= stored(operands(routing, 72, 72, dtype, layout), names)
    call["topk_ids"] = torch.full_like(call["topk_ids"], 135)
    check_moe_ffn({**call, "b_gate_up": None, "b_down": None}, [])


# On both sides of kFewSortByExpert and kFewSortExperts (moe_ffn/stages.h); slots that name no
# expert, all of one, ids of 64 bits, slots in every warp of a block.
SORTED_BY_THE_KERNEL = (
    Routing(64, 20, 16, "dropped"),
    Routing(9, 1024, 2),
    Routing(64, 5, 4, "out_of_range", torch.int64),
    Routing(7, 4, 2, "all_dropped"),
    Routing(60, 6, 2, "last_only"),
    Routing(40, 6, 9, "repeated"),
)
SORTED_BEFORE = (Routing(64, 20, 17, "dropped"), Routing(9, 1025, 2))


@pytest.mark.parametrize("routing", SORTED_BY_THE_KERNEL + SORTED_BEFORE, ids=str)
def test_who_sorts_the_slots_of_few_tokens(simulator, capfd, routing):
    call = operands(routing, 16, 8, torch.bfloat16)
    check_moe_ffn(call, [])
    capfd.readouterr()
    with simulator.options(verbose=1):
        moe_ops.moe_ffn(**call)
    assert ("place_kernel" in capfd.readouterr().err) == (routing in SORTED_BEFORE)
    if routing.num_slots < 300:
        simulator.check_schedules(lambda: moe_ops.moe_ffn(**call))


@half
@layouts
def test_few_tokens_and_many_give_the_same_bits(simulator, force, layout, dtype):
    call = operands(Routing(50, 3, 2, "dropped"), 328, 136, dtype, layout, bias=True)
    few = moe_ops.moe_ffn(**call)
    assert_identical(moe_ops.moe_ffn(**stored(call)), few)
    for tile in UP_TILES:
        force(tile)
        assert_identical(moe_ops.moe_ffn(**call), few, tile)
        assert_identical(moe_ops.moe_ffn(**stored(call)), few, tile)


def routed(counts, unrouted):
    """topk_ids of one slot a token: so many rows of each expert, and slots without one."""
    ids = [e for e, rows in enumerate(counts) for _ in range(rows)] + [-1] * unrouted
    return torch.tensor(ids, dtype=torch.int32)[torch.randperm(len(ids)), None]


def stages(call, wanted):
    """A function of nothing that runs forward as in training, and backward."""
    names = ("x", "w_gate_up", "w_down", "topk_weights")
    options = (call["activation"], call["interleaved"], call["apply_router_weight_on_input"])
    grad_y = torch.randn_like(call["x"])

    def run():
        y, *saved = torch.ops.moe_ops.moe_ffn_fwd(
            *(call[n] for n in (*names, "topk_ids", "b_gate_up", "b_down")), *options
        )
        grads = torch.ops.moe_ops.moe_ffn_bwd(
            grad_y, *(call[n] for n in names), *saved, call["b_down"], *options, 1.702, 7.0, *wanted
        )
        return (y, saved[0], *grads)

    return run


# Every tile with every layout; which of them has the weights on the input is left to --full.
SCHEDULED = [
    pytest.param(
        *(tile, layout, on_input),
        marks=() if (i + j + on_input) % 2 == 0 else pytest.mark.full,
        id=f"{tile}-{layout}-{'input' if on_input else 'output'}",
    )
    for i, tile in enumerate(UP_TILES)
    for j, layout in enumerate(LAYOUTS)
    for on_input in (False, True)
]


# As gpt-oss and Llama 4 store them; the rest of such a kernel is that of contiguous weights.
SCHEDULED_STORED = [
    pytest.param("low", "halves", True, marks=pytest.mark.full, id="low-llama4"),
    pytest.param("high", "interleaved", False, id="high-gpt-oss"),
    pytest.param("pair", "halves", True, id="pair-llama4"),
    pytest.param("pair", "interleaved", False, marks=pytest.mark.full, id="pair-gpt-oss"),
]


@pytest.mark.parametrize(("tile", "layout", "on_input"), SCHEDULED)
def test_schedules(simulator, force, tile, layout, on_input):
    check_schedules(simulator, force, tile, layout, on_input, ())


@pytest.mark.parametrize(("tile", "layout", "on_input"), SCHEDULED_STORED)
def test_schedules_of_stored_weights(simulator, force, tile, layout, on_input):
    check_schedules(simulator, force, tile, layout, on_input, STORED["both"])


def check_schedules(simulator, force, tile, layout, on_input, names):
    """Two or three tiles a block, experts of two tiles of rows, of one and of none, sums longer
    than the ring of the up projection. Every output of the two stages reaches a result: the
    pre-activation, h through y, and through the gradients of weights the gradient of the
    pre-activation (weighted or not), weight * h and <h, u>. The gradient of x is left to the tests
    of its product."""
    force(tile)
    counts, hidden_size = ((66, 0, 5, 9), 328) if tile == "low" else ((130, 0, 3, 9), 264)
    call = operands(Routing(1, 4, 1), hidden_size, 128, torch.bfloat16, layout, bias=True)
    ids = routed(counts, 5)
    call |= {
        "x": torch.randn(len(ids), hidden_size).bfloat16(),
        "topk_ids": ids,
        "topk_weights": torch.rand(len(ids), 1) + 0.1,
        "apply_router_weight_on_input": on_input,
    }
    call = stored(call, names)
    with simulator.options(sms=2):
        simulator.check_schedules(stages(call, (False, True, True, not on_input, True, False)))


@pytest.mark.parametrize("names", [(), STORED["both"]], ids=["contiguous", "stored"])
@pytest.mark.parametrize("num_tokens", [5, 60])
@layouts
def test_schedules_of_few_tokens(simulator, num_tokens, layout, names):
    call = operands(Routing(num_tokens, 3, 2, "dropped"), 328, 136, torch.float16, layout)
    call = stored(call, names)
    simulator.check_schedules(lambda: moe_ops.moe_ffn(**call))


@pytest.mark.parametrize(
    "view", ["rows", "odd_rows", "odd_start", "stored_rows", "stored_odd_rows"]
)
@pytest.mark.parametrize("name", ["x", "w_gate_up", "w_down", "b_gate_up"])
def test_strides_and_alignment(simulator, name, view):
    """Strides of 16 bytes stay, others are composed."""
    call = operands(Routing(80, 3, 2, "dropped"), 72, 136, torch.bfloat16, bias=True)
    if view.startswith("stored"):
        if not name.startswith("w"):
            pytest.skip("Only weights are stored transposed.")
        call |= {n: call[n].mT.contiguous() for n in ("w_gate_up", "w_down")}
    t = call[name]
    call[name] = {
        "rows": lambda: torch.cat([t, t], -1)[..., : t.size(-1)],
        "odd_rows": lambda: torch.nn.functional.pad(t, (0, 1))[..., : t.size(-1)],
        "odd_start": lambda: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape),
    }[view.removeprefix("stored_")]()
    if view.startswith("stored"):
        call |= {n: call[n].mT for n in ("w_gate_up", "w_down")}
    check_moe_ffn(call)
    check_moe_ffn(
        {k: v[:9] if k in ("x", "topk_ids", "topk_weights") else v for k, v in call.items()}, []
    )


@pytest.mark.parametrize("num_tokens", [40, 90])
def test_nan_stays_in_its_token_and_its_expert(simulator, num_tokens):
    call = operands(Routing(num_tokens, 4, 2, "half_empty"), 72, 136, torch.bfloat16)
    call["x"][5] = torch.nan
    call["topk_ids"][5] = torch.tensor([0, -1])
    call["w_gate_up"][1] = torch.nan  # no rows
    call["w_down"][3] = torch.nan
    y = moe_ops.moe_ffn(**call)
    where = torch.zeros(num_tokens, 72, dtype=torch.bool)
    where[5] = True
    assert_identical(y.isnan(), where)


@pytest.mark.full
def test_mutants_are_noticed(simulator):
    """The compiled kernels broken in one place at a time (moe_ffn_mutants.py)."""
    noticed = noticed_mutants("moe_ffn_mutants")
    assert len(noticed) >= 10
    assert [name for name, how in noticed.items() if how is None] == []
