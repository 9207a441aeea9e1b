from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ops.layers import Experts, SharedExperts

T, H, I, E, K = 17, 6, 8, 5, 2

GATED = ("swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_oai")
PLAIN = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
# activation, bias, interleaved
LAYOUTS = [
    ("swiglu", False, False),
    ("swiglu", True, True),
    ("geglu", True, False),
    ("swiglu_oai", True, True),
    ("relu2", False, False),
    ("gelu", True, False),
]


def activate(preact: Tensor, activation: str, interleaved: bool) -> Tensor:
    plain = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda x: F.relu(x) ** 2,
    }
    if activation in plain:
        return plain[activation](preact)
    gate, up = (preact[..., ::2], preact[..., 1::2]) if interleaved else preact.chunk(2, dim=-1)
    if activation == "swiglu_oai":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return (
        plain[
            {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}[
                activation
            ]
        ](gate)
        * up
    )


def one_expert(bank: Experts, e: int, x: Tensor) -> Tensor:
    b_up = None if bank.b_gate_up is None else bank.b_gate_up[e]
    b_down = None if bank.b_down is None else bank.b_down[e]
    preact = F.linear(x, bank.w_gate_up[e], b_up)
    return F.linear(activate(preact, bank.activation, bank.interleaved), bank.w_down[e], b_down)


def every_expert(bank: Experts, x: Tensor) -> Tensor:
    """[E, T, H]: what each expert makes of each token."""
    return torch.stack([one_expert(bank, e, x) for e in range(bank.num_experts)])


def make(activation="swiglu", bias=False, interleaved=False, **kwargs) -> Experts:
    bank = Experts(
        E,
        H,
        I,
        activation=activation,
        bias=bias,
        interleaved=interleaved,
        **{"dtype": torch.float64, **kwargs},
    )
    for p in bank.parameters():
        torch.nn.init.normal_(p, std=0.7)
    return bank


def routing(num_experts: int = E) -> tuple[Tensor, Tensor]:
    weights = torch.rand(T, K, dtype=torch.float64)
    ids = torch.stack([torch.randperm(num_experts)[:K] for _ in range(T)])
    ids[2, 1] = -1
    ids[5] = num_experts
    return weights, ids


