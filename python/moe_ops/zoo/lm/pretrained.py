"""Saving and loading of zoo models as published checkpoints, and parameter counts."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from moe_ops import _files
from moe_ops._fields import check_names
from moe_ops.layers import Router
from moe_ops.memory import available_memory

from . import checkpoint
from .checkpoint import Entry, LoadReport
from .config import LMConfig

# Entry of config.json for fields without a published name.
OWN_FIELDS = "moe_ops"
_CANNOT_BE_BUILT = (
    ArithmeticError,
    AssertionError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

Model = TypeVar("Model", bound="Pretrained")


class Pretrained(nn.Module):
    """Model that is built from a config and saved in a folder.

    A subclass has `config_class`, sets `config`, and lists the published names of its tensors in
    `entries`.
    """

    # Regular expressions of published keys that are unused.
    ignored_keys: tuple[str, ...] = ()
    # Config fields that are not tensor sizes, such as the training context.
    free_fields: tuple[str, ...] = ("context",)
    config_class: ClassVar[type[LMConfig]]

    config: Any  # An instance of `config_class`.
    load_report: LoadReport | None = None

    def entries(self) -> list[Entry]:
        """Returns each tensor of the model with its keys in published checkpoints. The first one's
        dtype is the checkpoint's dtype."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls: type[Model],
        folder: Path | str,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        strict: bool = True,
        reader: checkpoint.Reader | None = None,
        **overrides: Any,
    ) -> Model:
        """Reads a checkpoint: config.json and safetensors, sharded or not, with published keys.

        Args:
            folder: where they are.
            dtype: of the parameters; None is that of the checkpoint's first tensor, the embedding.
            device: of the parameters.
            strict: a missing key is an error; else the tensors it belongs to keep their initial
                values. Unexpected keys give a warning.
            reader: gives the tensors in the place of those of the folder.
            overrides: fields of the config to change.

        Returns:
            The model in eval mode. Its `load_report` says what was missing, unexpected and ignored.

        Raises:
            FileNotFoundError: no config, no tensors, or a file of the index that is not there.
            ValueError: missing keys with `strict`, a tensor whose shape or type does not fit, a
                config that describes something else, or a file that is damaged or lies outside the
                folder. All of it is noticed before memory for the model is taken.
        """
        folder = Path(folder)
        before = _files.stamp(folder / checkpoint.CONFIG)
        published = checkpoint.read_config(folder)
        try:
            config = cls._published_config(published, overrides)
        except ValueError as error:
            raise ValueError(
                f"{cls.__name__}.from_pretrained: in {folder / checkpoint.CONFIG}, {error}"
            ) from error
        reader = checkpoint.Reader(folder) if reader is None else reader
        if _files.stamp(folder / checkpoint.CONFIG) != before:
            raise ValueError(
                f"{cls.__name__}.from_pretrained: {folder} must stay as it is while it is read, "
                "got replaced by another checkpoint; load it again."
            )
        sizes = {name: value for name, value in vars(config).items() if name not in cls.free_fields}
        checkpoint.check_sizes(sizes, reader, strict=strict)
        model, entries = cls._without_memory(config, folder)
        report = checkpoint.compare(reader, entries, model.ignored_keys)
        if report.missing and strict:
            raise ValueError(
                f"{cls.__name__}.from_pretrained: {folder} must hold all tensors of the model, got "
                f"{report}"
            )
        if report.unexpected:
            warnings.warn(f"{cls.__name__}.from_pretrained: {report}", stacklevel=2)
        if dtype is None:
            first = next((k for k in entries[0].keys if k in reader.keys()), None)
            dtype = torch.float32 if first is None else reader.dtype(first)
        checkpoint.check(model, reader, entries, report)
        if report.missing:
            _check_memory(cls.__name__, model, dtype)
            model = cls(config).to(device=device, dtype=dtype)
        else:
            model = model.to(dtype).to_empty(device=device)
        checkpoint.load(model, reader, entries, report)
        model.load_report = report
        return model.eval()

    @classmethod
    def _published_config(cls, published: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
        own = published.get(OWN_FIELDS, {})
        if not isinstance(own, dict):
            raise ValueError(f"{OWN_FIELDS} must be an object, got {_files.shown(own)}.")
        check_names(cls.config_class, own, OWN_FIELDS)
        return cls.config_class.from_published(published, **{**own, **overrides})

    @classmethod
    def _without_memory(cls: type[Model], config: Any, folder: Path) -> tuple[Model, list[Entry]]:
        """Creates the model on the meta device.

        Sizes from a file may be inconsistent in ways that only construction reveals, such as a
        product beyond 2^63 or a number of heads that does not divide.
        """
        try:
            with torch.device("meta"):
                model = cls(config)
            return model, model.entries()
        except _CANNOT_BE_BUILT as error:
            raise ValueError(
                f"{cls.__name__}.from_pretrained: {folder / checkpoint.CONFIG} must describe a "
                f"model that can be built, got: {str(error).splitlines()[0]}"
            ) from error

    def save_pretrained(self, folder: Path | str, *, max_shard_bytes: int = 5 * 10**9) -> None:
        """Writes config.json and safetensors with the published keys and layouts.

        Args:
            folder: created if missing. An earlier checkpoint in it is replaced once the new one is
                on disk.
            max_shard_bytes: tensors of one file, unless a single one is larger.

        Raises:
            OSError: it could not be written; the earlier checkpoint is then unchanged.
            ValueError: quantized experts, published layouts have no scales.
        """
        published = self.config.to_published()
        published["dtype"] = str(next(self.parameters()).dtype).removeprefix("torch.")
        # Fields without published names, such as loss coefficients.
        plain = type(self.config).from_published(published)
        own = {
            field.name: getattr(self.config, field.name)
            for field in dataclasses.fields(self.config)
            if getattr(self.config, field.name) != getattr(plain, field.name)
        }
        if own:
            published[OWN_FIELDS] = own
        checkpoint.save(self, folder, self.entries(), published, max_shard_bytes=max_shard_bytes)

    # Parameter counts.

    def num_parameters(self) -> dict[str, int]:
        """Returns the numbers of all parameters and of the active ones (K experts of E)."""
        total = sum(p.numel() for p in self.parameters())
        return {"total": total, "active": total - self.idle_parameters()}

    def idle_parameters(self) -> int:
        """Returns the number of expert parameters that a token does not use."""
        idle = 0
        for module in self.modules():
            router = getattr(module, "router", None)
            if not isinstance(router, Router):
                continue
            share = 1 - router.top_k / router.num_experts
            experts = getattr(module, "experts", module)
            own = experts.parameters(recurse=experts is not module)
            idle += sum(round(p.numel() * share) for p in own if p.dim() == 3)
        return idle


def _check_memory(name: str, model: nn.Module, dtype: torch.dtype) -> None:
    """Checks available memory for a model with sizes that no tensor of the checkpoint confirms."""
    wanted = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    available = available_memory()
    if 0 < available < wanted:
        raise ValueError(
            f"{name}.from_pretrained: sizes of config.json must fit into the memory where the "
            f"checkpoint lacks tensors, got {wanted} bytes of {available}."
        )
