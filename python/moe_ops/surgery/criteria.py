"""Criteria of experts' importance for a text, and selection of experts within a budget.

Letters: E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .profile import ExpertProfile, LayerProfile
from .routed_layers import find_routed_layers
from .rules import groups_left


def frequency(layer: LayerProfile) -> Tensor:
    """Returns the number of slots per expert."""
    return layer.load.double()


def tcess(layer: LayerProfile) -> Tensor:
    """Computes the mean over tokens of the router logit if the expert is the token's best, else 0.

    It follows the released code of PreMoe: raw logits, which may be negative and then rank an
    expert below one that was never selected.

    Source: Pei et al. 2025 (PreMoe, arXiv 2505.17639), with K_a = 1 and without a threshold.
    """
    return layer.logit[0] / max(int(layer.tokens), 1)


def tcess_softmax(layer: LayerProfile) -> Tensor:
    """Computes the mean over tokens of the softmax over the token's selected experts: TCESS as in
    the PreMoe paper, with K_a = K."""
    return layer.share / max(int(layer.tokens), 1)


def gate_norm(layer: LayerProfile) -> Tensor:
    """Computes the sum over tokens of routing weight times the norm of the expert's output."""
    return layer.gate_norm


def reap(layer: LayerProfile) -> Tensor:
    """Computes the mean over the expert's tokens of routing weight times the norm of its output, 0
    without tokens.

    Source: Lasby et al. 2025 (REAP, arXiv 2510.13999).
    """
    return layer.gate_norm / layer.load.clamp(min=1)


def max_output(layer: LayerProfile) -> Tensor:
    """Returns the largest |output| of each expert, the score of super experts.

    Source: Su et al. 2025 (Super Experts, arXiv 2507.23279).
    """
    return layer.largest_output()


# Names for `--by` and `by=`; each is a function of a layer's profile.
CRITERIA: dict[str, Callable[[LayerProfile], Tensor]] = {
    "frequency": frequency,
    "tcess": tcess,
    "tcess_softmax": tcess_softmax,
    "gate_norm": gate_norm,
    "reap": reap,
    "max_output": max_output,
}


def score_experts(
    profile: ExpertProfile, by: str | Callable[[LayerProfile], Tensor]
) -> dict[str, Tensor]:
    """Returns, by layer name, the scores [E] fp64 of the layer's experts; larger is more important.

    Args:
        by: one of `CRITERIA`, or a function of a layer's profile.

    Raises:
        ValueError: an unknown criterion.
    """
    if isinstance(by, str):
        if by not in CRITERIA:
            raise ValueError(f"score_experts: by must be one of {', '.join(CRITERIA)}, got {by!r}.")
        by = CRITERIA[by]
    return {name: by(layer).double() for name, layer in profile.layers.items()}


def select_experts(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    keep: int | float,
    *,
    budget: str = "layer",
    groups: str = "drop",
) -> dict[str, list[int]]:
    """Returns the experts with the best scores, in the order of their ids.

    Args:
        model: model of the scores; its routers define the minimum number of experts per layer.
        scores: name of a layer -> [E].
        keep: experts per layer (int), or a fraction of them (a float in (0, 1]), rounded.
        budget: "layer": this number in each layer. "global": this number per layer on average, for
            the largest scores divided by the mean magnitude of their layer; each layer keeps at
            least its router's top_k. A Hugging Face config has one number of experts for all
            layers, so such a model can be used but not saved in that format.
        groups: of group-limited routing. "drop": the best of all experts; the router's groups are
            dropped if they no longer fit. "keep": an equal number per group.

    Ties: the smaller id.

    Returns:
        Name of a layer -> ids, for `prune_experts`.

    Raises:
        ValueError: an unknown option, a value out of range, fewer experts than a token uses, or
            groups that cannot be kept.
    """
    if budget not in ("layer", "global"):
        raise ValueError(f"select_experts: budget must be 'layer' or 'global', got {budget!r}.")
    if groups not in ("drop", "keep"):
        raise ValueError(f"select_experts: groups must be 'drop' or 'keep', got {groups!r}.")
    if groups == "keep" and budget == "global":
        raise ValueError("select_experts: groups must be 'drop' with budget='global', got 'keep'.")
    layers = {layer.name: layer for layer in find_routed_layers(model, caller="select_experts")}
    for name, score in scores.items():
        if name not in layers or score.shape != (layers[name].num_experts,):
            raise ValueError(
                f"select_experts: scores must be [E] of a routed layer each, got shape "
                f"{list(score.shape)} for {name!r}."
            )
    wanted = {n: number_to_keep(keep, layers[n].num_experts, layers[n].top_k) for n in scores}
    if budget == "global":
        least = {name: layers[name].top_k for name in scores}
        return _best_of_all(scores, sum(wanted.values()), least)
    return {
        name: _best(score, wanted[name], layers[name].rules() if groups == "keep" else None)
        for name, score in scores.items()
    }


def number_to_keep(
    keep: int | float, num_experts: int, top_k: int, name: str = "select_experts: keep"
) -> int:
    """Returns the experts that a layer keeps, for `keep` of `select_experts`.

    `name` says in an error what was given.

    Raises:
        ValueError: a fraction outside (0, 1], or a number outside [top_k, num_experts].
    """
    if isinstance(keep, float):
        if not 0 < keep <= 1:
            raise ValueError(f"{name} must be a part in (0, 1], got {keep}.")
        keep = max(1, round(keep * num_experts))
    if not top_k <= keep <= num_experts:
        raise ValueError(
            f"{name} must be in [{top_k}, {num_experts}], from the experts a token "
            f"uses to those there are, got {keep}."
        )
    return keep


def _ranked(score: Tensor) -> list[int]:
    order: list[int] = score.nan_to_num(-torch.inf).argsort(descending=True, stable=True).tolist()
    return order


def _best(score: Tensor, number: int, router: Any) -> list[int]:
    if router is None or router.num_groups == 1:
        return sorted(_ranked(score)[:number])
    if number % router.num_groups:
        raise ValueError(
            f"select_experts: keep must be a multiple of the {router.num_groups} groups with "
            f"groups='keep', got {number}."
        )
    each, size = number // router.num_groups, len(score) // router.num_groups
    chosen = [
        group * size + e
        for group, part in enumerate(score.split(size))
        for e in sorted(_ranked(part)[:each])
    ]
    if groups_left(router, chosen) is None:
        raise ValueError(
            f"select_experts: keep must leave each of the {router.num_groups} groups enough "
            f"experts for its score and top_k = {router.top_k}, got {number}."
        )
    return chosen


def _best_of_all(
    scores: Mapping[str, Tensor], number: int, least: Mapping[str, int]
) -> dict[str, list[int]]:
    chosen = {name: _ranked(score)[: least[name]] for name, score in scores.items()}
    rest = [
        (float(score[e] / score.abs().mean().clamp(min=1e-300)), place, e, name)
        for place, (name, score) in enumerate(scores.items())
        for e in _ranked(score)[least[name] :]
    ]
    rest.sort(key=lambda entry: (-entry[0], entry[1], entry[2]))
    for _, _, expert, name in rest[: number - sum(map(len, chosen.values()))]:
        chosen[name].append(expert)
    return {name: sorted(ids) for name, ids in chosen.items()}
