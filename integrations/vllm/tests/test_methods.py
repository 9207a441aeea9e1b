"""The methods without an engine: what they refuse and what they compute."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from moe_ops_vllm import register
from moe_ops_vllm.base import StaysWithVllm, Unquantized
from moe_ops_vllm.checkpoints import MoeOpsConfig, MoeOpsQuantized
from moe_ops_vllm.layers import CLASSES
from moe_ops_vllm.methods import method_for
from moe_ops_vllm.quantized import Fp8Blocks, GptOssMxfp4
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from moe_ops import reference
from moe_ops.quant import quantize_fp8_blocks

T, E, K, H, I = 9, 4, 2, 64, 32


@pytest.fixture(autouse=True)
def configured():
    with set_current_vllm_config(VllmConfig()):
        yield


def test_registration(monkeypatch):
    monkeypatch.setattr("vllm.platforms.current_platform.is_cpu", lambda: True)
    for name in CLASSES:
        op_registry_oot.pop(name, None)
    monkeypatch.setenv("MOE_OPS_VLLM", "0")
    register()
    assert not set(CLASSES) & set(op_registry_oot)
    monkeypatch.delenv("MOE_OPS_VLLM")
    register()
    register()
    assert {name: op_registry_oot[name] for name in CLASSES} == CLASSES


# --- what stays with vLLM


def moe_config(**changes):
    parallel = {"enable_eplb": False, "dp_size": 1, "use_ep": False}
    parallel |= {k: changes.pop(k) for k in list(changes) if k in parallel}
    settings = {
        "in_dtype": torch.bfloat16,
        "activation": MoEActivation.SILU,
        "moe_parallel_config": SimpleNamespace(**parallel),
        "is_act_and_mul": True,
        "has_bias": False,
        "w13_num_shards": 2,
        "intermediate_size_per_partition": I,
        "intermediate_size_per_partition_unpadded": I,
        "hidden_dim_unpadded": H,
        "max_capture_size": 0,
    }
    return SimpleNamespace(**(settings | changes))


NO_LORA = SimpleNamespace(lora_config=None)


def plain_layer():
    return SimpleNamespace(swiglu_limit=None, swiglu_alpha=None, swiglu_beta=None)


def choose(moe, layer=None, quant_config=None, lora=None):
    config = SimpleNamespace(lora_config=lora)
    return method_for(layer or plain_layer(), "experts", quant_config, moe, config)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"enable_eplb": True}, "EPLB"),
        ({"dp_size": 2, "use_ep": True}, "data parallel"),
        ({"in_dtype": torch.float64}, "float64"),
        ({"activation": MoEActivation.SWIGLUSTEP}, "swiglustep"),
    ],
)
def test_configurations_that_stay(changes, reason):
    with pytest.raises(StaysWithVllm, match=reason):
        choose(moe_config(**changes))


def test_settings_that_stay():
    with pytest.raises(StaysWithVllm, match="LoRA"):
        choose(moe_config(), lora=object())
    limited = SimpleNamespace(swiglu_limit=7.0, swiglu_alpha=None, swiglu_beta=None)
    with pytest.raises(StaysWithVllm, match="has a limit"):
        choose(moe_config(activation=MoEActivation.GELU), limited)
    limited.swiglu_alpha = 1.5
    with pytest.raises(StaysWithVllm, match="must have alpha 1"):
        choose(moe_config(), limited)
    unknown = SimpleNamespace(online_quantization_config=None, get_name=lambda: "quip")
    with pytest.raises(StaysWithVllm, match="quip"):
        choose(moe_config(), quant_config=unknown)


@pytest.mark.parametrize("more", [{"x_scale": True}, {"layers": {"experts": "int4 g64"}}])
def test_checkpoints_of_moe_ops_that_are_refused(more):
    with pytest.raises(ValueError, match="without x_scale and layers"):
        MoeOpsConfig.from_config({"format": "int8"} | more)


def test_tensors_of_a_checkpoint_of_moe_ops(monkeypatch):
    """Tensors of other sizes are refused, as are missing ones; a pattern keeps experts float."""
    moe = moe_config(in_dtype=torch.float32)
    moe.moe_parallel_config.tp_size, moe.moe_parallel_config.tp_rank = 1, 0
    config = MoeOpsConfig("int4 g32", ["*layers.1.*"])
    assert isinstance(choose(moe, quant_config=config), MoeOpsQuantized)
    skipped = method_for(plain_layer(), "model.layers.1.experts", config, moe, NO_LORA)
    assert isinstance(skipped, Unquantized)
    method = MoeOpsQuantized(moe, config)
    layer = Layer(moe)
    layer.layer_name = "layer.0"
    method.create_weights(layer, E, H, I, torch.float32)
    with pytest.raises(
        ValueError, match=r"layer\.0\.w_down: expected \[4, 64, 16\] on rank 0 of 1"
    ):
        method.load(layer, "w_down", torch.zeros(E, H, I, dtype=torch.uint8))
    with pytest.raises(ValueError, match="no such tensor"):
        method.load(layer, "w_down_zero", torch.zeros(E, H, 1))
    with pytest.raises(ValueError, match="the checkpoint has no w13_moe_ops_scale, w13_weight"):
        method.process_weights_after_loading(layer)


# --- what they compute


class Layer(nn.Module):
    """The attributes of RoutedExperts that a method reads."""

    def __init__(self, moe, expert_map=None, on_input=False) -> None:
        super().__init__()
        self.moe_config, self.activation = moe, moe.activation
        self.expert_map, self.apply_router_weight_on_input = expert_map, on_input
        self.swiglu_limit = self.swiglu_alpha = self.swiglu_beta = None
        self._loaded_expert_biases: set[str] = set()


def filled(method, moe, **options):
    """A layer with random parameters."""
    layer = Layer(moe, **options)
    method.create_weights(layer, E, H, I, moe.in_dtype, weight_loader=None)
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.2)
    return layer


def inputs(dtype):
    ids = torch.rand(T, E).topk(K).indices.int()
    return torch.randn(T, H).to(dtype), torch.rand(T, K), ids


def check(y, x, up, down, weights, ids, **options):
    want = reference.moe_ffn(x.double(), up.double(), down.double(), weights, ids, **options)
    scale = 2e-2 if x.dtype == torch.bfloat16 else 3e-3 if x.dtype == torch.float16 else 1e-5
    torch.testing.assert_close(y.double(), want, rtol=scale, atol=scale * want.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("activation", "limit", "name"),
    [
        (MoEActivation.SILU, None, "swiglu"),
        (MoEActivation.SILU, 0.5, "swiglu_clamped"),
        (MoEActivation.GELU_TANH, None, "geglu_tanh"),
        (MoEActivation.SWIGLUOAI, 0.5, "swiglu_oai"),
        (MoEActivation.SWIGLUOAI_UNINTERLEAVE, None, "swiglu_oai"),
        (MoEActivation.RELU2_NO_MUL, None, "relu2"),
    ],
)
def test_float_weights(dtype, activation, limit, name):
    moe = moe_config(
        in_dtype=dtype, activation=activation, has_bias=True, is_act_and_mul=activation.is_gated
    )
    method = Unquantized(moe)
    layer = filled(method, moe)
    layer.swiglu_limit = limit
    up, down = layer.w13_weight.data.clone(), layer.w2_weight.data.clone()
    method.process_weights_after_loading(layer)
    assert layer.w13_weight.untyped_storage().nbytes() == up.element_size()
    x, weights, ids = inputs(dtype)
    check(
        method.apply(layer, x, weights, ids),
        *(x, up, down, weights, ids),
        activation=name,
        **({} if limit is None else {"limit": limit}),
        interleaved=activation == MoEActivation.SWIGLUOAI,
        b_gate_up=layer.w13_bias.data.double(),
        b_down=layer.w2_bias.data.double(),
    )


def test_experts_of_other_ranks():
    """This rank has four experts of eight; routing has global ids."""
    expert_map = torch.tensor([-1, 0, -1, 1, -1, 2, 3, -1], dtype=torch.int32)
    moe = moe_config(in_dtype=torch.float32)
    method = Unquantized(moe)
    layer = filled(method, moe, expert_map=expert_map, on_input=True)
    up, down = layer.w13_weight.data.clone(), layer.w2_weight.data.clone()
    method.process_weights_after_loading(layer)
    x, weights, _ = inputs(torch.float32)
    ids = torch.rand(T, 8).topk(K).indices.int()
    check(
        method.apply(layer, x, weights, ids),
        *(x, up, down, weights, expert_map[ids.long()]),
        apply_router_weight_on_input=True,
    )


def test_mxfp4():
    moe = moe_config(activation=MoEActivation.SWIGLUOAI, has_bias=True)
    method = GptOssMxfp4(moe)
    layer = Layer(moe)
    method.create_weights(layer, E, H, I, torch.bfloat16)
    for name in ("w13_weight", "w2_weight"):
        getattr(layer, name).data.random_(0, 256)
        getattr(layer, f"{name}_scale").data.random_(120, 124)
    codes = {n: p.data.clone() for n, p in layer.named_parameters()}
    method.process_weights_after_loading(layer)
    x, weights, ids = inputs(torch.bfloat16)
    y = method.apply(layer, x, weights, ids)
    want = reference.moe_ffn_quantized(
        x.double(),
        *(codes[n] for n in ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale")),
        weights,
        ids,
        format="mxfp4",
        activation="swiglu_oai",
        interleaved=True,
    )
    torch.testing.assert_close(y.double(), want, rtol=2e-2, atol=2e-2 * want.abs().max().item())


def test_fp8_blocks(monkeypatch):
    alone = SimpleNamespace(world_size=1)
    monkeypatch.setattr("vllm.distributed.parallel_state.get_tp_group", lambda: alone)
    moe = moe_config(in_dtype=torch.float32, intermediate_size_per_partition=128)
    config = SimpleNamespace(
        weight_block_size=[128, 128],
        is_checkpoint_fp8_serialized=True,
        activation_scheme="dynamic",
    )
    method = Fp8Blocks(moe, config)
    layer = Layer(moe)
    method.create_weights(layer, E, 256, 128, torch.float32)
    wide = {}
    for name, shape in (("w13", (E, 256, 256)), ("w2", (E, 256, 128))):
        q, scale = quantize_fp8_blocks(torch.randn(shape))
        getattr(layer, f"{name}_weight").data.copy_(q)
        getattr(layer, f"{name}_weight_scale_inv").data.copy_(scale)
        grown = scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
        wide[name] = q.double() * grown[:, : shape[1], : shape[2]]
    method.process_weights_after_loading(layer)
    x, ids = torch.randn(T, 256) / 16, torch.rand(T, E).topk(K).indices.int()
    weights = torch.rand(T, K)
    check(method.apply(layer, x, weights, ids), x, wide["w13"], wide["w2"], weights, ids)


def test_blocks_that_stay():
    config = SimpleNamespace(weight_block_size=[64, 64], is_checkpoint_fp8_serialized=True)
    with pytest.raises(StaysWithVllm, match="128 x 128"):
        Fp8Blocks(moe_config(), config)
