"""Checkpoints that moe_ops has quantized: `quant_method` "moe_ops" in config.json."""

from __future__ import annotations

import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from moe_ops.quant.formats import formats_of
from moe_ops.weight_formats import joined_label
from moe_ops_vllm.base import MoeOpsMethod, Unquantized, replace
from moe_ops_vllm.quantized import Quantized

# A checkpoint's name of a weight -> the prefix of a layer's parameters.
_WEIGHTS = {"w_gate_up": "w13", "w_down": "w2"}
_NAMES = {"b_gate_up": "w13_bias", "b_down": "w2_bias"} | {
    ours + part: theirs + ("_weight" if part == "" else f"_moe_ops{part}")
    for ours, theirs in _WEIGHTS.items()
    for part in ("", "_scale", "_zero")
}


class MoeOpsConfig(QuantizationConfig):  # type: ignore[misc]
    """The formats of a checkpoint's experts. Dense layers are float."""

    def __init__(self, format: str, skip: list[str]) -> None:
        super().__init__()
        self.format, self.skip = format, skip

    def get_name(self) -> str:
        return "moe_ops"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MoeOpsConfig:
        if config.get("x_scale") or config.get("layers"):
            raise ValueError(
                "the plugin reads checkpoints of moe_ops without x_scale and layers, got "
                f"{config}: save the model again without calibration, from float weights"
            )
        return cls(config["format"], list(config.get("skip", ())))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> UnquantizedLinearMethod | None:
        if isinstance(layer, RoutedExperts):
            raise ValueError("vLLM has no kernels for experts that moe_ops has quantized")
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


class MoeOpsQuantized(Quantized):
    """Weights in the layout in which `moe_ops.quantize` stores them."""

    def __init__(self, moe: FusedMoEConfig, config: MoeOpsConfig) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        if moe.activation == MoEActivation.SWIGLUOAI:
            raise ValueError("the plugin reads checkpoints of moe_ops whose gate half comes first")
        self.format = self.label = config.format
        self.loaded: set[str] = set()

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        width = intermediate_size_per_partition * (2 if self.moe.is_act_and_mul else 1)
        depths = (hidden_size, intermediate_size_per_partition)
        formats = formats_of("MoeOpsConfig", self.format, depths)
        self.format = joined_label(formats)
        for (ours, how), out, depth in zip(
            formats.items(), (width, hidden_size), depths, strict=True
        ):
            tensors = how.tensors(out, depth)
            for part in ("", "_scale", "_zero"):
                value = None
                if part in tensors:
                    shape, dtype = tensors[part]
                    value = torch.empty(num_experts, *shape, dtype=dtype)
                replace(layer, _NAMES[ours + part], value)
        if self.moe.has_bias:
            for name, size in (("w13_bias", width), ("w2_bias", hidden_size)):
                replace(layer, name, torch.zeros(num_experts, size, dtype=params_dtype))

    def load(self, layer: Any, name: str, whole: Tensor) -> str:
        """Copies this rank's part of a tensor of the checkpoint and returns its parameter."""
        parallel = self.moe.moe_parallel_config
        ranks, rank = parallel.tp_size, parallel.tp_rank
        mine = whole
        if layer.expert_map is not None:
            mine = mine[(layer.expert_map >= 0).nonzero()[:, 0]]
        if name.partition("_")[2].startswith("gate_up"):
            halves = mine.unflatten(1, (2 if self.moe.is_act_and_mul else 1, -1))
            mine = halves.chunk(ranks, 2)[rank].flatten(1, 2)
        elif mine.dim() == 3:
            mine = mine.chunk(ranks, 2)[rank]
        parameter = getattr(layer, _NAMES.get(name, ""), None)
        if parameter is None or parameter.shape != mine.shape:
            expected = "no such tensor" if parameter is None else list(parameter.shape)
            raise ValueError(
                f"{layer.layer_name}.{name}: expected {expected} on rank {rank} of {ranks}, got "
                f"{list(mine.shape)}"
            )
        parameter.data.copy_(mine)
        self.loaded.add(_NAMES[name])
        return _NAMES[name]

    def finish(self, layer: nn.Module) -> None:
        missing = {name for name, _ in layer.named_parameters(recurse=False)} - self.loaded
        if missing:
            raise ValueError(f"the checkpoint has no {', '.join(sorted(missing))} of some experts")


def method(layer: Any, prefix: str, config: MoeOpsConfig, moe: FusedMoEConfig) -> MoeOpsMethod:
    """Returns the method of a layer."""
    if any(fnmatch.fnmatchcase(prefix, pattern) for pattern in config.skip):
        return Unquantized(moe)
    return MoeOpsQuantized(moe, config)
