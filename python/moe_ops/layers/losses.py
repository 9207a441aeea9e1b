"""Auxiliary routing losses as plain functions; the caller scales and adds them.

Letters: T tokens, E experts, K experts per token. p[t, e] are a token's routing probabilities:
softmax of its logits, or, with another `score_func`, scores divided by their sum. P[e] is the mean
of p[t, e] over tokens, and f[e] the fraction of the selected slots that belong to expert e.

Common to all: `router_logits` is [..., E] of one layer, in any float type. (Do not stack layers:
pooling hides collapse; average the losses instead.) Arithmetic runs in fp32 (fp64 for fp64).
Gradients reach the logits through p only; f is a constant. `token_mask` is bool with one element
per token, True if the token counts; values of masked tokens (including NaN) are never used. Without
a counted token, losses are 0. Each function returns an unscaled scalar.

With `group`, a process group (`torch.distributed.group.WORLD` is all ranks), f and the means cover
the tokens of all its ranks, which may have different numbers of tokens. The loss is that of the
whole batch on every rank, and so are its gradients after averaging over the ranks, as in DDP and
FSDP2. A loss sends one all-reduce of about 2 E values (mutual_information_loss two). Without
`group`, each rank balances its own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_ops.formulas.scores import SCORE_FUNCS, router_scores

from .expert_bias import update_expert_bias as update_expert_bias
from .ranks import mean_over_ranks
from .router import Router
from .routing import Routing
from .stats import count_tokens_per_expert


def load_balancing_loss(
    router_logits: Tensor | Sequence[Tensor],
    topk_ids: Tensor | None = None,
    *,
    tokens_per_expert: Tensor | None = None,
    score_func: str = "softmax",
    token_mask: Tensor | None = None,
    top_k: int | None = None,
    hf_compat: bool = False,
    group: Any = None,
) -> Tensor:
    """Computes the Switch-style balance loss of one layer: L = E * sum_e f[e] * P[e].

    f[e] = (slots of e) / (nonempty slots), so L is 1 at perfect balance for every K, and E if one
    expert gets everything with certainty. Uniform P gives exactly 1 for any f.

    Args:
        router_logits: [..., E] of one layer (with `hf_compat`, also a sequence of layers).
        topk_ids: [..., K], the selected experts; ids outside [0, E) are not counted.
        tokens_per_expert: [E] counts that replace those of `topk_ids`, for example of a whole
            batch, summed over micro-batches and ranks.
        score_func: score function of the router; scores other than softmax are divided by their
            sum.
        token_mask: bool, one element per token, True if the token counts.
        top_k: K of `hf_compat`; otherwise unused.
        hf_compat: reproduces transformers' `load_balancing_loss_func`: it selects the top `top_k`
            of the softmax, divides f[e] by tokens instead of slots (so the value at balance is K),
            and pools a sequence of layers into one f and one P before multiplying them. For parity
            only: pooling considers layers balanced that each collapse onto a different expert. The
            mask is that of one layer and applies to all.
        group: ranks whose tokens the loss covers.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: neither or both of `topk_ids` and `tokens_per_expert` given, `hf_compat` without
            `top_k`, a sequence of layers without `hf_compat`, or sizes that do not match.

    Source: Fedus, Zoph and Shazeer 2021 (Switch Transformers, arXiv 2101.03961), eq. 4-6; divided
    by K as in Dai et al. 2024 (DeepSeekMoE, arXiv 2401.06066), eq. 12-14.
    """
    if hf_compat:
        if group is not None:
            raise ValueError("load_balancing_loss: group must be None with hf_compat, got a group.")
        return _load_balancing_loss_hf(router_logits, top_k, token_mask)
    if not isinstance(router_logits, Tensor):
        raise ValueError(
            "load_balancing_loss: router_logits must be one layer's tensor (average the layers' "
            f"losses yourself, or set hf_compat=True), got {type(router_logits).__name__}."
        )
    if (topk_ids is None) == (tokens_per_expert is None):
        raise ValueError(
            "load_balancing_loss: exactly one of topk_ids and tokens_per_expert must be given, got "
            f"{'neither' if topk_ids is None else 'both'}."
        )
    logits, mask = _flatten("load_balancing_loss", router_logits, token_mask)
    if tokens_per_expert is not None:
        counts = _given_counts("load_balancing_loss", tokens_per_expert, logits)
        mean_probs = _mean(_probabilities(logits, score_func), mask, group=group)
    else:
        counts = _counts("load_balancing_loss", topk_ids, logits, mask)
        probs = _probabilities(logits, score_func)
        mean_probs, counts = _mean_and_counts(probs, mask, counts, group=group)
    return logits.shape[1] * (_share(counts, logits.dtype) * mean_probs).sum()


def _load_balancing_loss_hf(
    router_logits: Tensor | Sequence[Tensor], top_k: int | None, token_mask: Tensor | None
) -> Tensor:
    if top_k is None:
        raise ValueError("load_balancing_loss: hf_compat=True needs top_k, got None.")
    layers = [router_logits] if isinstance(router_logits, Tensor) else list(router_logits)
    counts: Any = 0.0
    probs: Any = 0.0
    rows: Any = 0.0
    for layer in layers:
        logits, mask = _flatten("load_balancing_loss", layer, token_mask)
        p = logits.softmax(-1)
        ids = p.topk(top_k, dim=-1).indices
        counts = counts + _counts("load_balancing_loss", ids, logits, mask).to(p.dtype)
        probs = probs + (p if mask is None else p * mask[:, None]).sum(0)
        rows = rows + (logits.shape[0] if mask is None else mask.sum())
    return layers[0].shape[-1] * (counts / rows * (probs / rows)).sum()


def router_z_loss(
    router_logits: Tensor, *, token_mask: Tensor | None = None, group: Any = None
) -> Tensor:
    """Computes the router z-loss, which keeps logits small: L = mean over tokens of
    logsumexp(logits)^2.

    Args:
        router_logits: [..., E].
        token_mask: bool, one element per token, True if the token counts.
        group: ranks whose tokens the loss covers.

    Returns:
        The loss, a scalar >= 0.

    Source: Zoph et al. 2022 (ST-MoE, arXiv 2202.08906).
    """
    logits, mask = _flatten("router_z_loss", router_logits, token_mask)
    return _mean(logits.logsumexp(-1).square(), mask, group=group)


def router_entropy_loss(
    router_logits: Tensor,
    *,
    score_func: str = "softmax",
    token_mask: Tensor | None = None,
    group: Any = None,
) -> Tensor:
    """Computes the mean entropy of a token's routing: L = -mean_t sum_e p[t, e] log p[t, e].

    It is between 0 (every token certain of one expert) and log E. Minimizing it sharpens routing,
    which keeps top-p routing from spreading over many experts.

    Args:
        router_logits: [..., E].
        score_func: score function of the router; scores other than softmax are divided by their
            sum.
        token_mask: bool, one element per token, True if the token counts.
        group: ranks whose tokens the loss covers.

    Returns:
        The loss, a scalar, in nats.

    Source: Huang et al. 2024 (dynamic routing by top-p, arXiv 2403.07652), the "dynamic loss".
    """
    logits, mask = _flatten("router_entropy_loss", router_logits, token_mask)
    return _mean(_token_entropy(logits, score_func), mask, group=group)


def mutual_information_loss(
    router_logits: Tensor,
    *,
    score_func: str = "softmax",
    token_mask: Tensor | None = None,
    group: Any = None,
) -> Tensor:
    """Computes minus the mutual information of token and expert: L = H(e | t) - H(e).

    H(e | t) = -mean_t sum_e p[t, e] log p[t, e] and H(e) = -sum_e P[e] log P[e]. It is between -log
    E (every token certain, all experts used equally) and 0 (routing does not depend on the token).
    Unlike the Switch loss, it does not push single tokens to spread.

    Args:
        router_logits: [..., E].
        score_func: score function of the router; scores other than softmax are divided by their
            sum.
        token_mask: bool, one element per token, True if the token counts.
        group: ranks whose tokens the loss covers.

    Returns:
        The loss, a scalar, in nats.

    Source: Shen et al. 2023 (ModuleFormer, arXiv 2306.04640).
    """
    logits, mask = _flatten("mutual_information_loss", router_logits, token_mask)
    marginal = _entropy(_mean(_probabilities(logits, score_func), mask, group=group))
    return _mean(_token_entropy(logits, score_func), mask, group=group) - marginal


def concentration_loss(
    router_logits: Tensor,
    *,
    score_func: str = "softmax",
    token_mask: Tensor | None = None,
    group: Any = None,
) -> Tensor:
    """Computes the entropy of the mean routing: L = H(e) = -sum_e P[e] log P[e].

    It is between 0 (one expert gets everything) and log E. In fine-tuning on one domain, minimizing
    it concentrates the domain on few experts, so that the others can be pruned.

    Args:
        router_logits: [..., E].
        score_func: score function of the router; scores other than softmax are divided by their
            sum.
        token_mask: bool, one element per token, True if the token counts.
        group: ranks whose tokens the loss covers.

    Returns:
        The loss, a scalar, in nats.

    Source: Shen et al. 2023 (ModuleFormer, arXiv 2306.04640), load concentration.
    """
    logits, mask = _flatten("concentration_loss", router_logits, token_mask)
    return _entropy(_mean(_probabilities(logits, score_func), mask, group=group))


def sequence_balance_loss(
    router_logits: Tensor,
    topk_ids: Tensor,
    *,
    num_sequences: int | None = None,
    score_func: str = "sigmoid",
    token_mask: Tensor | None = None,
    group: Any = None,
) -> Tensor:
    """Computes the balance loss within sequences: the mean over sequences of E * sum_e f_s[e] *
    P_s[e].

    f_s and P_s are f and P of one sequence; the loss is 1 if every sequence is balanced. Sequences
    without a counted token are excluded from the mean.

    Args:
        router_logits: [B, S, E], or [B*S, E] together with `num_sequences`.
        topk_ids: [B, S, K] or [B*S, K], the selected experts; ids outside [0, E) do not count.
        num_sequences: B; optional if `router_logits` has three dimensions.
        score_func: "softmax" (DeepSeek-V2), or another function of the router, whose scores are
            divided by their sum ("sigmoid": DeepSeek-V3).
        token_mask: bool, one element per token, True if the token counts.
        group: ranks that share sequences, as in context parallelism: each has a part of all B of
            them, and parts may differ in length. Not ranks with other sequences.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: no number of sequences, or one that does not divide the tokens.

    Source: DeepSeek-AI 2024 (DeepSeek-V3, arXiv 2412.19437), eq. 17-20, with f counted over the
    given selection, which includes expert_bias.
    """
    name = "sequence_balance_loss"
    if num_sequences is None:
        if router_logits.dim() != 3:
            raise ValueError(
                f"{name}: router_logits must be [B, S, E] unless num_sequences is given, got shape "
                f"{list(router_logits.shape)}."
            )
        num_sequences = router_logits.shape[0]
    logits, mask = _flatten(name, router_logits, token_mask)
    num_tokens, num_experts = logits.shape
    if num_sequences < 1 or num_tokens % num_sequences:
        raise ValueError(
            f"{name}: num_sequences must divide the {num_tokens} tokens, got {num_sequences}."
        )
    if mask is None:
        mask = torch.ones(num_tokens, dtype=torch.bool, device=logits.device)
    ids = _check_ids(name, topk_ids, num_tokens)
    valid = (ids >= 0) & (ids < num_experts) & mask[:, None]

    # One bin per pair of sequence and expert, and a spare one for slots that do not count.
    sequence = torch.arange(num_tokens, device=ids.device) // (num_tokens // num_sequences)
    bins = torch.where(valid, sequence[:, None] * num_experts + ids, num_sequences * num_experts)
    counts = torch.zeros(num_sequences * num_experts + 1, dtype=torch.int64, device=ids.device)
    counts = counts.scatter_add(0, bins.reshape(-1), torch.ones_like(bins).reshape(-1))
    counts = counts[:-1].view(num_sequences, num_experts)

    p = _probabilities(logits, score_func) * mask[:, None]
    # -1 would be ambiguous for sequences without tokens on this rank.
    by_sequence = num_sequences, num_tokens // num_sequences
    probs = p.view(*by_sequence, num_experts).sum(1)
    length = mask.view(by_sequence).sum(1, keepdim=True)
    if group is None:
        mean_probs = probs / length.clamp(min=1)
    else:
        mean_probs, both = mean_over_ranks(probs, length, group, torch.cat([counts, length], 1))
        assert both is not None
        counts, length = both[:, :-1], both[:, -1:]
    f = _share(counts, logits.dtype)
    per_sequence = num_experts * (f * mean_probs).sum(1)
    return _mean(per_sequence, length[:, 0] > 0)


def device_balance_loss(
    router_logits: Tensor,
    topk_ids: Tensor,
    num_groups: int,
    *,
    score_func: str = "softmax",
    token_mask: Tensor | None = None,
    group: Any = None,
) -> Tensor:
    """Computes the balance loss between groups of experts (one group per device): L = sum_d f'[d] *
    P'[d].

    The E experts form `num_groups` groups of E / num_groups consecutive experts. f'[d] is the mean
    over the group of E * f[e], and P'[d] the sum over it of P[e]. The loss is 1 at balance and
    num_groups if one group gets everything. Experts within a group may be unbalanced.

    Args:
        router_logits: [..., E].
        topk_ids: [..., K], the selected experts; ids outside [0, E) do not count.
        num_groups: number of groups; must divide E.
        score_func: score function of the router; scores other than softmax are divided by their
            sum.
        token_mask: bool, one element per token, True if the token counts.
        group: ranks whose tokens the loss covers.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: `num_groups` does not divide E.

    Source: Dai et al. 2024 (DeepSeekMoE, arXiv 2401.06066), eq. 15-17.
    """
    name = "device_balance_loss"
    logits, mask = _flatten(name, router_logits, token_mask)
    num_experts = logits.shape[1]
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(
            f"{name}: num_groups must divide the {num_experts} experts, got {num_groups}."
        )
    counts = _counts(name, topk_ids, logits, mask)
    probs = _probabilities(logits, score_func)
    mean_probs, counts = _mean_and_counts(probs, mask, counts, group=group)
    f = _share(counts, logits.dtype)
    group_f = num_experts * f.view(num_groups, -1).mean(1)
    return (group_f * mean_probs.view(num_groups, -1).sum(1)).sum()


AuxLoss = Callable[..., Tensor]


def _of_logits(loss: Callable[..., Tensor]) -> AuxLoss:
    return lambda router, r, mask, group=None: loss(
        r.router_logits, score_func=router.score_func, token_mask=mask, group=group
    )


# Names for the argument `aux_losses` of layers; each loss takes the router, its routing, a token
# mask and a process group.
AUX_LOSSES: dict[str, AuxLoss] = {
    "load_balancing": lambda router, r, mask, group=None: load_balancing_loss(
        r.router_logits, r.topk_ids, score_func=router.score_func, token_mask=mask, group=group
    ),
    "router_z": lambda router, r, mask, group=None: router_z_loss(
        r.router_logits, token_mask=mask, group=group
    ),
    "entropy": _of_logits(router_entropy_loss),
    "mutual_information": _of_logits(mutual_information_loss),
    "concentration": _of_logits(concentration_loss),
}


def check_aux_losses(layer: str, names: Sequence[str]) -> None:
    """Raises ValueError unless `AUX_LOSSES` contains all the names."""
    unknown = [name for name in names if name not in AUX_LOSSES]
    if unknown:
        raise ValueError(
            f"{layer}: aux_losses must be among {', '.join(AUX_LOSSES)}, got {', '.join(unknown)}."
        )


def aux_losses_of(
    names: Sequence[str],
    router: Router,
    routing: Routing,
    token_mask: Tensor | None,
    group: Any = None,
) -> dict[str, Tensor]:
    """Computes the losses of these names; returns none if the routing has no logits."""
    if routing.router_logits is None:
        return {}
    return {name: AUX_LOSSES[name](router, routing, token_mask, group) for name in names}


def _flatten(
    name: str, router_logits: Tensor, token_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Returns logits as [T, E] in fp32 or fp64, with masked tokens zeroed, and the mask as [T]
    bool."""
    if router_logits.dim() < 1 or not router_logits.is_floating_point():
        raise ValueError(
            f"{name}: router_logits must be a float tensor [..., E], got "
            f"{str(router_logits.dtype).removeprefix('torch.')} of shape "
            f"{list(router_logits.shape)}."
        )
    acc = torch.float64 if router_logits.dtype == torch.float64 else torch.float32
    logits = router_logits.reshape(-1, router_logits.shape[-1]).to(acc)
    if token_mask is None:
        return logits, None
    if token_mask.numel() != logits.shape[0]:
        raise ValueError(
            f"{name}: token_mask must have {logits.shape[0]} elements, one a token, got shape "
            f"{list(token_mask.shape)}."
        )
    mask = token_mask.reshape(-1).to(torch.bool)
    return logits.masked_fill(~mask[:, None], 0.0), mask


