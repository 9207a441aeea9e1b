"""Quantised checkpoints: a quantisation method of transformers called "moe_ops"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moe_ops._files import shown
from moe_ops.layers import QuantizedExperts
from moe_ops.quant.bank import find_banks
from moe_ops.quant.convert import check_sizes, quantize_experts
from moe_ops.quant.formats import check_format

METHOD = "moe_ops"


@register_quantization_config(METHOD)
class ExpertsQuantizationConfig(QuantizationConfigMixin):
    """How the experts of a model are, or are to be, quantised.

    Give it to `from_pretrained(..., quantization_config=...)` of a float checkpoint to quantise
    while loading; checkpoints that were saved quantised carry their own.

    Args:
        format: "int8" or "int4".
        group_size: of int4: 32, 64 or 128; None is 64.
        x_scale: whether the banks have an activation-aware scale. It takes calibration, which
            loading cannot do: use `moe_ops.quantize_experts` for that.
        skip: shell patterns of module names whose banks stay float.

    Raises:
        ValueError: an unknown format or group size.
    """

    def __init__(
        self,
        format: str = "int4",
        group_size: int | None = None,
        x_scale: bool = False,
        skip: Sequence[str] = (),
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        # What config.json of a stranger holds.
        name = type(self).__name__
        if unknown:
            raise ValueError(
                f"{name}: fields must be format, group_size, x_scale and skip, got "
                f"{', '.join(sorted(unknown))}."
            )
        if not isinstance(format, str):
            raise ValueError(f"{name}: format must be 'int8' or 'int4', got {shown(format)}.")
        if group_size is not None and type(group_size) is not int:
            raise ValueError(f"{name}: group_size must be a number, got {shown(group_size)}.")
        if not isinstance(x_scale, bool):
            raise ValueError(f"{name}: x_scale must be true or false, got {shown(x_scale)}.")
        if not isinstance(skip, Sequence) or not all(isinstance(s, str) for s in skip):
            raise ValueError(f"{name}: skip must be names, got {shown(skip)}.")
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format = format
        self.group_size = check_format(type(self).__name__, format, group_size) or None
        self.x_scale = x_scale
        self.skip = [skip] if isinstance(skip, str) else list(skip)


@register_quantizer(METHOD)
class ExpertsQuantizer(HfQuantizer):
    """Builds quantised banks before a checkpoint is read, or quantises after it was."""

    requires_calibration = False
    quantization_config: ExpertsQuantizationConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config = self.quantization_config
        if not self.pre_quantized:
            if config.x_scale:
                raise ValueError(
                    "from_pretrained: quantization_config must have x_scale=False for a float "
                    "checkpoint, got True; moe_ops.quantize_experts(model, calibration=...) makes "
                    "the scales."
                )
            return model
        count = 0
        for found in find_banks(model, tuple(config.skip)):
            check_sizes(found.name, found.bank, config.group_size)
            experts = found.hook.new_quantized(
                found.module,
                found.bank,
                format=config.format,
                group_size=config.group_size,
                x_scale=config.x_scale,
            )
            found.hook.install(model, found.module, experts)
            count += 1
        if not count:
            raise ValueError(
                f"from_pretrained: a checkpoint quantised by moe_ops must be of a model with banks "
                f"of experts, got {type(model).__name__} without one."
            )
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config = self.quantization_config
        if not self.pre_quantized:
            del model.quantization_method  # Set by transformers ahead of the fact.
            quantize_experts(model, config.format, group_size=config.group_size, skip=config.skip)
            self.pre_quantized = True
            return model
        for name, module in model.named_modules():
            if isinstance(module, QuantizedExperts):
                module.check(name)
                for key, buffer in module.named_buffers(recurse=False):
                    if buffer.is_meta and hasattr(module, "_hf_hook"):
                        continue  # Offloaded: accelerate's hook brings it for each call.
                    # Set by transformers on what it has read.
                    if not getattr(buffer, "_is_hf_initialized", False):
                        raise ValueError(
                            f"from_pretrained: the checkpoint must hold {name}.{key}, got none."
                        )
                module.move_to_huge_pages()
        _claim_experts(model)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        raise NotImplementedError(
            "dequantize: quantised blocks of transformers cannot become float blocks again; load "
            "the float checkpoint."
        )

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def mark_quantized(
    model: Any, format: str, group_size: int | None, x_scale: bool, skip: Sequence[str]
) -> None:
    """Makes `save_pretrained` of a model quantised in place write what from_pretrained needs."""
    config = ExpertsQuantizationConfig(format, group_size, x_scale, list(skip))
    model.config.quantization_config = config
    _claim_experts(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True
    model.hf_quantizer = ExpertsQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = METHOD


def _claim_experts(model: Any) -> None:
    """Makes config.json name "moe_ops" as the experts implementation.

    A process without `import moe_ops.hf` would only warn of an unknown quantisation method and give
    the experts random numbers; an implementation that it does not know is an error.
    """
    model.config.experts_implementation = METHOD
