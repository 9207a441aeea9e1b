"""Sentence experts: an encoder whose experts are those of given domains.

    model = zoo.create_model("sentence")                       # fresh, or:
    model = SentenceExperts(config, bert)                # a BERT or ModernBERT of transformers
    embeddings = model(input_ids, attention_mask, domains)

Source: Hallee et al. 2024 (Contrastive Learning and Mixture of Experts Enables Precise Vector
Embeddings, arXiv 2401.15713).
"""

from .model import DomainExperts, SentenceConfig, SentenceExperts
from .tokens import ByteTokens, WordPieces

__all__ = [
    "ByteTokens",
    "DomainExperts",
    "SentenceConfig",
    "SentenceExperts",
    "WordPieces",
]
