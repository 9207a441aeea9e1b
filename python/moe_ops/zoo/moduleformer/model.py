"""The blocks and the model of ModuleFormer, whose experts can be added and taken away.

Letters: B sequences, S tokens, H hidden size, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from moe_ops.layers import AttentionExperts, Experts, GateRouter, MoE, count_tokens_per_expert

from ..lm.blocks import Step
from ..lm.checkpoint import Entry
from ..lm.model import CausalLM
from .checkpoint import entries
from .config import ModuleFormerConfig

_KINDS = ("attention", "mlp")  # The attributes of a block that hold experts.


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
        attended = step.through(
            f"layers.{index}.attention",
            self.attention,
            self.attention_norm(x),
            cache=step.cache(index),
        )
        x = x + attended
        return x + step.through(f"layers.{index}.mlp", self.mlp, self.mlp_norm(x))


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
        self.frozen_rows: dict[str, FrozenRows] = {}
        self.assemble(
            config,
            (ModuleFormerBlock(config, config.experts_of(i)) for i in range(config.num_layers)),
            nn.LayerNorm(config.hidden_size),
            rope=None,
        )

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
        self.note_experts()
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
        self.note_experts()
        return kept

    def note_experts(self) -> None:
        """Writes the numbers of experts into the config, after layers were replaced."""
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

    def entries(self) -> list[Entry]:
        return entries(self.config)
