"""Models of transformers whose experts stay on the CPU, loaded straight into their places."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer

from moe_ops.hf.hybrid import bank_tensors, check_options, matching_blocks, place
from moe_ops.memory import release_file_pages
from moe_ops.quant import WeightConfig

from .quantizer import ExpertsQuantizer, MoeOpsConfig, forget_quantizer

__all__ = ["load_placed"]

_METHOD = "moe_ops_place"
# Options of from_pretrained that choose places or formats too.
_CONFLICTING = ("device_map", "tp_plan", "distributed_config", "quantization_config")


def load_placed(
    auto_class: Any,
    pretrained: Path | str,
    dense: torch.device | str = "cuda",
    *,
    layers: Sequence[str] | str | None = None,
    quantization: WeightConfig | None = None,
    stream_min_tokens: int | None = None,
    cached_experts: int | None = None,
    **options: Any,
) -> Any:
    """`from_pretrained` and :func:`moe_ops.hf.place` in one pass over the checkpoint.

    Example:
        model = load_placed(
            AutoModelForCausalLM, "folder", "cuda", quantization=moe_ops.Int4WeightConfig()
        )

    Each tensor goes to its final device when it has been read, and the experts of a layer are
    quantized when all of theirs have been. While it loads, CPU memory holds the experts read so far
    in their final format, one layer's float experts, and the pages of the checkpoint that these
    were read from; with a GPU, it holds one dense weight at a time, and no experts are copied to
    the GPU, apart from those that `layers` excludes.

    A checkpoint that is already quantized, or a GGUF file, is read into CPU memory first, dense
    weights included, and then placed.

    Args:
        auto_class: `AutoModelForCausalLM` or another class with `from_pretrained`.
        pretrained: name or folder of the checkpoint.
        dense: device of everything but experts, as for `place`.
        layers: see `place`.
        quantization: see `place`; None for a checkpoint that is already quantized.
        stream_min_tokens, cached_experts: see `place`.
        options: further ones of `from_pretrained`, without `device_map`, `tp_plan`,
            `distributed_config` and `quantization_config`.

    Returns:
        The placed model in eval mode.

    Raises:
        ValueError: see `place`; one of the excluded options, or `quantization` of a checkpoint that
            is already quantized.
    """
    device = check_options(
        "load_placed", dense, "cpu", quantization, stream_min_tokens, cached_experts
    )
    for name in _CONFLICTING:
        if options.get(name) is not None:
            raise ValueError(
                f"load_placed: options must not contain {name}, got {options[name]!r:.80}; dense, "
                "layers and quantization determine places and formats."
            )
    placing: dict[str, Any] = {
        "layers": layers,
        "stream_min_tokens": stream_min_tokens,
        "cached_experts": cached_experts,
    }
    if options.get("gguf_file") is not None or _is_quantized(pretrained, options):
        if quantization is not None:
            raise ValueError(
                "load_placed: quantization must be None for a checkpoint that is already "
                f"quantized, got {quantization!r}."
            )
        model = auto_class.from_pretrained(pretrained, **options)
        place(model, device, **placing)
        return model
    loading = _PlaceWhileLoading(device, layers, quantization)
    model = auto_class.from_pretrained(pretrained, quantization_config=loading, **options)
    if quantization is None:
        forget_quantizer(model)
    place(model, device, **placing)
    return model


def _is_quantized(pretrained: Path | str, options: dict[str, Any]) -> bool:
    config = options.get("config")
    if isinstance(config, PreTrainedConfig):
        fields = config.to_dict()
    else:
        fields, _ = PreTrainedConfig.get_config_dict(config or pretrained, **options)
    nested = (value for value in fields.values() if isinstance(value, dict))
    return any(part.get("quantization_config") for part in (fields, *nested))


@register_quantization_config(_METHOD)
class _PlaceWhileLoading(MoeOpsConfig):
    def __init__(
        self, device: torch.device, layers: Sequence[str] | str | None, config: WeightConfig | None
    ) -> None:
        super().__init__(config, layers={} if config is None else None)
        self.quant_method = _METHOD  # type: ignore[assignment]
        self.device = device
        self.placed_layers = layers


@register_quantizer(_METHOD)
class _Placer(ExpertsQuantizer):
    """Moves each tensor outside of placed experts to the device when it has been read."""

    quantization_config: _PlaceWhileLoading

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._dtype: torch.dtype | None = None
        # Name of a tensor -> its device, until it has been read.
        self._device_of: dict[str, torch.device] = {}

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self._dtype = dtype
        return dtype

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self._device_of or super().param_needs_quantization(model, param_name)

    def get_quantize_ops(self) -> ConversionOps:
        return _Put(self, super().get_quantize_ops())

    def put(self, values: dict[str, Any]) -> dict[str, Any]:
        """Returns tensors that have been read, those of `_device_of` on their devices."""
        found: dict[str, Any] = {}
        for name, value in values.items():
            tensor = value[0] if isinstance(value, list) else value
            # Without its name here, transformers compares its shape with that of the model's.
            device = self._device_of.pop(name, None)
            found[name] = tensor if device is None else tensor.to(device)
            if device is not None and device.type == "cpu":
                release_file_pages()
        return found

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config = self.quantization_config
        placed, others = matching_blocks(model, config.placed_layers)
        if config.config is not None:
            config.skip = others
            super()._process_model_before_weight_loading(model, **kwargs)
        on_cpu = {id(t) for name in placed for t in bank_tensors(model.get_submodule(name))}
        for name, t in model.state_dict(keep_vars=True).items():
            # transformers casts tensors of another dtype only if they are left to it.
            if not super().param_needs_quantization(model, name) and t.dtype == self._dtype:
                self._device_of[name] = torch.device("cpu") if id(t) in on_cpu else config.device
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.quantization_config.config is not None:
            super()._process_model_after_weight_loading(model, **kwargs)
        return model


class _Put(ConversionOps):
    """Hands what has been read to a `_Placer`, or to the op that quantizes it."""

    def __init__(self, placer: _Placer, quantize: ConversionOps) -> None:
        self.placer, self.quantize = placer, quantize

    def convert(self, input_dict: Any, *args: Any, **context: Any) -> dict[str, Any]:
        if any(name in self.placer._device_of for name in input_dict):
            return self.placer.put(input_dict)
        found: dict[str, Any] = self.quantize.convert(input_dict, *args, **context)
        return found
