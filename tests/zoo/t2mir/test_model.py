"""The transformer of T2MIR: what a prediction sees, experts, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bench.studies.t2mir.envs import DarkRoom, PointRobot, collect
from bench.studies.t2mir.training import fit, play
from torch import Tensor

from moe_ops.zoo.t2mir import T2MIR, T2MIRConfig, action_loss
from moe_ops.zoo.t2mir.routers import MomentumContrast, NoisyTopKRouter, TaskRouter

from .common import TINY, B, E, S, make


def inputs(model: T2MIR, steps: int = S) -> tuple[Tensor, ...]:
    config = model.config
    states, rewards = torch.randn(B, steps, config.state_size), torch.randn(B, steps)
    if config.num_actions:
        actions = torch.randint(config.num_actions, (B, steps))
    else:
        actions = torch.rand(B, steps, config.action_size) * 2 - 1
    query = torch.randn(B, config.state_size) if config.variant == "dpt" else None
    return states, actions, rewards, query


@pytest.mark.parametrize("variant", ["ad", "dpt"])
@pytest.mark.parametrize("num_actions", [0, 5])
def test_later_tokens_never_change_earlier_predictions(variant, num_actions):
    check_causal(make(variant=variant, num_actions=num_actions).double().eval())


def check_causal(model: T2MIR) -> None:
    states, actions, rewards, query = inputs(model)
    args = [
        t.double() if t is not None and t.is_floating_point() else t
        for t in (states, actions, rewards, query)
    ]
    base = model(*args).actions
    shift = int(model.config.variant == "dpt")
    for t in range(S):
        # The state of step t is seen by its own prediction; its action and reward are not.
        for which, first_changed in ((0, t), (1, t + 1), (2, t + 1)):
            changed = [a.clone() if a is not None else None for a in args]
            row = changed[which][:, t]
            changed[which][:, t] = (row + 1) % 5 if not row.is_floating_point() else row + 1.0
            other = model(*changed).actions
            same = first_changed + shift
            # Sums are grouped by how many rows an expert has: equal to rounding.
            torch.testing.assert_close(other[:, :same], base[:, :same], atol=1e-12, rtol=0)
            if first_changed < S:
                assert not torch.allclose(other[:, same:], base[:, same:])


def test_the_authors_sequence_routing_sees_the_future():
    model = make(routing="sequence").double().eval()
    states, actions, rewards, _ = inputs(model)
    base = model(states.double(), actions.double(), rewards.double()).actions
    states[:, -1] += 30.0
    other = model(states.double(), actions.double(), rewards.double()).actions
    assert not torch.allclose(other[:, :-1], base[:, :-1])


def test_the_query_reaches_every_prediction():
    model = make(variant="dpt").eval()
    states, actions, rewards, query = inputs(model)
    base = model(states, actions, rewards, query).actions
    other = model(states, actions, rewards, query + 1).actions
    assert base.shape == (B, S + 1, 2)
    assert (other - base).abs().amax(-1).min() > 1e-4
    alone = model(states[:, :0], actions[:, :0], rewards[:, :0], query).actions
    torch.testing.assert_close(alone, base[:, :1])


def test_expert_layer_is_a_sum_over_chosen_experts():
    model = make().double().eval()
    layer = model.experts
    x = torch.randn(2, 5, TINY.hidden_size, dtype=torch.float64)
    y, *_ = layer(x, False)
    h = layer.norm(x)
    flat = h.flatten(0, 1)
    halves = []
    for bank, routing in (
        (layer.token_experts, layer.token_router(flat)),
        (layer.task_experts, layer.task_router(h)),
    ):
        rows = []
        for t in range(10):
            total = 0.0
            for weight, e in zip(routing[0][t], routing[1][t].tolist(), strict=True):
                up = F.gelu(bank.w_gate_up[e] @ flat[t] + bank.b_gate_up[e])
                total = total + weight * (bank.w_down[e] @ up + bank.b_down[e])
            rows.append(total)
        halves.append(torch.stack(rows))
    assert halves[0].shape[1] == TINY.hidden_size // 2
    torch.testing.assert_close(y.flatten(0, 1), torch.cat(halves, dim=1))


def test_gradients_reach_everything_but_the_slow_router():
    model = make()
    output = model(*inputs(model), contrastive=True)
    loss = output.actions.square().mean() + output.balance_loss + output.contrastive_loss
    loss.backward()
    for name, p in model.named_parameters():
        if "target" in name:
            assert p.grad is None
        elif name != "embed_step.weight":
            assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_action_loss():
    logits, target = torch.randn(3, 4, 5), torch.randint(5, (3, 4))
    expected = -logits.log_softmax(-1).gather(-1, target[..., None]).mean()
    torch.testing.assert_close(action_loss(logits, target, 5), expected)
    a, b = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    torch.testing.assert_close(action_loss(a, b, 0), (a - b).square().mean())


def test_bad_configs_and_calls(bad_input):
    with bad_input("T2MIRConfig", "variant", "'ppo'"):
        T2MIRConfig(variant="ppo")
    with bad_input("T2MIRConfig", "hidden_size", "4"):
        T2MIRConfig(hidden_size=30)
    with bad_input("NoisyTopKRouter", "top_k", "7"):
        NoisyTopKRouter(8, E, 7)
    with bad_input("TaskRouter", "routing", "'later'"):
        TaskRouter(8, E, 2, routing="later")
    with bad_input("MomentumContrast", "tau", "0"):
        MomentumContrast(TaskRouter(8, E, 2), 0)
    model = make()
    states, actions, rewards, _ = inputs(model)
    with bad_input("T2MIR", "query", "one"):
        model(states, actions, rewards, states[:, 0])
    with bad_input("T2MIR", "actions", "[4, 8, 2]"):
        model(states, actions[:, 1:], rewards)
    with bad_input("T2MIR", "states", "25"):
        model(*inputs(model, 25))
    env = PointRobot.sample(4, horizon=6)
    data = collect(env, 4, progress=False)
    with bad_input("fit", "batch_size", "10"):
        fit(model, data, batch_size=10, progress=False)
    with bad_input("play", "env", "5"):
        play(model, DarkRoom.sample(2), progress=False)
    with bad_input("DarkRoom", "goals"):
        DarkRoom(torch.tensor([[10, 0]]))
    with bad_input("collect", "episodes", "0"):
        collect(env, 0)
