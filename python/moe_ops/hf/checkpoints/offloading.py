"""Models of transformers whose experts go to files while they are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moe_ops import _files
from moe_ops.memory import release_file_pages
from moe_ops.offload import offload_experts, save_experts
from moe_ops.offload.convert import parts_of
from moe_ops.offload.store import FileStore
from moe_ops.quant.bank import FoundBank, check_weights, find_banks

from .quantizer import BankReader, forget_quantizer

_METHOD = "moe_ops_offload"


def load_offloaded(
    auto_class: Any,
    pretrained: Path | str,
    path: Path | str,
    *,
    skip: Sequence[str] = (),
    keep_cached: bool = True,
    offload: dict[str, Any],
    **options: Any,
) -> Any:
    """`from_pretrained` of a float model whose experts are larger than the memory.

    Example:
        model = load_offloaded(
            AutoModelForCausalLM, "folder", "experts", offload={"max_bytes": 2**30}
        )
        model.generate(...)
        print(model.expert_cache.stats)

    The experts of a layer are written to a file as soon as they have been read, and go, and so do
    the pages of the checkpoint that they were read from. While it loads, the process has the dense
    weights, the experts of one layer, and the pages of these. Files of an earlier call for the same
    checkpoint are written anew.

    Args:
        auto_class: `AutoModelForCausalLM` or another class with `from_pretrained`.
        pretrained: name or folder of the checkpoint.
        path: folder for the files, one a layer; made if it is not there.
        skip: shell patterns of the names of banks to leave in memory.
        keep_cached: as of `moe_ops.offload.FileStore`.
        offload: arguments of `moe_ops.offload.offload_experts`: slots, policy, device.
        options: further ones of `from_pretrained`.

    Returns:
        The model in eval mode. Its `expert_cache` has the slots.

    Raises:
        ValueError: no bank of float experts, or banks that `offload_experts` refuses.
        OSError: a file could not be written.
    """
    patterns = (skip,) if isinstance(skip, str) else tuple(skip)
    folder = _files.make_folder(path)
    loading = _Loading(folder, patterns)
    model = auto_class.from_pretrained(
        pretrained, quantization_config=_OffloadWhileLoading(loading), **options
    )
    forget_quantizer(model)
    if not loading.files:
        raise ValueError(
            f"load_offloaded: model must hold a bank of float experts, got {type(model).__name__} "
            "without one."
        )
    names = [found.name for found in find_banks(model, patterns, op="load_offloaded")]
    missing = [name for name in names if name not in loading.files]
    if missing:
        raise ValueError(
            f"load_offloaded: the checkpoint must hold {missing[0]}, got a part of it."
        )
    stores = [FileStore.open(loading.files[name]) for name in names]
    experts = [store.experts[0] for store in stores]
    tensors = stores[0].tensors
    for store in stores:
        store.close()
    store = FileStore(experts, tensors, keep_cached=keep_cached)
    model.expert_cache = offload_experts(model, store=store, skip=patterns, **offload)
    return model


class _Loading:
    """The options and the progress of one call of `load_offloaded`."""

    def __init__(self, folder: Path, skip: tuple[str, ...]) -> None:
        self.folder = folder
        self.skip = skip
        self.files: dict[str, Path] = {}  # Name of a bank -> its file.

    def __deepcopy__(self, memo: Any) -> _Loading:  # With the config that it hangs on.
        return self


@register_quantization_config(_METHOD)
class _OffloadWhileLoading(QuantizationConfigMixin):
    def __init__(self, loading: _Loading, quant_method: str = _METHOD) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.loading = loading

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method}


@register_quantizer(_METHOD)
class _Offloader(BankReader):
    """Writes each bank to its file when its last weight has been read."""

    quantization_config: _OffloadWhileLoading

    def finish(self, model: nn.Module, found: FoundBank) -> None:
        loading = self.quantization_config.loading
        check_weights("load_offloaded", found.name, found.module, found.bank)
        file = loading.folder / f"{found.name}.safetensors"
        save_experts(file, [parts_of(found.bank)])
        loading.files[found.name] = file
        for key in self.parameters_of(found):
            owner, _, leaf = key.rpartition(".")
            module = model.get_submodule(owner)
            empty = nn.Parameter(torch.empty_like(getattr(module, leaf), device="meta"), False)
            empty._is_hf_initialized = True  # type: ignore[attr-defined]
            setattr(module, leaf, empty)
        # What was read of the checkpoint, which stays mapped until all of it has been.
        release_file_pages()

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.pre_quantized:
            raise ValueError(
                "load_offloaded: the checkpoint must be of floats, got a quantized one."
            )
        for found in find_banks(model, self.quantization_config.loading.skip, op="load_offloaded"):
            self.expect(found)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return model
