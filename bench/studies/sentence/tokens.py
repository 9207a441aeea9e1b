"""From text to tokens: bytes, or the word pieces of a tokenizer.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_ops import _files, _reading

# From texts to input_ids [B, S] and attention_mask [B, S], of which the first token is CLS.
Tokenize = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
PAD, CLS, FIRST_BYTE = 0, 1, 3


class ByteTokens:
    """CLS and the bytes of a text, of which those over `max_length` are cut off."""

    def __init__(self, max_length: int = 128) -> None:
        self.max_length = max_length

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        rows = [
            [CLS, *(FIRST_BYTE + b for b in text.encode()[: self.max_length - 1])] for text in texts
        ]
        return _padded(rows, PAD)


class WordPieces:
    """A tokenizer.json of a BERT; texts are cut at `max_length` tokens.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no regular file, or no tokenizer.
    """

    def __init__(self, path: Path | str, max_length: int = 128, pad_id: int = 0) -> None:
        from tokenizers import Tokenizer

        content = _reading.read_bytes(path, "WordPieces", _files.MAX_JSON_BYTES)
        with _reading.damage("WordPieces", path, "a tokenizer.json"):
            self.tokenizer: Any = Tokenizer.from_str(content.decode("utf-8"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_length)
        self.pad_id = pad_id

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return _padded(
            [found.ids for found in self.tokenizer.encode_batch(list(texts))], self.pad_id
        )


def _padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    longest = max((len(row) for row in rows), default=1)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask
