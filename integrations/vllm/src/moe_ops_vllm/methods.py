"""vLLM's methods of experts, computed by moe_ops.

A method creates the parameters that vLLM's loader fills, in the layout of the checkpoint, turns
them into what moe_ops reads when all are there, and computes a batch. The parameters are those of
vLLM's own methods, whose constructors are not called: they look for a kernel of vLLM and raise an
error where there is none.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig, AutoAWQMoEMethod
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig, AutoGPTQMoEMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w4a4_nvfp4 import (  # noqa: E501
    CompressedTensorsW4A4Nvfp4MoEMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w8a8_int8 import (  # noqa: E501
    CompressedTensorsW8A8Int8MoEMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16 import (  # noqa: E501
    CompressedTensorsWNA16MoEMethod,
)
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8MoEMethod
from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4Config, GptOssMxfp4MoEMethod
from vllm.model_executor.layers.quantization.utils.gptq_utils import get_dynamic_override
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

import moe_ops
from moe_ops.quant import published
from moe_ops.quant.published import StoredWeight
from moe_ops.weight_formats import GROUP_SIZES, WeightFormat

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ACTIVATIONS = {
    MoEActivation.SILU: "swiglu",
    MoEActivation.GELU: "geglu",
    MoEActivation.GELU_TANH: "geglu_tanh",
    MoEActivation.SWIGLUOAI: "swiglu_oai",
    MoEActivation.SWIGLUOAI_UNINTERLEAVE: "swiglu_oai",
    MoEActivation.SILU_NO_MUL: "silu",
    MoEActivation.GELU_NO_MUL: "gelu",
    MoEActivation.GELU_TANH_NO_MUL: "gelu_tanh",
    MoEActivation.RELU2_NO_MUL: "relu2",
}


class StaysWithVllm(Exception):
    """The reason why a layer is left to vLLM, as the end of a sentence."""


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
    if moe.activation not in _ACTIVATIONS:
        raise StaysWithVllm(f"moe_ops has no activation {moe.activation.value}")
    limited = any(
        getattr(layer, name, None) is not None
        for name in ("swiglu_limit", "swiglu_alpha", "swiglu_beta")
    )
    if limited and _ACTIVATIONS[moe.activation] != "swiglu_oai":
        raise StaysWithVllm(f"{moe.activation.value} of this model has limits of its own")
    if getattr(layer, "swiglu_beta", None) not in (None, 1.0):
        raise StaysWithVllm(f"swigluoai must add 1 to the up half, got {layer.swiglu_beta}")
    if quant_config is None:
        return Unquantized(moe)
    if getattr(quant_config, "online_quantization_config", None) is not None:
        raise StaysWithVllm("vLLM quantizes this checkpoint while it loads it")
    for kind, make in _BY_CONFIG.items():
        if isinstance(quant_config, kind):
            return make(layer, prefix, quant_config, moe)
    raise StaysWithVllm(f"moe_ops does not read checkpoints of {quant_config.get_name()}")


class MoeOpsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """What all methods share. Subclasses create parameters and define `finish` and `compute`."""

    label: str  # the format of the weights, for the log

    # vLLM's methods answer these by the kernel that they have chosen.
    is_monolithic = False
    supports_eplb = False
    skip_forward_padding = False
    has_unpadded_output = False
    topk_indices_dtype = torch.int32
    maybe_roundup_sizes = FusedMoEMethodBase.maybe_roundup_sizes

    def finish(self, layer: nn.Module) -> None:
        """Turns the parameters that vLLM has loaded into those that `compute` reads."""
        raise NotImplementedError

    def compute(
        self, layer: nn.Module, x: Tensor, weights: Tensor, ids: Tensor, **options: Any
    ) -> Tensor:
        """Returns the sum of the experts' outputs [T, H] for rows x [T, H], routing weights [T, K]
        and local ids [T, K], in which -1 is an expert of another rank."""
        raise NotImplementedError

    def get_fused_moe_quant_config(self, layer: nn.Module) -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig.make()

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        _drop_absent_biases(layer)
        self.finish(layer)

    def apply(
        self,
        layer: nn.Module,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """Computes routed experts; vLLM's runner computes shared ones before it calls this."""
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()].to(torch.int32)
        activation = layer.activation
        options: dict[str, Any] = {
            "b_gate_up": getattr(layer, "w13_bias", None),
            "b_down": getattr(layer, "w2_bias", None),
            "activation": _ACTIVATIONS[activation],
            "interleaved": activation == MoEActivation.SWIGLUOAI,
            "apply_router_weight_on_input": layer.apply_router_weight_on_input,
        }
        for ours, theirs in (("alpha", layer.swiglu_alpha), ("limit", layer.swiglu_limit)):
            if theirs is not None:
                options[ours] = theirs
        return self.compute(layer, x, topk_weights, topk_ids, **options)


