"""Checkpoints that others quantized, read into layers that compute with the weights as they are:
GPTQ, AWQ, compressed-tensors (pack-quantized, int-quantized, float-quantized,
nvfp4-pack-quantized), NVFP4 and FP8 of ModelOpt, MXFP4, and fp8 in blocks of 128 or with one scale
per weight.

Example:
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moe_ops")

Experts become `QuantizedHfExperts`, dense layers that are quantized too `StoredLinear`. No weight
is a float in between, and one expert at most is in memory twice. Without that argument transformers
reads such a checkpoint as it always does. `save_pretrained` writes the same codes, scales and zero
points as a checkpoint of moe_ops.

E experts, H hidden size, I intermediate size, O and D output and input features of a weight.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import modeling_utils
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moe_ops import _reading
from moe_ops._files import shown
from moe_ops.hf.checkpoints.files import Checkpoint, put
from moe_ops.hf.checkpoints.methods import LAYOUTS, Method, Mxfp4
from moe_ops.hf.checkpoints.quantizer import (
    mark_stored,
    parameter_types,
    replace_linear,
    restore_types,
)
from moe_ops.quant import published
from moe_ops.quant.bank import FoundBank, find_banks
from moe_ops.quant.convert import new_experts
from moe_ops.quant.published import StoredWeight
from moe_ops.weight_formats import WeightFormat

METHODS = tuple(LAYOUTS)
# A key of one projection of one expert, and which it is.
_EXPERT = re.compile(r"^(.*)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.(.+)$")
_GATE_UP_DOWN = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
# Tensors of quantized weights, which transformers is not to report as unexpected.
_LEAVES = (
    r"\.(qweight|qzeros|scales|g_idx|weight_packed|weight_scale|weight_zero_point|weight_shape"
    r"|weight_g_idx|weight_scale_inv|weight_global_scale|input_global_scale|weight_scale_2"
    r"|input_scale)$",
    r"\.experts\.\d+\.",
    r"\.(gate_up|down)_proj_(blocks|scales|bias)$",
)


class PublishedConfig(QuantizationConfigMixin):
    """The quantization_config of a checkpoint as it is in config.json."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.quant_method = config["quant_method"]
        self.config = config

    def to_dict(self) -> dict[str, Any]:
        return dict(self.config)


class _Bank(NamedTuple):
    """A bank to be filled: the name of its module, and where its experts are in the files."""

    name: str
    prefix: str  # of one expert, before its number; of the bank for MXFP4
    projections: tuple[str, str, str]


