"""FactorLLM: the networks of a dense model are cut into slices, of which each token uses some.

Zhao et al. 2024, FactorLLM: Factorizing Knowledge via Mixture of Experts for Large Language Models,
arXiv 2408.11855.

Letters: T tokens, H hidden size, I intermediate size, N slices of a network, K of them per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_ops import upcycle
from moe_ops._fields import check_divides
from moe_ops.layers import Experts, MoE, SharedExperts, TopKRouter
from moe_ops.layers.routing import valid_ids
from moe_ops.ops import topk_router

from .llama import Llama, LlamaConfig
from .lm.blocks import attention_entries
from .lm.checkpoint import Entry
from .lm.config import LMConfig
from .lm.model import LMLoss

__all__ = ["FactorLLM", "FactorLLMConfig", "SliceRouter", "route_loss", "slice_balance_loss"]


@dataclass(frozen=True)
class FactorLLMConfig(LlamaConfig):
    """Sizes and options of a FactorLLM.

    Attributes, beside those of `LlamaConfig` (whose I is that of the whole network):
        num_slices: N, a divisor of I.
        top_k: K. With K = N the model is the dense one.
        route_coefficient, balance_coefficient: of the losses of `distill`, summed over layers; both
            0: routers keep their initial values, as in the published training code.
    """

    num_slices: int = 4
    top_k: int = 1
    route_coefficient: float = 0.05
    balance_coefficient: float = 0.01


class SliceRouter(TopKRouter):
    """Router that selects the K slices of the largest logits, each with the weight N / K, which is
    a constant without gradient.

    Its arguments are those of `Router`; num_experts is N.
    """

    def choose_experts(
        self, router_logits: Tensor, expert_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ids = topk_router(router_logits.detach(), self.top_k)[1]
        scores = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
        return self.weights_of(scores, ids), ids

    def weights_of(self, router_logits: Tensor, topk_ids: Tensor) -> Tensor:
        valid, ids = valid_ids(topk_ids, self.num_experts)
        weights = torch.ones_like(ids, dtype=router_logits.dtype)
        return (weights * (self.num_experts / self.top_k)).masked_fill(~valid, 0.0)


def nearest_slices(outputs: Tensor, target: Tensor, top_k: int) -> Tensor:
    """Returns the K slices that, each times N / K, are nearest to the dense network's output.

    Args:
        outputs: [T, N, H], output of each slice for each token.
        target: [T, H], output of the dense network.
        top_k: K.

    Returns:
        [T, N] in the dtype of `outputs`: 1 for the K slices of the smallest mean square error, 0
        for others. Ties go to the smaller index.
    """
    wanted = target * (top_k / outputs.shape[1])
    error = (outputs - wanted[:, None]).square().mean(-1)
    nearest = error.sort(dim=1, stable=True).indices[:, :top_k]
    return torch.zeros_like(error).scatter_(1, nearest, 1.0)


def route_loss(router_logits: Tensor, label: Tensor) -> Tensor:
    """Computes KL(softmax(logits) || softmax(label)), mean over tokens: a scalar.

    Args:
        router_logits: [T, N]. label: [T, N], of `nearest_slices`.
    """
    log_p = router_logits.log_softmax(-1)
    log_q = label.to(log_p).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def slice_balance_loss(router_logits: Tensor, topk_ids: Tensor) -> Tensor:
    """Returns the mean over slices of the fraction of tokens that use a slice times its mean
    probability: a scalar.

    Args:
        router_logits: [T, N]. topk_ids: [T, K].
    """
    probabilities = router_logits.softmax(-1)
    used = torch.zeros_like(probabilities).scatter_(1, topk_ids.long(), 1.0)
    return (used.mean(0) * probabilities.mean(0)).mean()


class FactorLLM(Llama):
    """The language model; see `CausalLM` for its methods."""

    config_class: ClassVar[type[LMConfig]] = FactorLLMConfig
    config: FactorLLMConfig
    # The published training keeps the dense networks in the model, as teachers.
    ignored_keys = (*Llama.ignored_keys, r"model\.layers\.\d+\.mlp\.(?:gate|up|down)_proj\.weight")

    def make_mlp(self, config: Any) -> MoE | SharedExperts:
        whole = config.intermediate_size
        check_divides("FactorLLM", "num_slices", config.num_slices, "intermediate_size", whole)
        hidden, width = config.hidden_size, config.intermediate_size // config.num_slices
        router = SliceRouter(hidden, config.num_slices, config.top_k, bias=True)
        return MoE(router, Experts(config.num_slices, hidden, width))

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls, dense: Llama, *, orders: Sequence[Tensor] | None = None, **options: Any
    ) -> FactorLLM:
        """Returns the model `dense` with its networks cut; with top_k = num_slices it is the same
        function.

        Args:
            dense: unchanged.
            orders: [1, I] a layer, order of neurons before the cut (`moe_ops.upcycle` finds
                clusters); None: unchanged, as published.
            options: fields of `FactorLLMConfig`, such as num_slices and top_k.

        Raises:
            ValueError: sizes that do not divide.
        """
        values = {field.name: getattr(dense.config, field.name) for field in fields(LlamaConfig)}
        model = cls(FactorLLMConfig(**{**values, **options}))
        model.to(dense.embed_tokens.weight)
        model.load_state_dict(
            {name: t for name, t in dense.state_dict().items() if ".mlp." not in name},
            strict=False,
        )
        for index, (block, source) in enumerate(zip(model.layers, dense.layers, strict=True)):
            order = None if orders is None else orders[index]
            bank = upcycle.experts_from_dense(source.mlp)
            block.mlp.experts = upcycle.slice_experts(bank, model.config.num_slices, order=order)
        return model.train(dense.training)

    def distill(self, tokens: Tensor, teacher: Llama) -> LMLoss:
        """Computes the language model loss and the losses of the prior-approximate router.

        The label of each token is the set of slices nearest to the teacher's networks on the
        slices' own inputs; routers learn to predict it from the inputs of the teacher's networks.
        Labels have no gradient.

        Args:
            tokens: [B, S].
            teacher: the dense model; not trained.

        Returns:
            LMLoss; its `aux_losses` are "route" and "balance", summed over layers.
        """
        out = self.loss(tokens)
        read = self._teacher_states(tokens[:, :-1], teacher)
        aux = {name: out.loss.new_zeros(()) for name in ("route", "balance")}
        for block, (x, y) in zip(self.layers, read, strict=True):
            router, experts = block.mlp.router, block.mlp.experts
            with torch.no_grad():
                label = nearest_slices(experts.outputs(x), y, router.top_k)
            logits = router.logits(x)
            aux["route"] = aux["route"] + route_loss(logits, label)
            aux["balance"] = aux["balance"] + slice_balance_loss(logits, router.choose(logits))
        loss = out.loss + self.config.route_coefficient * aux["route"]
        loss = loss + self.config.balance_coefficient * aux["balance"]
        return LMLoss(loss, out.cross_entropy, aux, out.routing)

    @torch.no_grad()
    def _teacher_states(self, tokens: Tensor, teacher: Llama) -> list[tuple[Tensor, Tensor]]:
        """Returns inputs and outputs of the teacher's networks, [T, H] each, by layer."""
        found: list[tuple[Tensor, Tensor]] = []

        def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            found.append((args[0].flatten(0, -2), y.flatten(0, -2)))

        handles = [block.mlp.register_forward_hook(hook) for block in teacher.layers]
        try:
            teacher(tokens, head=False)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def block_entries(self, block: Any, ours: str, theirs: str) -> list[Entry]:
        slices = range(self.config.num_slices)
        gate_up = [
            f"{theirs}.mlp.{name}_proj_list.{j}.weight" for j in slices for name in ("gate", "up")
        ]
        down = [f"{theirs}.mlp.down_proj_list.{j}.weight" for j in slices]
        return [
            *attention_entries(block, ours, theirs),
            Entry(f"{ours}.mlp.router.weight", (f"{theirs}.mlp.route1.weight",)),
            Entry(f"{ours}.mlp.router.bias", (f"{theirs}.mlp.route1.bias",)),
            Entry(f"{ours}.mlp.experts.w_gate_up", tuple(gate_up), "experts", parts=2),
            Entry(f"{ours}.mlp.experts.w_down", tuple(down), "experts"),
        ]
