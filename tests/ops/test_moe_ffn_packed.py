from __future__ import annotations

import concurrent.futures

import pytest
import torch
from tests.helpers.ffn import ffn_operands, moe_ffn_magnitude
from tests.helpers.op_case import OpCase, ones
from tests.helpers.routing import EMPTY_ROUTINGS, ROUTINGS, Routing
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_ops
from moe_ops import _library, reference
from moe_ops.ops.gated_act import GATED_ACTIVATIONS, PLAIN_ACTIVATIONS
from moe_ops.testing import (
    DTYPES,
    VIEWS,
    as_strided_copy,
    assert_identical,
    check_against_reference,
    short,
)


def packed_call(s):
    call = s.ffn()
    call["packed_gate_up"] = moe_ops.pack_experts(call["w_gate_up"], halves=True)
    call["packed_down"] = moe_ops.pack_experts(call["w_down"])
    return call


OP_CASES = {
    "moe_ffn_packed": OpCase(
        packed_call,
        bad_arguments={"activation": ("", "swish", "SWIGLU", "swiglu\0")},
        mixed_floats=("topk_weights",),
    ),
    "pack_experts": OpCase(
        lambda s: {"w": s.float(s.e, 2 * s.o, s.h), "halves": True},
        free_dims={"w": {0, 2}},
        kind="integer",
        too_many_bytes=lambda: moe_ops.pack_experts(ones(1, 2**61, 1)),
    ),
}
pytestmark = pytest.mark.cpu_only

# (H, I): below, at and above the panel widths of every instruction set.
SIZES = (
    (1, 1),
    (3, 7),
    (16, 24),
    (17, 31),
    (31, 17),
    (33, 65),
    (64, 32),
    (65, 33),
    (97, 5),
    (129, 64),
    (6, 129),
    (257, 19),
)
SMALL = Routing(11, 4, 2, "dropped")


def with_copies(call):
    """The call with packed copies of its weights."""
    gated = call["activation"] in GATED_ACTIVATIONS
    halves = gated and not call.get("interleaved", False)
    return {
        **call,
        "packed_gate_up": moe_ops.pack_experts(call["w_gate_up"], halves=halves),
        "packed_down": moe_ops.pack_experts(call["w_down"]),
    }


def check(call, *, copies_are_good=True):
    call = call if "packed_down" in call else with_copies(call)
    sizes = (*call["x"].shape, call["w_down"].shape[-1], call["topk_ids"].numel(), 1)
    stale = _library.stale_panels()
    check_against_reference(
        moe_ops.moe_ffn_packed,
        reference.moe_ffn_packed,
        call,
        magnitude=moe_ffn_magnitude,
        sum_length=max(sizes),
        steps=2,
    )
    assert (_library.stale_panels() == stale) == copies_are_good


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_the_sum_is_rounded_once(dtype):
    """In float32 it is what is rounded without out_dtype."""
    call = with_copies(ffn_operands(SMALL, 33, 40, dtype, bias=True))
    wide = moe_ops.moe_ffn_packed(**call, out_dtype=torch.float32)
    assert not torch.equal(wide, wide.to(dtype).float())
    assert_identical(wide.to(dtype), moe_ops.moe_ffn_packed(**call))
    call["x"].requires_grad_()
    trained = moe_ops.moe_ffn_packed(**call, out_dtype=torch.float32)
    assert trained.dtype == torch.float32
    assert trained.requires_grad


