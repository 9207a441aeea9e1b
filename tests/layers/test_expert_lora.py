"""ExpertLoRA against the reference of moe_ffn on weights with the adapter added."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from tests.helpers.isas import run_python_at
from tests.helpers.quantized import weight_config

import moe_ops
from moe_ops import reference
from moe_ops.layers import ExpertLoRA, Experts, MoE, TopKRouter
from moe_ops.layers.expert_lora import FACTORS

E, H, I, K, T, R, M = 5, 16, 12, 2, 11, 3, 3
PLAIN = {"activation": "swiglu"}
OAI = {"activation": "swiglu_oai", "interleaved": True, "bias": True, "alpha": 1.5, "limit": 0.5}
RELU2 = {"activation": "relu2", "bias": True}


def make(options=PLAIN, dtype=torch.float64, sizes=(E, H, I), **how):
    torch.manual_seed(0)
    experts = Experts(*sizes, dtype=dtype, **options)
    for b in (experts.b_gate_up, experts.b_down):
        if b is not None:
            torch.nn.init.normal_(b)
    layer = ExpertLoRA(experts, R, alpha=2 * R, dtype=dtype, **how)
    with torch.no_grad():
        for name in FACTORS:
            getattr(layer, name).normal_(0, 0.5)
    return layer


def call(dtype=torch.float64, hidden=H):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(T, hidden, generator=generator, dtype=dtype, requires_grad=True)
    weights = torch.rand(T, K, generator=generator, dtype=torch.float64).requires_grad_()
    ids = torch.randint(-1, E - 1, (T, K), generator=generator)  # One expert is idle.
    return x, weights, ids


def expected(layer, x, weights, ids, on_input=False, adapter=None):
    """Differentiable: W + scaling * B A and the reference of moe_ffn."""
    bank = layer.experts
    if not isinstance(bank, Experts):
        bank = bank.dequantize(x.dtype)
    full = []
    for part in ("gate_up", "down"):
        a, b = (getattr(layer, f"{side}_{part}") for side in "ab")
        if adapter is not None:
            a, b = a[:, adapter], b[:, adapter]
        full.append(getattr(bank, f"w_{part}").detach() + layer.scaling * (b @ a))
    names = ("activation", "interleaved", "alpha", "limit", "b_gate_up", "b_down")
    how = {name: getattr(bank, name) for name in names}
    how["apply_router_weight_on_input"] = on_input
    return reference.moe_ffn(x, *full, weights, ids, **how)


def gradients(y, layer, *inputs):
    wanted = [*inputs, *(getattr(layer, name) for name in FACTORS)]
    grad = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y.dtype)
    return y, *torch.autograd.grad(y, wanted, grad)


def compare(got, wanted, rtol=1e-9):
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= rtol * other.norm()


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("options", [PLAIN, OAI, RELU2], ids=lambda o: o["activation"])
def test_value_and_gradients(options, on_input):
    layer, (x, weights, ids) = make(options), call()
    y = layer(x, weights, ids, apply_router_weight_on_input=on_input)
    wanted = expected(layer, x, weights, ids, on_input)
    compare(gradients(y, layer, x, weights), gradients(wanted, layer, x, weights))


@pytest.mark.parametrize("shared", [("a_gate_up", "b_down"), FACTORS])
def test_shared_factors(shared):
    layer, args = make(shared=shared), call()
    assert layer.a_gate_up.shape == (1, R, H)
    wanted = gradients(expected(layer, *args), layer, *args[:2])
    compare(gradients(layer(*args), layer, *args[:2]), wanted)


@pytest.mark.parametrize("shared", [(), ("a_down",)])
def test_an_adapter_a_token(shared):
    layer, (x, weights, ids) = make(num_adapters=M, shared=shared), call()
    chosen = torch.arange(T, dtype=torch.int32) % (M + 1) - 1  # -1: none.
    y = layer(x, weights, ids, adapter_ids=chosen)
    wanted = torch.zeros_like(y)
    for adapter in range(M):
        part = expected(layer, x, weights, ids, adapter=adapter)
        wanted = torch.where((chosen == adapter)[:, None], part, wanted)
    bare = moe_ops.moe_ffn(x, layer.experts.w_gate_up, layer.experts.w_down, weights, ids)
    wanted = torch.where((chosen < 0)[:, None], bare, wanted)
    compare(gradients(y, layer, x, weights), gradients(wanted, layer, x, weights))
    with layer.use(chosen):
        assert torch.equal(layer(x, weights, ids), y)
    merged = layer.merged(adapter=1)
    mine = chosen == 1
    compare([merged(x, weights, ids)[mine]], [y[mine]], 1e-6)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_quantized_banks(format):
    layer = make(dtype=torch.float32, sizes=(E, 64, 64))
    moe_ops.quantize(layer, weight_config(format, 32 if format == "int4" else None))
    args = call(torch.float32, 64)
    wanted = gradients(expected(layer, *args), layer, *args[:2])
    compare(gradients(layer(*args), layer, *args[:2]), wanted, 1e-5)
    with torch.no_grad():
        compare([layer(*args)], wanted[:1], 0.03)  # Rows are rounded where no gradient is wanted.
        compare([layer.merged()(*args)], wanted[:1], 1e-5)


def test_narrow_types_and_autocast():
    layer, (x, weights, ids) = make(dtype=torch.float32), call(torch.float32)
    wanted = gradients(expected(layer, x, weights, ids), layer, x, weights)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, weights, ids)
    compare(gradients(y, layer, x, weights), wanted, 0.03)
    layer.experts.to(torch.bfloat16)
    got = gradients(layer(x.bfloat16(), weights, ids).float(), layer, x, weights)
    compare(got, wanted, 0.03)


@pytest.mark.parametrize("how", ["checkpoint", "compile"])
def test_made_again_and_compiled(how):
    layer, (x, weights, ids) = make(), call()
    wanted = gradients(layer(x, weights, ids), layer, x, weights)
    if how == "checkpoint":
        y = torch.utils.checkpoint.checkpoint(layer, x, weights, ids, use_reentrant=False)
    else:
        y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, weights, ids)
    compare(gradients(y, layer, x, weights), wanted)


def test_in_a_layer():
    layer = MoE(TopKRouter(H, E, K), Experts(E, H, I))
    x = torch.randn(2, 3, H)
    before = layer(x)
    layer.experts = ExpertLoRA(layer.experts, R)
    torch.testing.assert_close(layer(x), before)  # B is zero.
    layer(x).square().sum().backward()
    assert layer.experts.b_down.grad.any()
    assert layer.experts.experts.w_down.grad is None
    assert layer(x[:0]).shape == (0, 3, H)


def test_names_and_shapes_of_peft():
    layer = make(num_adapters=M)
    saved = layer.peft_state_dict(1, "experts.")
    deltas = layer.merged(1), layer.experts
    for part, prefix in (("gate_up", "experts.base_layer."), ("down", "experts.")):
        a, b = (saved.pop(f"{prefix}lora_{side}.weight") for side in "AB")
        delta = torch.einsum("ore,eri->eoi", b.view(len(b), R, E), a.view(E, R, -1))
        got, before = (getattr(bank, f"w_{part}") for bank in deltas)
        torch.testing.assert_close(got - before, layer.scaling * delta, rtol=1e-5, atol=1e-6)
    assert not saved
    one = make()
    one.load_peft_state_dict({**layer.peft_state_dict(2), "other": torch.ones(1)})
    for name in FACTORS:
        assert torch.equal(getattr(one, name), getattr(layer, name)[:, 2])
    with pytest.raises(ValueError, match=r"^load_peft_state_dict: base_layer.lora_A.weight must"):
        one.load_peft_state_dict({})
    with pytest.raises(ValueError, match="a_down must be of each expert"):
        make(shared=["a_down"]).load_peft_state_dict(one.peft_state_dict())


def test_what_is_refused():
    layer, (x, weights, ids) = make(), call()
    with pytest.raises(ValueError, match=r"^moe_ffn_lora: .* must"):
        layer(x[:, 1:], weights, ids)
    with pytest.raises(ValueError, match="must be frozen"):
        layer.experts.requires_grad_(True)
        layer(x, weights, ids)
    with pytest.raises(ValueError, match="adapter_ids must be None"):
        layer(x, weights, ids, adapter_ids=ids[:, 0])
    with pytest.raises(ValueError, match="rank must be at least 1"):
        ExpertLoRA(layer.experts, 0)
    with pytest.raises(ValueError, match="got 'w_down'"):
        ExpertLoRA(layer.experts, 1, shared=["w_down"])
    with pytest.raises(ValueError, match="fp8_training"):
        ExpertLoRA(Experts(E, H, I, fp8_training=True), 1)


SHAPES = [  # E, H, I, K, T, rank
    (5, 17, 13, 2, 0, 3),
    (1, 8, 8, 1, 1, 1),
    (6, 33, 40, 3, 9, 17),
    (3, 600, 530, 2, 150, 8),
    (4, 64, 48, 1, 70, 40),
]


def close(got, wanted, dtype):
    for one, other in zip(got, wanted, strict=True):
        scale = other.double().norm()
        assert (one.double() - other.double()).norm() <= 40 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes(shape, dtype):
    """Odd sizes, ranks of several tiles, experts without tokens and one with most of them."""
    experts, hidden, inner, top_k, tokens, rank = shape
    torch.manual_seed(len(str(shape)))
    layer = ExpertLoRA(Experts(experts, hidden, inner, dtype=dtype), rank, dtype=torch.float64)
    with torch.no_grad():
        for name in FACTORS:
            getattr(layer, name).normal_(0, 0.3)
    layer.experts.double()
    x = torch.randn(tokens, 2 * hidden, dtype=torch.float64)[:, ::2].to(dtype).requires_grad_()
    weights = torch.rand(tokens, top_k, dtype=torch.float64, requires_grad=True)
    ids = torch.where(torch.rand(tokens, top_k) < 0.6, 0, torch.randint(experts, (tokens, top_k)))
    if experts > 1:
        ids[ids == experts - 1] = -1
    wanted = gradients(expected(layer, x.double(), weights, ids), layer, x, weights)
    layer.experts.to(dtype)
    close(gradients(layer(x, weights, ids), layer, x, weights), wanted, dtype)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_instruction_sets(isa):
    done = run_python_at(
        isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "sizes"
    )
    assert done.returncode == 0, done.stdout


def test_rows_are_batch_invariant():
    layer, (x, weights, ids) = make(dtype=torch.float32), call(torch.float32)
    with torch.no_grad(), moe_ops.batch_invariant():
        together = layer(x, weights, ids)
        for rows in ([3], [7, 3], [0, 1, 2, 3, 4]):
            assert torch.equal(layer(x[rows], weights[rows], ids[rows]), together[rows])
