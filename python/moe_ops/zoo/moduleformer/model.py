"""ModuleFormer: sparse attention and feed-forward modules that can be added and taken away.

Shen et al. 2023, ModuleFormer: Modularity Emerges from Mixture-of-Experts, arXiv 2306.04640.

Letters: B sequences, S tokens, T = B * S, H hidden size, I intermediate size, E experts, K experts
a token, n heads of an attention expert, d head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from moe_ops._fields import Fields, overridden
from moe_ops.layers import AttentionExperts, Experts, GateRouter, MoE, count_tokens_per_expert

from ..lm.checkpoint import Entry
from ..lm.embedding import TokenEmbedding
from ..lm.model import CausalLM, Step

# Ours -> what the published config calls the gate.
GATE_TYPES = {"mlp": "mlp", "linear": "linear", "cosine": "gmm"}
_KINDS = ("attention", "mlp")  # Of experts, as a block's attributes.


@dataclass(frozen=True)
class ModuleFormerConfig:
    """Sizes and options of a ModuleFormer.

    Attributes:
        vocab_size: V.
        hidden_size: H.
        num_layers: blocks.
        num_heads, attention_size: n and n * d, of one attention expert.
        intermediate_size: I, of one feed-forward expert.
        num_attention_experts, num_mlp_experts: E of both kinds.
        top_k_attention, top_k_mlp: K of both kinds.
        gate, gate_size, gate_dropout, sample_top_k: see `moe_ops.layers.GateRouter`.
        mutual_information_coefficient, concentration_coefficient: of the losses, summed over both
            kinds of experts of all blocks. The first is for pre-training; the second for
            fine-tuning to a domain, where it gathers the load on few experts.
        context: tokens it was trained on; nothing is limited by it.
        init_std: of embedding and linear maps; experts are uniform in +-1/inputs.
        experts_of_layers: (attention, mlp) experts of every block where they differ from the
            numbers above, as they do after pruning.
    """

    PRESETS: ClassVar[tuple[str, ...]] = ("tiny", "molm_350m_4b", "molm_700m_4b", "molm_700m_8b")

    vocab_size: int = 50_295
    hidden_size: int = 1024
    num_layers: int = 24
    num_heads: int = 8
    attention_size: int = 512
    intermediate_size: int = 2048
    num_attention_experts: int = 16
    num_mlp_experts: int = 32
    top_k_attention: int = 2
    top_k_mlp: int = 2
    gate: str = "mlp"
    gate_size: int = 256
    gate_dropout: float = 0.0
    sample_top_k: int = 0
    mutual_information_coefficient: float = 0.0
    concentration_coefficient: float = 0.0
    context: int = 512
    init_std: float = 0.02
    experts_of_layers: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def molm_350m_4b(cls) -> ModuleFormerConfig:
        """MoLM-350M-4B: 4 billion parameters, 350 million a token."""
        return cls()

    @classmethod
    def molm_700m_4b(cls) -> ModuleFormerConfig:
        """MoLM-700M-4B: the same with twice the experts a token."""
        return cls(top_k_attention=4, top_k_mlp=4)

    @classmethod
    def molm_700m_8b(cls) -> ModuleFormerConfig:
        """MoLM-700M-8B: twice the blocks."""
        return cls(num_layers=48)

    @classmethod
    def tiny(cls) -> ModuleFormerConfig:
        """Bytes, two blocks, four and eight experts: trains on a CPU."""
        return cls(
            vocab_size=256,
            hidden_size=64,
            num_layers=2,
            num_heads=2,
            attention_size=32,
            intermediate_size=64,
            num_attention_experts=4,
            num_mlp_experts=8,
            gate_size=32,
            mutual_information_coefficient=0.01,
            context=128,
        )

    def aux_coefficients(self) -> dict[str, float]:
        """The losses that are in use."""
        coefficients = {
            "mutual_information": self.mutual_information_coefficient,
            "concentration": self.concentration_coefficient,
        }
        return {name: value for name, value in coefficients.items() if value}

    def experts_of(self, layer: int) -> tuple[int, int]:
        """Attention and feed-forward experts of a block."""
        if self.experts_of_layers is None:
            return self.num_attention_experts, self.num_mlp_experts
        attention, mlp = self.experts_of_layers[layer]
        return attention, mlp

    @classmethod
    def from_published(cls, published: Mapping[str, Any], **overrides: Any) -> ModuleFormerConfig:
        """From the config.json of the published code."""
        read = Fields(published, cls.__name__)
        read.must_be("activation_function", "gelu_new")
        read.must_be("tie_word_embeddings", False)
        gates = {theirs: ours for ours, theirs in GATE_TYPES.items()}
        gate = read.choice("gate_type", of=gates, default="mlp")
        config = cls(
            vocab_size=read.size("vocab_size"),
            hidden_size=read.size("n_embd"),
            num_layers=read.size("n_layer"),
            num_heads=read.size("n_head"),
            attention_size=read.size("att_hidden"),
            intermediate_size=read.size("ffd_hidden"),
            num_attention_experts=read.size("n_att_experts"),
            num_mlp_experts=read.size("n_mlp_experts"),
            top_k_attention=read.size("k_att"),
            top_k_mlp=read.size("k_mlp"),
            gate=gates[gate],
            gate_size=read.size("gating_size", default=cls.gate_size),
            gate_dropout=read.number("moe_pdrop", default=0.0, least=0),
            sample_top_k=read.size("sample_topk", default=0, least=0),
            mutual_information_coefficient=read.number("aux_loss_weight", default=0.0),
            context=read.size("block_size", default=cls.context),
            init_std=read.number("initializer_range", default=cls.init_std, least=0),
        )
        layers = overrides.get("experts_of_layers")
        if isinstance(layers, list):  # JSON has lists.
            overrides["experts_of_layers"] = tuple(
                tuple(pair) if isinstance(pair, list) else pair for pair in layers
            )
        config = overridden(config, overrides)
        layers = config.experts_of_layers
        if layers is not None and len(layers) != config.num_layers:
            raise ValueError(
                f"{cls.__name__}: experts_of_layers must have a pair for each of "
                f"{config.num_layers} layers, got {len(layers)}."
            )
        return config

    def to_published(self) -> dict[str, Any]:
        """config.json with the names of the published code."""
        return {
            "architectures": ["ModuleFormerForCausalLM"],
            "model_type": "moduleformer",
            "vocab_size": self.vocab_size,
            "n_embd": self.hidden_size,
            "n_layer": self.num_layers,
            "n_head": self.num_heads,
            "att_hidden": self.attention_size,
            "ffd_hidden": self.intermediate_size,
            "n_att_experts": self.num_attention_experts,
            "n_mlp_experts": self.num_mlp_experts,
            "k_att": self.top_k_attention,
            "k_mlp": self.top_k_mlp,
            "gate_type": GATE_TYPES[self.gate],
            "gating_size": self.gate_size,
            "moe_pdrop": self.gate_dropout,
            "sample_topk": self.sample_top_k,
            "aux_loss_type": "mi",
            "aux_loss_weight": self.mutual_information_coefficient,
            "block_size": self.context,
            "history_length": self.context,
            "initializer_range": self.init_std,
            "activation_function": "gelu_new",
            "tie_word_embeddings": False,
        }


class ModuleFormerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Attention breaks sticks and knows no
    positions; the weights of experts are not renormalised."""

    def __init__(self, config: ModuleFormerConfig, experts: tuple[int, int]) -> None:
        super().__init__()
        hidden = config.hidden_size

        def router(num_experts: int, top_k: int) -> GateRouter:
            return GateRouter(
                hidden,
                num_experts,
                top_k,
                gate=config.gate,
                gate_size=None if config.gate == "linear" else config.gate_size,
                gate_dropout=config.gate_dropout,
                sample_top_k=config.sample_top_k,
            )

        self.attention_norm = nn.LayerNorm(hidden)
        self.attention = AttentionExperts(
            router(experts[0], config.top_k_attention),
            config.num_heads,
            config.attention_size // config.num_heads,
            kind="stick_breaking",
            kv_bias=True,
        )
        self.mlp_norm = nn.LayerNorm(hidden)
        self.mlp = MoE(
            router(experts[1], config.top_k_mlp),
            Experts(experts[1], hidden, config.intermediate_size, activation="gelu_tanh"),
        )

    def forward(self, x: Tensor, step: Step, index: int) -> Tensor:
        record = step.routing is not None
        attended = self.attention(
            self.attention_norm(x), cache=step.cache(index), return_routing=record
        )
        if record:
            step.record(f"layers.{index}.attention", self.attention.router, attended)
            attended = attended.y
        x = x + attended
        mixed = self.mlp(self.mlp_norm(x), return_routing=record)
        if record:
            step.record(f"layers.{index}.mlp", self.mlp.router, mixed)
            mixed = mixed.y
        return x + mixed