@pytest.mark.parametrize("activation", GATED + PLAIN)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("on_input", [False, True])
def test_forward_and_gradients_against_a_loop(activation, bias, on_input):
    bank = make(activation, bias, interleaved=activation == "swiglu_oai")
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    weights, ids = routing()
    weights.requires_grad_()

    expected = []
    for t in range(T):
        y = torch.zeros(H, dtype=torch.float64)
        for k in range(K):
            e = int(ids[t, k])
            if 0 <= e < E and on_input:
                y = y + one_expert(bank, e, x[t] * weights[t, k])
            elif 0 <= e < E:
                y = y + one_expert(bank, e, x[t]) * weights[t, k]
        expected.append(y)
    expected = torch.stack(expected)
    y = bank(x, weights, ids, apply_router_weight_on_input=on_input)
    torch.testing.assert_close(y, expected)

    upstream = torch.randn_like(y)
    inputs = [x, weights, *bank.parameters()]
    ours = torch.autograd.grad((y * upstream).sum(), inputs)
    theirs = torch.autograd.grad((expected * upstream).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_shapes_and_initialization():
    bank = Experts(E, H, I, bias=True)
    assert {n: tuple(p.shape) for n, p in bank.named_parameters()} == {
        "w_gate_up": (E, 2 * I, H),
        "w_down": (E, H, I),
        "b_gate_up": (E, 2 * I),
        "b_down": (E, H),
    }
    assert bank.w_gate_up.abs().max() <= H**-0.5 and bank.w_down.abs().max() <= I**-0.5
    assert bank.w_gate_up.std() > 0.4 * H**-0.5
    assert (bank.b_gate_up == 0).all() and (bank.b_down == 0).all()
    assert Experts(E, H, I, activation="relu").w_gate_up.shape == (E, I, H)


def test_called_several_times():
    bank = make()
    x = torch.randn(T, H, dtype=torch.float64)
    weights, ids = routing()
    once = bank(x, weights, ids)
    twice = bank(once, weights, ids)
    torch.testing.assert_close(bank(bank(x, weights, ids), weights, ids), twice)
    (twice.sum() + once.sum()).backward()
    assert bank.w_down.grad.abs().sum() > 0


def test_no_tokens_and_unused_experts():
    bank = make(bias=True)
    y = bank(
        torch.zeros(0, H, dtype=torch.float64),
        torch.zeros(0, K),
        torch.zeros(0, K, dtype=torch.int32),
    )
    assert y.shape == (0, H)
    bank(torch.randn(3, H).double(), torch.ones(3, 1), torch.full((3, 1), 2)).sum().backward()
    for p in bank.parameters():
        used = p.grad.flatten(1).abs().sum(1) > 0
        assert used.tolist() == [False, False, True, False, False]


def test_select():
    bank = make(bias=True)
    bank.w_down.requires_grad_(False)
    small = bank.select([4, 0, 0])
    x = torch.randn(T, H, dtype=torch.float64)
    torch.testing.assert_close(every_expert(small, x), every_expert(bank, x)[[4, 0, 0]])
    assert not small.w_down.requires_grad and small.w_gate_up.requires_grad
    assert small.w_gate_up.is_contiguous()
    small.w_gate_up.data.zero_()
    assert bank.w_gate_up.abs().min() > 0
    everything = bank.eval().select(range(E))
    assert not everything.training
    weights, ids = routing()
    assert torch.equal(everything(x, weights, ids), bank(x, weights, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_operations_keep_the_dtype(dtype):
    bank = make(bias=True, dtype=dtype)
    results = [
        bank.select([1]),
        bank.append(1),
        bank.append(1, init="mean"),
        bank.split(),
        bank.split([0], mode="copy", noise=0.1),
        bank.merge([[0, 1]]),
        bank.merge([[0, 1]], mode="concat"),
    ]
    assert {p.dtype for b in results for p in b.parameters()} == {dtype}


@pytest.mark.parametrize("init", ["random", "zero_output", "copy", "mean"])
def test_append(init):
    bank = make("swiglu", bias=init != "mean")
    grown = bank.append(2, init=init)
    x = torch.randn(T, H, dtype=torch.float64)
    before, after = every_expert(bank, x), every_expert(grown, x)
    torch.testing.assert_close(after[:E], before)
    if init == "copy":
        torch.testing.assert_close(after[E:], before[:2])
    elif init == "zero_output":
        assert (after[E:] == 0).all() and grown.w_gate_up[E:].abs().min() > 0
    elif init == "mean":
        torch.testing.assert_close(grown.w_down[E], bank.w_down.mean(0))
    else:
        assert grown.w_down[E:].abs().max() <= I**-0.5


def test_append_a_bank():
    first, second = make(bias=True), make(bias=True)
    x = torch.randn(T, H, dtype=torch.float64)
    both = torch.cat([every_expert(first, x), every_expert(second, x)])
    torch.testing.assert_close(every_expert(first.append(second), x), both)


@pytest.mark.parametrize(("activation", "bias", "interleaved"), LAYOUTS)
@pytest.mark.parametrize("ids", [None, [3, 1]])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_slices_add_up(activation, bias, interleaved, ids, factor):
    bank = make(activation, bias, interleaved)
    split = bank.split(ids, factor)
    chosen = range(E) if ids is None else ids
    assert split.intermediate_size == (I // factor if ids is None else I)
    parents = [e for e in range(E) for _ in range(factor if e in chosen else 1)]
    assert split.num_experts == len(parents)
    x = torch.randn(T, H, dtype=torch.float64)
    summed = torch.zeros(E, T, H, dtype=torch.float64)
    summed.index_add_(0, torch.tensor(parents), every_expert(split, x))
    torch.testing.assert_close(summed, every_expert(bank, x))


@pytest.mark.parametrize(("activation", "bias", "interleaved"), LAYOUTS)
def test_concat_undoes_slices(activation, bias, interleaved):
    bank = make(activation, bias, interleaved)
    back = bank.split(factor=4).merge(
        [list(range(4 * e, 4 * e + 4)) for e in range(E)], mode="concat"
    )
    assert back.intermediate_size == I
    for (name, a), b in zip(bank.named_parameters(), back.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize(("activation", "bias", "interleaved"), LAYOUTS)
def test_concat_is_the_sum(activation, bias, interleaved):
    bank = make(activation, bias, interleaved)
    merged = bank.merge([[0, 3], [4, 1]], mode="concat")
    assert merged.num_experts == 2 and merged.intermediate_size == 2 * I
    x = torch.randn(T, H, dtype=torch.float64)
    each = every_expert(bank, x)
    expected = torch.stack([each[0] + each[3], each[4] + each[1]])
    torch.testing.assert_close(every_expert(merged, x), expected)


def test_copies_merge_to_the_original():
    bank = make(bias=True)
    split = bank.split([0, 2], 2, mode="copy")
    x = torch.randn(T, H, dtype=torch.float64)
    torch.testing.assert_close(every_expert(split, x), every_expert(bank, x)[[0, 0, 1, 2, 2, 3, 4]])
    back = split.merge([[0, 1], [2], [3, 4], [5], [6]], [1.0, 3.0, 1, 2, 5, 1, 1])
    for a, b in zip(bank.parameters(), back.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_noise_changes_copies_only():
    bank = make()
    split = bank.split([1], 3, mode="copy", noise=0.01)
    assert torch.equal(split.w_down[0], bank.w_down[0])
    assert torch.equal(split.w_down[4:], bank.w_down[2:])
    copies = split.w_down[1:4]
    assert not torch.equal(copies[0], copies[1])
    assert ((copies / bank.w_down[1] - 1).abs().max() < 0.06).all()


def test_weighted_mean():
    bank = make(bias=True)
    merged = bank.merge([[0, 1], [4]], torch.tensor([1.0, 3.0, 0, 0, 7.0]))
    for new, old in zip(merged.parameters(), bank.parameters(), strict=True):
        torch.testing.assert_close(new[0], 0.25 * old[0] + 0.75 * old[1])
        torch.testing.assert_close(new[1], old[4])


@pytest.mark.parametrize(("activation", "bias", "interleaved"), LAYOUTS)
def test_alignment_recovers_permuted_copies(activation, bias, interleaved):
    bank = make(activation, bias, interleaved)
    order = torch.stack([torch.arange(I), *(torch.randperm(I) for _ in range(E - 1))])
    # Reordering neurons changes no function, so the mean of aligned copies is the expert itself.
    shuffled = bank.merge([[e] for e in range(E)], neuron_order=order)
    x = torch.randn(T, H, dtype=torch.float64)
    torch.testing.assert_close(every_expert(shuffled, x), every_expert(bank, x))
    pair = bank.select([1]).append(shuffled.select([1]))
    back = torch.stack([torch.arange(I), order[1].argsort()])
    merged = pair.merge([[0, 1]], neuron_order=back)
    torch.testing.assert_close(merged.w_down[0], bank.w_down[1])
    torch.testing.assert_close(merged.w_gate_up[0], bank.w_gate_up[1])
    assert not torch.allclose(pair.merge([[0, 1]]).w_down[0], bank.w_down[1])


@pytest.mark.parametrize("activation", GATED + PLAIN)
def test_shared_experts(activation):
    shared = SharedExperts(H, I, activation=activation, dtype=torch.float64)
    x = torch.randn(2, 3, H, dtype=torch.float64, requires_grad=True)
    expected = F.linear(activate(F.linear(x, shared.w_gate_up), activation, False), shared.w_down)
    y = shared(x)
    torch.testing.assert_close(y, expected)
    inputs = [x, *shared.parameters()]
    ours = torch.autograd.grad(y.square().sum(), inputs)
    theirs = torch.autograd.grad(expected.square().sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda b: Experts(0, H, I), "num_experts"),
        (lambda b: Experts(E, H, 0), "intermediate_size"),
        (lambda b: Experts(E, H, I, activation="tanh"), "activation"),
        (lambda b: Experts(E, H, I, activation="relu", interleaved=True), "interleaved"),
        (lambda b: SharedExperts(H, I, activation="tanh"), "activation"),
        (lambda b: SharedExperts(0, I), "hidden_size"),
        (lambda b: b.select([-1]), "ids"),
        (lambda b: b.append(0), "number of experts"),
        (lambda b: b.append(1, init="ones"), "init"),
        (lambda b: b.append(Experts(2, H, I, bias=True)), "other"),
        (lambda b: b.append(Experts(2, H, I + 1)), "other"),
        (lambda b: b.split(factor=3), "divide"),
        (lambda b: b.split(factor=2, noise=0.1), "noise"),
        (lambda b: b.split([1, 1], 2), "repeat"),
        (lambda b: b.merge([[0], [0]]), "at most once"),
        (lambda b: b.merge([[0]], mode="sum"), "mode"),
        (lambda b: b.merge([[0, 1]], [1.0] * E, mode="concat"), "weights"),
        (lambda b: b.merge([[0, 1]], neuron_order=torch.zeros(E, I)), "neuron_order"),
    ],
)
def test_bad_input(call, word):
    with pytest.raises(ValueError) as caught:
        call(Experts(E, H, I))
    assert word in str(caught.value) and ", got " in str(caught.value)


def test_state_dict_round_trip():
    bank = make(bias=True)
    fresh = Experts(E, H, I, bias=True, dtype=torch.float64)
    fresh.load_state_dict(bank.state_dict())
    x = torch.randn(T, H, dtype=torch.float64)
    assert torch.equal(every_expert(fresh, x), every_expert(copy.deepcopy(bank), x))
