"""Multi-task layers against equivalent networks with experts in a Python list.

    python -m bench.cpu.multitask [mmoe] [ple] [home] [--batch 4096] [--input 160] [--hidden 64]
        [--size 32] [--rounds 15]

Eight tasks in two categories, 16 experts in the last level. The time covers one training step's
forward and backward of everything between the features and the logits, with gradients of inputs and
parameters. Everything runs interleaved in one process with equal weights; outputs are compared
first. Values are medians, in ms: processor time with one thread, wall time with more.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.harness.medians import median_ms
from bench.studies.home.models import RecommenderConfig, build
from moe_ops.zoo.home import HoME
from moe_ops.zoo.home.layers import FeatureGate, GatedLayer, Gates

TASKS = (("a", "b", "c", "d"), ("e", "f", "g", "h"))
EXPERTS = {
    "mmoe": {"num_shared": 16},
    "ple": {"num_shared": 8, "num_task": 1},
    "home": {"num_shared": 2, "num_category": 3, "num_task": 1},
}


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


class ListGates(nn.Module):
    """One linear map per gate, over only its allowed experts."""

    def __init__(self, gates: Gates) -> None:
        super().__init__()
        assert gates.linear is not None
        self.allowed = [row.nonzero()[:, 0].tolist() for row in gates.mask]
        self.maps = nn.ModuleList(
            linear(gates.linear.weight[m][ids], gates.linear.bias[m][ids])
            for m, ids in enumerate(self.allowed)
        )

    def mix(self, x: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
        mixed = []
        for gate, ids, gate_x in zip(self.maps, self.allowed, x, strict=True):
            logits = gate(gate_x)
            weights = logits.sigmoid() if len(ids) == 1 else logits.softmax(-1)
            stacked = torch.stack([outputs[e] for e in ids], dim=1)
            mixed.append(torch.bmm(weights[:, None], stacked)[:, 0])
        return mixed


class ListLayer(nn.Module):
    """`GatedLayer` in its usual form: one module per expert, a loop over gates."""

    def __init__(self, layer: GatedLayer) -> None:
        super().__init__()
        bank = layer.experts
        self.input_ids = layer.input_ids
        experts = []
        for e in range(bank.num_experts):
            parts = [
                linear(bank.w_gate_up[e], bank.b_gate_up[e]),
                nn.ReLU(),
                linear(bank.w_down[e], bank.b_down[e]),
            ]
            if layer.norm is None:
                parts.append(nn.ReLU())
            else:
                norm = nn.BatchNorm1d(bank.output_size)
                with torch.no_grad():
                    norm.weight.copy_(layer.norm.weight[e])
                    norm.bias.copy_(layer.norm.bias[e])
                parts += [norm, nn.SiLU()]
            experts.append(nn.Sequential(*parts))
        self.experts = nn.ModuleList(experts)
        self.gates = ListGates(layer.gates)
        self.self_gates = None if layer.self_gates is None else ListGates(layer.self_gates)

    def forward(
        self, x: list[Tensor], gate_x: list[Tensor], self_x: list[Tensor] | None = None
    ) -> list[Tensor]:
        outputs = [
            expert(x[i if len(x) > 1 else 0])
            for expert, i in zip(self.experts, self.input_ids, strict=True)
        ]
        mixed = self.gates.mix(gate_x, outputs)
        if self.self_gates is None:
            return mixed
        own = self.self_gates.mix(gate_x if self_x is None else self_x, outputs)
        return [a + b for a, b in zip(mixed, own, strict=True)]


class ListFeatureGate(nn.Module):
    def __init__(self, gate: FeatureGate) -> None:
        super().__init__()
        self.num_lora = gate.num_lora
        down = gate.down.weight.unflatten(1, (gate.num_lora, gate.rank)).flatten(0, 1)
        self.down = nn.ModuleList(linear(w, None) for w in down)
        self.up = nn.ModuleList(linear(w, None) for w in gate.up.weight)
        self.select = nn.ModuleList(
            linear(w, b) for w, b in zip(gate.select.weight, gate.select.bias, strict=True)
        )

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        gated = []
        for g, select in enumerate(self.select):
            v = x[g if len(x) > 1 else 0]
            share = select(v).softmax(-1)
            total = torch.zeros_like(v)
            for l in range(self.num_lora):
                i = g * self.num_lora + l
                total = total + share[:, l : l + 1] * 2 * self.up[i](self.down[i](v)).sigmoid()
            gated.append(v * total)
        return gated


class ListModel(nn.Module):
    """MMoE, PLE or HoME from lists, with the weights of one of ours."""

    def __init__(self, model: HoME) -> None:
        super().__init__()
        self.kind, self.config = model.config.model, model.config
        if self.kind == "mmoe":
            layers = [model.mixture]
        elif self.kind == "ple":
            layers = list(model.stack)
        else:
            layers = [model.meta, model.task_level]
            self.feature_gate = ListFeatureGate(model.feature_gate)
            self.task_feature_gate = ListFeatureGate(model.task_feature_gate)
        self.layers = nn.ModuleList(ListLayer(layer) for layer in layers)
        bank = model.towers.bank
        self.towers = nn.ModuleList(
            nn.Sequential(
                linear(bank.w_gate_up[k], bank.b_gate_up[k]),
                nn.ReLU(),
                linear(bank.w_down[k], bank.b_down[k]),
            )
            for k in range(bank.num_experts)
        )

    def forward(self, v: Tensor) -> Tensor:
        num_tasks = len(self.config.tasks)
        if self.kind == "home":
            num_mixtures = len(self.config.categories) + 1
            z = self.layers[0](self.feature_gate([v]), [v] * num_mixtures)
            own = [z[c] for c, tasks in enumerate(self.config.categories) for _ in tasks]
            gate_x = [torch.cat([t, z[-1]], dim=-1) for t in own]
            x = self.layers[1](z + self.task_feature_gate(own), gate_x, own)
        else:
            x = [v]
            for level, layer in enumerate(self.layers):
                count = len(layer.gates.maps)
                x = layer(x, x[:count] if level else [v] * count)
        pairs = zip(self.towers, x[:num_tasks], strict=True)
        return torch.cat([tower(t) for tower, t in pairs], dim=-1)


class Ours(nn.Module):
    def __init__(self, model: HoME) -> None:
        super().__init__()
        self.model = model

    def forward(self, v: Tensor) -> Tensor:
        return self.model.towers(self.model.represent(v))


def make(kind: str, args: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    config = RecommenderConfig(
        num_dense=args.input,
        categories=TASKS,
        model=kind,
        expert_hidden=args.hidden,
        expert_size=args.size,
        **EXPERTS[kind],
    )
    model = build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Feature gates start at 0, which would hide a wrong one.
            if parameter.dim() > 1 and not bool(parameter.any()):
                nn.init.normal_(parameter, std=0.1)
    return Ours(model), ListModel(model)


def step(model: nn.Module, v: Tensor, grad: Tensor) -> Callable[[], object]:
    leaves = [v, *(p for p in model.parameters() if p.requires_grad)]

    def run() -> object:
        return torch.autograd.grad(model(v), leaves, grad, allow_unused=True)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(EXPERTS))
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--input", type=int, default=160)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if not set(args.models) <= EXPERTS.keys():
        parser.error(f"models must be among {', '.join(EXPERTS)}, got {' '.join(args.models)}")
    # With one thread, processor time excludes other work on the machine.
    clock = time.process_time if args.threads == 1 else time.perf_counter
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(
        f"batch {args.batch}, features {args.input}, experts {args.input}-{args.hidden}-"
        f"{args.size}, {args.threads} thread(s), forward and backward, ms"
    )
    for kind in args.models or list(EXPERTS):
        ours, listed = make(kind, args)
        v = torch.randn(args.batch, args.input, requires_grad=True)
        y, expected = ours(v), listed(v)
        error = float((y - expected).detach().norm() / expected.detach().norm())
        if not error < 1e-4:
            raise SystemExit(f"{kind}: outputs differ by {error:.2e} of their norm.")
        grad = torch.randn_like(y)
        runs = {"moe_ops": step(ours, v, grad), "list": step(listed, v, grad)}
        ms = median_ms(runs, args.rounds, warm=2, clock=clock)
        print(
            f"{kind:5s} moe_ops {ms['moe_ops']:7.1f}  list {ms['list']:7.1f}  "
            f"{ms['list'] / ms['moe_ops']:.2f} times  (outputs differ by {error:.1e})"
        )


if __name__ == "__main__":
    main()
