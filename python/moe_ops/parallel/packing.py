"""Rows of several tensors as one message of bytes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


class Packing:
    """Layout of a message with the rows of several tensors side by side. Each tensor begins at a
    multiple of the largest element size, so that its bytes can be read in its dtype.

    Args:
        parts: [S, W] each, of any dtypes; S must be equal, W may differ.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        align = max(part.element_size() for part in parts)
        self._dtypes = [part.dtype for part in parts]
        self._widths = [part.shape[1] * part.element_size() for part in parts]
        aligned = (-(-width // align) * align for width in self._widths)
        self._first = list(itertools.accumulate(aligned, initial=0))

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """Returns the message, uint8 [S, bytes of a row]. Bytes between tensors are undefined."""
        lines = parts[0].new_empty(parts[0].shape[0], self._first[-1], dtype=torch.uint8)
        for part, columns in zip(parts, self._columns(lines), strict=True):
            columns.view(part.dtype).copy_(part)
        return lines

    def unpack(self, lines: Tensor) -> list[Tensor]:
        """Returns contiguous copies of the tensors in a message of any number of rows."""
        return [
            columns.view(dtype).clone(memory_format=torch.contiguous_format)
            for columns, dtype in zip(self._columns(lines), self._dtypes, strict=True)
        ]

    def _columns(self, lines: Tensor) -> list[Tensor]:
        places = zip(self._first[:-1], self._widths, strict=True)
        return [lines.narrow(1, first, width) for first, width in places]
