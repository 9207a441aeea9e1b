"""Room for keys and values of new tokens in transformers' caches.

A growing cache exposes views of preallocated buffers, and a decode step writes after these views.
transformers itself never writes into tensors that a cache has exposed, and neither does a step: it
writes only where no view can exist.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

# Minimum capacity of a growing cache, and the ratio of capacity to need.
_LEAST_ROOM, _MORE_ROOM = 64, 1.5
_KEPT = "_moe_ops_kept"


class _Buffers:
    """Keys and values of one layer, filled from the front.

    Copies of a cache share them. The first cache that writes after the filled part keeps using
    them; for all others they are full.
    """

    def __init__(self, keys: Tensor, values: Tensor, filled: int) -> None:
        self.keys, self.values, self._filled = keys, values, filled
        self._lock = threading.Lock()

    def claim(self, start: int, end: int) -> bool:
        """Returns True for the only caller that may write from `start` to `end`."""
        with self._lock:
            if start != self._filled or end > self.keys.shape[2]:
                return False
            self._filled = end
            return True

    def __deepcopy__(self, memo: Any) -> None:
        return None  # The copy has its own tensors and does not use these.

    def __reduce__(self) -> Any:
        return _nothing, ()


def _nothing() -> None:
    return None


class _Kept(NamedTuple):
    """State of a cache layer after a step: the exposed views, and their buffers."""

    shown_keys: Tensor
    shown_values: Tensor
    buffers: _Buffers
    first: int  # Start of the views


class Room(NamedTuple):
    """Keys and values of a layer with room for more tokens.

    layer: the layer of the cache.
    keys, values: [B, n, R, ...] buffers, of which the first `start` tokens are filled.
    start: number of tokens.
    """

    layer: Any
    keys: Tensor
    values: Tensor
    start: int
    buffers: _Buffers | None
    first: int

    def note(self, length: int) -> None:
        """Updates the cache after `length` more tokens were written."""
        layer, end = self.layer, self.start + length
        if self.buffers is None:
            layer.cumulative_length.add_(length)
            return
        skipped = 0
        if type(layer) is DynamicSlidingWindowLayer:
            layer.cumulative_length += length
            skipped = max(0, end - layer.sliding_window + 1)
        layer.keys = self.keys.narrow(2, skipped, end - skipped)
        layer.values = self.values.narrow(2, skipped, end - skipped)
        setattr(layer, _KEPT, _Kept(layer.keys, layer.values, self.buffers, self.first + skipped))


def room(cache: Any, index: int, x: Tensor, heads: int, sizes: tuple[int, int]) -> Room | str:
    """Returns room for keys and values of x in a layer of a cache, or the reason for which there is
    none.

    Args:
        cache: a cache of transformers.
        index: index of the layer.
        x: [B, S, H] tokens.
        heads: number of key-value heads.
        sizes: features of a key and of a value.
    """
    layers = getattr(cache, "layers", None)
    if layers is None or getattr(cache, "offloading", True) or index >= len(layers):
        return "the cache is not made of layers in memory"
    layer: Any = layers[index]
    batch, length, _ = x.shape
    if type(layer) is StaticLayer:
        return _static_room(layer, x)
    if type(layer) is DynamicSlidingWindowLayer:
        if layer.record_past:
            return "the cache records what slides out of its window"
    elif type(layer) is not DynamicLayer:
        return f"{type(layer).__name__} is another kind of cache"
    if not layer.is_initialized:
        layer.lazy_initialization(x, x)
    empty = layer.keys.dim() != 4
    start = 0 if empty else layer.keys.shape[2]
    kept: _Kept | None = layer.__dict__.get(_KEPT)
    if kept is not None and kept[0] is layer.keys and kept[1] is layer.values:
        buffers = kept.buffers
        if buffers is not None and _fits(buffers.keys, x, batch):
            first = kept.first
            if buffers.claim(first + start, first + start + length):
                keys, values = buffers.keys, buffers.values
                if first:
                    rest = keys.shape[2] - first
                    keys, values = keys.narrow(2, first, rest), values.narrow(2, first, rest)
                return Room(layer, keys, values, start, buffers, first)
    if not empty and not (_fits(layer.keys, x, batch) and layer.keys.shape[1] == heads):
        return "keys in the cache have another type, place or size"
    most = max(_LEAST_ROOM, int((start + length) * _MORE_ROOM))
    keys, values = (x.new_empty(batch, heads, most, size) for size in sizes)
    if start:
        keys[:, :, :start] = layer.keys
        values[:, :, :start] = layer.values
    return Room(layer, keys, values, start, _Buffers(keys, values, start + length), 0)


def _static_room(layer: Any, x: Tensor) -> Room | str:
    if not layer.is_initialized:
        return "the static cache is not initialized yet"
    start = int(layer.cumulative_length)
    if start + x.shape[1] > layer.max_cache_len:
        return "the static cache is full"
    if not _fits(layer.keys, x, x.shape[0]):
        return "keys in the cache have another type, place or size"
    return Room(layer, layer.keys, layer.values, start, None, 0)


def _fits(keys: Tensor, x: Tensor, batch: int) -> bool:
    return keys.dtype == x.dtype and keys.device == x.device and keys.shape[0] == batch
