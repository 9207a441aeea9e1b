"""Dynamic routing: a token uses as many experts as it takes to gather a share p of its routing.

Huang et al. 2024, Harder Tasks Need More Experts: Dynamic Routing in MoE Models, arXiv 2403.07652.

Letters: B sequences, S tokens, T = B * S, H hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_ops._fields import Fields
from moe_ops.layers import Experts, MoE, SharedExperts, TopPRouter
from moe_ops.layers.rotary import Rope

from .lm.attention import Attention
from .lm.blocks import Block, attention_entries
from .lm.checkpoint import Entry, dense_entries, expert_entries
from .lm.config import LLAMA_KEYS, OWN, LMConfig, number, size
from .lm.losses import Routed
from .lm.model import CausalLM


@dataclass(frozen=True)
class TopPConfig(LMConfig):
    """Sizes and options of a model with dynamic routing.

    Attributes, beside those of `LMConfig`:
        num_layers: blocks; those whose number `expert_frequency` divides have experts (the first
            one, number 0, always), the others a dense network of the same width I.
        expert_frequency: see there.
        num_heads: attention heads, each of H / num_heads features.
        intermediate_size: I.
        num_experts: E.
        top_p: p, the probability that the experts of a token must gather.
        max_experts: most experts of a token; None is E.
        expected_experts: what parameters a token uses are counted with.
        rope_theta: base of the rotary embeddings.
        norm_eps: of all norms.
        load_balancing_coefficient, entropy_coefficient: of the losses, summed over layers. Without
            the second, training spreads the routing of every token over many experts.
    """

    PRESETS: ClassVar[tuple[str, ...]] = ("tiny",)
    KEYS: ClassVar[dict[str, Any]] = {
        **LLAMA_KEYS,
        "expert_frequency": size("expert_frequency", default=2),
        "num_heads": size("num_attention_heads"),
        "intermediate_size": size("intermediate_size"),
        "num_experts": size("num_experts"),
        "top_p": number("top_p_threshold", default=OWN),
        "expected_experts": size("experts_topk", default=OWN),
    }
    FIXED: ClassVar[dict[str, Any]] = {"hidden_act": "silu", "tie_word_embeddings": False}

    expert_frequency: int = 1
    num_heads: int = 4
    intermediate_size: int = 64
    num_experts: int = 8
    top_p: float = 0.4
    max_experts: int | None = None
    expected_experts: int = 2
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    load_balancing_coefficient: float = 1e-2
    entropy_coefficient: float = 1e-4

    @classmethod
    def tiny(cls) -> TopPConfig:
        """Bytes, two blocks with eight experts each: trains on a CPU."""
        return cls()

    def aux_coefficients(self) -> dict[str, float]:
        return {
            "load_balancing": self.load_balancing_coefficient,
            "entropy": self.entropy_coefficient,
        }

    @classmethod
    def read_more(cls, published: Fields) -> dict[str, Any]:
        published.must_be("num_key_value_heads", published.size("num_attention_heads"))
        return {}

    def write_more(self) -> dict[str, Any]:
        return {
            "architectures": ["MoEForCausalLM"],
            "model_type": "llama",
            "num_key_value_heads": self.num_heads,
        }


class TopPBlock(Block):
    """A block with experts, or with a dense network."""

    def __init__(self, config: TopPConfig, rope: Rope, *, dense: bool) -> None:
        hidden = config.hidden_size
        attention = Attention(hidden, config.num_heads, rope.size, rope)
        mlp: MoE | SharedExperts
        if dense:
            mlp = SharedExperts(hidden, config.intermediate_size)
        else:
            router = TopPRouter(
                hidden,
                config.num_experts,
                config.expected_experts,
                top_p=config.top_p,
                max_k=config.max_experts,
            )
            mlp = MoE(router, Experts(config.num_experts, hidden, config.intermediate_size))
        super().__init__(hidden, config.norm_eps, attention, mlp)


class TopP(CausalLM):
    """The language model; see `CausalLM` for what it can do."""

    config_class = TopPConfig
    config: TopPConfig

    def __init__(self, config: TopPConfig) -> None:
        super().__init__()
        if config.hidden_size % config.num_heads:
            raise ValueError(
                f"TopP: num_heads must divide hidden_size = {config.hidden_size}, got "
                f"{config.num_heads}."
            )
        rope = Rope(config.hidden_size // config.num_heads, config.rope_theta)
        self.assemble(
            config,
            (
                TopPBlock(config, rope, dense=bool(i % config.expert_frequency))
                for i in range(config.num_layers)
            ),
            nn.RMSNorm(config.hidden_size, eps=config.norm_eps),
            rope,
        )

    def block_entries(self, block: Any, ours: str, theirs: str) -> list[Entry]:
        norms = ("input_norm", "post_attention_norm")
        entries = attention_entries(block, ours, theirs, norms=norms)
        if isinstance(block.mlp, SharedExperts):
            return entries + dense_entries(f"{ours}.mlp", f"{theirs}.mlp.mlp")
        return [
            *entries,
            Entry(f"{ours}.mlp.router.weight", (f"{theirs}.mlp.router.weight",)),
            *expert_entries(
                f"{ours}.mlp.experts", f"{theirs}.mlp.experts", self.config.num_experts
            ),
        ]


def experts_per_token(routing: Sequence[Routed]) -> dict[str, Tensor]:
    """Layer -> number of experts that each token used, [T] int64."""
    return {r.layer: (r.routing.topk_ids >= 0).sum(-1) for r in routing}


class TopPController:
    """Holds the mean number of experts of a token at a target, by moving every router's `top_p`.

    p is a proportional-integral controller of the error, target minus mean over tokens and layers:
    p = p_0 + proportional * error + integral * (sum of errors), kept in [lowest, highest]. The sum
    stops growing while p is at an end that it would push beyond.

    `top_p` is a number of the module and not a tensor: a compiled model may compile again when it
    moves.

    Args:
        model: a module with `TopPRouter`s.
        target: experts a token.
        proportional, integral: gains; p moves by `integral` a step for an error of one expert.
        lowest, highest: range of p.

    Raises:
        ValueError: no such router, or numbers out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        target: float,
        *,
        proportional: float = 0.02,
        integral: float = 0.01,
        lowest: float = 0.05,
        highest: float = 1.0,
    ) -> None:
        self.routers = [m for m in model.modules() if isinstance(m, TopPRouter)]
        if not self.routers:
            raise ValueError(
                f"TopPController: model must hold a TopPRouter, got a "
                f"{type(model).__name__} without one."
            )
        if target < 1:
            raise ValueError(f"TopPController: target must be at least 1, got {target}.")
        if not 0 < lowest <= highest <= 1:
            raise ValueError(
                f"TopPController: lowest and highest must be 0 < lowest <= highest <= 1, got "
                f"{lowest} and {highest}."
            )
        self.target = target
        self.proportional = proportional
        self.integral = integral
        self.lowest = lowest
        self.highest = highest
        self.start = self.routers[0].top_p
        self.sum = 0.0
        self.mean = float("nan")

    @property
    def top_p(self) -> float:
        return self.routers[0].top_p

    @torch.no_grad()
    def step(self, routing: Sequence[Routed], *, group: Any = None) -> float:
        """One step from the routing of a training step; returns the mean number of experts.

        Counts are summed over the ranks of `group` when torch.distributed is in use, so that all
        move p alike.
        """
        counts = torch.cat(list(experts_per_token(routing).values()))
        both = torch.stack([counts.sum(), torch.full_like(counts.sum(), counts.numel())]).double()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(both, group=group)
        used, tokens = both.tolist()
        self.mean = used / max(tokens, 1.0)
        error = self.target - self.mean
        wanted = self.start + self.proportional * error + self.integral * (self.sum + error)
        if self.lowest < wanted < self.highest or (wanted >= self.highest) == (error < 0):
            self.sum += error
        top_p = min(max(wanted, self.lowest), self.highest)
        for router in self.routers:
            router.top_p = top_p
        return self.mean
