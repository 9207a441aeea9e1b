"""GGUF files with experts of Q8_0, Q4_0, Q4_K or Q6_K, which stay as they are::

    AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, experts_implementation="moe_ops")

transformers reads everything else, and makes floats of it. Files with three tensors of experts a
layer (`ffn_gate_exps` and so on: Qwen, OLMoE, DeepSeek and the like) are read, and their types may
differ from layer to layer and from w_gate_up to w_down. The package gguf reads the file.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import modeling_gguf_pytorch_utils as legacy
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from moe_ops._reading import damage
from moe_ops.hf.checkpoints.files import put
from moe_ops.hf.checkpoints.gguf_header import GgufTensor, check_gguf
from moe_ops.hf.checkpoints.quantizer import mark_stored
from moe_ops.quant import published
from moe_ops.quant.bank import find_banks
from moe_ops.quant.convert import new_experts
from moe_ops.quant.published import StoredWeight
from moe_ops.weight_formats import joined_label

# Sizes in the config that transformers does not read -> the tensors that have them as inputs.
_WIDTHS = {
    "moe_intermediate_size": "ffn_down_exps",
    "shared_expert_intermediate_size": "ffn_down_shexp",
}
_EXPERTS = re.compile(r"^blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight$")


def _check(file: str) -> dict[str, GgufTensor]:
    """Returns the tensors of a GGUF file that is whole; see `check_gguf`."""
    try:
        return check_gguf(file)
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise ImportError(
            "moe_ops needs the package gguf to read GGUF files: pip install gguf"
        ) from error


def _reader(file: str) -> Any:
    _check(file)
    import gguf

    with _reading(file):
        return gguf.GGUFReader(file)


def _reading(file: str) -> AbstractContextManager[None]:
    return damage("from_pretrained", file, "a whole GGUF file of this model")


class GgufExpertsQuantizer(GgufHfQuantizer):
    """Leaves the experts of a GGUF file in their blocks, in layers of moe_ops.

    Widths of experts are written into `model_config` when the file is known.
    """

    def __init__(self, quantization_config: Any, model_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._model_config = model_config
        self._tensors: dict[tuple[str, str], Any] = {}  # layer and part -> the reader's tensor
        self._banks: dict[str, str] = {}  # name of a module -> layer
        self._file = ""

    def read_header(self, gguf_file: str) -> None:
        """Checks the file before transformers reads it."""
        if gguf_file is None:  # transformers has found no regular file of the name.
            raise ValueError(
                f"from_pretrained: gguf_file must be a regular file, got "
                f"{self.quantization_config.gguf_file}."
            )
        tensors = _check(gguf_file)
        with _reading(gguf_file):
            super().read_header(gguf_file)
        for size, part in _WIDTHS.items():
            widths = {t.shape[-1] for n, t in tensors.items() if n.endswith(f".{part}.weight")}
            if len(widths) == 1 and hasattr(self._model_config, size):
                setattr(self._model_config, size, *widths)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        self.quantization_config.dequantize = True  # What is not an expert.

    def _weight(self, layer: str, part: str) -> StoredWeight:
        tensor = self._tensors[layer, part]
        with warnings.catch_warnings():  # The mapped file is not writable, and is not written.
            warnings.simplefilter("ignore", UserWarning)
            data = torch.from_numpy(tensor.data)
        return published.from_ggml(data, tensor.tensor_type.name)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        super()._process_model_before_weight_loading(model, **kwargs)
        assert checkpoint_files
        file = self._file = checkpoint_files[0]
        shapes = {name: tensor.shape for name, tensor in _check(file).items()}
        for tensor in _reader(file).tensors:
            match = _EXPERTS.match(tensor.name)
            if match is not None:
                self._tensors[match[1], match[2]] = tensor
        for found in find_banks(model, unsupported="skip"):
            layer = "".join(re.findall(r"\d+", found.name)[:1])
            if (layer, "down") not in self._tensors:
                continue
            bank = found.bank
            rows = (bank.num_experts, bank.intermediate_size, bank.hidden_size)
            wanted = {"gate": rows, "up": rows, "down": (rows[0], rows[2], rows[1])}
            for part, shape in wanted.items():
                name = f"blk.{layer}.ffn_{part}_exps.weight"
                if shapes.get(name) != shape:
                    raise ValueError(
                        f"from_pretrained: {name} in {file} must be {list(shape)}, got "
                        f"{list(shapes[name]) if name in shapes else 'none'}."
                    )
            with _reading(file):
                kinds = {
                    part: published.ggml_format(self._tensors[layer, part].tensor_type.name)
                    for part in wanted
                }
            if kinds["gate"] != kinds["up"]:
                raise ValueError(
                    f"from_pretrained: gate and up of {found.name} must have one type, got "
                    f"{kinds['gate'].label} and {kinds['up'].label}."
                )
            label = joined_label({"w_gate_up": kinds["up"], "w_down": kinds["down"]})
            with _reading(file):
                experts = new_experts(found, label, bank=bank)
            experts._is_hf_initialized = True
            found.hook.install(model, found.module, experts)
            self._banks[found.name] = layer
            del found, bank
        if not self._banks:
            raise ValueError(
                "from_pretrained: a GGUF file on moe_ops must hold experts that "
                f"{type(model).__name__} has, got none."
            )
        names = {rf"^{re.escape(name)}\." for name in self._banks}
        kept = model._keys_to_ignore_on_load_missing or ()
        model._keys_to_ignore_on_load_missing = names | set(kept)
        return model

    def get_state_dict(self, checkpoint_file: str, model: Any) -> dict[str, Any]:
        with _reading(checkpoint_file):
            tensors = self._dense_tensors(checkpoint_file, model)
            for name, own in model.state_dict().items():
                found = tensors.get(name)
                if isinstance(found, Tensor) and found.shape != own.shape:
                    raise ValueError(
                        f"{name} has shape {list(found.shape)} in place of {list(own.shape)}"
                    )
            return tensors

    def _dense_tensors(self, checkpoint_file: str, model: Any) -> dict[str, Any]:
        if self.supported:
            tensors = super().get_state_dict(checkpoint_file, model)
            return {name: t for name, t in tensors.items() if not _EXPERTS.match(name)}
        import gguf

        reader = _reader(checkpoint_file)
        architecture = legacy.read_field(reader, "general.architecture")[0]
        make = legacy.TENSOR_PROCESSORS.get(architecture, legacy.TensorProcessor)
        processor = make(config=model.config.to_dict())
        mapping = legacy.get_gguf_hf_weights_map(model, processor)
        result: dict[str, Tensor] = {}
        for tensor in reader.tensors:
            if _EXPERTS.match(tensor.name):
                continue
            weights = gguf.dequantize(tensor.data, tensor.tensor_type)
            done = processor.process(
                weights=weights,
                name=tensor.name,
                tensor_key_mapping=mapping,
                parsed_parameters={"tensors": result},
            )
            if done.name in mapping:
                value = torch.from_numpy(done.weights.copy())
                result[mapping[done.name]] = value.to(self.dtype or torch.float32)
        return result

    @torch.no_grad()
    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.supported:
            model._weight_conversions = None
        for name, layer in self._banks.items():
            block: Any = model.get_submodule(name)
            experts = getattr(block, "experts", block)
            with _reading(self._file):
                halves = [self._weight(layer, part) for part in ("gate", "up")]
                for weight, stored in (
                    ("w_gate_up", published.concatenated(halves)),
                    ("w_down", self._weight(layer, "down")),
                ):
                    put(getattr(experts, weight), stored.codes, weight)
                    put(getattr(experts, f"{weight}_scale"), stored.scale, f"{weight}_scale")
        self._tensors = {}
        mark_stored(model, list(self._banks))
        return model

    @property
    def is_trainable(self) -> bool:
        return True  # Adapters are.
