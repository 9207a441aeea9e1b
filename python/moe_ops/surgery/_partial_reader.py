"""Reader of a checkpoint without some of its experts. Needs safetensors.

Letters: E experts.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moe_ops.zoo.lm.checkpoint import Reader

# The layer number in keys and module names.
_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")
# Keys of one expert, of tensors with all experts, and of routers.
_ONE = re.compile(r"^(.*\.experts)\.(\d+)\.(.*)$")
_ALL = re.compile(r"\.experts\.|\.(?:in|out)put_linear\.weight$")
_ROUTER = re.compile(
    r"\.(?:gate|router)(?:\.layer|\.\d+)?\.(?:weight|bias|e_score_correction_bias)$"
)


def number_of(layer: str) -> int:
    """Returns the number of a layer from its name.

    Raises:
        ValueError: it has no number.
    """
    found = _LAYER.search(f"{layer}.")
    if found is None:
        raise ValueError(f"load_pruned: a routed layer must be one of a list, got {layer!r}.")
    return int(found[1])


class PartialReader(Reader):
    """Tensors of a checkpoint with some of its experts, renumbered, and a count of the bytes read.

    Args:
        folder: folder of the checkpoint.
        layers: number of a layer -> the experts to keep, and E.

    Attributes:
        bytes_read: of tensors so far. bytes_total: of all files.
    """

    def __init__(self, folder: Path, layers: Mapping[int, tuple[list[int], int]]) -> None:
        super().__init__(folder)
        self.layers = layers
        self.bytes_read = 0
        self.bytes_total = sum((self.folder / name).stat().st_size for name in self._open)
        # New key -> key in the files, and the rows to read, None for all.
        self._source: dict[str, tuple[str, list[int] | None]] = {}
        whole, scaled = self.stored, self._scaled
        self.stored = {}
        for key, entry in whole.items():
            new, rows = self._place(key, entry.shape)
            if new is not None:
                self._source[new] = key, rows
                shape = entry.shape if rows is None else (len(rows), *entry.shape[1:])
                self.stored[new] = dataclasses.replace(entry, shape=shape)
        self._scaled = {new for new, (old, _) in self._source.items() if old in scaled}

    def _place(self, key: str, shape: tuple[int, ...]) -> tuple[str | None, list[int] | None]:
        """Returns the new key, None for excluded tensors, and the rows to read."""
        layer = _LAYER.search(key)
        if layer is None or int(layer[1]) not in self.layers:
            return key, None
        ids, num_experts = self.layers[int(layer[1])]
        one = _ONE.match(key)
        if one is not None:
            expert = int(one[2])
            if expert not in ids:
                return None, None
            return f"{one[1]}.{ids.index(expert)}.{one[3]}", None
        by_expert = _ALL.search(key) or _ROUTER.search(key)
        if key.endswith(".x_scale"):  # Of quantized experts, by input feature.
            by_expert = None
        if by_expert and shape and shape[0] == num_experts:
            return key, ids
        return key, None

    def _raw(self, key: str) -> Tensor:
        old, rows = self._source[key]
        name = self.stored[key].file
        with self._reading(self.folder / name):
            if rows is None:
                tensor: Tensor = self._open[name].get_tensor(old)
            else:
                part = self._open[name].get_slice(old)
                tensor = torch.cat([part[a:b] for a, b in _runs(rows)])
        self.bytes_read += tensor.nbytes
        return tensor


def _runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Returns consecutive ids as ranges [a, b)."""
    runs: list[tuple[int, int]] = []
    for e in ids:
        if runs and runs[-1][1] == e:
            runs[-1] = runs[-1][0], e + 1
        else:
            runs.append((e, e + 1))
    return runs
