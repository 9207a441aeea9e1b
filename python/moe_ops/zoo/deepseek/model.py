"""DeepSeekMoE: many small experts, shared experts, and three ways to keep the load even.

V1: Dai et al. 2024, arXiv 2401.06066. V2: DeepSeek-AI 2024, arXiv 2405.04434. V3: DeepSeek-AI 2024,
arXiv 2412.19437, with the balancing of Wang et al. 2024, arXiv 2408.15664. Multi-token prediction
is left out.

Letters: B sequences, S tokens, H hidden size, I intermediate size, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from moe_ops._fields import Fields, overridden
from moe_ops.layers import (
    Experts,
    MoE,
    Router,
    SharedExperts,
    device_balance_loss,
    update_expert_bias,
)

from ..lm.attention import Attention, LatentAttention, Rope, Yarn, publish_rope, published_rope
from ..lm.checkpoint import Entry, bank_entries, dense_entries
from ..lm.embedding import TokenEmbedding
from ..lm.losses import AuxLoss, Routed
from ..lm.model import CausalLM, Step

MODEL_TYPES = ("deepseek", "deepseek_v2", "deepseek_v3")


@dataclass(frozen=True)
class DeepSeekConfig:
    """Sizes and options of a DeepSeekMoE, of any of its three generations.

    Attributes:
        vocab_size: V.
        hidden_size: H.
        num_layers: blocks; the first `num_dense_layers` have a dense network of width
            `dense_intermediate_size` instead of experts.
        num_heads: attention heads.
        latent: attention with latent keys and values (V2, V3) of the sizes `q_rank` (None: no
            bottleneck of the queries), `kv_rank`, `nope_size`, `rope_size` and `v_size`; False:
            plain attention (V1) with heads of `head_size`.
        rope_theta, rope_interleaved, yarn: see `blocks.Rope`.
        intermediate_size: I, of one expert.
        num_experts, top_k: E routed experts, K of them a token.
        num_shared_experts: experts that every token passes.
        score_func: "softmax" (V1, V2) or "sigmoid" (V3).
        renormalize, routed_scaling_factor: see `moe_ops.layers.Router`.
        num_groups, num_topk_groups, group_score: groups of experts, and how many a token may use.
        expert_bias: balance by a bias of the choice; see `DeepSeek.balance_after`.
        bias_update_rate: size of its steps.
        expert_balance_coefficient, device_balance_coefficient, sequence_balance_coefficient: of the
            losses, each summed over layers.
        num_devices: groups of the device loss.
        context: tokens it was trained on; nothing is limited by it.
        norm_eps: of all norms but those inside latent attention (1e-6).
        tie_embeddings: the embedding is also the output's weight.
        init_std: of all weights.
    """

    PRESETS: ClassVar[tuple[str, ...]] = (
        "tiny",
        "tiny_v1",
        "tiny_v2",
        "deepseek_moe_16b",
        "v2_lite",
        "v2",
        "v3",
    )

    vocab_size: int = 256
    hidden_size: int = 64
    num_layers: int = 2
    num_dense_layers: int = 1
    dense_intermediate_size: int = 128
    num_heads: int = 4
    latent: bool = True
    head_size: int = 16
    q_rank: int | None = None
    kv_rank: int = 32
    nope_size: int = 16
    rope_size: int = 8
    v_size: int = 16
    rope_theta: float = 10_000.0
    rope_interleaved: bool = True
    yarn: Yarn | None = None
    intermediate_size: int = 32
    num_experts: int = 16
    top_k: int = 4
    num_shared_experts: int = 1
    score_func: str = "softmax"
    renormalize: bool = False
    routed_scaling_factor: float = 1.0
    num_groups: int = 1
    num_topk_groups: int = 1
    group_score: str = "max"
    expert_bias: bool = False
    bias_update_rate: float = 1e-3
    expert_balance_coefficient: float = 0.0
    device_balance_coefficient: float = 0.0
    sequence_balance_coefficient: float = 0.0
    num_devices: int = 1
    context: int = 128
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    init_std: float = 0.02

    @classmethod
    def tiny(cls) -> DeepSeekConfig:
        """V3 in small: sigmoid scores, a selection bias, 4 groups of which a token uses 2."""
        return cls(
            score_func="sigmoid",
            renormalize=True,
            routed_scaling_factor=2.5,
            num_groups=4,
            num_topk_groups=2,
            group_score="top2_sum",
            expert_bias=True,
            # Rates of published runs need thousands of steps.
            bias_update_rate=1e-2,
            sequence_balance_coefficient=1e-4,
        )

    @classmethod
    def tiny_v1(cls) -> DeepSeekConfig:
        """V1 in small: plain attention, softmax scores, losses of experts and devices."""
        return cls(
            latent=False,
            rope_interleaved=False,
            expert_balance_coefficient=0.01,
            device_balance_coefficient=0.05,
            num_devices=4,
        )

    @classmethod
    def tiny_v2(cls) -> DeepSeekConfig:
        """V2 in small: latent attention, softmax scores, 4 groups of which a token uses 2."""
        return cls(
            q_rank=32,
            num_groups=4,
            num_topk_groups=2,
            routed_scaling_factor=4.0,
            expert_balance_coefficient=0.003,
            device_balance_coefficient=0.05,
            num_devices=4,
        )

    @classmethod
    def deepseek_moe_16b(cls) -> DeepSeekConfig:
        """DeepSeekMoE 16B (V1): 16.4 billion parameters, 2.8 billion a token."""
        return cls(
            vocab_size=102_400,
            hidden_size=2048,
            num_layers=28,
            dense_intermediate_size=10_944,
            num_heads=16,
            latent=False,
            head_size=128,
            rope_interleaved=False,
            intermediate_size=1408,
            num_experts=64,
            top_k=6,
            num_shared_experts=2,
            sequence_balance_coefficient=1e-3,
            context=4096,
            init_std=0.006,
        )

    @classmethod
    def v2_lite(cls) -> DeepSeekConfig:
        """DeepSeek-V2-Lite: 15.7 billion parameters, 2.4 billion a token."""
        return replace(
            cls.v2(),
            hidden_size=2048,
            num_layers=27,
            dense_intermediate_size=10_944,
            num_heads=16,
            q_rank=None,
            intermediate_size=1408,
            num_experts=64,
            num_groups=1,
            num_topk_groups=1,
            num_devices=1,
            device_balance_coefficient=0.0,
            routed_scaling_factor=1.0,
        )

    @classmethod
    def v2(cls) -> DeepSeekConfig:
        """DeepSeek-V2: 236 billion parameters, 21 billion a token."""
        return cls(
            vocab_size=102_400,
            hidden_size=5120,
            num_layers=60,
            dense_intermediate_size=12_288,
            num_heads=128,
            q_rank=1536,
            kv_rank=512,
            nope_size=128,
            rope_size=64,
            v_size=128,
            yarn=Yarn(40.0, 4096, mscale=0.707, mscale_all_dim=0.707),
            intermediate_size=1536,
            num_experts=160,
            top_k=6,
            num_shared_experts=2,
            routed_scaling_factor=16.0,
            num_groups=8,
            num_topk_groups=3,
            expert_balance_coefficient=0.003,
            device_balance_coefficient=0.05,
            num_devices=8,
            context=163_840,
            init_std=0.006,
        )

    @classmethod
    def v3(cls) -> DeepSeekConfig:
        """DeepSeek-V3 and R1: 671 billion parameters, 37 billion a token."""
        return cls(
            vocab_size=129_280,
            hidden_size=7168,
            num_layers=61,
            num_dense_layers=3,
            dense_intermediate_size=18_432,
            num_heads=128,
            q_rank=1536,
            kv_rank=512,
            nope_size=128,
            rope_size=64,
            v_size=128,
            yarn=Yarn(40.0, 4096, mscale=1.0, mscale_all_dim=1.0),
            intermediate_size=2048,
            num_experts=256,
            top_k=8,
            num_shared_experts=1,
            score_func="sigmoid",
            renormalize=True,
            routed_scaling_factor=2.5,
            num_groups=8,
            num_topk_groups=4,
            group_score="top2_sum",
            expert_bias=True,
            sequence_balance_coefficient=1e-4,
            context=163_840,
            init_std=0.006,
        )

    def aux_coefficients(self) -> dict[str, float]:
        """The losses that are in use."""
        coefficients = {
            "load_balancing": self.expert_balance_coefficient,
            "device_balance": self.device_balance_coefficient,
            "sequence_balance": self.sequence_balance_coefficient,
        }
        return {name: value for name, value in coefficients.items() if value}

    @property
    def model_type(self) -> str:
        """What config.json calls it: the generation that has this attention and this balancing."""
        if not self.latent:
            return MODEL_TYPES[0]
        return MODEL_TYPES[2] if self.expert_bias else MODEL_TYPES[1]

    @classmethod
    def from_published(cls, published: Mapping[str, Any], **overrides: Any) -> DeepSeekConfig:
        """From the config.json of a V1, V2 or V3 checkpoint."""
        read = Fields(published, cls.__name__)
        kind = read.choice("model_type", of=MODEL_TYPES)
        for name, wanted in (
            ("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False),
            ("moe_layer_freq", 1),
        ):  # fmt: skip
            read.must_be(name, wanted)
        latent, biased = kind != "deepseek", kind == "deepseek_v3"
        theta, yarn = published_rope(read)
        hidden, heads = read.size("hidden_size"), read.size("num_attention_heads")
        fields: dict[str, Any] = {
            "vocab_size": read.size("vocab_size"),
            "hidden_size": hidden,
            "num_layers": read.size("num_hidden_layers"),
            "num_dense_layers": read.size("first_k_dense_replace", default=0, least=0),
            "dense_intermediate_size": read.size("intermediate_size"),
            "num_heads": heads,
            "latent": latent,
            "rope_theta": theta,
            "rope_interleaved": latent and read.flag("rope_interleave", default=True),
            "yarn": yarn,
            "intermediate_size": read.size("moe_intermediate_size"),
            "num_experts": read.size("n_routed_experts"),
            "top_k": read.size("num_experts_per_tok"),
            "num_shared_experts": read.size("n_shared_experts", default=0, least=0),
            "score_func": read.choice(
                "scoring_func",
                of=("softmax", "sigmoid"),
                default="sigmoid" if biased else "softmax",
            ),
            # The code of V2 in transformers never renormalises, and no V2 checkpoint asks for it.
            "renormalize": kind != "deepseek_v2" and read.flag("norm_topk_prob", default=False),
            "routed_scaling_factor": read.number("routed_scaling_factor", default=1.0),
            "group_score": "top2_sum" if biased else "max",
            "expert_bias": biased,
            "context": read.size("max_position_embeddings", default=cls.context),
            "norm_eps": read.number("rms_norm_eps", default=cls.norm_eps, least=0),
            "tie_embeddings": read.flag("tie_word_embeddings", default=False),
            "init_std": read.number("initializer_range", default=cls.init_std, least=0),
        }
        if latent:
            fields |= {
                "q_rank": read.size("q_lora_rank", default=None),
                "kv_rank": read.size("kv_lora_rank"),
                "nope_size": read.size("qk_nope_head_dim"),
                "rope_size": read.size("qk_rope_head_dim"),
                "v_size": read.size("v_head_dim"),
            }
        else:
            fields["head_size"] = read.size("head_dim", default=hidden // heads)
        if biased or read.values.get("topk_method") == "group_limited_greedy":
            fields |= {
                "num_groups": read.size("n_group", default=1),
                "num_topk_groups": read.size("topk_group", default=1),
            }
        if "aux_loss_alpha" in read:
            name = "sequence" if read.flag("seq_aux", default=True) else "expert"
            fields[f"{name}_balance_coefficient"] = read.number("aux_loss_alpha")
        config = cls(**fields)
        return overridden(config, overrides)

    def to_published(self) -> dict[str, Any]:
        """config.json with the names of the published checkpoints."""
        kind = self.model_type
        name = {"deepseek": "Deepseek", "deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3"}
        grouped = self.num_groups > 1
        published: dict[str, Any] = {
            "architectures": [f"{name[kind]}ForCausalLM"],
            "model_type": kind,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "first_k_dense_replace": self.num_dense_layers,
            "moe_layer_freq": 1,
            "intermediate_size": self.dense_intermediate_size,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "moe_intermediate_size": self.intermediate_size,
            "n_routed_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "n_shared_experts": self.num_shared_experts,
            "scoring_func": self.score_func,
            "norm_topk_prob": self.renormalize,
            "routed_scaling_factor": self.routed_scaling_factor,
            "n_group": self.num_groups,
            "topk_group": self.num_topk_groups,
            "topk_method": "group_limited_greedy" if grouped else "greedy",
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": self.init_std,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            **publish_rope(self.rope_theta, self.yarn),
        }
        if self.sequence_balance_coefficient or self.expert_balance_coefficient:
            by_sequence = self.sequence_balance_coefficient > 0
            published["seq_aux"] = by_sequence
            published["aux_loss_alpha"] = (
                self.sequence_balance_coefficient
                if by_sequence
                else self.expert_balance_coefficient
            )
        if self.expert_bias:
            published["topk_method"] = "noaux_tc"
            published["num_nextn_predict_layers"] = 0
        if not self.latent:
            return published | {"head_dim": self.head_size}
        return published | {
            "q_lora_rank": self.q_rank,
            "kv_lora_rank": self.kv_rank,
            "qk_nope_head_dim": self.nope_size,
            "qk_rope_head_dim": self.rope_size,
            "v_head_dim": self.v_size,
            "rope_interleave": self.rope_interleaved,
        }


class DeepSeekBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); mlp is a MoE or a dense network."""

    def __init__(self, config: DeepSeekConfig, rope: Rope, *, dense: bool) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.attention_norm = nn.RMSNorm(hidden, eps=config.norm_eps)
        self.attention: Attention | LatentAttention
        if config.latent:
            self.attention = LatentAttention(
                hidden,
                config.num_heads,
                q_rank=config.q_rank,
                kv_rank=config.kv_rank,
                nope_size=config.nope_size,
                rope_size=config.rope_size,
                v_size=config.v_size,
                rope=rope,
            )
        else:
            self.attention = Attention(hidden, config.num_heads, config.head_size, rope)
        self.mlp_norm = nn.RMSNorm(hidden, eps=config.norm_eps)
        self.mlp: MoE | SharedExperts
        if dense:
            self.mlp = SharedExperts(hidden, config.dense_intermediate_size)
            return
        router = Router(
            hidden,
            config.num_experts,
            config.top_k,
            score_func=config.score_func,
            renormalize=config.renormalize,
            routed_scaling_factor=config.routed_scaling_factor,
            expert_bias=config.expert_bias,
            num_groups=config.num_groups,
            num_topk_groups=config.num_topk_groups,
            group_score=config.group_score,
            logits_dtype=torch.float32,
        )
        shared = None
        if config.num_shared_experts:
            shared = SharedExperts(hidden, config.num_shared_experts * config.intermediate_size)
        bank = Experts(config.num_experts, hidden, config.intermediate_size)
        self.mlp = MoE(router, bank, shared)

    def forward(self, x: Tensor, step: Step, index: int) -> Tensor:
        assert step.rotation is not None
        x = x + self.attention(self.attention_norm(x), step.rotation, step.cache(index))
        if isinstance(self.mlp, SharedExperts) or step.routing is None:
            return x + self.mlp(self.mlp_norm(x))
        mixed = self.mlp(self.mlp_norm(x), return_routing=True)
        step.record(f"layers.{index}.mlp", self.mlp.router, mixed)
        return x + mixed.y


