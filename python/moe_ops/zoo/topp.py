"""Dynamic routing: a token uses as many experts as it takes to gather a share p of its routing.

Huang et al. 2024, Harder Tasks Need More Experts: Dynamic Routing in MoE Models, arXiv 2403.07652.

Letters: B sequences, S tokens, T = B * S, H hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_ops._fields import Fields, overridden
from moe_ops.layers import Experts, MoE, Router, SharedExperts, TopPRouter

from .blocks import Attention, Rope, published_rope
from .checkpoint import Entry, bank_entries, dense_entries
from .embedding import TokenEmbedding
from .language_model import CausalLM, Step
from .lm_losses import Routed


@dataclass(frozen=True)
class TopPConfig:
    """Sizes and options of a model with dynamic routing.

    Attributes:
        vocab_size: V.
        hidden_size: H.
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
        context: tokens it was trained on; nothing is limited by it.
        norm_eps: of all norms.
        init_std: of all weights.
        load_balancing_coefficient, entropy_coefficient: of the losses, summed over layers. Without
            the second, training spreads the routing of every token over many experts.
    """

    PRESETS: ClassVar[tuple[str, ...]] = ("tiny",)

    vocab_size: int = 256
    hidden_size: int = 64
    num_layers: int = 2
    expert_frequency: int = 1
    num_heads: int = 4
    intermediate_size: int = 64
    num_experts: int = 8
    top_p: float = 0.4
    max_experts: int | None = None
    expected_experts: int = 2
    rope_theta: float = 10_000.0
    context: int = 128
    norm_eps: float = 1e-6
    init_std: float = 0.02
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
    def from_published(cls, published: Mapping[str, Any], **overrides: Any) -> TopPConfig:
        """From the config.json of the published code."""
        read = Fields(published, cls.__name__)
        heads = read.size("num_attention_heads")
        for name, wanted in (
            ("hidden_act", "silu"), ("num_key_value_heads", heads), ("tie_word_embeddings", False),
        ):  # fmt: skip
            read.must_be(name, wanted)
        theta, yarn = published_rope(read)
        if yarn is not None:
            raise ValueError("TopPConfig: rope_scaling must be none, got yarn.")
        config = cls(
            vocab_size=read.size("vocab_size"),
            hidden_size=read.size("hidden_size"),
            num_layers=read.size("num_hidden_layers"),
            expert_frequency=read.size("expert_frequency", default=2),
            num_heads=heads,
            intermediate_size=read.size("intermediate_size"),
            num_experts=read.size("num_experts"),
            top_p=read.number("top_p_threshold", default=cls.top_p),
            expected_experts=read.size("experts_topk", default=cls.expected_experts),
            rope_theta=theta,
            context=read.size("max_position_embeddings", default=cls.context),
            norm_eps=read.number("rms_norm_eps", default=cls.norm_eps, least=0),
            init_std=read.number("initializer_range", default=cls.init_std, least=0),
        )
        return overridden(config, overrides)

    def to_published(self) -> dict[str, Any]:
        """config.json with the names of the published code."""
        return {
            "architectures": ["MoEForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "expert_frequency": self.expert_frequency,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "intermediate_size": self.intermediate_size,
            "num_experts": self.num_experts,
            "top_p_threshold": self.top_p,
            "experts_topk": self.expected_experts,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": False,
            "initializer_range": self.init_std,
            "hidden_act": "silu",
        }


class TopPBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); mlp is a MoE or a dense network."""

    def __init__(self, config: TopPConfig, rope: Rope, *, dense: bool) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.attention_norm = nn.RMSNorm(hidden, eps=config.norm_eps)
        self.attention = Attention(hidden, config.num_heads, rope.size, rope)
        self.mlp_norm = nn.RMSNorm(hidden, eps=config.norm_eps)
        self.mlp: MoE | SharedExperts
        if dense:
            self.mlp = SharedExperts(hidden, config.intermediate_size)
            return
        router = Router(
            hidden,
            config.num_experts,
            config.expected_experts,
            kind="topp",
            top_p=config.top_p,
            max_k=config.max_experts,
        )
        bank = Experts(config.num_experts, hidden, config.intermediate_size)
        self.mlp = MoE(router, bank)

    def forward(self, x: Tensor, step: Step, index: int) -> Tensor:
        assert step.rotation is not None
        x = x + self.attention(self.attention_norm(x), step.rotation, step.cache(index))
        if isinstance(self.mlp, SharedExperts) or step.routing is None:
            return x + self.mlp(self.mlp_norm(x))
        mixed = self.mlp(self.mlp_norm(x), return_routing=True)
        step.record(f"layers.{index}.mlp", self.mlp.router, mixed)
        return x + mixed.y


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
        self.config = config
        self.rope = Rope(config.hidden_size // config.num_heads, config.rope_theta)
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            TopPBlock(config, self.rope, dense=bool(i % config.expert_frequency))
            for i in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights N(0, init_std), norms 1."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=self.config.init_std)
            else:
                nn.init.ones_(parameter)

    def entries(self) -> list[Entry]:
        entries = [Entry("embed_tokens.weight", ("model.embed_tokens.weight",))]
        for i, block in enumerate(self.layers):
            ours, theirs = f"layers.{i}", f"model.layers.{i}"
            entries += [
                Entry(f"{ours}.attention_norm.weight", (f"{theirs}.input_norm.weight",)),
                *block.attention.entries(f"{ours}.attention", f"{theirs}.self_attn"),
                Entry(f"{ours}.mlp_norm.weight", (f"{theirs}.post_attention_norm.weight",)),
            ]
            if isinstance(block.mlp, SharedExperts):
                entries += dense_entries(f"{ours}.mlp", f"{theirs}.mlp.mlp")
                continue
            entries.append(Entry(f"{ours}.mlp.router.weight", (f"{theirs}.mlp.router.weight",)))
            entries += bank_entries(
                f"{ours}.mlp.experts", f"{theirs}.mlp.experts", self.config.num_experts
            )
        return [
            *entries,
            Entry("norm.weight", ("model.norm.weight",)),
            Entry("lm_head.weight", ("lm_head.weight",)),
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
        model: a module with routers of kind="topp".
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
                f'TopPController: model must hold a Router of kind="topp", got a '
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
