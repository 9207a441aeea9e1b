"""Weights of published formats against their layouts written down element by element, and against
the libraries that write them where these are installed."""

from __future__ import annotations

import pytest
import torch
from tests.helpers import published as layout

from moe_ops.quant import published
from moe_ops.quant.published import adapted, concatenated
from moe_ops.reference._codes import dequantized

O, D, G = 24, 256, 64


def value(weight):
    return dequantized(
        weight.codes, weight.scale, weight.zero, format=weight.format.label, dtype=torch.float64
    )


def stored_as_said(weight):
    """Its tensors have the types and shapes that the format says."""
    tensors = weight.format.tensors(weight.codes.shape[0], D)
    for part, name in (("", "codes"), ("_scale", "scale"), ("_zero", "zero")):
        t = getattr(weight, name)
        assert (None if t is None else (tuple(t.shape), t.dtype)) == tensors.get(part)


def read(method, tensors):
    if method == "compressed_tensors":
        names = ("weight_packed", "weight_scale", "weight_zero_point")
        parts = (tensors.get(n) for n in names)
        return published.from_compressed_tensors(*parts, in_features=D)
    return getattr(published, f"from_{method}")(*tensors.values())


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("method", ["gptq", "awq", "compressed_tensors"])
def test_four_bits_in_groups(method, zeros):
    codes, zero, scale = layout.random_codes(O, D, G, zeros)
    if method == "gptq":
        zero = zero.clamp(min=1)  # 0 is stored as 15, which is read as 16 by some and as 0 by us.
    weight = read(method, getattr(layout, method)(codes, zero, scale))
    stored_as_said(weight)
    assert torch.equal(value(weight).float(), layout.meaning(codes, zero, scale))
    wide = adapted(weight, weight.format.__class__("int4", G, "float32", zeros))
    stored_as_said(wide)
    assert torch.equal(value(wide), value(weight))
    two = concatenated([weight, weight])
    assert torch.equal(value(two), torch.cat([value(weight)] * 2))


