"""Models of the HoME experiments, with equal numbers of parameters."""

from __future__ import annotations

import dataclasses

from bench.studies import matching
from bench.studies.home.models import RecommenderConfig, build
from moe_ops.zoo.home import HoME

LR = 2e-3
EXPERTS = {
    "MMoE": {"model": "mmoe", "num_shared": 8},
    "PLE": {"model": "ple", "num_shared": 2, "num_task": 1},
    "HoME": {"model": "home", "num_shared": 2, "num_category": 1, "num_task": 1},
}
# HoME* without one part, and the lower bound: on the generated rows only.
WITHOUT = {
    "HoME* without hierarchy": ("HoME*", {"hierarchy": False}),
    "HoME* without feature gates": ("HoME*", {"feature_gate": "none"}),
    "HoME* without self gates": ("HoME*", {"self_gate": False}),
}
FIXED = "MMoE* with fixed gates"
MODELS = tuple(f"{name}{star}" for name in EXPERTS for star in ("", "*"))


def parameters(model: HoME) -> int:
    """Returns the number of parameters without embeddings and towers, which all models share."""
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if not name.startswith(("features", "towers"))
    )


def matched(config: RecommenderConfig, target: int) -> RecommenderConfig:
    """Returns the config with the hidden width of experts that comes nearest to `target`
    parameters."""

    def at(width: int) -> RecommenderConfig:
        return dataclasses.replace(config, expert_hidden=width)

    return at(matching.width(lambda width: parameters(build(at(width))), target))


def with_parts(base: RecommenderConfig) -> dict[str, RecommenderConfig]:
    """Returns the six models at one number of parameters, then HoME* without one part, then the
    lower bound."""
    found: dict[str, RecommenderConfig] = {}
    target = parameters(build(dataclasses.replace(base, **EXPERTS["HoME"])))
    for name, experts in EXPERTS.items():
        config = matched(dataclasses.replace(base, **experts), target)
        found[name] = dataclasses.replace(config, expert_norm=False)
        found[f"{name}*"] = config
    for name, (whole, change) in WITHOUT.items():
        found[name] = dataclasses.replace(found[whole], **change)
    found[FIXED] = found["MMoE*"]
    return found
