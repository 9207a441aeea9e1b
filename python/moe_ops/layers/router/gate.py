"""Routers whose logits are not just a linear map.

Letters: T tokens, H hidden size, G gate size, E experts, K experts per token.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops.ops import topk_router

from ..functional import apply_linear, linear, plain_activation
from .topk import TopKRouter

GATES = ("linear", "mlp", "cosine")


class GateRouter(TopKRouter):
    """Top-k router with a configurable gate and optional random selection in training.

    Gates for a token x:

    - "linear": x W^T, W [E, H], as in `Router`.
    - "mlp": dropout(gelu(x V^T + v)) W^T, V [G, H], W [E, G].
    - "cosine": exp(temperature) cos(x V^T, w_e), V [G, H], w_e the rows of W [E, G].

    In each, an expert is a row of W, so `select`, `append` and `merge` work as for `Router`; V is
    shared by all experts and is copied.

    Parameters:
        weight: W. stem.weight, stem.bias: V and v ("cosine" has no v). temperature: [1], "cosine".

    Args:
        hidden_size, num_experts, top_k: H, E, K.
        gate: see above.
        gate_size: G; None with "linear".
        gate_dropout: dropout probability of "mlp" in training.
        sample_top_k: number of the K experts that are, in training, sampled without replacement
            from the routing probabilities of the remaining experts instead of taken from the top.
        router_options: other arguments of `TopKRouter`, with softmax scores.

    Initialization: weights like `nn.Linear`; for "cosine", rows N(0, 1) and temperature 0.

    Raises:
        ValueError: an unknown gate, a missing or superfluous size, or a value out of range.

    Source: Shen et al. 2023 (ModuleFormer, arXiv 2306.04640) and the code published with it.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        gate: str = "mlp",
        gate_size: int | None = None,
        gate_dropout: float = 0.0,
        sample_top_k: int = 0,
        **router_options: Any,
    ) -> None:
        if gate not in GATES:
            raise ValueError(f"GateRouter: gate must be one of {', '.join(GATES)}, got {gate!r}.")
        if (gate == "linear") != (gate_size is None):
            raise ValueError(
                f"GateRouter: gate_size must be given unless gate is 'linear', got {gate_size} "
                f"with {gate!r}."
            )
        if gate_size is not None and gate_size < 1:
            raise ValueError(f"GateRouter: gate_size must be at least 1, got {gate_size}.")
        if not 0 <= gate_dropout < 1:
            raise ValueError(f"GateRouter: gate_dropout must be in [0, 1), got {gate_dropout}.")
        if not 0 <= sample_top_k <= top_k:
            raise ValueError(
                f"GateRouter: sample_top_k must be in [0, top_k = {top_k}], got {sample_top_k}."
            )
        kind = router_options.get("kind", "topk")
        score_func = router_options.get("score_func", "softmax")
        if (kind, score_func) != ("topk", "softmax"):
            raise ValueError(
                "GateRouter: kind and score_func must be 'topk' and 'softmax', got "
                f"{kind!r} and {score_func!r}."
            )
        super().__init__(hidden_size, num_experts, top_k, **router_options)
        self.gate = gate
        self.gate_size = gate_size
        self.gate_dropout = gate_dropout
        self.sample_top_k = sample_top_k
        self.stem: nn.Linear | None = None
        self.temperature: nn.Parameter | None = None
        if gate_size is not None:
            where: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
            self.weight = nn.Parameter(self.weight.new_empty(num_experts, gate_size))
            self.stem = nn.Linear(hidden_size, gate_size, bias=gate == "mlp", **where)
            if gate == "cosine":
                self.temperature = nn.Parameter(self.weight.new_empty(1))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial values described in the class docstring."""
        super().reset_parameters()
        # The constructor of Router calls this before the stem exists.
        stem, temperature = getattr(self, "stem", None), getattr(self, "temperature", None)
        if stem is not None:
            stem.reset_parameters()
        if temperature is not None:
            nn.init.normal_(self.weight)
            nn.init.zeros_(temperature)

    def logits(self, x: Tensor) -> Tensor:
        """Computes router_logits [T, E] from x [T, H]."""
        if self.stem is None:
            return super().logits(x)
        z = apply_linear(self.stem, x)
        if self.gate == "mlp":
            h = plain_activation(z, "gelu")
            return super().logits(F.dropout(h, self.gate_dropout, self.training))
        assert self.temperature is not None
        z, rows = F.normalize(z, dim=-1), F.normalize(self.weight, dim=-1)
        return linear(z, rows) * self.temperature.exp()

    def route(
        self, router_logits: Tensor, *, expert_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Routes like `Router.route`; with `sample_top_k` in training, some experts are sampled."""
        if not self.training or not self.sample_top_k or self.override is not None:
            return super().route(router_logits, expert_mask=expert_mask)
        with torch.no_grad():
            logits = router_logits.detach()
            logits = logits if logits.dtype == torch.float64 else logits.float()
            allowed = torch.ones_like(logits, dtype=torch.bool)
            if expert_mask is not None:
                allowed = expert_mask.expand(logits.shape)
                logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
            certain = self.top_k - self.sample_top_k
            ids = torch.empty(len(logits), 0, dtype=torch.int32, device=logits.device)
            if certain:
                ids = topk_router(logits, certain)[1]
                allowed = allowed.scatter(1, ids.long(), False)
            rest = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min).softmax(-1)
            # multinomial needs enough experts with positive probability.
            p = rest.clamp(min=1e-30) * allowed
            drawn = torch.multinomial(p, self.sample_top_k)
            ids = torch.cat([ids, drawn.to(ids.dtype)], dim=1)
        return self.weights_at(router_logits, ids, expert_mask=expert_mask), ids

    @property
    def draws_random_numbers(self) -> bool:  # type: ignore[override]
        return self.sample_top_k > 0

    def with_rows(self, num_experts: int, top_k: int, **changes: Any) -> Any:
        changes["sample_top_k"] = min(self.sample_top_k, top_k)
        result: Any = super().with_rows(num_experts, top_k, **changes)
        # Parameters shared by all experts.
        result.stem = copy.deepcopy(self.stem)
        result.temperature = copy.deepcopy(self.temperature)
        return result

    def extra_repr(self) -> str:
        words = [super().extra_repr(), f"gate={self.gate!r}"]
        if self.sample_top_k:
            words.append(f"sample_top_k={self.sample_top_k}")
        return ", ".join(words)