@pytest.mark.parametrize("group", [G, D])
def test_packed_compressed_tensors_of_eight_bits(group):
    codes = torch.randint(-128, 128, (O, D), dtype=torch.int8)
    scale = torch.rand(O, D // group).bfloat16()
    packed = (codes.view(torch.uint8) ^ 128).view(torch.int32)
    weight = published.from_compressed_tensors(packed, scale, in_features=D, bits=8)
    stored_as_said(weight)
    steps = scale.double().repeat_interleave(group, 1)
    assert torch.equal(value(weight).double(), codes.double() * steps)
    with pytest.raises(ValueError, match="bits must be 4, or 8 without zero points, got 8 with"):
        published.from_compressed_tensors(packed, scale, codes, in_features=D, bits=8)


def test_gptq_of_eight_bits():
    codes = torch.randint(0, 256, (O, D), dtype=torch.int64)
    packed = sum(codes[:, i::4] << 8 * i for i in range(4))
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).int().T.contiguous()
    zeros = torch.full((D // G, O // 4), 0x7F7F7F7F, dtype=torch.int32)
    scales = torch.rand(D // G, O).half()
    weight = published.from_gptq(packed, zeros, scales, bits=8)
    stored_as_said(weight)
    expected = (codes - 128) * scales.T.double().repeat_interleave(G, 1)
    assert torch.equal(value(weight), expected)


def test_mxfp4():
    codes = torch.randint(0, 16, (O, D), dtype=torch.uint8)
    exponents = torch.randint(110, 130, (O, D // 32), dtype=torch.uint8)
    exponents[0, 0], exponents[0, 1] = 0, 254
    blocks = (codes[:, 0::2] | codes[:, 1::2] << 4).view(O, D // 32, 16)
    weight = published.from_mxfp4(blocks, exponents)
    stored_as_said(weight)
    powers = 2.0 ** (exponents.double() - 127).repeat_interleave(32, 1)
    assert torch.equal(value(weight), layout.e2m1(codes) * powers)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_ggml(kind):
    data = layout.random_ggml(kind, O, D)
    weight = published.from_ggml(data, kind)
    stored_as_said(weight)
    assert weight.codes.nbytes + weight.scale.nbytes == data.nbytes  # As stored.
    torch.testing.assert_close(value(weight), layout.ggml_meaning(kind, data), rtol=1e-12, atol=0)


def test_fp8_and_int8_channels():
    q = torch.randn(O, D).to(torch.float8_e4m3fn)
    weight = published.from_fp8(q, torch.rand(1, 2))
    stored_as_said(weight)
    codes, scale = torch.randint(-128, 128, (O, D), dtype=torch.int8), torch.rand(O, 1).bfloat16()
    weight = published.from_int8_channels(codes, scale)
    stored_as_said(weight)
    assert torch.equal(value(weight), codes * scale.double())


@pytest.mark.parametrize("shape", [(O, 1), (O,), (1,), ()])
def test_fp8_channels(shape):
    codes, scale = torch.randn(O, D).to(torch.float8_e4m3fn), torch.rand(shape).bfloat16()
    weight = published.from_fp8_channels(codes, scale)
    stored_as_said(weight)
    assert torch.equal(value(weight), codes.double() * scale.double().reshape(-1, 1))
    with pytest.raises(ValueError, match=r"weight_scale must be one number or one per output"):
        published.from_fp8_channels(codes, torch.rand(2))


def test_what_cannot_be_held_is_refused():
    codes, zero, scale = layout.random_codes(O, D, G, True)
    tensors = layout.gptq(codes, zero, scale)
    mixed = tensors | {"g_idx": tensors["g_idx"].flip(0)}
    with pytest.raises(ValueError, match=r"groups must be of consecutive inputs"):
        published.from_gptq(*mixed.values())
    weight = published.from_awq(*layout.awq(codes, zero, scale).values())
    plain = weight.format.__class__("int4", G)
    with pytest.raises(ValueError, match=r"zero points of symmetric weights must be 8"):
        adapted(weight, plain)
    with pytest.raises(ValueError, match=r"must be one of Q4_0, Q8_0, Q4_K, Q6_K, got Q5_K"):
        published.from_ggml(torch.zeros(1, 176, dtype=torch.uint8), "Q5_K")


@pytest.mark.parametrize("library", ["modelopt", "compressed-tensors"])
def test_nvfp4(library):
    codes = torch.randint(0, 16, (O, D), dtype=torch.uint8)
    scale = (torch.rand(O, D // 16) * 400 + 40).to(torch.float8_e4m3fn)
    factor = 2.0**-9
    parts = layout.nvfp4(codes, scale, factor, library).values()
    weight = published.from_nvfp4(*parts, inverse=library != "modelopt")
    assert torch.equal(value(weight).float(), layout.nvfp4_meaning(codes, scale, factor))
    shapes = {part: list(shape) for part, (shape, _) in weight.format.tensors(O, D).items()}
    assert shapes == {"": list(weight.codes.shape), "_scale": list(weight.scale.shape)}
    # Gate and up may have factors of their own.
    other = published.from_nvfp4(*layout.nvfp4(codes, scale, 0.5, "modelopt").values())
    both = value(concatenated([weight, other]))
    assert torch.equal(both, torch.cat([value(weight), value(other)]))
    packed, scale, factor = parts
    with pytest.raises(ValueError, match=r"from_nvfp4: scale must be for 16 inputs each"):
        published.from_nvfp4(packed[:, ::2].contiguous(), scale, factor)
    with pytest.raises(ValueError, match=r"from_nvfp4: scale must be float8_e4m3fn"):
        published.from_nvfp4(packed, scale.float(), factor)


# ------------------------------------------------------------------ files of the libraries' own


def test_the_package_gguf():
    gguf = pytest.importorskip("gguf")
    for kind in ("Q8_0", "Q4_0", "Q4_K", "Q6_K"):
        number = getattr(gguf.GGMLQuantizationType, kind)
        data = layout.random_ggml(kind, O, D)
        if kind in ("Q8_0", "Q4_0"):  # What its Python code can write.
            data = torch.from_numpy(gguf.quants.quantize(torch.randn(O, D).numpy(), number))
        expected = torch.from_numpy(gguf.quants.dequantize(data.numpy(), number))
        got = value(published.from_ggml(data, kind)).float()
        # It multiplies and subtracts in fp32.
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_package_compressed_tensors(symmetric):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=4, group_size=G, strategy="group", symmetric=symmetric)
    codes, zero, scale = layout.random_codes(O, D, G, not symmetric)
    weight = layout.meaning(codes, zero, scale.bfloat16())
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format="pack-quantized")
    state = {
        "weight": weight,
        "weight_scale": scale.bfloat16(),
        "weight_zero_point": (zero - 8).to(torch.int8),
    }
    packed = PackedQuantizationCompressor.compress(dict(state), scheme)
    names = ("weight_packed", "weight_scale", "weight_zero_point")
    parts = (packed.get(n) for n in names)
    got = published.from_compressed_tensors(*parts, in_features=D)
    expected = PackedQuantizationCompressor.decompress(dict(packed), scheme)["weight"]
    torch.testing.assert_close(value(got).to(expected.dtype), expected, rtol=1e-2, atol=0)
    assert torch.equal(value(got).float(), weight)


def test_mxfp4_of_transformers():
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = torch.randint(0, 256, (2, O, D // 32, 16), dtype=torch.uint8)
    scales = torch.randint(110, 130, (2, O, D // 32), dtype=torch.uint8)
    expected = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    got = value(published.from_mxfp4(blocks, scales)).float()
    # Their result is [E, D, O].
    assert torch.equal(got, expected.transpose(1, 2))
