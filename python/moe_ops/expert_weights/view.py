"""Views of a module's expert weights, independent of their storage.

Letters: T tokens, H hidden size, I intermediate size, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_ops._sharded import local_part
from moe_ops.ops.moe_ffn import moe_ffn


class ExpertInputs(NamedTuple):
    """Inputs of one call of experts: x [T, H], topk_weights and topk_ids [T, K]."""

    x: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    apply_router_weight_on_input: bool = False

    def take(self, tokens: Tensor) -> ExpertInputs:
        """Returns the inputs of some of its tokens."""
        return ExpertInputs(
            self.x[tokens],
            self.topk_weights[tokens],
            self.topk_ids[tokens],
            self.apply_router_weight_on_input,
        )

    def tokens_by_expert(self, num_experts: int) -> Iterator[tuple[int, Tensor]]:
        """Yields each used expert with the indices of its tokens."""
        for expert in range(num_experts):
            tokens = (self.topk_ids == expert).any(-1).nonzero().flatten()
            if tokens.numel():
                yield expert, tokens


@dataclass(frozen=True)
class ExpertWeights:
    """Expert weights as views, without copies.

    gate_up: w_gate_up [E, 2I, H], or consecutive parts of its rows, each [E, rows, H].
    down: [E, H, I].
    b_gate_up, b_down: [E, 2I] and [E, H] or None.
    activation: the arguments of moe_ffn that define the activation.
    """

    gate_up: tuple[Tensor, ...]
    down: Tensor
    b_gate_up: Tensor | None = None
    b_down: Tensor | None = None
    activation: Mapping[str, Any] = field(default_factory=lambda: {"activation": "swiglu"})

    def local(self) -> ExpertWeights:
        """Returns this process's part of sharded weights, without gradients."""
        with torch.no_grad():
            gate_up, down = tuple(map(local_part, self.gate_up)), local_part(self.down)
            biases = local_part(self.b_gate_up), local_part(self.b_down)
        return ExpertWeights(gate_up, down, *biases, self.activation)

    @property
    def num_experts(self) -> int:
        return self.down.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.down.shape[1]

    @property
    def intermediate_size(self) -> int:
        return self.down.shape[2]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for _, t in self.tensors())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields each tensor with its name in moe_ffn (also for parts)."""
        yield from (("w_gate_up", w) for w in self.gate_up)
        yield "w_down", self.down
        biases = ("b_gate_up", self.b_gate_up), ("b_down", self.b_down)
        yield from ((name, b) for name, b in biases if b is not None)

    def gate_up_of(self, expert: int) -> Tensor:
        """Returns [2I, H] fp32, a separate copy."""
        return torch.cat([w[expert].detach().float() for w in self.gate_up])

    def down_of(self, expert: int) -> Tensor:
        """Returns [H, I] fp32."""
        return self.down[expert].detach().float().contiguous()

    def biases_of(self, expert: int) -> dict[str, Any]:
        pairs = (("b_gate_up", self.b_gate_up), ("b_down", self.b_down))
        return {n: b[expert : expert + 1].detach().float() for n, b in pairs if b is not None}

    def run_expert(
        self, expert: int, inputs: ExpertInputs, w_gate_up: Tensor | None = None
    ) -> Tensor:
        """Computes the contribution of one expert to the tokens of `inputs`, [T, H] fp32,
        optionally with another w_gate_up."""
        w_gate_up = self.gate_up_of(expert) if w_gate_up is None else w_gate_up
        return moe_ffn(
            inputs.x.float(),
            w_gate_up[None],
            self.down_of(expert)[None],
            inputs.topk_weights.float(),
            torch.where(inputs.topk_ids == expert, 0, -1),
            apply_router_weight_on_input=inputs.apply_router_weight_on_input,
            **self.biases_of(expert),
            **self.activation,
        )

    def run(self, inputs: ExpertInputs) -> Tensor:
        """Computes the output [T, H] in fp32, one expert at a time so that at most one is
        copied."""
        y = inputs.x.new_zeros(inputs.x.shape[0], self.hidden_size, dtype=torch.float32)
        for expert, tokens in inputs.tokens_by_expert(self.num_experts):
            y[tokens] += self.run_expert(expert, inputs.take(tokens))
        return y
