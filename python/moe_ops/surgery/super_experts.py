"""Super experts: the few experts with extremely large outputs, and the loss increase without them.

Letters: L layers, E experts.

Source: Su et al. 2025 (Super Experts, arXiv 2507.23279).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_sinks import attention_sink_decay, attention_sink_mass
from .profile import ExpertProfile, LayerProfile
from .prune import ablate_experts

# Standard deviation of a normal distribution over its median absolute deviation.
_NORMAL_MAD = 1.4826


class SuperExpert(NamedTuple):
    """One expert with large outputs.

    layer, expert: name and id.
    largest: max |output| over the text.
    channel: index in the hidden state.
    z: robust z-score of log(largest) among all experts, from the median and the median absolute
    deviation; 0 if that is 0.
    """

    layer: str
    expert: int
    largest: float
    channel: int
    z: float


class SuperExperts(NamedTuple):
    """Result of `find_super_experts`.

    experts: the super experts, largest first.
    threshold: lower bound of their outputs.
    """

    experts: list[SuperExpert]
    threshold: float


def find_super_experts(
    profile: ExpertProfile,
    *,
    percentile: float = 99.5,
    part: float = 0.1,
    first_layers: float = 0.75,
) -> SuperExperts:
    """Finds experts whose largest |output| a is above `percentile` of all experts and above `part`
    of the maximum, in the first layers.

    With few experts a percentile is not informative: for 64, the 99.5th is between the largest two.
    Therefore each expert has a robust z-score. Experts should be compared within a layer, because
    outputs grow with depth.

    Args:
        profile: profile of the model.
        percentile: of a over all experts of all layers, with linear interpolation.
        part: fraction of the largest a.
        first_layers: fraction of the routed layers, from the first, in which massive activations
            form.

    Returns:
        The experts, and the larger of the two thresholds.
    """
    layers = list(profile.layers.items())
    everything = torch.cat([layer.largest_output() for _, layer in layers])
    threshold = float(torch.quantile(everything, percentile / 100))
    threshold = max(threshold, part * float(everything.max()))
    logs = everything.clamp(min=1e-300).log()
    center = logs.median()
    spread = float((logs - center).abs().median()) * _NORMAL_MAD
    found = []
    for index, (name, layer) in enumerate(layers):
        if index >= first_layers * len(layers):
            break
        largest = layer.largest_output()
        for expert in (largest > threshold).nonzero().flatten().tolist():
            a = float(largest[expert])
            z = (math.log(a) - float(center)) / spread if spread > 0 else 0.0
            channel = int(layer.max_channel[expert])
            found.append(SuperExpert(name, expert, a, channel, z))
    return SuperExperts(sorted(found, key=lambda one: -one.largest), threshold)


def matched_controls(
    layer: LayerProfile, expert: int, number: int = 3, *, excluded: Sequence[int] = ()
) -> list[int]:
    """Returns the experts of the same layer whose load is closest to that of `expert`, closest
    first.

    Without matching, any criterion that picks experts of early layers appears effective, because
    experts of some layers are more important than those of others.

    Args:
        layer: profile of the layer.
        expert: id to match.
        number: maximum number of controls.
        excluded: other experts that must not be controls.
    """
    distance = (layer.load - layer.load[expert]).abs()
    order = distance.argsort(stable=True).tolist()
    return [e for e in order if e != expert and e not in excluded][:number]


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Any]) -> float:
    """Computes the mean over tokens of the cross-entropy of the next token, in nats.

    Args:
        model: a language model of the zoo or of transformers; put it into `eval()` first.
        batches: tokens [B, S], or keyword arguments with `input_ids`; tokens with `attention_mask`
            0 are ignored.
    """
    total, count = 0.0, 0
    for batch in batches:
        named = isinstance(batch, Mapping)
        tokens = batch["input_ids"] if named else batch
        output: Any = model(**batch) if named else model(tokens)
        logits = getattr(output, "logits", output)[:, :-1].flatten(0, 1).float()
        targets = tokens[:, 1:].long()
        mask = batch.get("attention_mask") if named else None
        if mask is not None:
            targets = targets.masked_fill(mask[:, 1:] == 0, -100)
        total += float(F.cross_entropy(logits, targets.flatten(), reduction="sum"))
        count += int((targets != -100).sum())
    if not count:
        raise ValueError("mean_loss: batches must hold a token to predict, got none.")
    return total / count


def measure_ablation(
    model: nn.Module, experts: Iterable[tuple[str, int]], batches: Sequence[Any]
) -> dict[tuple[str, int], float]:
    """Measures the cost of each expert: the loss with its outputs zeroed minus the loss of the
    whole model.

    It takes one pass over the batches per expert, and one more.

    Args:
        model: the model.
        experts: (layer, id) each.
        batches: see `mean_loss`.
    """
    whole, costs = mean_loss(model, batches), {}
    for pair in experts:
        with ablate_experts(model, [pair]):
            costs[pair] = mean_loss(model, batches) - whole
    return costs


@dataclass
class SuperExpertReport:
    """Result of `evaluate_super_experts`.

    Attributes:
        experts: the super experts.
        threshold: lower bound of their outputs.
        loss: of the whole model, nats per token.
        without: loss with all of `experts` zeroed.
        damage: loss increase without each expert of `experts`.
        controls: ids of the matched experts of each.
        control_damage: their loss increases.
        sinks: sink mass of the whole model, [L, n].
        sinks_without: sink mass with all of `experts` zeroed.
        decay: of the sinks, see `attention_sink_decay`.
        layers: names.
        largest: largest |output| of all experts, one list per layer.
    """

    experts: list[SuperExpert]
    threshold: float
    loss: float
    without: float
    damage: list[float]
    controls: list[list[int]]
    control_damage: list[list[float]]
    sinks: list[list[float]] | None
    sinks_without: list[list[float]] | None
    decay: float
    layers: list[str]
    largest: list[list[float]]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain Python values, JSON-serializable."""
        return {**asdict(self), "experts": [one._asdict() for one in self.experts]}

    def table(self) -> str:
        """Returns a table with one line per expert."""
        head = ("layer", "expert", "max |out|", "z", "damage", "worst control")
        rows = [
            (
                one.layer,
                str(one.expert),
                f"{one.largest:.4g}",
                f"{one.z:.1f}",
                f"{cost:+.4f}",
                f"{max(others):+.4f}" if others else "-",
            )
            for one, cost, others in zip(
                self.experts, self.damage, self.control_damage, strict=True
            )
        ]
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (head, *rows)
        ]
        sinks = "" if math.isnan(self.decay) else f"; sinks decay by {self.decay:.2f}"
        lines.append(f"loss {self.loss:.4f} -> {self.without:.4f} without all of them{sinks}")
        return "\n".join(lines)

    def draw(self, path: Path | str | None = None) -> Any:
        """Draws the largest outputs of all experts by layer; see
        `moe_ops.viz.plot_largest_outputs`."""
        from moe_ops import viz

        places = {(self.layers.index(one.layer), one.expert) for one in self.experts}
        title = f"Largest output of each expert: {len(self.experts)} super experts"
        return viz.plot_largest_outputs(
            self.largest, threshold=self.threshold, marked=places, title=title, path=path
        )