class Unquantized(MoeOpsMethod, UnquantizedFusedMoEMethod):  # type: ignore[misc]
    """float32, bfloat16 and float16 weights: vLLM's parameters, then packed copies alone."""

    def __init__(self, moe: FusedMoEConfig) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        self.label = str(moe.in_dtype).removeprefix("torch.")

    def finish(self, layer: nn.Module) -> None:
        halves = layer.activation.is_gated and layer.activation != MoEActivation.SWIGLUOAI
        for name, split in (("w13_weight", halves), ("w2_weight", False)):
            weight = getattr(layer, name).data
            packed = moe_ops.pack_experts(weight, halves=split)
            shape = weight.new_empty(()).expand(weight.shape)
            _replace(layer, name, shape)
            _replace(layer, f"{name}_panels", packed)

    def compute(
        self, layer: nn.Module, x: Tensor, weights: Tensor, ids: Tensor, **options: Any
    ) -> Tensor:
        return moe_ops.moe_ffn_packed(
            x,
            layer.w13_weight,
            layer.w2_weight,
            layer.w13_weight_panels,
            layer.w2_weight_panels,
            weights,
            ids,
            packed_only=True,
            **options,
        )


class Quantized(MoeOpsMethod):
    """Weights of a format of moe_ops; subclasses define `stored`."""

    parts: tuple[str, ...]  # the names of a weight's parameters, behind "w13_" or "w2_"

    def stored(self, *parts: Tensor | None) -> StoredWeight:
        """Returns the weights [E, O, D] of some experts, from the parameters of `parts`."""
        raise NotImplementedError

    def finish(self, layer: nn.Module) -> None:
        labels = []
        for weight in ("w13", "w2"):
            names = [f"{weight}_{part}" for part in self.parts]
            given = [getattr(layer, name, None) for name in names]
            found = _stored_by_expert(self.stored, given)
            for name in names:
                _replace(layer, name, None)
            _replace(layer, f"{weight}_weight", found.codes)
            _replace(layer, f"{weight}_moe_ops_scale", found.scale)
            _replace(layer, f"{weight}_moe_ops_zero", found.zero)
            labels.append(found.format.label)
        self.format = labels[0] if labels[0] == labels[1] else ", ".join(labels)

    def compute(
        self, layer: nn.Module, x: Tensor, weights: Tensor, ids: Tensor, **options: Any
    ) -> Tensor:
        return moe_ops.moe_ffn_quantized(
            x,
            layer.w13_weight,
            layer.w13_moe_ops_scale,
            layer.w2_weight,
            layer.w2_moe_ops_scale,
            weights,
            ids,
            format=self.format,
            w_gate_up_zero=layer.w13_moe_ops_zero,
            w_down_zero=layer.w2_moe_ops_zero,
            **options,
        )


