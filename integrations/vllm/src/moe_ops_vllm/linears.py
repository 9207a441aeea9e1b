"""Dense layers of formats for which vLLM has no kernel on this CPU.

vLLM asks its kernels in order whether they can compute a layer; those of moe_ops come last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.kernels.linear import (
    _POSSIBLE_FP8_BLOCK_KERNELS,
    _POSSIBLE_NVFP4_KERNELS,
    Fp8BlockScaledMMLinearKernel,
    FP8ScaledMMLinearLayerConfig,
    NvFp4LinearKernel,
    NvFp4LinearLayerConfig,
)
from vllm.model_executor.layers.quantization.utils.fp8_utils import _upcast_e8m0_to_fp32
from vllm.platforms import PlatformEnum

import moe_ops
from moe_ops.quant import published
from moe_ops_vllm.base import replace

_BLOCK = 128  # inputs and outputs of a block of fp8 weights


def register() -> None:
    """Adds the kernels to vLLM's lists. It may be called several times."""
    for kernels, kernel in (
        (_POSSIBLE_FP8_BLOCK_KERNELS, MoeOpsFp8Blocks),
        (_POSSIBLE_NVFP4_KERNELS, MoeOpsNvfp4),
    ):
        known = kernels.setdefault(PlatformEnum.CPU, [])
        if kernel not in known:
            known.append(kernel)


class MoeOpsFp8Blocks(Fp8BlockScaledMMLinearKernel):  # type: ignore[misc]
    """fp8 weights in blocks of 128 x 128. Inputs are not rounded to fp8."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, config: FP8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        block = config.weight_quant_key.scale.group_shape
        if (block.row, block.col) != (_BLOCK, _BLOCK):
            return False, f"requires blocks of 128 x 128, got {block.row} x {block.col}"
        return True, None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        params = self._get_layer_params(layer)
        scale = params.block_scale.data
        if scale.dtype in (torch.float8_e8m0fnu, torch.uint8):
            scale = _upcast_e8m0_to_fp32(scale)
        replace(layer, params.WEIGHT, params.weight.data.contiguous())
        replace(layer, params.block_scale_attr, scale.float().contiguous())

    def apply_weights(
        self, layer: nn.Module, x: Tensor, bias: Tensor | None = None, **_: Any
    ) -> Tensor:
        params = self._get_layer_params(layer)
        return _product(x, params.weight, params.block_scale, bias, "fp8")

    def apply_block_scaled_mm(self, A: Tensor, B: Tensor, As: Tensor, Bs: Tensor) -> Tensor:
        raise NotImplementedError  # The base class calls it with rounded inputs.


class MoeOpsNvfp4(NvFp4LinearKernel):  # type: ignore[misc]
    """NVFP4 weights. Inputs are not rounded to it."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, config: NvFp4LinearLayerConfig) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        # vLLM has turned the factor into one that scales are multiplied by.
        found = published.from_nvfp4(
            layer.weight.data, layer.weight_scale.data, layer.weight_global_scale.data
        )
        replace(layer, "weight", found.codes)
        replace(layer, "weight_scale", found.scale)

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return _product(x, layer.weight, layer.weight_scale, bias, "nvfp4")


def _product(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, format: str) -> Tensor:
    """Returns x [..., D] times the transposed weight [O, D], plus the bias [O]."""
    rows = x.reshape(-1, x.shape[-1])
    y = moe_ops.grouped_gemm_quantized(
        rows,
        codes[None],
        scale[None],
        torch.arange(2, device=x.device) * rows.shape[0],
        format=format,
        bias=None if bias is None else bias.to(x.dtype)[None],
    )
    return y.view(*x.shape[:-1], codes.shape[0])
