"""QuantizedExperts: the call, the buffers, what may and may not happen to them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.moe import build_moe
from tests.helpers.quantized import weight_config

import moe_ops
from moe_ops import quant
from moe_ops.layers import Experts
from moe_ops.quant import QuantizedExperts

FORMATS = [("int8", None), ("int4", 32), ("int4", 64), ("int4", 128)]
E, H, I, K, T = 5, 128, 256, 2, 23


def make(activation="swiglu", bias=False, interleaved=False, sizes=(E, H, I), **kwargs):
    experts = Experts(*sizes, activation=activation, bias=bias, interleaved=interleaved, **kwargs)
    with torch.no_grad():
        for b in (experts.b_gate_up, experts.b_down):
            if b is not None:
                b.normal_()
    return experts.eval()


def routing(tokens=T, dtype=torch.float32, hidden=H):
    ids = torch.randint(-1, E - 1, (tokens, K))  # The last expert is idle, some slots are empty.
    return torch.randn(tokens, hidden, dtype=dtype), torch.rand(tokens, K), ids


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


# What the kernel may add to the rounding of the weights, relative to the output. It may round
# activations to 8 bits in blocks, an error uniform in +-amax / 254: rms amax / 440. The largest of
# 128 normal numbers is below 4.5 of their rms, so that is 1 % at the input and as much between the
# products (heavier tails there: twice that).
KERNEL = 0.03


@pytest.mark.parametrize(
    ("activation", "bias", "interleaved"),
    [
        ("swiglu", False, False),
        ("swiglu", True, True),
        ("swiglu_oai", True, True),
        ("geglu_tanh", True, False),
        ("reglu", False, False),
        ("relu2", False, False),
        ("gelu", True, False),
    ],
)
@pytest.mark.parametrize(("format", "group_size"), FORMATS)
@pytest.mark.parametrize("on_input", [False, True])
def test_computes_what_its_float_form_does(
    activation, bias, interleaved, format, group_size, on_input
):
    experts = make(activation, bias, interleaved, alpha=1.5, limit=1.0)
    quantized = moe_ops.quantize(experts, weight_config(format, group_size))
    x, weights, ids = routing()
    with torch.no_grad():
        got = quantized(x, weights, ids, apply_router_weight_on_input=on_input)
        want = quantized.dequantize()(x, weights, ids, apply_router_weight_on_input=on_input)
        exact = experts(x, weights, ids, apply_router_weight_on_input=on_input)
    assert relative(got, want) < KERNEL
    # Steps: amax / 127 for 8 bits, 1/8 of the largest of a group for 4.
    assert relative(got, exact) < (0.05 if format == "int8" else 0.25)
    assert not torch.equal(got, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("format", "group_size"), FORMATS[:2])
def test_x_keeps_its_dtype(dtype, format, group_size):
    quantized = moe_ops.quantize(make(bias=True), weight_config(format, group_size))
    x, weights, ids = routing(dtype=dtype)
    with torch.no_grad():
        y = quantized(x, weights, ids)
        want = quantized.dequantize()(x.float(), weights, ids)
    assert y.dtype == dtype
    assert relative(y, want) < KERNEL + 2 * torch.finfo(dtype).eps


def test_no_tokens_and_no_experts_for_a_token():
    quantized = moe_ops.quantize(make(), moe_ops.Int4WeightConfig())
    x, weights, ids = routing()
    with torch.no_grad():
        assert quantized(x[:0], weights[:0], ids[:0]).shape == (0, H)
        assert not quantized(x, weights, torch.full_like(ids, -1)).any()


@pytest.mark.parametrize(("format", "group_size"), FORMATS)
def test_memory(format, group_size):
    experts = make(bias=True)
    quantized = moe_ops.quantize(experts, weight_config(format, group_size))
    numbers = experts.w_gate_up.numel() + experts.w_down.numel()
    bits = 8 if format == "int8" else 4
    scales = E * (2 * I + H) if format == "int8" else numbers // group_size
    biases = 4 * E * (2 * I + H)
    assert quantized.num_bytes == numbers * bits // 8 + 4 * scales + biases
    assert f"size={quantized.num_bytes / 2**20:.1f} MiB" in repr(quantized)
    assert quantized.format_name in repr(quantized)


def test_buffers_and_no_parameters():
    quantized = moe_ops.quantize(make(), moe_ops.Int4WeightConfig())
    assert not list(quantized.parameters())
    assert quantized.w_gate_up.dtype == torch.uint8
    assert quantized.w_gate_up.shape == (E, 2 * I, H // 2)
    assert quantized.w_gate_up_scale.shape == (E, 2 * I, H // 64)
    assert quantized.w_down.shape == (E, H, I // 2)
    assert list(quantized.state_dict()) == [
        "w_gate_up",
        "w_gate_up_scale",
        "w_down",
        "w_down_scale",
    ]


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.type(torch.bfloat16),
        lambda m: m.to("meta").to_empty(device="cpu").to(torch.bfloat16),
    ],
    ids=["to", "half", "double", "type", "meta"],
)
@pytest.mark.parametrize("calibrated", [False, True])
def test_casts_touch_only_biases(cast, calibrated):
    batch = [routing()]
    quantized = moe_ops.quantize(
        make(bias=True), moe_ops.Int4WeightConfig(), calibration=batch if calibrated else None
    )
    before = copy.deepcopy(quantized)
    after = cast(quantized)
    for name, buffer in after.named_buffers():
        old = getattr(before, name)
        if name.startswith("b_"):
            assert buffer.dtype != old.dtype
        else:
            assert buffer.dtype == old.dtype and buffer.shape == old.shape
    after.check()


def test_a_cast_keeps_the_numbers():
    quantized = moe_ops.quantize(
        make(bias=True), moe_ops.Int4WeightConfig(), calibration=[routing()]
    )
    before = copy.deepcopy(quantized)
    quantized.to(torch.bfloat16).float()
    for name, buffer in quantized.named_buffers():
        old = getattr(before, name)
        assert torch.equal(buffer, old.bfloat16().float() if name.startswith("b_") else old)


@pytest.mark.parametrize(("format", "group_size"), FORMATS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_state_dict_round_trip(tmp_path, format, group_size, calibrated):
    batch = routing()
    quantized = moe_ops.quantize(
        make(bias=True),
        weight_config(format, group_size),
        calibration=[batch] if calibrated else None,
    )
    save_file(quantized.state_dict(), tmp_path / "experts.safetensors")
    config = quantized.config()
    fresh = QuantizedExperts(E, **config)
    fresh.load_state_dict(load_file(tmp_path / "experts.safetensors"))
    with torch.no_grad():
        want = quantized(*batch)
        assert torch.equal(fresh(*batch), want)
        assert torch.equal(pickle.loads(pickle.dumps(quantized))(*batch), want)
        assert torch.equal(copy.deepcopy(quantized)(*batch), want)


def test_float_weights_are_not_loaded():
    experts = make()
    fresh = QuantizedExperts(E, H, I, format="int8")
    message = r"w_gate_up must be int8 of shape \[5, 512, 128\], got float32 of shape"
    with pytest.raises(RuntimeError, match=message):
        fresh.load_state_dict(experts.state_dict(), strict=False)
    assert not fresh.w_gate_up.any()


def test_another_format_is_not_loaded():
    state = moe_ops.quantize(make(), moe_ops.Int4WeightConfig(32)).state_dict()
    with pytest.raises(RuntimeError, match=r"w_gate_up_scale must be float32 .*\[5, 512, 2\], got"):
        QuantizedExperts(E, H, I, format="int4 g64").load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"w_down must be int8 of shape .* got uint8"):
        QuantizedExperts(E, H, I, format="int8").load_state_dict(state)
    halves = {k: v.half() if k.endswith("scale") else v for k, v in state.items()}
    with pytest.raises(RuntimeError, match=r"must be float32 .* got float16"):
        QuantizedExperts(E, H, I, format="int4 g32").load_state_dict(halves)


def test_missing_keys_are_reported():
    state = moe_ops.quantize(make(), moe_ops.Int4WeightConfig()).state_dict()
    del state["w_down_scale"]
    with pytest.raises(RuntimeError, match=r"Missing key.*w_down_scale"):
        QuantizedExperts(E, H, I).load_state_dict(state)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_gradients_are_those_of_the_dequantized_layer(format):
    """The forward has the bits of inference; gradients know nothing of its rounding of x."""
    quantized = moe_ops.quantize(make(), weight_config(format))
    x, weights, ids = routing()
    with torch.no_grad():
        want = quantized(x, weights, ids)
    results = []
    for layer in (quantized, quantized.dequantize().requires_grad_(False)):
        leaves = [t.detach().requires_grad_() for t in (x, weights)]
        y = layer(*leaves, ids)
        results.append((y, *torch.autograd.grad(y.sin().sum(), leaves)))
    assert torch.equal(results[0][0], want)
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 0.03 * theirs.norm()


def test_experts_alone_are_left_as_they_are():
    experts = make()
    before = copy.deepcopy(experts.state_dict())
    quantized = moe_ops.quantize(experts, moe_ops.Int4WeightConfig())
    assert all(torch.equal(experts.state_dict()[k], v) for k, v in before.items())
    assert not quantized.training
    assert moe_ops.quantize(experts.train(), moe_ops.Int4WeightConfig()).training
    with pytest.raises(ValueError, match=r"model must hold float experts, got Linear"):
        moe_ops.quantize(torch.nn.Linear(2, 2), moe_ops.Int4WeightConfig())


def test_dequantize_is_close_to_the_bank():
    experts = make(bias=True, interleaved=True)
    x, weights, ids = routing()
    x *= torch.logspace(-1, 1, H)
    for calibration in (None, [(x, weights, ids)]):
        quantized = moe_ops.quantize(experts, moe_ops.Int8WeightConfig(), calibration=calibration)
        back = quantized.dequantize(torch.float64)
        assert relative(back.w_gate_up, experts.w_gate_up) < 0.01
        assert relative(back.w_down, experts.w_down) < 0.01
        assert torch.equal(back.b_gate_up.float(), experts.b_gate_up)
        assert back.interleaved and back.activation == experts.activation
        assert back.w_down.requires_grad


def test_select():
    batch = routing()
    quantized = moe_ops.quantize(make(bias=True), moe_ops.Int4WeightConfig(), calibration=[batch])
    x, weights, _ = batch
    few = quantized.select([3, 1])
    ids = torch.randint(0, 2, (T, K))
    with torch.no_grad():
        got = few(x, weights, ids)
        assert torch.equal(got, quantized(x, weights, torch.tensor([3, 1])[ids]))
    assert few.num_experts == 2
    with pytest.raises(ValueError, match=r"QuantizedExperts.select: ids"):
        quantized.select([E])


@pytest.mark.parametrize("operation", ["append", "split", "merge"])
def test_other_bank_operations_need_floats(operation):
    quantized = moe_ops.quantize(make(), moe_ops.Int4WeightConfig())
    with pytest.raises(NotImplementedError, match=rf"{operation} needs float weights; call deq"):
        getattr(quantized, operation)(1)


def test_in_a_moe():
    torch.manual_seed(0)
    layer = build_moe(H, I, E, K, num_shared_experts=1, router="qwen3_moe").eval()
    x = torch.randn(2, 9, H)
    with torch.no_grad():
        want = layer(x)
        returned = moe_ops.quantize(layer, moe_ops.Int8WeightConfig())
        assert returned is layer and isinstance(layer.experts, QuantizedExperts)
        assert relative(layer(x), want) < 0.05
        small = layer.select([0, 2, 4])
        mask = torch.tensor([True, False, True, False, True])
        torch.testing.assert_close(small(x), layer(x, expert_mask=mask))
    assert isinstance(small.experts, QuantizedExperts)


def test_pack_weights_skips_with_a_word():
    layer = build_moe(H, I, E, K).eval()
    both = torch.nn.Sequential(layer, build_moe(H, I, E, K).eval())
    moe_ops.quantize(layer, moe_ops.Int4WeightConfig())
    with pytest.warns(UserWarning, match="pack_weights: skipped 1 bank of quantized experts"):
        assert layer.pack_weights() == 0
    with pytest.warns(UserWarning, match="skipped 1 bank"):
        size = moe_ops.pack_weights(both)
    assert size == moe_ops.packed_weight_bytes(both[1]) > 0
    assert layer.unpack_weights() == 0
    moe_ops.unpack_weights(both)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"format": "int2"}, r"format must be one of int8, int4, mxfp4, .*, got 'int2'"),
        ({"format": "mxfp4 g32"}, r"group_size and zero_points must not be given for mxfp4"),
        ({"format": "int8, int8, int8"}, r"format must be one name or two, got 'int8, int8, int8'"),
        ({"format": "int4 g48"}, r"group_size must be a multiple of 32, got 48"),
        ({"hidden_size": 96}, r"features of w_gate_up must be a multiple.* got 96; .*int4 g32"),
        ({"intermediate_size": 40}, r"features of w_down must be a multiple.*got 40; use int8"),
        ({"num_experts": 0}, r"num_experts must be at least 1, got 0"),
        ({"activation": "tanh"}, r"activation must be one of .* got 'tanh'"),
        ({"activation": "relu", "interleaved": True}, r"interleaved must be False .* got True"),
    ],
)
def test_bad_arguments(kwargs, message):
    arguments = {"num_experts": E, "hidden_size": H, "intermediate_size": I, **kwargs}
    with pytest.raises(ValueError, match=rf"QuantizedExperts: .*{message}"):
        QuantizedExperts(**arguments)


def test_check_names_the_buffer():
    quantized = moe_ops.quantize(make(), moe_ops.Int4WeightConfig())
    quantized.w_down_scale = quantized.w_down_scale.double()
    with pytest.raises(ValueError, match=r"here: w_down_scale must be float32 .* got float64"):
        quantized.check("here")


def test_compiles():
    quantized = moe_ops.quantize(make(), moe_ops.Int4WeightConfig())
    batch = routing()
    compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(*batch), quantized(*batch))


def test_report_of_a_bank():
    experts = make()
    batches = [routing(), routing()]
    baseline = quant.collect_calibration(experts, batches)
    quantized = moe_ops.quantize(experts, moe_ops.Int4WeightConfig(32))
    report = quant.compare_quality(quantized, baseline)
    (bank,) = report.banks
    assert bank.name == "experts" and bank.format == "int4 g32" and bank.num_tokens == 2 * T
    x, weights, ids = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        want = relative(quantized(x, weights, ids), experts(x, weights, ids))
    assert bank.error == pytest.approx(want, rel=1e-3)
    assert bank.bytes_after == quantized.num_bytes