def plain(call):
    """moe_ffn of the same operands."""
    return moe_ops.moe_ffn(**{k: v for k, v in call.items() if not k.startswith("packed")})


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), SIZES)
def test_sizes(hidden_size, intermediate_size, dtype):
    check(ffn_operands(SMALL, hidden_size, intermediate_size, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("routing", ROUTINGS + EMPTY_ROUTINGS, ids=str)
def test_routings(routing, dtype):
    check(ffn_operands(routing, 9, 12, dtype, bias=True))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("activation", [*GATED_ACTIVATIONS, *PLAIN_ACTIVATIONS])
def test_activations(activation, dtype, bias):
    check(ffn_operands(SMALL, 17, 19, dtype, activation=activation, bias=bias))


@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_options(dtype, interleaved, on_input):
    call = ffn_operands(SMALL, 35, 22, dtype, activation="swiglu_oai", bias=True)
    call |= {"interleaved": interleaved, "apply_router_weight_on_input": on_input}
    check({**call, "alpha": 1.3, "limit": 0.8})


@pytest.mark.parametrize("tokens", [1, 3, 160])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(
    ("activation", "interleaved"),
    [("swiglu", False), ("swiglu_oai", True), ("silu", False)],
    ids=["halves", "interleaved", "plain"],
)
def test_more_than_one_block_in_every_direction(activation, interleaved, dtype, tokens):
    routing = Routing(tokens, 2, 2, "skewed")
    call = ffn_operands(routing, 270, 300, dtype, activation=activation, bias=True)
    check({**call, "interleaved": interleaved})


@pytest.mark.parametrize("tokens", [1, 3, 60])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(2101, 40), (40, 2101)])
def test_more_than_one_block_of_depth(hidden_size, intermediate_size, dtype, tokens):
    """Blocks are 1024 elements or pairs deep."""
    check(ffn_operands(Routing(tokens, 2, 2, "skewed"), hidden_size, intermediate_size, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(0, 5), (5, 0), (0, 0)])
def test_empty_sizes(hidden_size, intermediate_size, dtype):
    check(ffn_operands(SMALL, hidden_size, intermediate_size, dtype, bias=True))


