"""Sentence experts as a model of sentence-transformers, for its losses, trainer and evaluators.

The domain of a text is in front of it, in brackets: "[code] import os". Their prompts do the same:
``model.encode(texts, prompt="[code] ")``, or `prompts` in the trainer's arguments.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_ops.zoo.sentence import SentenceExperts

from ..trainer import write_state
from .tokens import Tokenize

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import InputModule
except ModuleNotFoundError as error:
    raise ImportError(
        f"bench.studies: the adapter of sentence experts needs {error.name}, which is not "
        "installed or is older than sentence-transformers 6.2: "
        'pip install "sentence-transformers[train]>=6.2"'
    ) from error

_DOMAIN = re.compile(r"\[([^\]]*)\] ?")


class SentenceModule(InputModule):  # type: ignore[misc]
    """Tokens and embeddings of texts with their domains in front.

    Args:
        model: `SentenceExperts`. tokenize: its tokens.
    """

    def __init__(self, model: SentenceExperts, tokenize: Tokenize) -> None:
        super().__init__()
        self.model = model
        self.tokenize_texts = tokenize

    def preprocess(
        self, inputs: Sequence[str], prompt: str | None = None, **_: Any
    ) -> dict[str, Tensor]:
        names, texts = [], []
        for text in inputs:
            found = _DOMAIN.match((prompt or "") + text)
            if found is None:
                raise ValueError(
                    "SentenceModule: texts must begin with their domain in brackets, got "
                    f"{text[:40]!r}."
                )
            names.append(found[1])
            texts.append(((prompt or "") + text)[found.end() :])
        ids, mask = self.tokenize_texts(texts)
        return {"input_ids": ids, "attention_mask": mask, "domains": self.model.domain_ids(names)}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        features["sentence_embedding"] = self.model(
            features["input_ids"], features["attention_mask"], features["domains"]
        )
        return features

    def get_embedding_dimension(self) -> int:
        return self.model.embedding_size

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Writes the model's state dict; sentence-transformers does not read it."""
        write_state(Path(output_path) / "model.pt", self.model.state_dict())


def to_sentence_transformer(
    model: SentenceExperts, tokenize: Tokenize, device: str = "cpu"
) -> SentenceTransformer:
    """A SentenceTransformer that holds the model itself: training one trains the other."""
    return SentenceTransformer(modules=[SentenceModule(model, tokenize)], device=device)
