"""Sentence experts: an encoder of sentences with feed-forward experts per domain.

Example:
    model = zoo.create_model("sentence")                       # fresh, or:
    model = SentenceExperts(config, bert)                # a BERT or ModernBERT of transformers
    embeddings = model(input_ids, attention_mask, domains)

Hallee et al. 2024, Contrastive Learning and Mixture of Experts Enables Precise Vector Embeddings,
arXiv 2401.15713.

Letters: B sentences, S tokens of each, H hidden size, E domains and experts, D size of an
embedding.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from moe_ops._fields import check_choice
from moe_ops.hf.models.gates import activation_name, fused_gate
from moe_ops.layers import Experts

from ._presets import preset

__all__ = ["DomainExperts", "SentenceConfig", "SentenceExperts", "ranking_loss"]

HEADS = ("mlp", "mean")
SIMILARITIES = ("cosine", "dot")


@dataclass(frozen=True)
class SentenceConfig:
    """Sizes and options.

    Attributes:
        domains: names of the E domains, each of which has an expert.
        moe_layers: numbers of the layers that have experts; None: all. (): a dense encoder.
        head: "mlp", as published: mean over tokens, LayerNorm, Linear, Tanh, Linear; "mean": the
            mean alone, which keeps what an encoder has learned.
        embedding_size: D of "mlp"; 0: H.
        vocab_size, cls_id, pad_id: of the tokens. hidden_size, num_layers, num_heads,
            intermediate_size, max_length: of the encoder, transformers' BertModel.
    """

    domains: tuple[str, ...]
    moe_layers: tuple[int, ...] | None = None
    head: str = "mlp"
    embedding_size: int = 0
    vocab_size: int = 259
    cls_id: int = 1
    pad_id: int = 0
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 2
    intermediate_size: int = 128
    max_length: int = 128

    def __post_init__(self) -> None:
        check_choice("SentenceConfig", "head", self.head, HEADS)
        if not self.domains or len(set(self.domains)) != len(self.domains):
            raise ValueError(
                f"SentenceConfig: domains must be one or more different names, got {self.domains}."
            )

    tiny = preset("Bytes, two layers.", domains=("reference", "code", "maths", "names"))
    minilm = preset(
        "The sizes of all-MiniLM-L6-v2, with the experts of the authors' five domains.",
        domains=("autoimmune", "cancer", "copd", "cardiovascular", "parasitic"),
        head="mean",
        vocab_size=30_522,
        cls_id=101,
        hidden_size=384,
        num_layers=6,
        num_heads=12,
        intermediate_size=1536,
        max_length=512,
    )


class Given:
    """Domains of the sentences of the current call, shared by all layers of a model."""

    domains: Tensor | None = None


class DomainExperts(nn.Module):
    """Feed-forward network per domain; all tokens of a sentence use their domain's network.

    x [B, S, H] to [B, S, H]; `given` holds the domains [B].
    """

    def __init__(self, experts: Experts, given: Given) -> None:
        super().__init__()
        self.experts = experts
        self.given = given

    def forward(self, x: Tensor) -> Tensor:
        domains = self.given.domains
        if domains is None or domains.shape[0] != x.shape[0]:
            got = "none" if domains is None else f"{domains.shape[0]}"
            raise ValueError(
                f"DomainExperts: domains must be of the {x.shape[0]} sentences, got {got}; call "
                "the SentenceExperts that this encoder belongs to."
            )
        ids = domains.to(torch.int32).repeat_interleave(x.shape[1])[:, None]
        ones = torch.ones(ids.shape, device=x.device)
        y: Tensor = self.experts(x.flatten(0, 1), ones, ids)
        return y.view(x.shape)


class BertDomainOutput(nn.Module):
    """Replacement for a BERT layer's `output`: experts, dropout, residual and LayerNorm."""

    def __init__(self, mlp: DomainExperts, output: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp
        self.dropout: Any = output.dropout
        self.LayerNorm: Any = output.LayerNorm

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(self.dropout(self.mlp(hidden_states)) + input_tensor)
        return out


class SentenceExperts(nn.Module):
    """Encoder that computes embeddings [B, D] of sentences with known domains, without a router.

    The first token of a sentence, CLS, is replaced by a token of its domain, whose embedding starts
    as a copy of CLS's. Experts start as copies of the encoder's networks.

    It does not support several threads or activation recomputation: the domains of a call are
    stored for all layers while it runs.

    Args:
        config: builds a newly initialized BertModel, if no encoder is given.
        encoder: a BertModel or ModernBertModel of transformers that is changed in place; config's
            sizes are not used. Its dropout is unchanged.
    """

    def __init__(self, config: SentenceConfig, encoder: Any = None) -> None:
        super().__init__()
        self.config = config
        if encoder is None:
            encoder = BertModel(
                BertConfig(
                    vocab_size=config.vocab_size,
                    hidden_size=config.hidden_size,
                    num_hidden_layers=config.num_layers,
                    num_attention_heads=config.num_heads,
                    intermediate_size=config.intermediate_size,
                    max_position_embeddings=config.max_length,
                    hidden_dropout_prob=0.0,
                    attention_probs_dropout_prob=0.0,
                    pad_token_id=config.pad_id,
                ),
                add_pooling_layer=False,
            )
        self.encoder = encoder
        self.given = Given()
        hidden = encoder.config.hidden_size
        size = (config.embedding_size or hidden) if config.head == "mlp" else hidden
        self.embedding_size = size
        self.head: nn.Module = nn.Identity()
        if config.head == "mlp":
            self.head = nn.Sequential(
                nn.LayerNorm(hidden),
                nn.Linear(hidden, hidden),
                nn.Tanh(),
                nn.Linear(hidden, size),
            )
        self.first_domain_id = encoder.config.vocab_size
        self._add_domain_tokens()
        self._make_experts()

    def _make_experts(self) -> None:
        """Creates experts in the layers that the config lists."""
        config, layers = self.config, layers_of(self.encoder)
        chosen = range(len(layers)) if config.moe_layers is None else config.moe_layers
        for number in chosen:
            if not 0 <= number < len(layers):
                raise ValueError(
                    f"SentenceExperts: moe_layers must be in [0, {len(layers)}), got {number}."
                )
            make_domain_experts(layers[number], len(config.domains), self.given)

    def _add_domain_tokens(self) -> None:
        count, cls = len(self.config.domains), self.config.cls_id
        self.encoder.resize_token_embeddings(self.first_domain_id + count, mean_resizing=False)
        weight = self.encoder.get_input_embeddings().weight
        with torch.no_grad():
            weight[self.first_domain_id :] = weight[cls]

    def domain_ids(self, names: Sequence[str]) -> Tensor:
        """Returns the ids [B] int64 of domain names.

        Raises:
            ValueError: an unknown name.
        """
        for name in names:
            check_choice("SentenceExperts", "domain", name, self.config.domains)
        return torch.tensor([self.config.domains.index(name) for name in names])

    def forward(self, input_ids: Tensor, attention_mask: Tensor, domains: Tensor) -> Tensor:
        """Returns embeddings [B, D].

        Args:
            input_ids: [B, S] int64, the first token of each is CLS. attention_mask: [B, S], 0 where
                there is padding.
            domains: [B] int64 in [0, E).
        """
        if domains.shape != input_ids.shape[:1]:
            raise ValueError(
                f"SentenceExperts: domains must be [{input_ids.shape[0]}], got shape "
                f"{list(domains.shape)}."
            )
        if domains.is_meta or input_ids.is_meta:
            raise ValueError(
                "SentenceExperts: input_ids and domains must have values, got a tensor on meta."
            )
        if bool((domains < 0).any()) or bool((domains >= len(self.config.domains)).any()):
            raise ValueError(
                f"SentenceExperts: domains must be in [0, {len(self.config.domains)}), got "
                f"{domains.tolist()}."
            )
        first = (self.first_domain_id + domains).to(input_ids)[:, None]
        tokens = torch.cat([first, input_ids[:, 1:]], dim=1)
        self.given.domains = domains
        try:
            hidden = self.encoder(tokens, attention_mask=attention_mask).last_hidden_state
        finally:
            self.given.domains = None
        mask = attention_mask[..., None].to(hidden)
        pooled: Tensor = self.head((hidden * mask).sum(1) / mask.sum(1))
        return pooled

    def with_experts(self, moe_layers: Sequence[int] | None = None) -> SentenceExperts:
        """Returns a copy of this dense model with experts that are copies of its networks.

        Raises:
            ValueError: this model already has experts.
        """
        if self.config.moe_layers != ():
            raise ValueError("SentenceExperts: the model must be dense, got one with experts.")
        made = copy.deepcopy(self)
        chosen = None if moe_layers is None else tuple(moe_layers)
        made.config = dataclasses.replace(self.config, moe_layers=chosen)
        made._make_experts()
        return made


def layers_of(encoder: Any) -> Any:
    """Returns the layers of a BertModel or a ModernBertModel.

    Raises:
        ValueError: another encoder.
    """
    if isinstance(encoder, BertModel):
        return encoder.encoder.layer
    if type(encoder).__name__ == "ModernBertModel":
        return encoder.layers
    raise ValueError(
        "SentenceExperts: encoder must be a BertModel or a ModernBertModel, got "
        f"{type(encoder).__name__}."
    )


def make_domain_experts(layer: Any, num_domains: int, given: Given) -> None:
    """Replaces a layer's feed-forward network with copies of it, one per domain.

    Raises:
        ValueError: an activation that `Experts` does not have.
    """
    if hasattr(layer, "intermediate"):
        first, second = layer.intermediate.dense, layer.output.dense
        function = layer.intermediate.intermediate_act_fn
        activation = activation_name(function)
    else:
        # The activation applies to the first half of Wi's output, as in `Experts`.
        first, second, function = layer.mlp.Wi, layer.mlp.Wo, layer.mlp.act
        activation = (fused_gate(function) or {}).get("activation")
    if activation is None:
        raise ValueError(
            "SentenceExperts: the encoder's activation must be one that Experts has, got "
            f"{type(function).__name__}."
        )
    experts = Experts(
        num_domains,
        first.in_features,
        second.in_features,
        activation=activation,
        bias=first.bias is not None,
    ).to(first.weight)
    with torch.no_grad():
        experts.w_gate_up.copy_(first.weight)
        experts.w_down.copy_(second.weight)
        if experts.b_gate_up is not None and experts.b_down is not None:
            experts.b_gate_up.copy_(first.bias)
            experts.b_down.copy_(second.bias)
    mlp = DomainExperts(experts, given)
    if hasattr(layer, "intermediate"):
        layer.intermediate = nn.Identity()
        layer.output = BertDomainOutput(mlp, layer.output)
    else:
        layer.mlp = mlp


def ranking_loss(
    left: Tensor, right: Tensor, *, similarity: str = "cosine", scale: float = 20.0
) -> Tensor:
    """Computes the multiple negatives ranking loss in both directions: the correct partner among
    the whole batch.

    Cross-entropy of the rows and of the columns of the similarities [B, B], averaged.

    Args:
        left, right: [B, D].
        similarity: "cosine", multiplied by `scale`; "dot", as in the authors' code, unscaled.
    """
    check_choice("ranking_loss", "similarity", similarity, SIMILARITIES)
    if similarity == "cosine":
        scores = scale * F.normalize(left, dim=-1) @ F.normalize(right, dim=-1).T
    else:
        scores = left @ right.T
    target = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