@pytest.mark.parametrize("view", [*VIEWS, "step2_last"])
@pytest.mark.parametrize("name", ["x", "w_gate_up", "w_down", "topk_weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_views(dtype, name, view):
    call = ffn_operands(SMALL, 11, 14, dtype, bias=True)
    call[name] = as_strided_copy(call[name], view)
    check(call)


@pytest.mark.parametrize("view", ["transposed", "step2", "step2_last", "offset"])
@pytest.mark.parametrize("halves", [False, True], ids=["whole", "halves"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_a_copy_depends_on_values_only(dtype, halves, view):
    w = torch.randn(3, 38, 21).to(dtype)
    packed = moe_ops.pack_experts(w, halves=halves)
    assert packed.dtype == torch.uint8
    assert packed.numel() >= w.numel() * w.element_size()
    assert_identical(moe_ops.pack_experts(as_strided_copy(w, view), halves=halves), packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_a_copy_has_every_element_once(dtype):
    """Distinct bit patterns go in; the same come out, and zeros where panels are filled up."""
    w = torch.arange(1, 1 + 2 * 5 * 7).view(2, 5, 7).to(dtype)
    packed = moe_ops.pack_experts(w).view(dtype)
    assert_identical(packed[packed != 0].sort().values, w.flatten())


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_the_copies_are_what_is_read(dtype):
    """Another number in the copy, which a spot check hardly ever hits, shows in the output."""
    call = with_copies(ffn_operands(Routing(4, 1, 1), 200, 120, dtype))
    before, stale = moe_ops.moe_ffn_packed(**call), _library.stale_panels()
    for name in ("packed_gate_up", "packed_down"):
        changed = call[name].clone()
        changed.view(dtype)[1234] += 64
        after = moe_ops.moe_ffn_packed(**{**call, name: changed})
        if _library.stale_panels() == stale:
            assert not torch.equal(after, before)
        stale = _library.stale_panels()


# --- copies without weights


def without_weights(call):
    """The call with shapes in the place of the weights."""
    shapes = {
        n: call[n].new_full((), torch.nan).expand_as(call[n]) for n in ("w_gate_up", "w_down")
    }
    return {**call, **shapes, "packed_only": True}


@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(33, 31), (64, 48), (257, 19)])
def test_copies_alone(dtype, tokens, hidden_size, intermediate_size):
    """Rows of one token of float32 are read from the weights where there are some."""
    routing = Routing(tokens, 4, 2, "dropped" if tokens > 2 else "uniform")
    call = with_copies(ffn_operands(routing, hidden_size, intermediate_size, dtype, bias=True))
    y = moe_ops.moe_ffn_packed(**without_weights(call))
    if tokens == 1 and dtype == torch.float32:
        torch.testing.assert_close(y, moe_ops.moe_ffn_packed(**call))
    else:
        assert_identical(y, moe_ops.moe_ffn_packed(**call))


def test_copies_alone_have_no_gradient():
    call = without_weights(with_copies(ffn_operands(SMALL, 33, 31, torch.float32)))
    call["x"].requires_grad_()
    with pytest.raises(NotImplementedError, match="packed_only must be False for gradients"):
        moe_ops.moe_ffn_packed(**call)
    with torch.no_grad():
        moe_ops.moe_ffn_packed(**call)


# --- a copy of other weights is not used


@pytest.mark.parametrize("name", ["w_gate_up", "w_down"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_changed_weights(dtype, name):
    call = with_copies(ffn_operands(SMALL, 33, 31, dtype))
    call[name].mul_(-1.5)
    check(call, copies_are_good=False)


def test_both_changed_is_moe_ffn_to_the_bit():
    call = with_copies(ffn_operands(SMALL, 33, 31, torch.float32))
    for name in ("w_gate_up", "w_down"):
        call[name].data.add_(1)
    assert_identical(moe_ops.moe_ffn_packed(**call), plain(call))


def test_one_token_of_small_experts_is_moe_ffn_to_the_bit():
    """Whatever the copies hold: they are not read."""
    call = with_copies(ffn_operands(Routing(1, 4, 2), 64, 48, torch.float32))
    for name in ("packed_gate_up", "packed_down"):
        call[name].fill_(255)
    stale = _library.stale_panels()
    assert_identical(moe_ops.moe_ffn_packed(**call), plain(call))
    assert _library.stale_panels() == stale


@pytest.mark.parametrize("dim", [1, 2], ids=["features", "depth"])
@pytest.mark.parametrize("name", ["w_gate_up", "w_down"])
def test_a_run_of_a_sixteenth_is_always_noticed(name, dim):
    """Wherever it lies, at every call, in one expert of all that have tokens."""
    call = with_copies(ffn_operands(Routing(6, 3, 3), 96, 64, torch.float32))
    size = call[name].shape[dim]
    for begin in range(0, size - size // 16 + 1, 3):
        w = call[name].clone()
        w[1].narrow(dim - 1, begin, size // 16).neg_()
        stale = _library.stale_panels()
        moe_ops.moe_ffn_packed(**{**call, name: w})
        assert _library.stale_panels() > stale, begin


def test_scattered_changes_are_noticed_sooner_or_later():
    call = with_copies(ffn_operands(Routing(6, 1, 1), 40, 24, torch.float32))
    call["w_down"][0, 7, 11] += 1
    stale = _library.stale_panels()
    for _ in range(2000):
        moe_ops.moe_ffn_packed(**call)
    assert _library.stale_panels() > stale


def test_experts_without_tokens_are_not_looked_at():
    call = with_copies(ffn_operands(Routing(9, 4, 2, "one_expert"), 33, 31, torch.float32))
    for name in ("w_gate_up", "w_down"):
        call[name][[0, 1, 3]] = torch.nan
    check(call)


def test_nan_weights_match_their_copy():
    call = ffn_operands(SMALL, 33, 31, torch.float32)
    call["w_down"][:] = torch.nan
    stale = _library.stale_panels()
    assert moe_ops.moe_ffn_packed(**with_copies(call)).isnan().any()
    assert _library.stale_panels() == stale


# --- torch


def positional(call):
    names = (
        "x",
        "w_gate_up",
        "w_down",
        "packed_gate_up",
        "packed_down",
        "topk_weights",
        "topk_ids",
    )
    keywords = {k: v for k, v in call.items() if k not in names}
    return tuple(call[name] for name in names), keywords


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_opcheck(dtype, requires_grad):
    call = with_copies(ffn_operands(Routing(5, 3, 2, "dropped"), 6, 7, dtype, bias=True))
    for name in ("x", "w_gate_up", "w_down", "topk_weights", "b_gate_up", "b_down"):
        call[name].requires_grad_(requires_grad)
    args, kwargs = positional(call)
    torch.library.opcheck(torch.ops.moe_ops.moe_ffn_packed.default, args, kwargs)
    torch.library.opcheck(torch.ops.moe_ops.pack_experts.default, (call["w_gate_up"], True))


def test_gradients_are_those_of_moe_ffn():
    call = with_copies(ffn_operands(SMALL, 9, 12, torch.float32, bias=True))
    leaves = [call[name].requires_grad_() for name in ("x", "w_gate_up", "w_down", "topk_weights")]
    grad = torch.randn(11, 9)
    got = torch.autograd.grad(moe_ops.moe_ffn_packed(**call), leaves, grad)
    for a, b in zip(got, torch.autograd.grad(plain(call), leaves, grad), strict=True):
        assert_identical(a, b)
    with torch.no_grad():
        assert not moe_ops.moe_ffn_packed(**call).requires_grad
    assert not moe_ops.pack_experts(call["w_down"]).requires_grad


def test_compile():
    call = with_copies(ffn_operands(SMALL, 6, 7, torch.float32, bias=True))
    compiled = torch.compile(moe_ops.moe_ffn_packed, fullgraph=True, backend="aot_eager")
    assert_identical(compiled(**call), moe_ops.moe_ffn_packed(**call))
    pack = torch.compile(moe_ops.pack_experts, fullgraph=True, backend="aot_eager")
    assert_identical(pack(call["w_gate_up"], halves=True), call["packed_gate_up"])


def test_autocast():
    """Packed and called in the same state; the weights' own type would not fit."""
    call = ffn_operands(SMALL, 9, 12, torch.float32)
    wide = with_copies(call)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        packed = with_copies(call)
        y = moe_ops.moe_ffn_packed(**packed)
        with pytest.raises(ValueError, match="packed_gate_up must be what pack_experts makes"):
            moe_ops.moe_ffn_packed(**wide)
    half = {k: v.bfloat16() if k in ("x", "w_gate_up", "w_down") else v for k, v in call.items()}
    assert_identical(y, moe_ops.moe_ffn_packed(**with_copies(half)))


def test_inference_mode():
    call = with_copies(ffn_operands(SMALL, 9, 12, torch.float32, bias=True))
    want = moe_ops.moe_ffn_packed(**call)
    with torch.inference_mode():
        assert_identical(moe_ops.moe_ffn_packed(**call), want)
        assert_identical(moe_ops.pack_experts(call["w_down"]), call["packed_down"])


@pytest.mark.parametrize("kind", ["skewed", "dropped", "one_expert"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_same_bits_for_any_thread_count(dtype, kind, set_threads):
    call = ffn_operands(Routing(150, 8, 2, kind), 64, 80, dtype, bias=True)
    runs = []
    for threads in (1, 2, 2):
        set_threads(threads)
        packed = with_copies(call)
        runs.append(
            (packed["packed_gate_up"], packed["packed_down"], moe_ops.moe_ffn_packed(**packed))
        )
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert_identical(a, b)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_same_bits_however_features_are_cut(dtype, tokens, set_threads):
    """Threads decide how many panels an item has, and so which of them are read side by side."""
    for hidden, intermediate in ((160, 80), (336, 48), (240, 112), (176, 208)):
        call = with_copies(ffn_operands(Routing(tokens, 4, 2), hidden, intermediate, dtype))
        runs = []
        for threads in (1, 2, 8):
            set_threads(threads)
            runs.append(moe_ops.moe_ffn_packed(**call))
        for run in runs[1:]:
            assert_identical(run, runs[0])


def test_two_python_threads_at_once():
    calls = [with_copies(ffn_operands(Routing(60, 4, 2), 40, 50, torch.bfloat16)) for _ in range(4)]
    want = [moe_ops.moe_ffn_packed(**call) for call in calls]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: moe_ops.moe_ffn_packed(**calls[i % 4]), range(40)))
    for i, y in enumerate(got):
        assert_identical(y, want[i % 4], f"call {i}")


# --- bad input


@pytest.mark.parametrize("name", ["packed_gate_up", "packed_down"])
@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda p: p[:-1], "uint8 of shape ["),
        (lambda p: torch.cat([p, p]), "uint8 of shape ["),
        (lambda p: p.view(1, -1), "uint8 of shape [1, "),
        (lambda p: p.to(torch.int8), "int8"),
        (lambda p: p.view(torch.float32), "float32"),
        (lambda p: p[:0], "[0]"),
    ],
    ids=["shorter", "longer", "rank", "int8", "float32", "empty"],
)
def test_a_copy_of_another_size(change, got, name, bad_input):
    call = with_copies(ffn_operands(Routing(6, 4, 2), 5, 7, torch.float32))
    with bad_input("moe_ffn_packed", name, got):
        moe_ops.moe_ffn_packed(**{**call, name: change(call[name])})
    with bad_input("moe_ffn_packed", name, got):  # The rule that tracing goes by says the same.
        meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in call.items()}
        moe_ops.moe_ffn_packed(**{**meta, name: change(call[name]).to("meta")})


@pytest.mark.parametrize(
    ("change", "name", "got"),
    [
        ({"x": torch.zeros(6)}, "x", "[6]"),
        ({"w_gate_up": torch.zeros(4, 14, 6)}, "w_gate_up", "6"),
        ({"w_down": torch.zeros(4, 5, 7, dtype=torch.float64)}, "w_down", "float64"),
        ({"topk_ids": torch.zeros(6, 2)}, "topk_ids", "float32"),
        ({"activation": "swish"}, "activation", "swish"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_input(change, name, got, bad_input):
    call = with_copies(ffn_operands(Routing(6, 4, 2), 5, 7, torch.float32))
    with bad_input("moe_ffn_packed", name, got):
        moe_ops.moe_ffn_packed(**{**call, **change})


@pytest.mark.parametrize(
    ("w", "halves", "got"),
    [
        (torch.zeros(4, 5), False, "[4, 5]"),
        (torch.zeros(4, 5, 3, dtype=torch.int32), False, "int32"),
        (torch.zeros(4, 5, 3), True, "[4, 5, 3]"),
    ],
    ids=["rank", "dtype", "halves"],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_weights(w, halves, got, device, bad_input):
    with bad_input("pack_experts", "w", got):
        moe_ops.pack_experts(w.to(device), halves=halves)


def test_copies_on_another_device(bad_input):
    call = with_copies(ffn_operands(Routing(6, 4, 2), 5, 7, torch.float32))
    for name in ("packed_gate_up", "packed_down"):
        with bad_input("moe_ffn_packed", name):
            moe_ops.moe_ffn_packed(**{**call, name: call[name].to("meta")})


def test_copies_on_cuda():
    """Empty ones, and those that were made on the CPU: what the rule for tracing says of them."""
    call = with_copies(ffn_operands(SMALL, 16, 8, torch.float32))
    with FakeTensorMode(allow_non_fake_inputs=True):  # There need not be a GPU.
        moved = {
            k: torch.empty(v.shape, dtype=v.dtype, device="cuda") if torch.is_tensor(v) else v
            for k, v in call.items()
        }
        assert moe_ops.pack_experts(moved["w_down"]).shape == (0,)
        empty = with_copies({k: v for k, v in moved.items() if not k.startswith("packed")})
        for copies in (moved, empty):
            y = moe_ops.moe_ffn_packed(**copies)
            assert y.is_cuda and y.shape == call["x"].shape
        with pytest.raises(
            ValueError, match=r"packed_down must be what pack_experts makes .* \[0\]"
        ):
            other = torch.empty(1, dtype=torch.uint8, device="cuda")
            moe_ops.moe_ffn_packed(**{**empty, "packed_down": other})