def _probabilities(logits: Tensor, score_func: str) -> Tensor:
    if score_func not in SCORE_FUNCS:
        names = ", ".join(SCORE_FUNCS)
        raise ValueError(f"losses: score_func must be one of {names}, got {score_func!r}.")
    scores = router_scores(logits, score_func)
    return scores if score_func == "softmax" else scores / (scores.sum(-1, keepdim=True) + 1e-20)


def _token_entropy(logits: Tensor, score_func: str) -> Tensor:
    if score_func == "softmax":
        # log_softmax keeps the gradient finite if a probability underflows.
        log_p = logits.log_softmax(-1)
        return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)
    return _entropy(_probabilities(logits, score_func))


def _entropy(p: Tensor) -> Tensor:
    # p log p is 0 at 0; clamping p to the smallest normal number keeps the gradient finite.
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1)


def _mean(values: Tensor, mask: Tensor | None, dim: int = 0, *, group: Any = None) -> Tensor:
    """Computes the mean of the counted rows over dimension `dim`, over all ranks of `group` if
    given; 0 without rows."""
    return _mean_and_counts(values, mask, None, dim, group=group)[0]


def _mean_and_counts(
    values: Tensor, mask: Tensor | None, counts: Any, dim: int = 0, *, group: Any = None
) -> tuple[Tensor, Any]:
    """Computes `_mean`, and sums counts over the ranks."""
    num: Any = values.shape[dim]
    if mask is not None:
        values = values.masked_fill(~mask.view(-1, *[1] * (values.dim() - 1 - dim)), 0.0)
        num = mask.sum()
    total = values.sum(dim)
    if group is not None:
        return mean_over_ranks(total, num, group, counts)
    return total / (max(num, 1) if mask is None else num.clamp(min=1)), counts


