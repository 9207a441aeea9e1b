"""Tokens of parallel text: bytes, or pairs of bytes merged by frequency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from moe_ops.zoo.thor.model import EOS, PAD, UNKNOWN

NUM_SPECIAL = UNKNOWN + 1


class ByteTokens:
    """A token a byte of UTF-8, behind the special ones."""

    vocab_size = NUM_SPECIAL + 256

    def numbers(self, text: str) -> list[int]:
        return [NUM_SPECIAL + byte for byte in text.encode()]

    def text(self, numbers: Sequence[int]) -> str:
        found = bytes(n - NUM_SPECIAL for n in numbers if n >= NUM_SPECIAL)
        return found.decode("utf-8", "replace")


class PairTokens:
    """Byte-pair encoding by the package `tokenizers`.

    Args:
        json: as the package writes it; kept under this name.

    Raises:
        ImportError: without the package.
    """

    def __init__(self, json: str) -> None:
        self.json = json
        self._made: Any = _tokenizers().Tokenizer.from_str(json)
        self.vocab_size: int = self._made.get_vocab_size()

    @classmethod
    def learn(cls, texts: Sequence[str], vocab_size: int) -> PairTokens:
        """Learns merges from texts."""
        made = _tokenizers()
        tokenizer = made.Tokenizer(made.models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = made.pre_tokenizers.ByteLevel()
        tokenizer.decoder = made.decoders.ByteLevel()
        trainer = made.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
            initial_alphabet=made.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer.to_str())

    def numbers(self, text: str) -> list[int]:
        found: list[int] = self._made.encode(text).ids
        return found

    def text(self, numbers: Sequence[int]) -> str:
        found: str = self._made.decode([n for n in numbers if n >= NUM_SPECIAL])
        return found.removeprefix(" ")


Tokens: TypeAlias = ByteTokens | PairTokens


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ImportError(
            "moe_ops.zoo.thor: pairs of bytes need tokenizers, which is not installed: "
            "pip install tokenizers"
        ) from error
    return tokenizers


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """[B, S]: each row with `EOS` behind it, filled up with `PAD`."""
    ended = [torch.tensor([*row, EOS]) for row in rows]
    return nn.utils.rnn.pad_sequence(ended, batch_first=True, padding_value=PAD)