class DeepSeek(CausalLM):
    """The language model of all three generations; see `CausalLM` for what it can do.

    Equals transformers' DeepseekV2ForCausalLM and DeepseekV3ForCausalLM with the same weights.
    """

    config_class = DeepSeekConfig
    config: DeepSeekConfig

    def __init__(self, config: DeepSeekConfig) -> None:
        super().__init__()
        self.config = config
        self.rope = Rope(
            config.rope_size if config.latent else config.head_size,
            config.rope_theta,
            config.rope_interleaved,
            config.yarn,
        )
        # Prediction heads for later tokens are further layers of V3's checkpoints.
        later = r"model\.layers\.(\d+)\..*"
        self.ignored_keys = (*self.ignored_keys, _layers_from(config.num_layers, later))
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DeepSeekBlock(config, self.rope, dense=i < config.num_dense_layers)
            for i in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head = None
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias_update_rate = config.bias_update_rate
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights N(0, init_std), norms 1."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=self.config.init_std)
            else:
                nn.init.ones_(parameter)

    def auxiliary_losses(self) -> Mapping[str, AuxLoss]:
        def device_balance(routed: Routed, batch: int, mask: Tensor | None) -> Tensor:
            return device_balance_loss(
                routed.routing.router_logits,
                routed.routing.topk_ids,
                self.config.num_devices,
                score_func=routed.router.score_func,
                token_mask=mask,
            )

        return {**super().auxiliary_losses(), "device_balance": device_balance}

    def balance_after(self, optimizer: Optimizer, *, group: Any = None) -> RemovableHandle:
        """Moves every router's expert_bias after each step of the optimizer from now on.

        The routers count the slots of all training forwards since the last step, that is over
        gradient accumulation; the counts are summed over the ranks of `group` when
        torch.distributed is in use. The size of a step is `self.bias_update_rate`, which may be
        changed at any time (V3 sets it to 0 for the end of training).

        Returns:
            A handle whose `remove()` ends it.

        Raises:
            ValueError: the config has no expert_bias.
        """
        if not self.config.expert_bias:
            raise ValueError("DeepSeek.balance_after: config must have expert_bias, got False.")

        def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            update_expert_bias(self, rate=self.bias_update_rate, group=group)

        return optimizer.register_step_post_hook(hook)

    def entries(self) -> list[Entry]:
        entries = [Entry("embed_tokens.weight", ("model.embed_tokens.weight",))]
        for i, block in enumerate(self.layers):
            ours, theirs = f"layers.{i}", f"model.layers.{i}"
            entries += [
                Entry(f"{ours}.attention_norm.weight", (f"{theirs}.input_layernorm.weight",)),
                *block.attention.entries(f"{ours}.attention", f"{theirs}.self_attn"),
                Entry(f"{ours}.mlp_norm.weight", (f"{theirs}.post_attention_layernorm.weight",)),
            ]
            if isinstance(block.mlp, SharedExperts):
                entries += dense_entries(f"{ours}.mlp", f"{theirs}.mlp")
                continue
            entries.append(Entry(f"{ours}.mlp.router.weight", (f"{theirs}.mlp.gate.weight",)))
            if self.config.expert_bias:
                key = f"{theirs}.mlp.gate.e_score_correction_bias"
                entries.append(Entry(f"{ours}.mlp.router.expert_bias", (key,)))
            entries += bank_entries(
                f"{ours}.mlp.experts", f"{theirs}.mlp.experts", self.config.num_experts
            )
            if block.mlp.shared_experts is not None:
                entries += dense_entries(
                    f"{ours}.mlp.shared_experts", f"{theirs}.mlp.shared_experts"
                )
        entries.append(Entry("norm.weight", ("model.norm.weight",)))
        if self.lm_head is not None:
            entries.append(Entry("lm_head.weight", ("lm_head.weight",)))
        return entries


def _layers_from(first: int, pattern: str) -> str:
    """A pattern of the numbers `first` to first + 7 in the place of (\\d+)."""
    numbers = "|".join(str(first + i) for i in range(8))
    return pattern.replace(r"(\d+)", f"(?:{numbers})")