class CompressedTensorsPacked(Quantized, CompressedTensorsWNA16MoEMethod):  # type: ignore[misc]
    """compressed-tensors' pack-quantized: 4 or 8 bits, groups of inputs or one scale a row."""

    parts = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")

    def __init__(self, moe: FusedMoEConfig, args: Any) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        if args.actorder in ("group", "dynamic"):
            raise StaysWithVllm("moe_ops needs groups of consecutive inputs (actorder)")
        if args.num_bits not in (4, 8) or (args.num_bits == 8 and not args.symmetric):
            raise StaysWithVllm(f"moe_ops does not read {args.num_bits} bits of this kind")
        self.weight_quant = args
        self.symmetric, self.num_bits = args.symmetric, args.num_bits
        self.packed_factor = Fraction(32, args.num_bits)
        self.strategy = args.strategy
        self.group_size = -1 if args.group_size is None else args.group_size
        self.label = f"compressed-tensors int{args.num_bits}"

    def stored(self, *parts: Tensor | None) -> StoredWeight:
        packed, scale, zero, _ = parts
        assert packed is not None and scale is not None
        depth = packed.shape[-1] * 32 // self.num_bits
        if self.num_bits == 8:  # Bytes with 128 added.
            codes = (packed.contiguous().view(torch.uint8) ^ 128).view(torch.int8)
            if scale.shape[-1] == 1:
                return published.from_int8_channels(codes, scale)
            how = WeightFormat("int8", depth // scale.shape[-1], _dtype_name(scale))
            return StoredWeight(how, codes, scale)
        return published.from_compressed_tensors(packed, scale, zero, in_features=depth)


class CompressedTensorsInt8(Quantized, CompressedTensorsW8A8Int8MoEMethod):  # type: ignore[misc]
    """compressed-tensors' int-quantized: int8 with a scale a row; tokens are rounded by moe_ops."""

    parts = ("weight", "weight_scale")
    label = "compressed-tensors int8 (W8A8)"

    def __init__(self, moe: FusedMoEConfig, args: Any, inputs: Any) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        if args.strategy != "channel" or not inputs.dynamic:
            raise StaysWithVllm("moe_ops reads int8 with a scale a row and dynamic inputs")
        self.weight_quant, self.input_quant = args, inputs
        self.static_input_scales = False

    def stored(self, *parts: Tensor | None) -> StoredWeight:
        weight, scale = parts
        assert weight is not None and scale is not None
        return published.from_int8_channels(weight, scale)


class CompressedTensorsNvfp4(Quantized, CompressedTensorsW4A4Nvfp4MoEMethod):  # type: ignore[misc]
    """NVFP4 of compressed-tensors; tokens are not rounded to it."""

    parts = (
        "weight_packed",
        "weight_scale",
        "weight_global_scale",
        "input_global_scale",
    )
    label = "compressed-tensors NVFP4"

    def __init__(self, moe: FusedMoEConfig) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        self.group_size, self.use_a16 = 16, True

    def stored(self, *parts: Tensor | None) -> StoredWeight:
        packed, scale, factor, _ = parts
        assert packed is not None and scale is not None and factor is not None
        # One expert: gate and up have a factor each, down has one.
        factors = factor.reshape(-1)
        rows = packed.shape[-2] // len(factors)
        pieces = [
            published.from_nvfp4(
                packed[..., i * rows : (i + 1) * rows, :],
                scale[..., i * rows : (i + 1) * rows, :],
                factors[i],
                inverse=True,
            )
            for i in range(len(factors))
        ]
        return published.concatenated(pieces)


class Gptq(Quantized, AutoGPTQMoEMethod):  # type: ignore[misc]
    """GPTQ with 4 bits, or 8 with zero points of 128."""

    parts = ("qweight", "qzeros", "scales")

    def __init__(self, moe: FusedMoEConfig, config: AutoGPTQConfig) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        if config.desc_act:
            raise StaysWithVllm("moe_ops needs groups of consecutive inputs (desc_act)")
        self.quant_config, self.input_dtype = config, None
        self.bits = config.quant_type.size_bits
        self.version = 2 if config.full_config.get("checkpoint_format") == "gptq_v2" else 1
        self.label = f"GPTQ int{self.bits}"

    def stored(self, *parts: Tensor | None) -> StoredWeight:
        qweight, qzeros, scales = parts
        assert qweight is not None and qzeros is not None and scales is not None
        return published.from_gptq(qweight, qzeros, scales, bits=self.bits, version=self.version)


class Awq(Quantized, AutoAWQMoEMethod):  # type: ignore[misc]
    """AWQ with 4 bits."""

    parts = ("qweight", "qzeros", "scales")
    label = "AWQ int4"

    def __init__(self, moe: FusedMoEConfig, config: AutoAWQConfig) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        self.quant_config, self.input_dtype = config, None

    def stored(self, *parts: Tensor | None) -> StoredWeight:
        qweight, qzeros, scales = parts
        assert qweight is not None and qzeros is not None and scales is not None
        return published.from_awq(qweight, qzeros, scales)


class Fp8Blocks(Quantized, Fp8MoEMethod):  # type: ignore[misc]
    """fp8 in blocks of 128 x 128, as DeepSeek-V3 is published; tokens are not rounded to it."""

    parts = ("weight", "weight_scale_inv")
    label = "fp8 in blocks"

    def __init__(self, moe: FusedMoEConfig, config: Fp8Config) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        block = config.weight_block_size
        if list(block or ()) != [128, 128] or not config.is_checkpoint_fp8_serialized:
            raise StaysWithVllm("moe_ops reads fp8 checkpoints with blocks of 128 x 128")
        if moe.intermediate_size_per_partition % 128 and moe.is_act_and_mul:
            raise StaysWithVllm("gate and up share a block of fp8 scales")
        self.quant_config = config
        self.weight_block_size = self.moe_block_shape = block
        self.block_quant, self.weight_scale_name = True, "weight_scale_inv"
        self.weight_scale_refine = None

    def stored(self, *parts: Tensor | None) -> StoredWeight:
        weight, scale = parts
        assert weight is not None and scale is not None
        return published.from_fp8(weight, scale)


class GptOssMxfp4(Quantized, GptOssMxfp4MoEMethod):  # type: ignore[misc]
    """MXFP4 as gpt-oss is published."""

    parts = ("weight", "weight_scale")
    label = "MXFP4"

    def __init__(self, moe: FusedMoEConfig) -> None:
        FusedMoEMethodBase.__init__(self, moe)

    def stored(self, *parts: Tensor | None) -> StoredWeight:
        weight, scale = parts
        assert weight is not None and scale is not None
        return published.from_mxfp4(weight.unflatten(-1, (-1, 16)), scale)


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
}