def _check_ids(name: str, topk_ids: Tensor | None, num_tokens: int) -> Tensor:
    assert topk_ids is not None
    if topk_ids.dim() < 1 or topk_ids.shape[:-1].numel() != num_tokens:
        raise ValueError(
            f"{name}: topk_ids must be [..., K] with {num_tokens} tokens as in router_logits, got "
            f"shape {list(topk_ids.shape)}."
        )
    return topk_ids.reshape(num_tokens, topk_ids.shape[-1]).long()


def _counts(name: str, topk_ids: Tensor | None, logits: Tensor, mask: Tensor | None) -> Tensor:
    ids = _check_ids(name, topk_ids, logits.shape[0])
    return count_tokens_per_expert(ids, logits.shape[1], token_mask=mask)


def _given_counts(name: str, tokens_per_expert: Tensor, logits: Tensor) -> Tensor:
    if tokens_per_expert.shape != logits.shape[1:]:
        raise ValueError(
            f"{name}: tokens_per_expert must be [{logits.shape[1]}], got shape "
            f"{list(tokens_per_expert.shape)}."
        )
    return tokens_per_expert.detach()


def _share(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts counts [..., E] to fractions of their sum; zeros if the sum is 0."""
    return counts.to(dtype) / counts.sum(-1, keepdim=True).clamp(min=1).to(dtype)
