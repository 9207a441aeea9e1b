from __future__ import annotations

import pytest
import torch
from tests.helpers.ffn import moe_ffn_magnitude
from tests.helpers.op_case import BARE_OP_ERROR, OpCase, map_of
from tests.helpers.routing import EMPTY_ROUTINGS, ROUTINGS, Routing

import moe_ops
from moe_ops import reference
from moe_ops.ops.gated_act import GATED_ACTIVATIONS, PLAIN_ACTIVATIONS
from moe_ops.testing import (
    DTYPES,
    VIEWS,
    acc_dtype,
    as_strided_copy,
    assert_identical,
    check_against_reference,
    short,
)

OP_CASES = {
    "peer_ffn": OpCase(
        lambda s: {
            "x": s.float(s.t, s.h),
            "w_gate_up": s.float(s.e, 2, s.h),
            "w_down": s.float(s.e, s.h, 1),
            "topk_weights": s.weights(),
            "topk_ids": s.ids(),
            "activation": "swiglu",
        },
        bad_arguments={"activation": ("", "gelu", "tanh", "SWIGLU")},
        mixed_floats=("topk_weights",),
        by_token=("x", "topk_weights", "topk_ids"),
        too_many_bytes=lambda: moe_ops.peer_ffn(
            torch.ones(1, 2**17).expand(2**44, 2**17),
            torch.ones(1, 1, 2**17),
            torch.ones(1, 2**17, 1),
            torch.empty(2**44, 0),
            map_of(2**44, 0),
            activation="relu",
        ),
    )
}
FLOATS = ("x", "w_gate_up", "w_down", "topk_weights")
SMALL = Routing(11, 9, 5, "dropped")


def operands(routing, hidden_size, dtype, activation="gelu"):
    t, k, e = routing.num_tokens, routing.top_k, routing.num_experts
    vectors = 2 if activation in GATED_ACTIVATIONS else 1
    return {
        "x": torch.randn(t, hidden_size).to(dtype),
        "w_gate_up": (torch.randn(e, vectors, hidden_size) * hidden_size**-0.5).to(dtype)
        if hidden_size
        else torch.empty(e, vectors, 0, dtype=dtype),
        "w_down": torch.randn(e, hidden_size, 1).to(dtype),
        "topk_weights": torch.rand(t, k).to(acc_dtype(dtype)) + 0.1,
        "topk_ids": routing.ids(),
        "activation": activation,
    }


def check(call, wrt=FLOATS, **kwargs):
    check_against_reference(
        moe_ops.peer_ffn,
        reference.peer_ffn,
        call,
        wrt,
        magnitude=moe_ffn_magnitude,
        sum_length=max(1, call["x"].shape[1] + call["topk_ids"].numel()),
        **kwargs,
    )


def gradients(call, grad, **options):
    leaves = [call[name].detach().clone().requires_grad_() for name in FLOATS]
    y = moe_ops.peer_ffn(**{**call, **dict(zip(FLOATS, leaves, strict=True))}, **options)
    return y, torch.autograd.grad(y, leaves, grad)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("hidden_size", [1, 7, 16, 33, 130])
def test_sizes(hidden_size, dtype, activation):
    check(operands(SMALL, hidden_size, dtype, activation))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("activation", [*GATED_ACTIVATIONS, *PLAIN_ACTIVATIONS])
def test_activations(activation, dtype):
    check(operands(SMALL, 12, dtype, activation))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=short)
@pytest.mark.parametrize("routing", ROUTINGS + EMPTY_ROUTINGS, ids=str)
def test_routings(routing, dtype):
    check(operands(routing, 9, dtype))


def test_nothing():
    for routing in (Routing(0, 3, 2), Routing(4, 3, 0)):
        y, grads = gradients(operands(routing, 5, torch.float32), torch.ones(routing.num_tokens, 5))
        assert not y.any() and not any(g.any() for g in grads)
    check(operands(SMALL, 0, torch.float32))


@pytest.mark.parametrize("view", [*VIEWS, "step2_last"])
@pytest.mark.parametrize("name", [*FLOATS, "topk_ids"])
def test_views(name, view):
    for dtype in (torch.float32, torch.bfloat16):
        call = operands(SMALL, 11, dtype, "swiglu")
        call[name] = as_strided_copy(call[name], view)
        check(call, grad_view=view)


