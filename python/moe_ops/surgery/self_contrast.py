"""Self-contrast decoding (SCMoE): contrasts a model with itself under weaker routing.

Letters: B sequences, S tokens per sequence, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from .rules import Rule, override_routing, rank


def contrast(strong: Tensor, weak: Tensor, *, alpha: float = 0.1, beta: float = 0.5) -> Tensor:
    """Computes (1 + beta) strong - beta weak where strong >= max(strong) + log(alpha), else -inf.

    Args:
        strong, weak: logits [..., V]; a constant added to either changes no probability.
        alpha: in (0, 1]; minimum probability in the strong model, relative to the largest one, for
            a token to be considered. 1 keeps only the most likely token.
        beta: at least 0, factor of the difference. 0 returns the strong model's logits.

    Returns:
        [..., V] fp32 (fp64 for fp64 logits).

    Source: Shi et al. 2024 (SCMoE, arXiv 2405.14507), equations 4 and 5.
    """
    _check(alpha, beta)
    dtype = torch.float64 if strong.dtype == torch.float64 else torch.float32
    strong, weak = strong.to(dtype), weak.to(dtype)
    considered = strong >= strong.amax(-1, keepdim=True) + math.log(alpha)
    return (strong + beta * (strong - weak)).masked_fill(~considered, -math.inf)


class SelfContrastLogitsProcessor:
    """Logits processor that contrasts a model with itself under weaker routing.

    Example:
        contrasted = SelfContrastLogitsProcessor(model, rank(2), beta=0.5)
        model.generate(tokens, 64, logits_processor=contrasted)              # of the zoo
        model.generate(ids, logits_processor=[contrasted], max_new_tokens=64)  # of transformers

    The weak pass runs the same weights with a separate KV cache, on the new tokens since the last
    call; a call that does not continue the tokens of the previous one starts over. It supports
    greedy search and sampling, but not beams, which change the order of sequences.

    Args:
        model: the generating model; see `moe_ops.surgery.find_routed_layers`.
        weak: a rule of `override_routing`. The paper uses `rank(2)` for Mixtral; shared experts are
            unaffected.
        alpha, beta: see `contrast`.
        renormalize: normalize the experts' weights in the weak pass to sum to 1, as in the paper.
        attention_mask: [B, S] for left-padded prompts; transformers only.

    Raises:
        ValueError: alpha or beta out of range, or (in a call) a model that `override_routing`
            rejects.

    Source: Shi et al. 2024 (SCMoE, arXiv 2405.14507).
    """

    def __init__(
        self,
        model: nn.Module,
        weak: Rule | None = None,
        *,
        alpha: float = 0.1,
        beta: float = 0.5,
        renormalize: bool = True,
        attention_mask: Tensor | None = None,
    ) -> None:
        _check(alpha, beta)
        self.model: Any = model
        self.weak = rank(2) if weak is None else weak
        self.alpha = alpha
        self.beta = beta
        self.renormalize = renormalize
        self.attention_mask = attention_mask
        self._cache: Any = None
        self._cache_name = ""  # Looked up once per cache: reading a signature is slow.
        self._seen: Tensor | None = None
        # The zoo's models make caches themselves.
        self._is_ours = hasattr(model, "new_cache")
        self._parameters = inspect.signature(model.forward).parameters

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns the contrasted logits of the next token, [B, V].

        Args:
            input_ids: [B, S], all tokens so far.
            scores: [B, V], the model's logits of the next token.
        """
        weak = self.weak_logits(input_ids)
        return contrast(scores, weak.to(scores.device), alpha=self.alpha, beta=self.beta)

    @torch.no_grad()
    def weak_logits(self, input_ids: Tensor) -> Tensor:
        """Computes the logits [B, V] of the next token in the weak pass."""
        seen = self._seen
        if seen is None or not self._goes_on(input_ids, seen):
            self._cache = self.model.new_cache() if self._is_ours else self._new_cache()
            new = input_ids
        else:
            new = input_ids[:, seen.shape[1] :]
        with override_routing(self.model, self.weak, renormalize=self.renormalize):
            if self._is_ours:
                logits = self.model(new, cache=self._cache, last=1)
            else:
                logits = self._run_transformers(input_ids, new)
        self._seen = input_ids
        return logits[:, -1]

    def _goes_on(self, input_ids: Tensor, seen: Tensor) -> bool:
        length = seen.shape[1]
        longer = input_ids.shape[0] == seen.shape[0] and input_ids.shape[1] > length
        return longer and torch.equal(input_ids[:, :length], seen)

    def _run_transformers(self, input_ids: Tensor, new: Tensor) -> Tensor:
        options: dict[str, Any] = {}
        if (mask := self.attention_mask) is not None:
            added = input_ids.shape[1] - mask.shape[1]
            mask = nn.functional.pad(mask.to(input_ids.device), (0, added), value=1)
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
            options["attention_mask"] = mask
            if "position_ids" in self._parameters:
                options["position_ids"] = positions[:, -new.shape[1] :]
        if "logits_to_keep" in self._parameters:
            options["logits_to_keep"] = 1
        options[self._cache_name] = self._cache
        return self.model(input_ids=new, use_cache=True, **options).logits

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        from moe_ops.hf.models.cache_argument import cache_name

        self._cache_name = cache_name(self.model.forward)
        return DynamicCache(config=self.model.config)


def _check(alpha: float, beta: float) -> None:
    if not 0 < alpha <= 1:
        raise ValueError(f"contrast: alpha must be in (0, 1], got {alpha}.")
    if not beta >= 0:
        raise ValueError(f"contrast: beta must be at least 0, got {beta}.")
