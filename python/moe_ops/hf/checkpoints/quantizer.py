"""Quantized checkpoints: a quantization method of transformers called "moe_ops"."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moe_ops._files import shown
from moe_ops._reading import damage
from moe_ops.hf.checkpoints.files import Checkpoint
from moe_ops.memory import release_file_pages
from moe_ops.quant import QuantizedExperts, quantize
from moe_ops.quant.bank import FoundBank, check_finite, find_banks, idle_patterns
from moe_ops.quant.config import WeightConfig, check_config, config_named
from moe_ops.quant.convert import check_sizes, new_experts, replace_bank
from moe_ops.quant.linear import QuantizedLinear, find_linears, stored_form, stored_linears
from moe_ops.quant.stored_linear import StoredLinear
from moe_ops.weight_formats import WeightFormat

METHOD = "moe_ops"
_CONFIG = "quantization_config of config.json"


@register_quantization_config(METHOD)
class MoeOpsConfig(QuantizationConfigMixin):
    """The formats of the quantized experts of a model, as transformers keeps them.

    Give it to `from_pretrained(..., quantization_config=MoeOpsConfig(Int8WeightConfig()))` of a
    float checkpoint to quantize while loading; checkpoints that were saved quantized carry their
    own.

    Args:
        config: what `moe_ops.quantize` takes.
        dense: what `moe_ops.quantize` takes for dense layers; None leaves them float.
        x_scale: whether the experts have an activation-aware scale. It takes calibration, which
            loading cannot do: use `moe_ops.quantize` for that.
        skip: shell patterns of module names whose experts stay float.
        layers: of a checkpoint with quantized dense layers, or that was saved from one of another
            method: the name of each layer of experts and dense layer that is quantized -> its
            format ("int4 g128 float16 zero", "q4_k, q6_k"). `config` and `skip` do not count then.

    Raises:
        ValueError: arguments of other types.
    """

    def __init__(
        self,
        config: WeightConfig | None = None,
        *,
        dense: WeightConfig | None = None,
        x_scale: bool = False,
        skip: Sequence[str] = (),
        layers: Mapping[str, str] | None = None,
    ) -> None:
        name = type(self).__name__
        if config is not None or layers is None:
            check_config(name, config)
        if dense is not None:
            check_config(name, dense)
        if not isinstance(x_scale, bool):
            raise ValueError(f"{name}: x_scale must be true or false, got {shown(x_scale)}.")
        if not isinstance(skip, Sequence) or not all(isinstance(s, str) for s in skip):
            raise ValueError(f"{name}: skip must be names, got {shown(skip)}.")
        if layers is not None:
            if not isinstance(layers, Mapping) or not all(
                isinstance(text, str) for pair in layers.items() for text in pair
            ):
                raise ValueError(
                    f"{name}: layers must be formats by name of a layer, got {shown(layers)}."
                )
            layers = dict(layers)
        self.quant_method = METHOD  # type: ignore[assignment]
        self.config = config
        self.dense = dense
        self.x_scale = x_scale
        self.skip = [skip] if isinstance(skip, str) else list(skip)
        self.layers = layers

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Reads what config.json of a stranger holds, as `to_dict` writes it."""
        given = {key: v for key, v in config_dict.items() if key != "quant_method"}
        unknown = sorted(given.keys() - {"format", "x_scale", "skip", "layers"})
        if unknown:
            raise ValueError(
                f"{cls.__name__}: fields must be format, x_scale, skip and layers, got "
                f"{', '.join(unknown)}."
            )
        label, config = given.pop("format", None), None
        if label is not None or given.get("layers") is None:
            if not isinstance(label, str):
                raise ValueError(f"{cls.__name__}: format must be a name, got {shown(label)}.")
            config = config_named(cls.__name__, label)
        made = cls(config, **given)
        return (made, kwargs) if return_unused_kwargs else made

    def to_dict(self) -> dict[str, Any]:
        """Returns what `from_dict` reads: the name of the format in the place of the config."""
        found: dict[str, Any] = {"quant_method": METHOD}
        if self.config is not None:
            found["format"] = self.config.label
        found |= {"x_scale": self.x_scale, "skip": list(self.skip)}
        return found if self.layers is None else {**found, "layers": dict(self.layers)}


