"""Loading of a model with only some of the experts of its checkpoint.

Letters: E experts.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from moe_ops import _reading
from moe_ops._files import shown
from moe_ops.zoo.lm.config import LMConfig

from ._optional import optional
from .prune import prune_experts
from .routed_layers import find_routed_layers


class PartlyLoaded(NamedTuple):
    """Result of `load_pruned`: the model in eval mode, the bytes of the tensors that were read, and
    those of all tensors of the checkpoint."""

    model: Any
    bytes_read: int
    bytes_total: int


def load_pruned(
    folder: Path | str,
    keep: Mapping[str, Sequence[int]],
    *,
    model_class: Any = None,
    dtype: torch.dtype | None = None,
) -> PartlyLoaded:
    """Loads a checkpoint with only some of its experts, and does not read others.

    The model equals the result of `prune_experts` on the whole model, in the memory of the kept
    experts: separate tensors of other experts are never read; of tensors with all experts, and of
    routers, only some rows are read. For a checkpoint of transformers with experts quantized by
    `moe_ops.quantize`, these are the quantized values and scales of the kept experts.

    Args:
        folder: config.json and safetensors, sharded or not, as written by transformers or the zoo.
        keep: name of a routed layer, as in the whole model -> ids of the experts to keep, an equal
            number in all layers; must contain all routed layers.
        model_class: of the zoo (`moe_ops.zoo.deepseek.DeepSeek`, ...); None: the causal language
            model of transformers in the config.
        dtype: of the parameters; None is the checkpoint's.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: an unknown or missing layer name, different numbers of experts, a checkpoint of
            transformers with another quantization, or a damaged one.
        ImportError: safetensors, or transformers, is missing.

    Source: Pei et al. 2025 (PreMoe, arXiv 2505.17639).
    """
    folder = Path(folder)
    optional("load_pruned", "safetensors")
    # Both need safetensors, which the rest of this package does not.
    from moe_ops.zoo.lm import checkpoint

    from ._partial_reader import PartialReader, number_of

    published = checkpoint.read_config(folder)
    if model_class is None:
        model_class, whole = _of_transformers(folder, published)
    else:
        with _reading.damage(
            "load_pruned", folder / checkpoint.CONFIG, f"of {model_class.__name__}"
        ):
            config = model_class._published_config(published, {})
        with (
            _reading.damage("load_pruned", folder / checkpoint.CONFIG, "that of a model"),
            torch.device("meta"),
        ):
            whole = model_class(config)
    layers = {layer.name: layer for layer in find_routed_layers(whole, caller="load_pruned")}
    missing = [name for name in layers if name not in keep]
    if missing or len(keep) != len(layers):
        wrong = missing or [name for name in keep if name not in layers]
        raise ValueError(
            f"load_pruned: keep must name the {len(layers)} routed layers of the model in "
            f"{folder}, got "
            f"{'none' if missing else 'a layer that is not there'} for {wrong[0]!r}."
        )
    numbers = {number_of(name): (list(keep[name]), layers[name].num_experts) for name in layers}
    pruned = prune_experts(whole, keep)
    if "save_pretrained" in vars(pruned):
        raise ValueError(
            "load_pruned: keep must leave all layers the same number of experts, got "
            f"{sorted({len(ids) for ids in keep.values()})}."
        )
    reader = PartialReader(folder, numbers)
    if isinstance(pruned.config, LMConfig):
        model = _load_of_zoo(model_class, folder, published, pruned.config, reader, dtype)
    else:
        model = _load_of_transformers(model_class, pruned.config, reader, dtype)
    return PartlyLoaded(model, reader.bytes_read, reader.bytes_total)


def _of_transformers(folder: Path, published: Mapping[str, Any]) -> tuple[Any, nn.Module]:
    """Returns the class of the model in the folder, and the model on the meta device."""
    transformers = optional("load_pruned", "transformers")
    quantized = published.get("quantization_config")
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
        if method != "moe_ops":
            raise ValueError(
                f"load_pruned: {folder} must hold a float checkpoint, or one whose experts "
                f"moe_ops.quantize has quantized, got quant_method {shown(method)}."
            )
        if quantized.get("layers") is not None:
            raise ValueError(
                f"load_pruned: {folder} must have experts of moe_ops.quantize, got those "
                "of a checkpoint of another method."
            )
        # Registers the quantization method with transformers.
        importlib.import_module("moe_ops.hf")
    with _reading.damage("load_pruned", folder, "a checkpoint that transformers knows"):
        config = transformers.AutoConfig.from_pretrained(folder)
    known = transformers.AutoModelForCausalLM._model_mapping
    if type(config) not in known:
        raise ValueError(
            f"load_pruned: {folder} must hold a causal language model of transformers, got "
            f"{config.model_type}."
        )
    with torch.device("meta"):
        return known[type(config)], known[type(config)](config)


def _load_of_transformers(
    model_class: Any, config: Any, reader: Any, dtype: torch.dtype | None
) -> Any:
    tensors = {key: reader.get(key) for key in reader.keys()}
    model, report = model_class.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype="auto" if dtype is None else dtype,
        output_loading_info=True,
    )
    if report["missing_keys"]:
        raise ValueError(
            f"load_pruned: {reader.folder} must hold all tensors of {model_class.__name__}, got "
            f"no {sorted(report['missing_keys'])[0]}."
        )
    return model.eval()


def _load_of_zoo(
    model_class: Any,
    folder: Path,
    published: Mapping[str, Any],
    config: LMConfig,
    reader: Any,
    dtype: torch.dtype | None,
) -> Any:
    whole = model_class._published_config(published, {})
    changes = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(whole, field.name)
    }
    return model_class.from_pretrained(folder, dtype=dtype, reader=reader, **changes)