class PublishedQuantizer(HfQuantizer):
    """Puts layers of moe_ops into a model before its checkpoint is read, and fills them after."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        config = quantization_config.config
        _check_config(config)
        self._method = LAYOUTS[config["quant_method"]](config)
        self._banks: list[_Bank] = []
        self._linears: list[str] = []
        self._files: Checkpoint | None = None
        self._types: dict[str, torch.dtype] = {}

    def update_device_map(self, device_map: Any) -> Any:
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if len(places) > 1 or places & {"disk", "auto", "balanced"}:
            raise ValueError(
                "from_pretrained: device_map must be one device for a checkpoint of "
                f"{self.quantization_config.quant_method} on moe_ops, got {shown(device_map)}."
            )
        return device_map

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        if not checkpoint_files or not all(f.endswith(".safetensors") for f in checkpoint_files):
            raise ValueError(
                "from_pretrained: a quantized checkpoint must be of safetensors files, got "
                f"{shown(checkpoint_files)}."
            )
        method = self.quantization_config.quant_method
        files = self._files = Checkpoint(checkpoint_files, f"checkpoint of {method}")
        experts = _experts_in(files)
        for found in find_banks(model, unsupported="skip"):
            bank = self._bank(found, experts)
            if bank is not None:
                self._install(model, found, bank, files)
                self._banks.append(bank)
            del found
        if not self._banks:
            raise ValueError(
                f"from_pretrained: a checkpoint of {self.quantization_config.quant_method} on "
                f"moe_ops must hold quantized experts, got none that {type(model).__name__} has."
            )
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and f"{name}.{self._method.marker}" in files:
                with files.reading(name):
                    how = self._method.format(files, name, module.in_features)
                    replace_linear(model, name, how)
                self._linears.append(name)
        ours = [bank.name for bank in self._banks] + self._linears
        hidden = {rf"^{re.escape(name)}\." for name in ours}
        model._keys_to_ignore_on_load_missing = hidden | set(
            model._keys_to_ignore_on_load_missing or ()
        )
        model._keys_to_ignore_on_load_unexpected = {*hidden, *_LEAVES} | set(
            model._keys_to_ignore_on_load_unexpected or ()
        )
        self._types = parameter_types(model)
        files.check_shapes({n: t for n, t in model.state_dict().items() if not _hides(ours, n)})
        return model

    def _bank(self, found: FoundBank, experts: dict[tuple[str, ...], Any]) -> _Bank | None:
        files = self._files
        assert files is not None
        if isinstance(self._method, Mxfp4):
            name = found.name
            return _Bank(name, name, ("", "", "")) if f"{name}.down_proj_blocks" in files else None
        place = experts.get(tuple(re.findall(r"\d+", found.name)))
        if place is None:
            return None
        prefix, projections = place
        if f"{prefix}.0.{projections[0]}.{self._method.marker}" not in files:
            return None
        return _Bank(found.name, prefix, projections)

    def _install(self, model: nn.Module, found: FoundBank, bank: _Bank, files: Checkpoint) -> None:
        weights = found.bank
        if isinstance(self._method, Mxfp4):
            up = down = WeightFormat("mxfp4")
        else:
            gate, _, last = (f"{bank.prefix}.0.{p}" for p in bank.projections)
            with files.reading(gate):
                up = self._method.format(files, gate, weights.hidden_size)
            with files.reading(last):
                down = self._method.format(files, last, weights.intermediate_size)
        if up != down:
            raise ValueError(
                f"from_pretrained: {bank.name} must have one format, got {up.label} and "
                f"{down.label}."
            )
        with files.reading(bank.prefix):
            experts = new_experts(found, up.label)
        experts._is_hf_initialized = True
        found.hook.install(model, found.module, experts)

    def update_weight_conversions(self, weight_conversions: Any, *args: Any) -> Any:
        """Without those that would put experts together: their targets are not in the model."""
        # The model is an argument from transformers 5.21 or later on.
        names = "\n".join(self._types)
        return [
            c
            for c in weight_conversions
            if not isinstance(c, WeightConverter)
            or any(re.search(t.replace("*", ".*"), names) for t in c.target_patterns)
        ]

    @torch.no_grad()
    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        files = self._files
        assert files is not None
        for bank in self._banks:
            _fill_bank(model.get_submodule(bank.name), bank, files, self._method)
        for name in self._linears:
            linear: Any = model.get_submodule(name)
            with files.reading(name):
                weight = self._method.read(files, name, linear.in_features)
                weight = published.adapted(weight, linear.format)
                for mine, part in zip(
                    (linear.codes, linear.scale, linear.zero), weight[1:], strict=True
                ):
                    if mine is not None and part is not None:
                        put(mine, part, name)
        self._files = None
        restore_types(model, self._types)
        mark_stored(model, [bank.name for bank in self._banks], self._linears)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True  # Adapters are.

    @property
    def is_compileable(self) -> bool:
        return True


def _hides(modules: Sequence[str], name: str) -> bool:
    """Returns whether a tensor is of one of these modules."""
    return any(name.startswith(f"{module}.") for module in modules)


def _check_config(config: dict[str, Any]) -> None:
    """Checks what is known of a checkpoint before anything of it is read.

    Raises:
        ValueError: moe_ops has no layers for it, or it is not what such checkpoints hold.
    """
    wanted = f"that of a {config['quant_method']} checkpoint"
    with _reading.damage("from_pretrained", "quantization_config of config.json", wanted):
        _check_values(config)


def _check_values(config: dict[str, Any]) -> None:
    def refuse(what: str, wanted: str, got: Any) -> None:
        method = config["quant_method"]
        raise ValueError(
            f"from_pretrained: {what} of a {method} checkpoint must be {wanted} for moe_ops, got "
            f"{shown(got)} in config.json."
        )

    method = config["quant_method"]
    if method == "gptq" and config.get("bits", 4) not in (4, 8):
        refuse("bits", "4 or 8", config["bits"])
    if method == "awq":
        if config.get("bits", config.get("w_bit", 4)) != 4:
            refuse("bits", "4", config.get("bits"))
        version = str(config.get("version", "gemm")).lower()
        if version != "gemm":
            refuse("version", "gemm", version)
    if method == "modelopt" and config.get("quant_algo") not in ("NVFP4", "FP8"):
        refuse("quant_algo", "NVFP4 or FP8", config.get("quant_algo"))
    blocks = config.get("weight_block_size")
    if method == "fp8" and blocks is not None and list(blocks) != [128, 128]:
        refuse("weight_block_size", "[128, 128] or null", blocks)
    if method == "compressed-tensors":
        known = (
            "pack-quantized",
            "int-quantized",
            "float-quantized",
            "nvfp4-pack-quantized",
            "mixed-precision",
        )
        if config.get("format") not in known:
            refuse("format", " or ".join(known), config.get("format"))
        groups = (config.get("config_groups") or {}).values()
        packed = [g for g in groups if (g.get("format") or config["format"]) == "pack-quantized"]
        bits = {(g.get("weights") or {}).get("num_bits") for g in packed}
        if bits - {4, 8}:
            refuse("num_bits", "4 or 8", sorted(map(str, bits)))
        for group in groups:
            size = (group.get("weights") or {}).get("block_structure")
            if size is not None and list(size) != [128, 128]:
                refuse("block_structure", "[128, 128]", size)


def _experts_in(files: Checkpoint) -> dict[tuple[str, ...], tuple[str, tuple[str, str, str]]]:
    """Numbers in the name of a block, as of its layer -> what is before the number of an expert,
    and the names of gate, up and down."""
    found: dict[tuple[str, ...], tuple[str, tuple[str, str, str]]] = {}
    for key in files.keys():
        match = _EXPERT.match(key)
        if match is not None:
            names = _GATE_UP_DOWN[match[3].startswith("w")]
            found[tuple(re.findall(r"\d+", match[1]))] = (f"{match[1]}.experts", names)
    return found


def _fill_bank(experts: Any, bank: _Bank, files: Checkpoint, method: Method) -> None:
    experts = getattr(experts, "experts", experts)  # A block that keeps its bank as a part.
    if isinstance(method, Mxfp4):
        for part in ("gate_up", "down"):
            name = f"{bank.prefix}.{part}_proj"
            with files.reading(name):
                leaves = (f"{name}_{leaf}" for leaf in ("blocks", "scales"))
                weight = published.from_mxfp4(*map(files.get, leaves))
                put(getattr(experts, f"w_{part}"), weight.codes, f"{name}_blocks")
                put(getattr(experts, f"w_{part}_scale"), weight.scale, f"{name}_scales")
                bias = getattr(experts, f"b_{part}")
                if bias is not None:
                    put(bias, files.get(f"{name}_bias").to(bias.dtype), f"{name}_bias")
        return
    for e in range(experts.num_experts):
        gate, up, down = (f"{bank.prefix}.{e}.{p}" for p in bank.projections)
        hidden, width = experts.hidden_size, experts.intermediate_size
        how = experts.formats["w_gate_up"]
        with files.reading(gate):
            halves = [method.read(files, name, hidden) for name in (gate, up)]
            together = published.concatenated([published.adapted(h, how) for h in halves])
            _put_expert(experts, e, "w_gate_up", together)
        with files.reading(down):
            rest = published.adapted(method.read(files, down, width), experts.formats["w_down"])
            _put_expert(experts, e, "w_down", rest)


def _put_expert(experts: Any, expert: int, name: str, weight: StoredWeight) -> None:
    for leaf, value in zip(("", "_scale", "_zero"), weight[1:], strict=True):
        if value is not None:
            put(getattr(experts, name + leaf)[expert], value, f"{name}{leaf}")


def install() -> None:
    """Has transformers ask here first for the quantizer of a checkpoint.

    Its registries go by the method alone, of which transformers' own entries must stay what they
    are; only this function sees the model's `experts_implementation` too.
    """
    original: Any = modeling_utils.get_hf_quantizer
    if getattr(original, "moe_ops", False):
        return

    def get_hf_quantizer(
        config: Any,
        quantization_config: Any,
        device_map: Any,
        weights_only: Any,
        user_agent: Any,
        **kwargs: Any,
    ) -> Any:
        given = getattr(config, "quantization_config", None)
        asked = getattr(config, "_experts_implementation", None) == "moe_ops"
        asked = asked and quantization_config is None
        if asked and kwargs.get("gguf_file") is not None:
            from transformers.utils.quantization_config import GgufConfig

            from moe_ops.hf.checkpoints.gguf import GgufExpertsQuantizer

            config.quantization_config = GgufConfig(gguf_file=kwargs["gguf_file"], dequantize=True)
            return GgufExpertsQuantizer(config.quantization_config, config), config, device_map
        if asked and isinstance(given, dict) and not isinstance(given.get("quant_method"), str):
            raise ValueError(
                "from_pretrained: quant_method of quantization_config in config.json must be a "
                f"name, got {shown(given.get('quant_method'))}."
            )
        if not (asked and isinstance(given, dict) and given.get("quant_method") in METHODS):
            arguments = (config, quantization_config, device_map, weights_only, user_agent)
            return original(*arguments, **kwargs)
        config.quantization_config = PublishedConfig(given)
        quantizer = PublishedQuantizer(config.quantization_config, pre_quantized=True)
        return quantizer, config, quantizer.update_device_map(device_map)

    get_hf_quantizer.moe_ops = True  # type: ignore[attr-defined]
    modeling_utils.get_hf_quantizer = get_hf_quantizer  # type: ignore[assignment]