class _TakeFloats(ConversionOps):
    """Receives each float weight of the experts as soon as transformers has read it."""

    def __init__(self, quantizer: BankReader) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: Any, *_: Any, **context: Any) -> dict[str, Any]:
        missing = context.get("missing_keys") or set()
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            self.quantizer.take(context["model"], name, weight)
            missing.discard(name)
        return {}  # Nothing is left for transformers to put anywhere.


class BankReader(HfQuantizer):
    """Looks at the float banks of a checkpoint while it is read, each as soon as it is whole, so
    that the model is never in memory as a whole."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._bank_of: dict[str, str] = {}  # Name of a parameter -> that of its bank's module.

    def expect(self, found: FoundBank) -> None:
        """Has `finish` called for a bank of the model, which is on the meta device."""
        held = [t for _, t in found.bank.tensors()]
        for key, p in found.module.named_parameters(prefix=found.name):
            if any(t is p or t._base is p for t in held):
                self._bank_of[key] = found.name

    def parameters_of(self, found: FoundBank) -> list[str]:
        """Names of the parameters of an expected bank."""
        return [key for key, name in self._bank_of.items() if name == found.name]

    def finish(self, model: nn.Module, found: FoundBank) -> None:
        """All weights of a bank have been read."""
        raise NotImplementedError

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self._bank_of

    def get_quantize_ops(self) -> ConversionOps:
        return _TakeFloats(self)

    def take(self, model: nn.Module, name: str, weight: torch.Tensor) -> None:
        """Puts a parameter into its bank, and finishes that if it was the last one."""
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        check_shape(name, getattr(module, leaf).shape, weight)
        setattr(module, leaf, nn.Parameter(weight, requires_grad=False))
        found = _bank_at(model, self._bank_of[name])
        if found is None or any(t.is_meta for _, t in found.bank.tensors()):
            return
        self.finish(model, found)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # Adapters are.

    @property
    def is_compileable(self) -> bool:
        return True


def forget_quantizer(model: Any) -> None:
    """Removes what transformers keeps of a quantizer that only watched weights being read."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
    model.hf_quantizer = None
    for name in ("quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)


@register_quantizer(METHOD)
class ExpertsQuantizer(BankReader):
    """Builds quantized banks before a checkpoint is read, or quantizes while it is."""

    quantization_config: MoeOpsConfig

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._num_quantized = 0
        self._types: dict[str, torch.dtype] = {}
        self._dense: dict[str, WeightConfig] = {}  # Name of a weight of a dense layer -> format.

    def finish(self, model: nn.Module, found: FoundBank) -> None:
        try:
            check_finite("from_pretrained", found.name, found.module, found.bank)
        except ValueError:
            return  # quantize says it once all has been read.
        config = self.quantization_config
        replace_bank(model, found, _format(config).label)
        self._num_quantized += 1
        release_file_pages()  # What was read of the checkpoint, which stays mapped until the end.

    def expect_dense(self, model: Any, config: WeightConfig) -> None:
        """Has dense layers quantized as soon as their weights have been read. A head that is tied
        to the embedding stays float."""
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        for name, layer in find_linears(model).items():
            fitting = config.fitting(layer.in_features)
            kept = any(fnmatchcase(name, pattern) for pattern in self.quantization_config.skip)
            if fitting is not None and not kept and f"{name}.weight" not in tied:
                self._dense[f"{name}.weight"] = fitting

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self._dense or super().param_needs_quantization(model, param_name)

    def take(self, model: nn.Module, name: str, weight: torch.Tensor) -> None:
        if name not in self._dense:
            super().take(model, name, weight)
            return
        owner = name.removesuffix(".weight")
        layer: Any = model.get_submodule(owner)
        check_shape(name, layer.weight.shape, weight)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        made = QuantizedLinear(layer, self._dense[name])
        # transformers empties buffers that are not in the state dict, as those of `made` are.
        stored = replace_linear(model, owner, made.how)
        stored.codes, stored.scale, stored.bias = made.q, made.scale, layer.bias

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config = self.quantization_config
        if not self.pre_quantized:
            if config.x_scale:
                raise ValueError(
                    "from_pretrained: quantization_config must have x_scale=False for a float "
                    "checkpoint, got True; moe_ops.quantize(..., calibration=...) makes the scales."
                )
            for pattern in idle_patterns(model, tuple(config.skip)):
                warnings.warn(
                    f"from_pretrained: skip must match the name of a bank, got {pattern!r}, which "
                    "matches none.",
                    stacklevel=2,
                )
            for found in find_banks(model, tuple(config.skip)):
                check_sizes(found.name, found.bank, _format(config))
                self.expect(found)
            if config.dense is not None:
                self.expect_dense(model, config.dense)
            return model
        if config.layers is not None:
            with damage("from_pretrained", _CONFIG, "that of a checkpoint of moe_ops"):
                _build_layers(model, config.layers, config.x_scale)
            _check_files(model, kwargs.get("checkpoint_files"))
            self._types = parameter_types(model)
            return model
        count = 0
        for found in find_banks(model, tuple(config.skip)):
            check_sizes(found.name, found.bank, _format(config))
            experts = new_experts(found, _format(config).label, x_scale=config.x_scale)
            found.hook.install(model, found.module, experts)
            count += 1
        if not count:
            raise ValueError(
                f"from_pretrained: a checkpoint quantized by moe_ops must be of a model with banks "
                f"of experts, got {type(model).__name__} without one."
            )
        _check_files(model, kwargs.get("checkpoint_files"))
        self._types = parameter_types(model)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config = self.quantization_config
        if not self.pre_quantized:
            rest = next(iter(find_banks(model, tuple(config.skip))), None)
            if rest is not None or not self._num_quantized:
                del model.quantization_method  # Set by transformers ahead of the fact.
                quantize(model, _format(config), skip=config.skip)
            else:
                mark_quantized(model, _format(config).label, False, config.skip)
            if self._dense:
                mark_layers(model)
            release_file_pages()
            self.pre_quantized = True
            return model
        for name, module in model.named_modules():
            if isinstance(module, QuantizedExperts | StoredLinear):
                if isinstance(module, QuantizedExperts):
                    module.check(name)
                for key, buffer in module.named_buffers(recurse=False):
                    if buffer.is_meta and hasattr(module, "_hf_hook"):
                        continue  # Offloaded: accelerate's hook brings it for each call.
                    # Set by transformers on what it has read.
                    if not getattr(buffer, "_is_hf_initialized", False):
                        raise ValueError(
                            f"from_pretrained: the checkpoint must hold {name}.{key}, got none in "
                            f"{model.name_or_path}."
                        )
        restore_types(model, self._types)
        _claim_experts(model)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[Any, dict[str, Any]]:
        if not stored_linears(model):
            return None, {}
        with stored_form(model):
            return model.state_dict(), {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        raise NotImplementedError(
            "dequantize: quantized blocks of transformers cannot become float blocks again; load "
            "the float checkpoint."
        )


def check_shape(name: str, wanted: torch.Size, weight: torch.Tensor) -> None:
    if weight.shape != wanted:
        raise ValueError(
            f"from_pretrained: {name} must have shape {list(wanted)}, got {list(weight.shape)}."
        )


def _format(config: MoeOpsConfig) -> WeightConfig:
    assert config.config is not None
    return config.config


def _check_files(model: nn.Module, files: Sequence[str] | None) -> None:
    """Checks safetensors files before transformers reads them into a model.

    Raises:
        ValueError: one is damaged, or a tensor has another shape than the model's of that name.
    """
    if files and all(file.endswith(".safetensors") for file in files):
        Checkpoint(files).check_shapes(model.state_dict())


def _build_layers(model: nn.Module, layers: Mapping[str, str], x_scale: bool) -> None:
    """Puts the layers of a checkpoint with `layers` into a model on the meta device."""
    left = dict(layers)
    for found in find_banks(model, unsupported="skip"):
        label = left.pop(found.name, None)
        if label is not None:
            bank = new_experts(found, label, x_scale=x_scale)
            found.hook.install(model, found.module, bank)
    modules = dict(model.named_modules())
    for name, label in left.items():
        if type(modules.get(name)) is not nn.Linear:
            raise ValueError(
                "from_pretrained: layers of a checkpoint quantized by moe_ops must be banks of "
                f"experts and dense layers of {type(model).__name__}, got {shown(name)}."
            )
        replace_linear(model, name, WeightFormat.from_label(label))


def parameter_types(model: nn.Module) -> dict[str, torch.dtype]:
    """The type of each parameter that is no code, of a model before its checkpoint is read."""
    return {n: p.dtype for n, p in model.named_parameters() if p.is_floating_point()}


def restore_types(model: Any, types: Mapping[str, torch.dtype]) -> None:
    """Gives parameters these types again: of a quantized checkpoint transformers 5.20 leaves those
    whose names it changes in the types of the files."""
    wide = (model._keep_in_fp32_modules or (), model._keep_in_fp32_modules_strict or ())
    for name, p in model.named_parameters():
        kept = p.dtype == torch.float32 and any(re.search(k, name) for keys in wide for k in keys)
        if not (kept or p.is_meta) and p.dtype != types.get(name, p.dtype):
            p.data = p.data.to(types[name])


def replace_linear(model: nn.Module, name: str, how: WeightFormat) -> StoredLinear:
    """Puts a `StoredLinear` on the meta device where a dense layer is; returns it."""
    module: Any = model.get_submodule(name)
    stored = StoredLinear(
        module.in_features,
        module.out_features,
        how,
        bias=module.bias is not None,
        device="meta",
        dtype=module.weight.dtype,
    )
    # transformers would decode the weight, and draw numbers for what it gets.
    stored._is_hf_initialized = True  # type: ignore[assignment]
    model.set_submodule(name, stored)
    return stored


def _bank_at(model: nn.Module, name: str) -> FoundBank | None:
    module = model.get_submodule(name)
    found = next(iter(find_banks(module)), None)
    return None if found is None or found.module is not module else found._replace(name=name)


def mark_quantized(model: Any, format: str, x_scale: bool, skip: Sequence[str]) -> None:
    """Makes `save_pretrained` of a model quantized in place write what from_pretrained needs."""
    config = config_named("quantize", format)
    _mark(model, MoeOpsConfig(config, x_scale=x_scale, skip=list(skip)))


def mark_stored(model: Any, banks: Sequence[str], linears: Sequence[str] = ()) -> None:
    """Like `mark_quantized`, for checkpoints of another quantization method.

    Args:
        banks: names of what its experts are in; of a block, or of the bank itself.
        linears: names of its `StoredLinear`.
    """
    layers = {name: model.get_submodule(name).format_name for name in banks}
    layers |= {name: model.get_submodule(name).format.label for name in linears}
    _mark(model, MoeOpsConfig(layers=layers))


def mark_layers(model: Any) -> None:
    """Like `mark_quantized`, for a model with quantized dense layers."""
    banks = [n for n, m in model.named_modules() if isinstance(m, QuantizedExperts)]
    x_scale = any(model.get_submodule(name).x_scale is not None for name in banks)
    blocks = [_block_of(model, name) for name in banks]
    layers = {name: model.get_submodule(name).format_name for name in blocks}
    _mark(model, MoeOpsConfig(layers=layers | stored_linears(model), x_scale=x_scale))


def _block_of(model: nn.Module, name: str) -> str:
    """Returns the name of the module that `find_banks` has found where these experts are now."""
    parent = name.rpartition(".")[0]
    block = model.get_submodule(parent)
    return parent if getattr(block, "quantized_block", False) else name


def refuse_to_save(model: Any) -> None:
    """Has `save_pretrained` of a model whose other parts are quantized by another method end in a
    sentence: a checkpoint has room for one."""
    method = model.quantization_method
    refuse = functools.partial(_refuse_to_save, getattr(method, "value", method))
    model.hf_quantizer.is_serializable = refuse


def _refuse_to_save(method: str, *_: Any, **__: Any) -> bool:
    raise ValueError(
        f"save_pretrained: model must be quantized by one method, got {method} and moe_ops; save "
        "its adapters, and quantize the experts again after loading."
    )


def _mark(model: Any, config: MoeOpsConfig) -> None:
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

    A process without `import moe_ops.hf` would only warn of an unknown quantization method and give
    the experts random numbers; an implementation that it does not know is an error.
    """
    model.config.experts_implementation = METHOD
