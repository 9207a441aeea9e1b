"""Methods of quantized experts: one class for each layout of checkpoints."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig, AutoAWQMoEMethod
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig, AutoGPTQMoEMethod
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
from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4MoEMethod

import moe_ops
from moe_ops.quant import published
from moe_ops.quant.published import StoredWeight
from moe_ops.weight_formats import GROUP_SIZES, WeightFormat, joined_label
from moe_ops_vllm.base import MoeOpsMethod, StaysWithVllm, replace


class Quantized(MoeOpsMethod):
    """Weights of a format of moe_ops; subclasses define `stored`."""

    parts: tuple[str, ...]  # the names of a weight's parameters, behind "w13_" or "w2_"

    def stored(self, *parts: Tensor | None) -> StoredWeight:
        """Returns the weights [E, O, D] of some experts, from the parameters of `parts`."""
        raise NotImplementedError

    def finish(self, layer: nn.Module) -> None:
        formats = {}
        for weight in ("w13", "w2"):
            names = [f"{weight}_{part}" for part in self.parts]
            given = [getattr(layer, name, None) for name in names]
            found = _stored_by_expert(self.stored, given)
            for name in names:
                # vLLM's reload looks for the shape after it has found all weights.
                if not name.endswith("_shape"):
                    replace(layer, name, None)
            replace(layer, f"{weight}_weight", found.codes)
            replace(layer, f"{weight}_moe_ops_scale", found.scale)
            replace(layer, f"{weight}_moe_ops_zero", found.zero)
            formats[weight] = found.format
        self.format = joined_label(formats)

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
        return published.from_compressed_tensors(
            packed, scale, zero, in_features=depth, bits=self.num_bits
        )


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

    def finish(self, layer: nn.Module) -> None:
        # vLLM creates zeros for checkpoints that may have biases.
        if not layer.moe_config.has_bias:
            for name in {"w13_bias", "w2_bias"} - layer._loaded_expert_biases:
                replace(layer, name, None)
        super().finish(layer)

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


def _for_kernels(weight: StoredWeight) -> StoredWeight:
    """Returns a weight in the form that has integer kernels, where its numbers allow it."""
    how = weight.format
    if how.name != "int4" or how.group_size not in GROUP_SIZES:
        return weight
    if weight.zero is not None and bool((weight.zero != 8).any()):
        return weight
    return published.adapted(weight, WeightFormat("int4", how.group_size))


def _stored_by_expert(stored: Any, parts: list[Tensor | None]) -> StoredWeight:
    """Converts a weight one expert after another, which bounds the memory of conversions."""
    count = next(p.shape[0] for p in parts if p is not None)
    found = [stored(*(None if p is None else p.data[e] for p in parts)) for e in range(count)]
    kernels = [_for_kernels(weight) for weight in found]
    if all(weight.format == kernels[0].format for weight in kernels):
        found = kernels
    zeros = None if found[0].zero is None else torch.stack([w.zero for w in found])
    codes, scales = (torch.stack([getattr(w, n) for w in found]) for n in ("codes", "scale"))
    return StoredWeight(found[0].format, codes, scales, zeros)
