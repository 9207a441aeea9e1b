"""Training of the policy, dense and then sparse, and its evaluation by rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops import _files
from moe_ops.layers.routing import Routing
from moe_ops.zoo.adamoe import ActionTransformer, AdaMoEConfig

from ..progress import bar
from ..settings import settings_folder
from ..trainer import Group, Lesson, load_weights, train_steps, write_state
from .skills import REACHED, Demonstrations, SkillRobot, demonstrate

Batches = Callable[[torch.Generator], Demonstrations]


def groups_of(
    model: ActionTransformer,
    rate: float,
    router_rate: float,
    warm_up: int,
    router_warm_up: int,
    weight_decay: float = 1e-6,
) -> list[Group]:
    """Returns the authors' three parameter groups: the base, the experts, and the routers with
    their scales."""
    named = dict(model.named_parameters())
    routers = [n for n in named if ".moe.router." in n]
    experts = [n for n in named if ".moe.experts." in n or ".moe.shared_experts." in n]
    special = {*routers, *experts}
    base = [n for n in named if n not in special]
    return [
        Group([named[n] for n in base], rate, warm_up, weight_decay),
        Group([named[n] for n in experts], rate, warm_up, weight_decay),
        Group([named[n] for n in routers], router_rate, router_warm_up, weight_decay),
    ]


def lesson(
    model: ActionTransformer,
    batches: Batches,
    *,
    rate: float = 1e-3,
    router_rate: float | None = None,
    warm_up: int = 50,
    router_warm_up: int = 5,
    weight_decay: float = 1e-6,
    early_steps: int = 500,
    late_balance_weight: float = 0.005,
) -> Lesson:
    """Returns the training on demonstrations; the published run has rates of 2.5e-5 and 5e-5
    (router), warm-ups of 1000 and 100 steps, and 90,000 steps.

    Args:
        batches: function from the run's generator to a batch.
        router_rate: of routers and scales; None: twice `rate`.
        early_steps, late_balance_weight: steps with the config's weight of the balance loss, and
            the weight after them.
    """

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        weight = model.config.balance_weight if step <= early_steps else late_balance_weight
        found = model.loss(*batches(generator), balance_weight=weight, generator=generator)
        return {
            "loss": found.loss, "action": found.action, "balance": found.balance,
            "z": mean_z(found.routing, found.loss),
        }  # fmt: skip

    rates = (rate, 2 * rate if router_rate is None else router_rate)
    return Lesson(groups_of(model, *rates, warm_up, router_warm_up, weight_decay), loss)


@torch.no_grad()
def mean_z(routing: Sequence[Routing], like: Tensor) -> Tensor:
    """Returns the mean of the routers' squared logsumexp, summed over layers, for monitoring."""
    parts = (layer.router_logits.logsumexp(-1).square().mean() for layer in routing)
    return sum(parts, like.new_zeros(()))


