"""Saving and loading of any model of the zoo with its config, in one file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from moe_ops import _reading
from moe_ops._state import read_state, write_state


def save_model(model: nn.Module, path: Path | str) -> None:
    """Writes the config and the state dict of a model into one file, in place of an old one.

    Language models, THOR and WideNet also have `save_pretrained`, which writes published formats.

    Args:
        model: of `create_model`, or built from a config of the zoo.
        path: of the file.

    Raises:
        ValueError: the model has no config, or experts that are no modules, like DriftMoE's trees.
    """
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not dataclasses.is_dataclass(config):
        raise ValueError(
            "save_model: model must be a torch module with a config of the zoo, got "
            f"{type(model).__name__}."
        )
    if isinstance(getattr(model, "experts", None), list):  # No modules: trees of river.
        raise ValueError(
            f"save_model: the experts of {type(model).__name__} must be torch modules, got Python "
            "objects, which only pickle saves."
        )
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
    write_state(path, {"config": fields, "weights": model.state_dict()})


def load_weights_and_config(path: Path | str, config_class: Any, model_class: Any) -> Any:
    """Returns the model in the file, on the CPU; see `load_model`."""
    state = read_state(path)
    with _reading.damage("load_model", path, f"a {config_class.__name__} and its weights"):
        model = model_class(config_class(**state["config"]))
        model.load_state_dict(state["weights"])
    return model