@pytest.mark.parametrize("wanted", FLOATS)
def test_one_gradient_at_a_time(wanted):
    check(operands(SMALL, 9, torch.float32, "swiglu"), [wanted])


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("hidden_size", [1024, 1001])
def test_large_tables(hidden_size, dtype):
    """Gradients of 8 MiB and more, which pass the cache: rows of whole lines, and others."""
    call = operands(Routing(3, 4200, 4, "dropped"), hidden_size, dtype)
    grad = torch.randn(3, hidden_size).to(dtype)
    (_, dense), (_, sparse) = gradients(call, grad), gradients(call, grad, sparse_grad=True)
    for a, b in zip(dense[1:3], sparse[1:3], strict=True):
        assert_identical(a, b.to_dense())


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=short)
@pytest.mark.parametrize("kind", ["uniform", "out_of_range", "all_dropped", "repeated"])
def test_sparse_gradients_are_the_dense_ones(kind, id_dtype):
    call = operands(Routing(6, 40, 5, kind, id_dtype), 8, torch.float32, "swiglu")
    grad = torch.randn(6, 8)
    y, dense = gradients(call, grad)
    y_sparse, sparse = gradients(call, grad, sparse_grad=True)
    assert_identical(y_sparse, y)
    valid = call["topk_ids"][(call["topk_ids"] >= 0) & (call["topk_ids"] < 40)]
    for name, a, b in zip(FLOATS, sparse, dense, strict=True):
        assert a.is_sparse == name.startswith("w_")
        if a.is_sparse:
            assert a.is_coalesced() and torch.equal(a.indices()[0], valid.unique().long())
            torch.sparse_coo_tensor(a.indices(), a.values(), a.shape, check_invariants=True)
            a = a.to_dense()
        assert_identical(a, b)


def test_an_optimizer_takes_sparse_gradients():
    torch.manual_seed(0)
    call = operands(Routing(6, 40, 5), 8, torch.float32)
    tables = [call[name].requires_grad_() for name in ("w_gate_up", "w_down")]
    before = [t.detach().clone() for t in tables]
    optimizer = torch.optim.SparseAdam(tables, lr=0.1)
    moe_ops.peer_ffn(**call, sparse_grad=True).sum().backward()
    optimizer.step()
    chosen = torch.zeros(40, dtype=torch.bool)
    chosen[call["topk_ids"].flatten().long()] = True
    for old, new in zip(before, tables, strict=True):
        assert torch.equal((old != new.detach()).flatten(1).any(1), chosen)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_empty_slots_add_nothing_and_keep_nan_out(dtype):
    call = operands(Routing(9, 3, 2), 8, dtype)
    call["topk_ids"][4, 1] = 3
    call["topk_ids"][5] = -1
    call["topk_weights"][4, 1] = torch.nan
    call["topk_weights"][5] = torch.nan
    call["x"][5] = torch.nan
    y, grads = gradients(call, torch.ones(9, 8, dtype=dtype))
    assert bool((y[5] == 0).all()) and not y.isnan().any()
    assert not any(g.isnan().any() for g in grads)
    assert bool((grads[0][5] == 0).all()) and bool((grads[3][5] == 0).all())


@pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.float16], ids=short)
def test_weights_of_any_dtype(weights_dtype):
    call = operands(SMALL, 9, torch.float32)
    call["topk_weights"] = call["topk_weights"].to(weights_dtype)
    check(call)


@pytest.mark.parametrize("activation", ["gelu", "swiglu", "geglu_tanh"])
def test_gradcheck(activation):
    call = operands(Routing(4, 5, 3, "dropped"), 3, torch.float64, activation)
    inputs = tuple(call[name].requires_grad_() for name in FLOATS)

    def fn(*tensors):
        return moe_ops.peer_ffn(**{**call, **dict(zip(FLOATS, tensors, strict=True))})

    assert torch.autograd.gradcheck(fn, inputs)


def test_double_backward_says_so():
    call = operands(SMALL, 4, torch.float64)
    x = call["x"].requires_grad_()
    (grad,) = torch.autograd.grad(moe_ops.peer_ffn(**call).pow(2).sum(), x, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="peer_ffn"):
        torch.autograd.grad(grad.sum(), x)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
def test_opcheck(requires_grad):
    call = operands(SMALL, 5, torch.float32, "swiglu")
    for name in FLOATS:
        call[name].requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.moe_ops.peer_ffn.default, tuple(call.values()))


def test_compile():
    call = operands(SMALL, 6, torch.float32)
    leaves = [call[name].requires_grad_() for name in FLOATS]
    compiled = torch.compile(moe_ops.peer_ffn, fullgraph=True, backend="aot_eager")
    got, want = compiled(**call), moe_ops.peer_ffn(**call)
    assert_identical(got, want)
    grad = torch.randn(want.shape)
    for a, b in zip(*(torch.autograd.grad(y, leaves, grad) for y in (got, want)), strict=True):
        assert_identical(a, b, "gradient")


