"""Published mixture-of-experts systems, built from the layers and ops of this package.

    from moe_ops import zoo

    zoo.systems()                                    # what there is
    model = zoo.create("jetmoe", preset="tiny")      # a model of a named size
    model = zoo.create("jetmoe", preset="tiny", num_experts=4)

Each system is one module, ``moe_ops.zoo.<name>``, with a frozen dataclass of sizes (its presets are
class methods, ``JetMoEConfig.jetmoe_8b()``) and the model, a plain `torch.nn.Module`. Nothing is
imported before it is asked for.
"""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

__all__ = ["System", "create", "get", "register", "systems"]


@dataclass(frozen=True)
class System:
    """One entry of the zoo.

    Attributes:
        name: what `create` and the command line call it; the stem of its page in docs/zoo and of
            its experiment in bench/experiments.
        module: the module that holds it, imported when first used.
        config: name of its config dataclass there, whose class attribute `PRESETS` names the class
            methods that make presets.
        model: name of the class there that is built from a config.
        summary: one line for lists.
        needs: the extra of this distribution that its module needs, or "".
    """

    name: str
    module: str
    config: str
    model: str
    summary: str
    needs: str = ""

    def load(self) -> ModuleType:
        """Its module. ImportError says which extra to install where something is missing."""
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if not self.needs or (error.name or "").startswith("moe_ops"):
                raise
            raise ImportError(
                f"moe_ops.zoo: {self.name} needs {error.name}, which is not installed: "
                f"pip install torch-moe-ops[{self.needs}]"
            ) from error

    def presets(self) -> tuple[str, ...]:
        """Names of its presets, "tiny" first."""
        return tuple(getattr(self.load(), self.config).PRESETS)

    def make_config(self, preset: str = "tiny", **overrides: Any) -> Any:
        """The config of a preset, with other values for some of its fields.

        Raises:
            ValueError: an unknown preset or field.
        """
        config_class = getattr(self.load(), self.config)
        if preset not in config_class.PRESETS:
            raise ValueError(
                f"moe_ops.zoo: preset of {self.name} must be one of "
                f"{', '.join(config_class.PRESETS)}, got {preset!r}."
            )
        config = getattr(config_class, preset)()
        known = {field.name for field in dataclasses.fields(config)}
        unknown = sorted(set(overrides) - known)
        if unknown:
            raise ValueError(
                f"moe_ops.zoo: {config_class.__name__} must be given fields among "
                f"{', '.join(sorted(known))}, got {', '.join(unknown)}."
            )
        return dataclasses.replace(config, **overrides)

    def create(self, preset: str = "tiny", **overrides: Any) -> Any:
        """The model of `make_config`, with fresh weights."""
        return getattr(self.load(), self.model)(self.make_config(preset, **overrides))


_SYSTEMS: dict[str, System] = {}


def register(system: System) -> System:
    """Adds a system, yours or one of ours.

    Raises:
        ValueError: the name is taken.
    """
    if system.name in _SYSTEMS:
        raise ValueError(f"moe_ops.zoo: name must be a new one, got {system.name!r}.")
    _SYSTEMS[system.name] = system
    return system


def systems() -> tuple[str, ...]:
    """Names of all systems, in the order of `moe-ops zoo list`."""
    return tuple(_SYSTEMS)


def get(name: str) -> System:
    """The entry of a system.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in _SYSTEMS:
        known = ", ".join(_SYSTEMS) or "nothing yet"
        raise ValueError(f"moe_ops.zoo: name must be one of {known}, got {name!r}.")
    return _SYSTEMS[name]


def create(name: str, preset: str = "tiny", **overrides: Any) -> Any:
    """A model with fresh weights.

    Args:
        name: one of `systems()`.
        preset: one of the presets of its config; every system has "tiny".
        overrides: fields of its config to change.

    Raises:
        ValueError: an unknown name, preset or field.
    """
    return get(name).create(preset, **overrides)


# One line a system; modules are imported by `System.load` alone.
register(
    System(
        "jetmoe",
        "moe_ops.zoo.jetmoe",
        "JetMoEConfig",
        "JetMoE",
        "Language model with sparse attention and sparse feed-forward experts.",
        needs="zoo",
    )
)
register(
    System(
        "deepseek",
        "moe_ops.zoo.deepseek",
        "DeepSeekConfig",
        "DeepSeek",
        "DeepSeekMoE V1 to V3: small experts, shared experts, balance by losses or a bias.",
        needs="zoo",
    )
)
register(
    System(
        "moduleformer",
        "moe_ops.zoo.moduleformer",
        "ModuleFormerConfig",
        "ModuleFormer",
        "ModuleFormer: modules that can be inserted and pruned, stick-breaking attention.",
        needs="zoo",
    )
)
register(
    System(
        "coe",
        "moe_ops.zoo.coe",
        "CoEConfig",
        "CoE",
        "Chain-of-Experts: the same experts several times in a row, each time routed anew.",
        needs="zoo",
    )
)
register(
    System(
        "topp",
        "moe_ops.zoo.topp",
        "TopPConfig",
        "TopP",
        "Dynamic top-p routing: harder tokens use more experts.",
        needs="zoo",
    )
)
register(
    System(
        "home",
        "moe_ops.zoo.home",
        "HoMEConfig",
        "build",
        "Multi-task recommenders: HoME, PLE, CGC, MMoE, AdaMMoE and a shared bottom.",
    )
)
register(
    System(
        "mowst",
        "moe_ops.zoo.mowst",
        "MowstConfig",
        "Mowst",
        "Mowst: a weak and a strong expert on a graph, mixed by the weak one's confidence.",
        needs="graphs",
    )
)
register(
    System(
        "t2mir",
        "moe_ops.zoo.t2mir",
        "T2MIRConfig",
        "T2MIR",
        "In-context reinforcement learning with experts routed by token and by task.",
    )
)
