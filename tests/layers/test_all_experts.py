"""Banks in which every expert sees every token, and banks with another output size."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_ops
from moe_ops.layers import ExpertBatchNorm, Experts, MoE, TopKRouter, mix_outputs

GATED = ("swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_oai")
PLAIN = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
}
T, H, I, E, O = 19, 6, 8, 6, 5


def make(activation: str = "relu", bias: bool = True, **kwargs) -> Experts:
    interleaved = activation == "swiglu_oai"
    bank = Experts(
        E,
        H,
        I,
        activation=activation,
        bias=bias,
        interleaved=interleaved,
        **{"output_size": O, "dtype": torch.float64, **kwargs},
    )
    for p in bank.parameters():
        nn.init.normal_(p, std=0.7)
    return bank


def one_expert(bank: Experts, e: int, x: Tensor) -> Tensor:
    b_up, b_down = (None if b is None else b[e] for b in (bank.b_gate_up, bank.b_down))
    h = F.linear(x, bank.w_gate_up[e], b_up)
    name = bank.activation
    if name in PLAIN:
        h = PLAIN[name](h)
    elif name == "swiglu_oai":
        g, u = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(-7.0, 7.0)
        h = (u + 1) * g * torch.sigmoid(1.702 * g)
    else:
        g, u = h.chunk(2, dim=-1)
        plain = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
        h = PLAIN[plain[name]](g) * u
    return F.linear(h, bank.w_down[e], b_down)


def check(y, expected, inputs):
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    ours = torch.autograd.grad((y * upstream).sum(), inputs)
    theirs = torch.autograd.grad((expected * upstream).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", (*GATED, *PLAIN))
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_of_one_input(activation, bias):
    bank = make(activation, bias)
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([one_expert(bank, e, x) for e in range(E)], dim=1)
    check(bank.outputs(x), expected, [x, *bank.parameters()])


@pytest.mark.parametrize(
    ("num_inputs", "ids"),
    [
        (1, None),
        (3, None),
        (6, None),
        (3, [0, 0, 1, 1, 2, 2]),
        (3, [2, 2, 0, 0, 1, 1]),
        (4, [3, 3, 3, 1, 1, 1]),  # inputs 0 and 2 are read by nobody
        (3, [0, 1, 2, 0, 1, 2]),
        (2, [0, 0, 0, 0, 1, 1]),
    ],
)
def test_outputs_of_several_inputs(num_inputs, ids):
    bank = make()
    x = torch.randn(T, num_inputs, H, dtype=torch.float64, requires_grad=True)
    reads = ids if ids is not None else [e * num_inputs // E for e in range(E)]
    expected = torch.stack([one_expert(bank, e, x[:, i]) for e, i in enumerate(reads)], dim=1)
    y = bank.outputs(x, ids)
    check(y, expected, [x, *bank.parameters()])


def test_an_expert_sees_its_own_input_only():
    bank = make()
    x = torch.randn(T, 3, H, dtype=torch.float64, requires_grad=True)
    bank.outputs(x, [0, 1, 2, 0, 1, 2])[:, [1, 4]].sum().backward()
    assert x.grad[:, 1].abs().min() > 0
    assert not x.grad[:, [0, 2]].any()
    assert not bank.w_down.grad[[0, 2, 3, 5]].any()


def test_mixtures_against_the_formula():
    bank = make()
    x = torch.randn(T, 2, H, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(T, 4, E, dtype=torch.float64, requires_grad=True)
    outputs = bank.outputs(x).detach()
    expected = torch.einsum("tme,teo->tmo", weights, bank.outputs(x))
    check(bank.mix(x, weights), expected, [x, weights, *bank.parameters()])
    one = mix_outputs(outputs.contiguous(), weights[:, 0])
    torch.testing.assert_close(one, expected[:, 0])


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_half_precision_takes_the_other_way(how):
    bank = make(dtype=torch.float32)
    x, weights = torch.randn(T, 3, H), torch.rand(T, 4, E)
    exact = bank.mix(x, weights, [0, 0, 1, 2, 2, 0])
    if how == "bfloat16":
        y = bank.bfloat16().mix(x.bfloat16(), weights.bfloat16(), [0, 0, 1, 2, 2, 0])
    else:
        with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
            y = bank.mix(x, weights, [0, 0, 1, 2, 2, 0])
    assert y.dtype == torch.bfloat16
    # Three products round operands to 2^-8 of their size.
    assert (y.float() - exact).norm() < 8 * 2**-8 * exact.norm()
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in bank.parameters())


def test_no_tokens():
    bank = make()
    x = torch.randn(0, 2, H, dtype=torch.float64)
    assert bank.mix(x, torch.randn(0, 3, E, dtype=torch.float64)).shape == (0, 3, O)
    weights, ids = torch.rand(0, 2), torch.zeros(0, 2, dtype=torch.int32)
    assert bank(x[:, 0], weights, ids).shape == (0, O)


@pytest.mark.parametrize("activation", ["swiglu_oai", "relu", "geglu"])
@pytest.mark.parametrize("on_input", [False, True])
def test_routed_with_another_output_size(activation, on_input):
    bank = make(activation)
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(T, 2, dtype=torch.float64, requires_grad=True)
    ids = torch.stack([torch.randperm(E)[:2] for _ in range(T)])
    ids[3, 1], ids[7] = -1, E
    rows = []
    for t in range(T):
        y = torch.zeros(O, dtype=torch.float64)
        for k in range(2):
            e = int(ids[t, k])
            if 0 <= e < E:
                w = weights[t, k]
                y = y + (
                    one_expert(bank, e, x[t] * w) if on_input else one_expert(bank, e, x[t]) * w
                )
        rows.append(y)
    y = bank(x, weights, ids, apply_router_weight_on_input=on_input)
    check(y, torch.stack(rows), [x, weights, *bank.parameters()])


def test_bank_operations_keep_the_output_size():
    bank = make("swiglu")
    x = torch.randn(T, H, dtype=torch.float64)
    y = bank.outputs(x)
    torch.testing.assert_close(bank.select([4, 1]).outputs(x), y[:, [4, 1]])
    grown = bank.append(2, init="zero_output")
    torch.testing.assert_close(grown.outputs(x)[:, :E], y)
    assert not grown.outputs(x)[:, E:].any()
    slices = bank.split(factor=2).outputs(x).unflatten(1, (E, 2)).sum(2)
    torch.testing.assert_close(slices, y)
    merged = bank.merge([[0, 3], [1, 2]], mode="concat")
    torch.testing.assert_close(merged.outputs(x)[:, 0], y[:, 0] + y[:, 3])


def test_what_another_output_size_rules_out():
    bank = Experts(E, 8, 16, output_size=4)
    with pytest.raises(ValueError, match=r"^pack_weights: "):
        bank.pack_weights()
    with pytest.raises(ValueError, match=r"^MoE: experts must have output_size = 8 .*got 4"):
        MoE(TopKRouter(8, E, 2), bank)
    with pytest.raises(ValueError, match=r"^quantize: model must hold float experts, got Exp"):
        moe_ops.quantize(bank, moe_ops.Int8WeightConfig())
    assert "output_size=4" in repr(bank)


def test_bad_calls(bad_input):
    bank = make()
    x = torch.randn(T, 3, H, dtype=torch.float64)
    with bad_input("Experts", "output_size", "0"):
        Experts(E, H, I, output_size=0)
    with bad_input("Experts.outputs", "x must be", f"{H + 1}"):
        bank.outputs(torch.randn(T, H + 1))
    with bad_input("Experts.outputs", "number of inputs", "4"):
        bank.outputs(torch.randn(T, 4, H, dtype=torch.float64))
    with bad_input("Experts.outputs", "input_ids", "[0, 1]"):
        bank.outputs(x, [0, 1])
    with bad_input("Experts.outputs", "input_ids", "3"):
        bank.outputs(x, [0, 1, 2, 3, 0, 0])
    with bad_input("Experts.outputs", "input_ids"):
        bank.outputs(x[:, 0], [0] * E)
    with bad_input("mix_outputs", "weights", f"{E + 1}"):
        mix_outputs(bank.outputs(x), torch.rand(T, 2, E + 1, dtype=torch.float64))


# ------------------------------------------------------------------------------ normalization


def separate(norm: ExpertBatchNorm) -> list[nn.BatchNorm1d]:
    parts = []
    for e in range(norm.num_experts):
        part = nn.BatchNorm1d(norm.size, dtype=torch.float64)
        with torch.no_grad():
            part.weight.copy_(norm.weight[e])
            part.bias.copy_(norm.bias[e])
        parts.append(part)
    return parts


@pytest.mark.parametrize("tokens_last", [False, True])
def test_norm_is_a_batch_norm_an_expert(tokens_last):
    norm = ExpertBatchNorm(E, O, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    parts = separate(norm)
    for _ in range(3):
        x = torch.randn(T, E, O, dtype=torch.float64) * 3 + 1
        if tokens_last:
            x = x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        x.requires_grad_()
        expected = torch.stack([part(x[:, e]) for e, part in enumerate(parts)], dim=1)
        y = norm(x)
        torch.testing.assert_close(y, expected)
        upstream = torch.randn_like(y)
        ours = torch.autograd.grad((y * upstream).sum(), [x, norm.weight, norm.bias])
        leaves = [x, *(p.weight for p in parts), *(p.bias for p in parts)]
        theirs = torch.autograd.grad((expected * upstream).sum(), leaves)
        torch.testing.assert_close(ours[0], theirs[0])
        torch.testing.assert_close(ours[1], torch.stack(theirs[1 : E + 1]))
        torch.testing.assert_close(ours[2], torch.stack(theirs[E + 1 :]))
    torch.testing.assert_close(norm.running_mean, torch.stack([p.running_mean for p in parts]))
    torch.testing.assert_close(norm.running_var, torch.stack([p.running_var for p in parts]))
    assert int(norm.num_batches_tracked) == 3

    norm.eval()
    x = torch.randn(T, E, O, dtype=torch.float64)
    expected = torch.stack([part.eval()(x[:, e]) for e, part in enumerate(parts)], dim=1)
    torch.testing.assert_close(norm(x), expected)
    assert norm(x[:0]).shape == (0, E, O)
    torch.testing.assert_close(norm(x[:1]), expected[:1])


def test_norm_refuses_one_token(bad_input):
    norm = ExpertBatchNorm(E, O)
    with bad_input("ExpertBatchNorm", "outputs", "1"):
        norm(torch.randn(1, E, O))
    with bad_input("ExpertBatchNorm", "outputs", f"{O + 1}"):
        norm(torch.randn(4, E, O + 1))
    weights = torch.rand(1, 2, E)
    with bad_input("ExpertBatchNorm", "outputs", "1"):
        norm.mix(torch.randn(1, E, O), weights)
    with bad_input("ExpertBatchNorm.mix", "weights", "[1, 2, "):
        norm.mix(torch.randn(4, E, O), weights)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_norm_mix_is_norm_then_activation_then_mixture(activation, training):
    norm = ExpertBatchNorm(E, O, dtype=torch.float64).train(training)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.running_mean)
    twin = copy.deepcopy(norm)
    act = {"silu": F.silu, "relu": F.relu}[activation]
    for _ in range(2):
        x = (torch.randn(T, E, O, dtype=torch.float64) * 3 + 1).requires_grad_()
        weights = torch.randn(T, 4, E, dtype=torch.float64, requires_grad=True)
        y = norm.mix(x, weights, activation)
        expected = torch.einsum("tme,teo->tmo", weights, act(twin(x)))
        torch.testing.assert_close(y, expected)
        upstream = torch.randn_like(y)
        ours = torch.autograd.grad((y * upstream).sum(), [x, weights, *norm.parameters()])
        theirs = torch.autograd.grad((expected * upstream).sum(), [x, weights, *twin.parameters()])
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(buffer, twin.get_buffer(name))


def test_norm_mix_in_bfloat16():
    norm = ExpertBatchNorm(E, O)
    x, weights = torch.randn(T, E, O), torch.rand(T, 2, E)
    exact = norm.mix(x, weights)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        y = norm.mix(x, weights)
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).norm() < 4 * 2**-8 * exact.norm()
    half = norm.bfloat16().mix(x.bfloat16(), weights.bfloat16())
    assert (half.float() - exact).norm() < 4 * 2**-8 * exact.norm()
    assert norm.running_var.dtype == torch.bfloat16


def test_mix_outputs_activates():
    outputs = torch.randn(T, E, O, dtype=torch.float64)
    weights = torch.randn(T, E, dtype=torch.float64)
    for name, act in (("relu", F.relu), ("silu", F.silu), ("sigmoid", torch.sigmoid)):
        expected = torch.einsum("te,teo->to", weights, act(outputs))
        torch.testing.assert_close(mix_outputs(outputs, weights, activation=name), expected)