def evaluate_super_experts(
    model: nn.Module,
    profile: ExpertProfile,
    batches: Sequence[Any],
    *,
    controls: int = 3,
    sinks: bool = True,
    positions: Sequence[int] = (0,),
    **options: Any,
) -> SuperExpertReport:
    """Finds the super experts and measures their importance, compared with matched experts.

    Args:
        model: in eval mode.
        profile: of the model.
        batches: see `mean_loss`; the tokens of the first one are used for the sinks.
        controls: number of matched experts per super expert.
        sinks: also measure `attention_sink_mass`; needs a supported attention.
        positions: of the sinks.
        options: of `find_super_experts`.
    """
    found = find_super_experts(profile, **options)
    pairs = [(one.layer, one.expert) for one in found.experts]
    others = []
    for layer, expert in pairs:
        own = [e for name, e in pairs if name == layer]
        others.append(matched_controls(profile[layer], expert, controls, excluded=own))
    wanted = {(layer, e) for (layer, _), ids in zip(pairs, others, strict=True) for e in ids}
    costs = measure_ablation(model, [*pairs, *sorted(wanted)], batches)
    loss = mean_loss(model, batches)
    first = batches[0]["input_ids"] if isinstance(batches[0], Mapping) else batches[0]
    before = attention_sink_mass(model, first, positions) if sinks else None
    with ablate_experts(model, pairs):
        without = mean_loss(model, batches)
        after = attention_sink_mass(model, first, positions) if sinks else None
    return SuperExpertReport(
        experts=found.experts,
        threshold=found.threshold,
        loss=loss,
        without=without,
        damage=[costs[pair] for pair in pairs],
        controls=others,
        control_damage=[
            [costs[layer, e] for e in ids] for (layer, _), ids in zip(pairs, others, strict=True)
        ],
        sinks=_listed(before),
        sinks_without=_listed(after),
        decay=float("nan")
        if before is None or after is None
        else attention_sink_decay(before, after),
        layers=list(profile),
        largest=[layer.largest_output().tolist() for layer in profile.layers.values()],
    )


def _listed(tensor: Tensor | None) -> list[list[float]] | None:
    if tensor is None:
        return None
    rows: list[list[float]] = tensor.tolist()
    return rows
