"""Published mixture-of-experts models, built from the layers and ops of this package.

Example:
    from moe_ops import zoo

Each model is a module or a package, ``moe_ops.zoo.<name>``, with a frozen config dataclass (its
presets are class methods, ``JetMoEConfig.jetmoe_8b()``) and a plain `torch.nn.Module`.
``moe_ops.zoo.lm`` contains the code that the language models share. Modules are imported on first
use.
"""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from moe_ops._fields import check_choice, check_names

from ._presets import preset as preset
from ._presets import presets_of
from ._saving import load_weights_and_config, save_model

__all__ = [
    "create_model",
    "get",
    "list_methods",
    "list_models",
    "load_model",
    "save_model",
]


@dataclass(frozen=True)
class System:
    """Entry of the zoo.

    Attributes:
        name: name for `create_model` and the command line; the stem of its page in docs/zoo and of
            its experiment in bench/studies, if it has one.
        module: the module that defines it, imported when first used.
        config: name of its config dataclass in that module; its attributes made by `preset` are the
            presets.
        model: name of the model class in that module, built from a config.
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
        """Imports and returns the module. An ImportError names the extra to install if a dependency
        is missing."""
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
        """Returns the names of its presets, "tiny" first."""
        return presets_of(getattr(self.load(), self.config))

    def make_config(self, preset: str = "tiny", **overrides: Any) -> Any:
        """Returns the config of a preset, with some fields replaced.

        Raises:
            ValueError: an unknown preset or field.
        """
        config_class = getattr(self.load(), self.config)
        check_choice("moe_ops.zoo", f"preset of {self.name}", preset, presets_of(config_class))
        check_names(config_class, overrides, f"moe_ops.zoo: {config_class.__name__}")
        return dataclasses.replace(getattr(config_class, preset)(), **overrides)

    def create(self, preset: str = "tiny", **overrides: Any) -> Any:
        """Returns the model of `make_config`, with newly initialized weights."""
        return getattr(self.load(), self.model)(self.make_config(preset, **overrides))


@dataclass(frozen=True)
class Method:
    """Published method for trained models: it has functions instead of a model and presets.

    Attributes:
        name: the stem of its page in docs/zoo and of its experiment in bench/studies.
        module: the module that has its functions.
        functions: their names in that module.
        summary: one line for lists.
    """

    name: str
    module: str
    functions: tuple[str, ...]
    summary: str

    def load(self) -> dict[str, Any]:
        """Imports the module and returns its functions and classes by name."""
        module = importlib.import_module(self.module)
        return {name: getattr(module, name) for name in self.functions}


_METHODS = (
    Method("premoe", "moe_ops.surgery", ("TaskRoutingPatterns", "load_pruned"),
           "PreMoe: finds the experts of a task from a prompt, and loads only these."),
    Method("uncurl", "moe_ops.surgery", ("uncurl_groups", "merge_experts"),
           "UNCURL: groups, aligns and merges experts."),
    Method("super_experts", "moe_ops.surgery",
           ("find_super_experts", "evaluate_super_experts"),
           "Super Experts: finds the few experts with extremely large outputs."),
    Method("scmoe", "moe_ops.surgery", ("SelfContrastLogitsProcessor", "override_routing"),
           "SCMoE: decoding that contrasts a model with itself under weaker routing."),
    Method("expertflow", "moe_ops.offload", ("offload_experts", "ExpertPredictor"),
           "ExpertFlow: experts in slower memory, and a cache that is filled by prediction."),
)  # fmt: skip
_SYSTEMS: dict[str, System] = {}


def register(system: System) -> System:
    """Adds a model to the zoo, from this package or elsewhere.

    Raises:
        ValueError: the name is taken.
    """
    if system.name in _SYSTEMS:
        raise ValueError(f"moe_ops.zoo: name must be a new one, got {system.name!r}.")
    _SYSTEMS[system.name] = system
    return system


def list_models() -> tuple[str, ...]:
    """Returns the names of all models, in the order of `moe-ops zoo list`."""
    return tuple(_SYSTEMS)


def list_methods() -> tuple[Method, ...]:
    """Returns the methods for trained models, which `create_model` cannot build."""
    return _METHODS


def get(name: str) -> System:
    """Returns the entry of a model.

    Raises:
        ValueError: no model has this name.
    """
    check_choice("moe_ops.zoo", "name", name, _SYSTEMS)
    return _SYSTEMS[name]


def create_model(name: str, preset: str = "tiny", **overrides: Any) -> Any:
    """Returns a model with newly initialized weights.

    Args:
        name: one of `list_models()`.
        preset: one of the presets of its config; every system has "tiny".
        overrides: fields of its config to change.

    Raises:
        ValueError: an unknown name, preset or field.
    """
    return get(name).create(preset, **overrides)


def load_model(name: str, path: Path | str) -> Any:
    """Returns the model that `save_model` wrote, on the CPU.

    Args:
        name: one of `list_models()`, the model's system.
        path: of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown name; the file is damaged, or of another system.
    """
    module = get(name).load()
    config_class, model_class = getattr(module, get(name).config), getattr(module, get(name).model)
    return load_weights_and_config(path, config_class, model_class)


# Name, config, model, extra and summary; a system is imported by `System.load` alone.
_OURS = (
    ("jetmoe", "JetMoEConfig", "JetMoE", "zoo",
     "Language model with sparse attention and sparse feed-forward experts."),
    ("deepseek", "DeepSeekConfig", "DeepSeek", "zoo",
     "DeepSeekMoE V1 to V3: small experts, shared experts, balance by losses or a bias."),
    ("kolibri", "KolibriConfig", "Kolibri", "zoo",
     "Kolibri-1: many small experts selected by biased logits, windowed attention."),
    ("moduleformer", "ModuleFormerConfig", "ModuleFormer", "zoo",
     "ModuleFormer: attention and feed-forward modules, informative routing, stick-breaking."),
    ("coe", "CoEConfig", "CoE", "zoo",
     "Chain-of-Experts: the same experts several times in a row, each time routed anew."),
    ("topp", "TopPConfig", "TopP", "zoo",
     "Dynamic top-p routing: harder tokens use more experts."),
    ("llama", "LlamaConfig", "Llama", "zoo",
     "Dense language model in Llama's layout: what upcycling starts from."),
    ("bam", "BAMConfig", "BAM", "zoo",
     "BAM: attention and feed-forward experts from dense models; BTX as its baseline."),
    ("factorllm", "FactorLLMConfig", "FactorLLM", "zoo",
     "FactorLLM: networks of a dense model cut into slices, of which a token uses some."),
    ("home", "HoMEConfig", "HoME", "",
     "HoME: a multi-task recommender with experts of tasks, of categories and of all."),
    ("mowst", "MowstConfig", "Mowst", "graphs",
     "Mowst: a weak and a strong expert on a graph, mixed by the weak one's confidence."),
    ("t2mir", "T2MIRConfig", "T2MIR", "",
     "In-context reinforcement learning with experts routed by token and by task."),
    ("composition", "CompositionConfig", "Composition", "",
     "Composition of Experts: whole models behind a router of categories, under a budget."),
    ("adamoe", "AdaMoEConfig", "ActionTransformer", "",
     "AdaMoE: a flow-matching policy with experts that are chosen and weighed apart."),
    ("gntmove", "GNTMoveConfig", "GNTMove", "",
     "GNT-MOVE: novel views of unseen scenes, by transformers with experts of views."),
    ("mofme", "MoFMEConfig", "RestorationTransformer", "",
     "MoFME: images restored by experts that modulate one shared network."),
    ("sentence", "SentenceConfig", "SentenceExperts", "hf",
     "Sentence experts: an encoder with an expert for every given domain."),
    ("dynamicdino", "DynamicDinoConfig", "DynamicDino", "detection",
     "Dynamic-DINO: an open-vocabulary detector with experts in its decoder."),
    ("thor", "ThorConfig", "Thor", "zoo",
     "THOR: translation with experts that are drawn at random and taught to agree."),
    ("widenet", "WideNetConfig", "build", "zoo",
     "WideNet: one block of experts at every depth, with norms of each depth."),
    ("driftmoe", "DriftMoEConfig", "DriftMoE", "streams",
     "DriftMoE: a router network over trees that learn from a drifting stream."),
)  # fmt: skip
for _name, _config, _model, _needs, _summary in _OURS:
    register(System(_name, f"moe_ops.zoo.{_name}", _config, _model, _summary, _needs))