@torch.no_grad()
def roll_out(
    model: ActionTransformer,
    env: SkillRobot,
    *,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> Tensor:
    """Returns bool [N]: True if an episode ended within 0.1 of its goal. The policy plans a chunk,
    plays it open loop, and plans again."""
    before = model.training
    model.eval()
    env.reset()
    done = 0
    with bar(env.horizon, f"roll out {len(env.skills)}", progress) as shown:
        while done < env.horizon:
            actions = model.act(env.states, env.skills, generator=generator)
            for i in range(min(model.config.chunk, env.horizon - done)):
                env.step(actions[:, i])
                done += 1
                shown.update()
    model.train(before)
    return env.distance() < REACHED


@torch.no_grad()
def decoupling(
    model: ActionTransformer, data: Demonstrations, *, seed: int = 0
) -> dict[str, float]:
    """Measures the difference of weights from selection probabilities, over all tokens and layers.

    "correlation" of probability and weight of the selected experts (nan if one of them is
    constant), "probability" and "weight", their means, and "max_violation": the largest fraction of
    tokens of an expert over the mean fraction, minus 1, mean over layers.
    """
    generator = torch.Generator().manual_seed(seed)
    routing = model.loss(*data, generator=generator).routing
    if not routing:
        raise ValueError("decoupling: model must be sparse, got a dense one.")
    p = torch.cat([r.router_logits.softmax(-1).gather(1, r.topk_ids.long()) for r in routing])
    w = torch.cat([r.topk_weights for r in routing])
    both = torch.stack([p.flatten(), w.flatten().to(p.dtype)]).double()
    counts = [torch.bincount(r.topk_ids.flatten().long(), minlength=r.router_logits.shape[-1])
              for r in routing]  # fmt: skip
    worst = [float(c.max() / c.double().mean()) - 1 for c in counts]
    return {
        "correlation": float(torch.corrcoef(both)[0, 1]),
        "probability": float(p.mean()),
        "weight": float(w.mean()),
        "max_violation": sum(worst) / len(worst),
    }


def gradient_conflict(model: ActionTransformer, data: Demonstrations, *, seed: int = 0) -> float:
    """Returns the cosine between the gradients of the action loss and of the balance loss with
    respect to the routers' weights: -1 if the losses conflict."""
    layers: Any = model.layers
    weights: list[nn.Parameter] = [layer.ffn.moe.router.weight for layer in layers]
    generator = torch.Generator().manual_seed(seed)
    found = model.loss(*data, generator=generator)
    task = torch.autograd.grad(found.action, weights, retain_graph=True)
    balance = torch.autograd.grad(found.balance, weights)
    a, b = (torch.cat([g.flatten() for g in gradients]) for gradients in (task, balance))
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


@dataclass(frozen=True)
class Settings:
    """Settings of `train`.

    Attributes:
        arms: variants made from the dense policy; "dense" continues training it unchanged.
        pretrain_steps, steps: of the dense policy, and of each arm after it.
        batch_size: states of a step. rate: of pre-training; `tune_rate` of the arms.
        balance_weight: of the balance loss, in all steps; the published weights are 0.01, then
            0.005.
        preserve: start "additive" close to the dense policy.
        episodes: rollouts of the evaluation.
    """

    arms: tuple[str, ...] = ("dense", "coupled", "additive", "concat")
    pretrain_steps: int = 1000
    steps: int = 1000
    batch_size: int = 128
    rate: float = 2e-3
    tune_rate: float = 1e-3
    num_experts: int = 4
    top_k: int = 1
    balance_weight: float = 0.01
    late_balance_weight: float = 0.005
    preserve: int = 0
    num_skills: int = 8
    hidden_size: int = 64
    num_layers: int = 2
    intermediate_size: int = 128
    episodes: int = 2048
    seed: int = 0


def train(
    folder: Path | str, settings: Settings | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """Pre-trains a dense policy, tunes each arm from it, evaluates; writes and returns report.json.

    Finished parts are not repeated; interrupted ones continue from their checkpoints.

    Raises:
        ValueError: the folder has other settings.
    """
    settings = settings or Settings()
    # Other arms and rollouts can reuse the policy.
    folder, now = settings_folder(folder, settings, "policies", ("arms", "episodes"))
    config = AdaMoEConfig(
        num_skills=settings.num_skills,
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
        intermediate_size=settings.intermediate_size,
        ffn="dense",
    )

    def batches(generator: torch.Generator) -> Demonstrations:
        return demonstrate(settings.batch_size, config.chunk, settings.num_skills, generator)

    def trained(name: str, model: ActionTransformer, steps: int, rate: float) -> ActionTransformer:
        done = folder / f"{name}.pt"
        if done.exists():
            load_weights(model, done)
            return model
        state = folder / f"{name}.training.pt"
        train_steps(
            f"fit adamoe {model.config.ffn}", model,
            *lesson(model, batches, rate=rate, late_balance_weight=settings.late_balance_weight),
            steps=steps, seed=settings.seed, checkpoint=state, progress=progress,
        )  # fmt: skip
        write_state(done, model.state_dict())
        state.unlink()
        return model

    torch.manual_seed(settings.seed)
    base = trained("pretrained", ActionTransformer(config), settings.pretrain_steps, settings.rate)
    report: dict[str, Any] = {"settings": now, "arms": {}}
    fresh = torch.Generator().manual_seed(settings.seed + 10_000)
    data = demonstrate(4096, config.chunk, settings.num_skills, fresh)
    report["arms"]["pretrained"] = evaluate(base, data, settings, progress)
    for arm in settings.arms:
        torch.manual_seed(settings.seed + 1)
        model = ActionTransformer(config)
        model.load_state_dict(base.state_dict())
        if arm != "dense":
            model = model.made_sparse(
                arm,
                num_experts=settings.num_experts,
                top_k=settings.top_k,
                preserve=bool(settings.preserve) and arm == "additive",
                balance_weight=settings.balance_weight,
            )
        model = trained(arm, model, settings.steps, settings.tune_rate)
        report["arms"][arm] = evaluate(model, data, settings, progress)
    _files.write_json(folder / "report.json", report)
    return report


def evaluate(
    model: ActionTransformer, data: Demonstrations, settings: Settings, progress: bool = True
) -> dict[str, float]:
    """Returns the action loss on demonstrations, success of rollouts, and for sparse policies the
    results of `decoupling` and `gradient_conflict`. All policies use equal noise and tasks."""
    generator = torch.Generator().manual_seed(settings.seed + 20_000)
    with torch.no_grad():
        loss = float(model.loss(*data, generator=generator).action)
    env = SkillRobot.sample(settings.episodes, settings.num_skills, generator)
    reached = roll_out(model, env, generator=generator, progress=progress)
    found = {"action loss": loss, "success": float(reached.float().mean())}
    if model.config.ffn != "dense":
        found |= decoupling(model, data)
        found["gradient conflict"] = gradient_conflict(model, data)
    return found
