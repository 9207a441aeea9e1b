"""Chain-of-Experts: the experts of a layer run several times in sequence, with routing repeated
each time.

Wang et al. 2025, Chain-of-Experts: Unlocking the Communication Power of Mixture-of-Experts Models,
arXiv 2506.18945.

Letters: B sequences, S tokens, H hidden size, I intermediate size, E experts, K experts per token
and iteration, C iterations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_ops._fields import Fields, check_least
from moe_ops.layers import Experts, Router, SharedExperts, TopKRouter
from moe_ops.layers.rotary import Rope, Yarn
from moe_ops.layers.self_attention import LatentAttention

from ._presets import preset
from .lm.blocks import Step, attend, attention_entries
from .lm.checkpoint import Entry, dense_entries, expert_entries
from .lm.config import LATENT_KEYS, LLAMA_KEYS, LMConfig, flag, number, size
from .lm.model import CausalLM

__all__ = ["ChainOfExperts", "CoE", "CoEConfig"]

# The published config names the residuals (inner, outer).
RESIDUALS = {"inner": (True, False), "outer": (False, True), "none": (False, False)}


@dataclass(frozen=True)
class CoEConfig(LMConfig):
    """Sizes and options of a Chain-of-Experts.

    Attributes, beside those of `LMConfig`:
        num_layers: blocks, all with experts.
        num_heads, q_rank, kv_rank, nope_size, rope_size, v_size: of the latent attention.
        rope_theta, yarn: see `moe_ops.layers.rotary.Rope`.
        intermediate_size: I, of one expert.
        num_experts, top_k: E routed experts, K of them in each iteration.
        num_shared_experts: experts applied to every token in each iteration.
        num_iterations: C.
        own_gates: a router for each iteration; False: one for all.
        inner_residual: an iteration adds its result to its input.
        outer_residual: the chain's result is added to the residual stream. The published code omits
            this with an inner residual: the chain's result then replaces the stream, which goes on
            from the *normalized* state.
        renormalize, routed_scaling_factor: see `moe_ops.layers.Router`.
        sequence_balance_coefficient: of the loss, summed over layers and iterations.
        norm_eps: of all norms but those inside the attention (1e-6).
    """

    KEYS: ClassVar[dict[str, Any]] = {
        **LLAMA_KEYS,
        **LATENT_KEYS,
        "num_heads": size("num_attention_heads"),
        "intermediate_size": size("moe_intermediate_size"),
        "num_experts": size("n_routed_experts"),
        "top_k": size("num_experts_per_tok"),
        "num_shared_experts": size("n_shared_experts", default=0, least=0),
        "num_iterations": size("inner_iter", default=1),
        "own_gates": flag("use_igate", default=True),
        "renormalize": flag("norm_topk_prob", default=False),
        "routed_scaling_factor": number("routed_scaling_factor", default=1.0),
        "sequence_balance_coefficient": number("aux_loss_alpha", default=0.0),
    }
    FIXED: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "seq_aux": True,
        "tie_word_embeddings": False,
    }
    LOSSES = ("sequence_balance",)

    num_heads: int = 4
    q_rank: int | None = None
    kv_rank: int = 32
    nope_size: int = 16
    rope_size: int = 8
    v_size: int = 16
    rope_theta: float = 10_000.0
    yarn: Yarn | None = None
    intermediate_size: int = 32
    num_experts: int = 15
    top_k: int = 2
    num_shared_experts: int = 1
    num_iterations: int = 2
    own_gates: bool = True
    inner_residual: bool = True
    outer_residual: bool = True
    renormalize: bool = False
    routed_scaling_factor: float = 1.0
    sequence_balance_coefficient: float = 1e-3
    norm_eps: float = 1e-6

    tiny = preset("Bytes, two blocks, two iterations of two experts, with both residuals.")
    tiny_published = preset(
        "`tiny` with the residuals of the published code.",
        outer_residual=False,
    )
    c2k4 = preset(
        "The published experiment: two iterations of 4 of 63 experts, 544 million parameters.",
        vocab_size=102_400,
        hidden_size=1024,
        num_layers=4,
        num_heads=8,
        kv_rank=512,
        nope_size=128,
        rope_size=64,
        v_size=128,
        yarn=Yarn(40.0, 4096, mscale=0.707, mscale_all_dim=0.707),
        intermediate_size=704,
        num_experts=63,
        top_k=4,
        outer_residual=False,
        context=163_840,
    )
    c1k8 = c2k4.but("Its baseline: one iteration of 8 experts.", num_iterations=1, top_k=8)

    @classmethod
    def read_more(cls, published: Fields) -> dict[str, Any]:
        residual = published.choice("residual", of=RESIDUALS, default="inner")
        return dict(zip(("inner_residual", "outer_residual"), RESIDUALS[residual], strict=True))

    def write_more(self) -> dict[str, Any]:
        # The published config has no value for both residuals together.
        residuals = (self.inner_residual, self.outer_residual and not self.inner_residual)
        return {
            "architectures": ["CoeForCausalLM"],
            "model_type": "coe_deepseekv2",
            "num_key_value_heads": self.num_heads,
            "n_shared_experts": self.num_shared_experts or None,
            "residual": next(n for n, pair in RESIDUALS.items() if pair == residuals),
        }


class ChainOfExperts(nn.Module):
    """Computes x_t = sum_i g_i E_i(x_(t-1)) + shared(x_(t-1)) [+ x_(t-1)], t = 1 .. C; returns x_C.

    All iterations use the same experts; the gates g belong to iteration t or are shared.

    Args:
        routers: one for each iteration, or one for all.
        experts: those of all iterations.
        shared_experts: a module applied to every token in each iteration, or None.
        num_iterations: C >= 1.
        inner_residual: add x_(t-1).
    """

    def __init__(
        self,
        routers: list[Router],
        experts: Experts,
        shared_experts: SharedExperts | None,
        num_iterations: int,
        *,
        inner_residual: bool,
    ) -> None:
        super().__init__()
        check_least("ChainOfExperts", "num_iterations", num_iterations, 1)
        if len(routers) not in (1, num_iterations):
            raise ValueError(
                f"ChainOfExperts: routers must be one or {num_iterations}, got {len(routers)}."
            )
        self.routers = nn.ModuleList(routers)
        self.experts = experts
        self.shared_experts = shared_experts
        self.num_iterations = num_iterations
        self.inner_residual = inner_residual

    def router_of(self, iteration: int) -> Router:
        router = self.routers[iteration if len(self.routers) > 1 else 0]
        assert isinstance(router, Router)
        return router

    def forward(self, x: Tensor, step: Step | None = None, name: str = "") -> Tensor:
        """Returns a tensor shaped like x [..., H]. `step` records each iteration's routing as
        `name.iteration.t`."""
        flat = x.reshape(-1, x.shape[-1])
        for t in range(self.num_iterations):
            router = self.router_of(t)
            routing = router(flat)
            if step is not None:
                step.record(f"{name}.iteration.{t}", router, routing)
            y = self.experts(flat, routing.topk_weights, routing.topk_ids)
            if self.shared_experts is not None:
                y = y + self.shared_experts(flat)
            flat = flat + y if self.inner_residual else y
        return flat.view(x.shape)


class CoEBlock(nn.Module):
    """Computes x + attention(norm(x)), then x + chain(norm(x)), or chain(norm(x)) alone."""

    def __init__(self, config: CoEConfig, rope: Rope) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.attention_norm = nn.RMSNorm(hidden, eps=config.norm_eps)
        self.attention = LatentAttention.of(config, rope)
        self.mlp_norm = nn.RMSNorm(hidden, eps=config.norm_eps)
        routers: list[Router] = [
            TopKRouter(
                hidden,
                config.num_experts,
                config.top_k,
                renormalize=config.renormalize,
                routed_scaling_factor=config.routed_scaling_factor,
                logits_dtype=torch.float32,
            )
            for _ in range(config.num_iterations if config.own_gates else 1)
        ]
        shared = None
        if config.num_shared_experts:
            shared = SharedExperts(hidden, config.num_shared_experts * config.intermediate_size)
        self.mlp = ChainOfExperts(
            routers,
            Experts(config.num_experts, hidden, config.intermediate_size),
            shared,
            config.num_iterations,
            inner_residual=config.inner_residual,
        )
        self.outer_residual = config.outer_residual

    def forward(self, x: Tensor, step: Step, index: int) -> Tensor:
        x = attend(self, x, step, index)
        y = self.mlp(self.mlp_norm(x), step, f"layers.{index}.mlp")
        return x + y if self.outer_residual else y


class CoE(CausalLM):
    """The language model; see `CausalLM` for its methods."""

    config_class = CoEConfig
    config: CoEConfig

    def __init__(self, config: CoEConfig) -> None:
        super().__init__()
        rope = Rope(config.rope_size, config.rope_theta, True, config.yarn)
        blocks = (CoEBlock(config, rope) for _ in range(config.num_layers))
        self.assemble(config, blocks, rope)

    def reset_parameters(self) -> None:
        """Draws weights from N(0, init_std) and router weights uniformly in +-1/sqrt(H), as
        published; norms are 1."""
        for name, parameter in self.named_parameters():
            if ".routers." in name:
                bound = self.config.hidden_size**-0.5
                nn.init.uniform_(parameter, -bound, bound)
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=self.config.init_std)
            else:
                nn.init.ones_(parameter)

    def idle_parameters(self) -> int:
        """Returns the expert parameters that a token does not use if its C * K experts are all
        distinct."""
        config, idle = self.config, 0
        used = min(config.num_experts, config.top_k * config.num_iterations)
        for block in self.layers:
            total = sum(p.numel() for p in block.mlp.experts.parameters())
            idle += total * (config.num_experts - used) // config.num_experts
        return idle

    def block_entries(self, block: Any, ours: str, theirs: str) -> list[Entry]:
        entries = attention_entries(block, ours, theirs)
        for t in range(len(block.mlp.routers)):
            gate = f"gate.{t}" if self.config.own_gates else "gate"
            entries.append(
                Entry(f"{ours}.mlp.routers.{t}.weight", (f"{theirs}.mlp.{gate}.weight",))
            )
        entries += expert_entries(
            f"{ours}.mlp.experts", f"{theirs}.mlp.experts", self.config.num_experts
        )
        if block.mlp.shared_experts is not None:
            entries += dense_entries(f"{ours}.mlp.shared_experts", f"{theirs}.mlp.shared_experts")
        return entries