class FrozenRows:
    """The first rows of a parameter stay as they are while the others are trained.

    Their gradient is zero. That alone does not stop weight decay, nor optimisers with a memory of
    earlier gradients: `restore` puts the rows back, and `ModuleFormer.hold_frozen` calls it after
    every step of an optimiser.
    """

    def __init__(self, parameter: nn.Parameter, rows: int) -> None:
        self.parameter = parameter
        self.kept = parameter.detach()[:rows].clone()
        parameter.requires_grad_(True)
        self.handle = parameter.register_hook(self._mask)

    def _mask(self, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[: len(self.kept)] = 0
        return gradient

    @torch.no_grad()
    def restore(self) -> None:
        self.parameter[: len(self.kept)] = self.kept

    def new_rows(self) -> Tensor:
        """The rows that are trained; differentiable."""
        return self.parameter[len(self.kept) :]


class ModuleFormer(CausalLM):
    """The language model, and what its modules are for: `insert_experts` and `prune`.

    See `CausalLM` for the rest.
    """

    config_class = ModuleFormerConfig
    ignored_keys = (r"attn\.mask", r"attn\.cum_weight")
    config: ModuleFormerConfig

    def __init__(self, config: ModuleFormerConfig) -> None:
        super().__init__()
        if config.attention_size % config.num_heads:
            raise ValueError(
                f"ModuleFormer: num_heads must divide attention_size = {config.attention_size}, "
                f"got {config.num_heads}."
            )
        if config.attention_size == config.hidden_size and config.num_heads == 1:
            raise ValueError(
                "ModuleFormer: one head of the hidden size has no key and value projections in the "
                f"published code and is not supported, got attention_size {config.attention_size}."
            )
        self.config = config
        self.rope = None
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            ModuleFormerBlock(config, config.experts_of(i)) for i in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.frozen_rows: dict[str, FrozenRows] = {}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Experts uniform in +-1/inputs; rows of cosine gates N(0, 1); other weights N(0,
        init_std); biases and temperatures 0, norms 1."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 3:
                bound = 1 / parameter.shape[-1]
                nn.init.uniform_(parameter, -bound, bound)
            elif parameter.dim() == 2:
                rows = self.config.gate == "cosine" and name.endswith("router.weight")
                nn.init.normal_(parameter, std=1.0 if rows else self.config.init_std)
            elif name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            else:
                nn.init.zeros_(parameter)

    # -------------------------------------------------------------------------------- modules

    def insert_experts(
        self, attention: int = 0, mlp: int = 0, *, init: str = "random", freeze: bool = True
    ) -> None:
        """Adds experts to every block, in place, to learn something new with them alone.

        The blocks' layers are replaced, so make the optimiser afterwards. With `freeze`, nothing
        but the new experts and their rows in the routers is trained: all other parameters get
        requires_grad False, and the old rows of the tensors that hold both are kept by a
        `FrozenRows` each (`frozen_rows`, by parameter name); call `hold_frozen` on the optimiser.

        Args:
            attention, mlp: experts to add to each block.
            init: "random", "zero_output" (they contribute nothing until trained), "copy" or
                "mean"; see `moe_ops.layers.Experts.append`.

        Raises:
            ValueError: a negative number, or nothing to add.
        """
        if min(attention, mlp) < 0 or not attention + mlp:
            raise ValueError(
                "ModuleFormer.insert_experts: attention and mlp must be numbers >= 0 and not both "
                f"0, got {attention} and {mlp}."
            )
        grown: dict[str, int] = {}
        for i, block in enumerate(self.layers):
            if attention:
                old = block.attention.router.num_experts
                block.attention = block.attention.append(attention, init=init)
                for name in ("router.weight", "w_query", "w_output"):
                    grown[f"layers.{i}.attention.{name}"] = old
            if mlp:
                old = block.mlp.router.num_experts
                block.mlp = block.mlp.append(mlp, init=init)
                for name in ("router.weight", "experts.w_gate_up", "experts.w_down"):
                    grown[f"layers.{i}.mlp.{name}"] = old
        self._note_experts()
        self.unfreeze()
        if freeze:
            self.requires_grad_(False)
            for name, rows in grown.items():
                self.frozen_rows[name] = FrozenRows(self.get_parameter(name), rows)

    def hold_frozen(self, optimizer: Optimizer) -> RemovableHandle:
        """Puts the frozen rows back after every step of the optimiser from now on.

        Returns:
            A handle whose `remove()` ends it.
        """

        def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            for rows in self.frozen_rows.values():
                rows.restore()

        return optimizer.register_step_post_hook(hook)

    def unfreeze(self) -> None:
        """Everything is trained again."""
        for rows in self.frozen_rows.values():
            rows.handle.remove()
        self.frozen_rows = {}
        self.requires_grad_(True)

    def new_rows_penalty(self) -> Tensor:
        """Sum of squares of the new experts' rows in the routers, to add to a loss with a small
        coefficient: it keeps the routers from preferring the new experts on old domains."""
        rows = [r.new_rows() for name, r in self.frozen_rows.items() if "router" in name]
        if not rows:
            raise ValueError(
                "ModuleFormer.new_rows_penalty: experts must have been inserted with freeze=True, "
                "got none."
            )
        return torch.stack([r.square().sum() for r in rows]).sum()

    @torch.no_grad()
    def expert_frequencies(self, batches: Iterable[Tensor]) -> dict[str, Tensor]:
        """How often each expert is used: layer -> [E], the share of tokens that use it.

        Args:
            batches: of tokens [B, S]; the model runs in eval mode.
        """
        training, total = self.training, 0
        counts: dict[str, Tensor] = {}
        self.eval()
        try:
            for tokens in batches:
                total += tokens.numel()
                for r in self(tokens, return_routing=True).routing:
                    found = count_tokens_per_expert(r.routing.topk_ids, r.router.num_experts)
                    counts[r.layer] = counts[r.layer] + found if r.layer in counts else found
        finally:
            self.train(training)
        return {layer: c.double() / max(total, 1) for layer, c in counts.items()}

    def prune(self, frequencies: Mapping[str, Tensor], threshold: float) -> dict[str, list[int]]:
        """Drops, in place, the experts used by fewer than `threshold` of the tokens.

        The K most used experts of a layer always stay, for the router needs K. The rest is as if
        the others did not exist: routing probabilities are those among the experts that are left.
        The layers are replaced, so make optimisers afterwards; freezing ends.

        Args:
            frequencies: of `expert_frequencies`; layers that are not in it are left alone.
            threshold: share of tokens, in [0, 1].

        Returns:
            Layer -> ids of the experts that were kept, in order.

        Raises:
            ValueError: a threshold out of range, a layer that is none, or another number of
                experts than it has.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"ModuleFormer.prune: threshold must be in [0, 1], got {threshold}.")
        layers = {f"layers.{i}.{kind}" for i in range(len(self.layers)) for kind in _KINDS}
        for name, frequency in frequencies.items():
            if name not in layers:
                raise ValueError(
                    f"ModuleFormer.prune: frequencies must be of layers.N.attention or "
                    f"layers.N.mlp, got {name}."
                )
            routed: Any = self.get_submodule(name)
            experts = routed.router.num_experts
            if frequency.shape != (experts,):
                raise ValueError(
                    f"ModuleFormer.prune: frequencies of {name} must be [{experts}], got "
                    f"{list(frequency.shape)}."
                )
        self.unfreeze()
        kept = {}
        for name, frequency in frequencies.items():
            layer: Any = self.get_submodule(name)
            most = frequency.argsort(descending=True, stable=True)[: layer.router.top_k]
            keep = set(most.tolist()) | set((frequency >= threshold).nonzero().flatten().tolist())
            kept[name] = sorted(keep)
            _, index, kind = name.split(".")
            setattr(self.layers[int(index)], kind, layer.select(kept[name]))
        self._note_experts()
        return kept

    def _note_experts(self) -> None:
        """Writes the numbers of experts into the config."""
        found = tuple(
            (block.attention.router.num_experts, block.mlp.router.num_experts)
            for block in self.layers
        )
        attention, mlp = found[0]
        self.config = replace(
            self.config,
            num_attention_experts=max(a for a, _ in found),
            num_mlp_experts=max(m for _, m in found),
            experts_of_layers=None if set(found) == {(attention, mlp)} else found,
        )

    # ---------------------------------------------------------------------------- checkpoints

    def _gate_entries(self, ours: str, theirs: str) -> list[Entry]:
        names = {
            "linear": {"weight": "w_gate.0.weight"},
            "mlp": {
                "stem.weight": "w_gate.0.weight",
                "stem.bias": "w_gate.0.bias",
                "weight": "w_gate.3.weight",
            },
            "cosine": {
                "stem.weight": "w_gate.weight",
                "weight": "expert_centroids",
                "temperature": "temperature",
            },
        }[self.config.gate]
        return [
            Entry(f"{ours}.router.{mine}", (f"{theirs}.gate.{name}",))
            for mine, name in names.items()
        ]

    def entries(self) -> list[Entry]:
        entries = [Entry("embed_tokens.weight", ("transformer.wte.weight",))]

        def norm(ours: str, theirs: str) -> list[Entry]:
            return [Entry(f"{ours}.{n}", (f"{theirs}.{n}",)) for n in ("weight", "bias")]

        for i in range(self.config.num_layers):
            ours, theirs = f"layers.{i}", f"transformer.h.{i}"
            q, mlp = f"{theirs}.attn.q_proj", f"{theirs}.mlpf"
            entries += norm(f"{ours}.attention_norm", f"{theirs}.ln_1")
            entries += self._gate_entries(f"{ours}.attention", q)
            for n in ("weight", "bias"):
                keys = tuple(f"{theirs}.attn.{p}_proj.{n}" for p in "kv")
                entries.append(Entry(f"{ours}.attention.kv_proj.{n}", keys, "rows"))
            entries += norm(f"{ours}.mlp_norm", f"{theirs}.ln_2")
            entries += self._gate_entries(f"{ours}.mlp", mlp)
            # Their experts are [E, inputs, outputs].
            for mine, key in (
                ("attention.w_query", f"{q}.experts.weight"),
                ("attention.w_output", f"{q}.output_experts.weight"),
                ("mlp.experts.w_gate_up", f"{mlp}.experts.weight"),
                ("mlp.experts.w_down", f"{mlp}.output_experts.weight"),
            ):
                entries.append(Entry(f"{ours}.{mine}", (key,), "transposed"))
        return [
            *entries,
            *norm("norm", "transformer.ln_f"),
            Entry("lm_head.weight", ("lm_head.weight",)),
        ]