def _dtype_name(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _replace(layer: nn.Module, name: str, value: Tensor | None) -> None:
    """Gives a layer a parameter without a gradient in the place of what has that name."""
    if hasattr(layer, name):
        delattr(layer, name)
    kept = None if value is None else nn.Parameter(value, requires_grad=False)
    layer.register_parameter(name, kept)


def _drop_absent_biases(layer: nn.Module) -> None:
    """Removes zeros that GPTQ's method creates for checkpoints that may have biases."""
    if layer.moe_config.has_bias:
        return
    for name in ("w13_bias", "w2_bias"):
        if hasattr(layer, name) and name not in layer._loaded_expert_biases:
            _replace(layer, name, None)


def _for_kernels(weight: StoredWeight) -> StoredWeight:
    """Returns a weight in the form that has integer kernels, where its numbers allow it."""
    how = weight.format
    if how.name != "int4" or how.group_size not in GROUP_SIZES:
        return weight
    if weight.zero is not None and bool((weight.zero != 8).any()):
        return weight
    return published.adapted(weight, WeightFormat("int4", how.group_size))


def _stored_by_expert(stored: Any, parts: list[Tensor | None]) -> StoredWeight:
    """Converts a weight one expert after another, so that little memory is used beside it."""
    count = next(p.shape[0] for p in parts if p is not None)
    found = [stored(*(None if p is None else p.data[e] for p in parts)) for e in range(count)]
    kernels = [_for_kernels(weight) for weight in found]
    if all(weight.format == kernels[0].format for weight in kernels):
        found = kernels
    joined = [
        None if found[0][i] is None else torch.stack([_bytes(weight[i]) for weight in found])
        for i in (1, 2, 3)
    ]
    codes, scale, zero = (
        None if t is None else t.view(found[0][i + 1].dtype) for i, t in enumerate(joined)
    )
    assert codes is not None and scale is not None
    return StoredWeight(found[0].format, codes, scale, zero)


def _bytes(t: Tensor) -> Tensor:
    """float8 as bytes: torch does not stack it."""
    return t.contiguous().view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t.contiguous()
