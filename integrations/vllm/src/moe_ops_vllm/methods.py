"""The choice of the method that computes a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4Config
from vllm.model_executor.layers.quantization.utils.gptq_utils import get_dynamic_override
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

from moe_ops_vllm import checkpoints
from moe_ops_vllm.base import MoeOpsMethod, StaysWithVllm, Unquantized, activation_for
from moe_ops_vllm.quantized import (
    Awq,
    CompressedTensorsInt8,
    CompressedTensorsNvfp4,
    CompressedTensorsPacked,
    Fp8Blocks,
    GptOssMxfp4,
    Gptq,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def method_for(
    layer: nn.Module, prefix: str, quant_config: Any, moe: FusedMoEConfig, config: VllmConfig
) -> MoeOpsMethod:
    """Returns the method for a layer.

    Args:
        layer: RoutedExperts under construction; its method does not exist yet.
        prefix: the layer's name.
        quant_config: of the checkpoint, or None.
        moe: sizes and parallelism of the layer.
        config: of the engine.

    Raises:
        StaysWithVllm: moe_ops does not compute this layer.
    """
    parallel = moe.moe_parallel_config
    if config.lora_config is not None:
        raise StaysWithVllm("LoRA adapters on experts need vLLM's Triton kernels")
    if parallel.enable_eplb:
        raise StaysWithVllm("EPLB moves weights between ranks, which packed weights do not allow")
    if parallel.dp_size > 1 and parallel.use_ep:
        raise StaysWithVllm("data parallel ranks that share experts exchange tokens in vLLM")
    if moe.in_dtype not in _DTYPES:
        raise StaysWithVllm(f"moe_ops computes float32, bfloat16 and float16, not {moe.in_dtype}")
    activation_for(layer, moe.activation)
    if quant_config is None:
        return Unquantized(moe)
    if getattr(quant_config, "online_quantization_config", None) is not None:
        raise StaysWithVllm("vLLM quantizes this checkpoint while it loads it")
    for kind, make in _BY_CONFIG.items():
        if isinstance(quant_config, kind):
            return make(layer, prefix, quant_config, moe)
    raise StaysWithVllm(f"moe_ops does not read checkpoints of {quant_config.get_name()}")


def _compressed_tensors(
    layer: Any, prefix: str, config: CompressedTensorsConfig, moe: FusedMoEConfig
) -> MoeOpsMethod:
    config._add_fused_moe_to_target_scheme_map()
    projections = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
    schemes = [config.get_scheme_dict(layer, f"{prefix}.0.{name}") for name in projections]
    scheme = schemes[0]
    if any(other != scheme for other in schemes):
        raise StaysWithVllm("gate, up and down have different schemes")
    if scheme is None:
        return Unquantized(moe)
    weights, inputs = scheme.get("weights"), scheme.get("input_activations")
    if config._is_wNa16_group_channel(weights, inputs):
        if scheme.get("format") != "pack-quantized":
            raise StaysWithVllm(f"moe_ops does not read {scheme.get('format')}")
        return CompressedTensorsPacked(moe, weights)
    if config._is_nvfp4_format(weights):
        return CompressedTensorsNvfp4(moe)
    if config._is_dynamic_token_w8a8(weights, inputs):
        return CompressedTensorsInt8(moe, weights, inputs)
    raise StaysWithVllm("moe_ops does not read this scheme of compressed-tensors")


def _gptq(layer: Any, prefix: str, config: AutoGPTQConfig, moe: FusedMoEConfig) -> MoeOpsMethod:
    override = get_dynamic_override(config, layer_name=prefix) if config.dynamic else None
    if override is False:
        return Unquantized(moe)
    if override:
        raise StaysWithVllm("this layer has settings of its own")
    return Gptq(moe, config)


def _awq(layer: Any, prefix: str, config: AutoAWQConfig, moe: FusedMoEConfig) -> MoeOpsMethod:
    skipped = getattr(config, "modules_to_not_convert", None) or []
    if is_layer_skipped(prefix, skipped, match_mode="substring"):
        return Unquantized(moe)
    return Awq(moe, config)


def _fp8(layer: Any, prefix: str, config: Fp8Config, moe: FusedMoEConfig) -> MoeOpsMethod:
    if is_layer_skipped(
        prefix=prefix,
        ignored_layers=config.ignored_layers,
        fused_mapping=config.packed_modules_mapping,
    ):
        return Unquantized(moe)
    return Fp8Blocks(moe, config)


def _mxfp4(layer: Any, prefix: str, config: GptOssMxfp4Config, moe: FusedMoEConfig) -> MoeOpsMethod:
    return GptOssMxfp4(moe)


_BY_CONFIG: dict[type, Any] = {
    CompressedTensorsConfig: _compressed_tensors,
    AutoGPTQConfig: _gptq,
    AutoAWQConfig: _awq,
    Fp8Config: _fp8,
    GptOssMxfp4Config: _mxfp4,
    checkpoints.MoeOpsConfig: checkpoints.method,
}