def test_sparse_gradients_are_refused_where_they_cannot_be():
    call = operands(SMALL, 6, torch.float32)

    def loss(table):
        return moe_ops.peer_ffn(**{**call, "w_down": table}, sparse_grad=True).sum()

    with pytest.raises(NotImplementedError, match="peer_ffn: sparse_grad must be False"):
        torch.func.grad(loss)(call["w_down"])
    with pytest.raises(Exception, match="sparse_grad must be False"):
        torch.compile(loss, fullgraph=True, backend="aot_eager")(call["w_down"])


def test_autocast_leaves_tables_as_they_are():
    call = operands(SMALL, 9, torch.float32)
    want = moe_ops.peer_ffn(**{**call, "x": call["x"].bfloat16().float()})
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y = moe_ops.peer_ffn(**{**call, "x": call["x"].bfloat16()})
    assert_identical(y, want)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_many_slots(dtype, activation):
    """The reference, and the bits that a few tokens alone have."""
    call = operands(Routing(300, 70, 16, "out_of_range", torch.int64), 21, dtype, activation)
    check(call)
    grad = torch.randn(300, 21).to(dtype)
    y, grads = gradients(call, grad)
    few = {n: v[40:47] if n in ("x", "topk_weights", "topk_ids") else v for n, v in call.items()}
    y_few, grads_few = gradients(few, grad[40:47])
    assert_identical(y_few, y[40:47])
    for i in (0, 3):
        assert_identical(grads_few[i], grads[i][40:47])
    _, sparse = gradients(call, grad, sparse_grad=True)
    for a, b in zip(sparse, grads, strict=True):
        assert_identical(a.to_dense() if a.is_sparse else a, b)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_same_bits_for_any_thread_count(dtype, set_threads):
    call = operands(Routing(300, 70, 16, "repeated"), 40, dtype, "swiglu")
    grad = torch.randn(300, 40).to(dtype)
    runs = []
    for threads in (1, 2, 2):
        set_threads(threads)
        y, grads = gradients(call, grad)
        runs.append((y, *grads))
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert_identical(a, b)


def test_it_is_moe_ffn_of_one_neuron():
    call = operands(SMALL, 14, torch.float64, "geglu")
    torch.testing.assert_close(moe_ops.peer_ffn(**call), moe_ops.moe_ffn(**call))


@pytest.mark.parametrize(
    ("change", "name", "got"),
    [
        ({"x": torch.zeros(6, 2, 5)}, "x", "[6, 2, 5]"),
        ({"x": torch.zeros(6, 5, dtype=torch.int32)}, "x", "int32"),
        ({"w_gate_up": torch.zeros(4, 5)}, "w_gate_up", "[4, 5]"),
        ({"w_gate_up": torch.zeros(4, 2, 5)}, "w_gate_up", "[4, 2, 5]"),
        ({"w_gate_up": torch.zeros(4, 1, 6)}, "w_gate_up", "[4, 1, 6]"),
        ({"w_gate_up": torch.zeros(4, 1, 5).half()}, "w_gate_up", "float16"),
        ({"w_down": torch.zeros(4, 5)}, "w_down", "[4, 5]"),
        ({"w_down": torch.zeros(3, 5, 1)}, "w_down", "[3, 5, 1]"),
        ({"w_down": torch.zeros(4, 6, 1)}, "w_down", "[4, 6, 1]"),
        ({"w_down": torch.zeros(4, 5, 2)}, "w_down", "[4, 5, 2]"),
        ({"topk_weights": torch.zeros(6, 3)}, "topk_weights", "[6, 3]"),
        ({"topk_weights": torch.zeros(6, 2, dtype=torch.int32)}, "topk_weights", "int32"),
        ({"topk_ids": torch.zeros(7, 2, dtype=torch.int32)}, "topk_ids", "[7, 2]"),
        ({"topk_ids": torch.zeros(6, 2)}, "topk_ids", "float32"),
        ({"activation": "tanh"}, "activation", "'tanh'"),
        ({"activation": "swiglu"}, "w_gate_up", "[4, 1, 5]"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_input(change, name, got, bad_input):
    call = operands(Routing(6, 4, 2), 5, torch.float32)
    with bad_input("peer_ffn", name, got):
        moe_ops.peer_ffn(**{**call, **change})


@pytest.mark.parametrize(
    ("ids", "num_rows", "words"),
    [(None, 3, "num_rows must be E = 4"), (True, 5, r"num_rows must be in \[0, 4\]")],
)
def test_bad_rows_of_gradients(ids, num_rows, words):
    call = operands(Routing(6, 4, 2), 5, torch.float32)
    *tensors, activation = call.values()
    ids = None if ids is None else call["topk_ids"]
    rest = torch.zeros(6, 1, 2), ids, activation, num_rows, True, True, True, True
    with pytest.raises(BARE_OP_ERROR, match=f"peer_ffn_bwd: {words}"):
        torch.ops.moe_ops.peer_ffn_bwd(torch.zeros(6, 5), *tensors, *rest)
