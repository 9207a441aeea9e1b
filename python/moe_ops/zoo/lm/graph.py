"""Decoding with one CUDA graph a token.

A step of decoding is hundreds of small kernels; a graph that was captured once launches all of them
together. Its addresses never change, so keys and values lie in memory of a fixed size, and where a
step writes and what it sees is on the device.

Letters: B sequences, C tokens that there is room for, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_ops.layers import AttentionExperts, KVCache


class _FixedCache(KVCache):
    """Room [B, n, C, d] for keys and values. A token goes where `position` [1] says; `mask`
    [1, 1, 1, C] says which of all that `update` returns it sees."""

    def __init__(self, capacity: int, position: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.length = capacity
        self.position, self.mask = position, mask

    def fill(self, cache: KVCache) -> None:
        """Takes over the tokens of another cache."""
        shown = cache.shown()
        if self._buffers is None:
            k, v = (t.new_zeros(*t.shape[:2], self.length, t.shape[3]) for t in shown)
            self._buffers = k, v
        for buffer, t in zip(self._buffers, shown, strict=True):
            buffer[:, :, : t.shape[2]] = t

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        assert self._buffers is not None
        for buffer, t in zip(self._buffers, (k, v), strict=True):
            buffer.index_copy_(2, self.position, t.transpose(1, 2))
        keys, values = self._buffers
        return keys.transpose(1, 2), values.transpose(1, 2)

    def positions(self, length: int, device: torch.device) -> Tensor:
        return self.position.float()


class DecodingGraph:
    """Greedy or sampled decoding of one model, a token a replay.

        graph = DecodingGraph(model, batch_size=1, max_tokens=512)
        model.generate(prompt, 100, graph=graph)

    The first prompt captures the step, which takes as long as some steps do; later prompts of the
    same batch size use it again. Prompts themselves are read without a graph. The graph reads the
    parameters where they were: values may change, tensors may not be replaced (`optimize` and
    `.to()` come first). On the CPU nothing is captured, and the same step runs.

    Args:
        model: a CausalLM. Its attention takes a mask, as `moe_ops.layers.AttentionExperts` does
            not.
        batch_size: B.
        max_tokens: C, of a prompt and what follows it.

    Raises:
        ValueError: attention of another kind, sizes below 1.
    """

    def __init__(self, model: Any, batch_size: int, max_tokens: int) -> None:
        for name, size in (("batch_size", batch_size), ("max_tokens", max_tokens)):
            if size < 1:
                raise ValueError(f"DecodingGraph: {name} must be at least 1, got {size}.")
        if any(isinstance(m, AttentionExperts) for m in model.modules()):
            raise ValueError(
                "DecodingGraph: model must have attention that takes a mask, got AttentionExperts."
            )
        self.model, self.batch_size, self.max_tokens = model, batch_size, max_tokens
        device = model.embed_tokens.weight.device
        self._slots = torch.arange(max_tokens, device=device)
        self._position = torch.zeros(1, dtype=torch.long, device=device)
        self._mask = torch.zeros(1, 1, 1, max_tokens, dtype=torch.bool, device=device)
        self._tokens = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self._caches = [
            _FixedCache(max_tokens, self._position, self._mask) for _ in model.new_cache()
        ]
        self._length = 0  # Tokens held, as the host knows.
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    @torch.no_grad()
    def start(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] of the token after prompts [B, S]; what was held before is forgotten.

        Raises:
            ValueError: another batch size, a prompt that leaves no room.
        """
        if tokens.dim() != 2 or len(tokens) != self.batch_size:
            raise ValueError(
                f"DecodingGraph: tokens must be [{self.batch_size}, S], got shape "
                f"{list(tokens.shape)}."
            )
        self._check_room(tokens.shape[1])
        cache = self.model.new_cache()
        logits: Tensor = self.model(tokens, cache=cache, last=1)
        if self._graph is None and tokens.is_cuda:
            self._fill(cache)
            self._capture()
        self._fill(cache)
        self._length = tokens.shape[1]
        self._position.fill_(self._length)
        return logits[:, -1]

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] of the token after `tokens` [B, 1], which follow those before. The next
        call overwrites them.

        Raises:
            ValueError: no room is left, or no prompt was given.
        """
        if self._length == 0:
            raise ValueError("DecodingGraph: step must follow start, got no prompt before.")
        self._check_room(self._length + 1)
        self._tokens.copy_(tokens)
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()
        self._length += 1
        assert self._logits is not None
        return self._logits

    def _run(self) -> None:
        torch.le(self._slots, self._position, out=self._mask.view(-1))
        logits: Tensor = self.model(self._tokens, cache=self._caches, last=1)
        self._logits = logits[:, -1]
        self._position.add_(1)

    def _fill(self, cache: Sequence[KVCache]) -> None:
        for own, other in zip(self._caches, cache, strict=True):
            own.fill(other)

    def _capture(self) -> None:
        """Captures a step at position 0, in the place of whose keys and values anything may lie
        afterwards."""
        self._position.zero_()
        device = self._position.device
        with torch.cuda.device(device):
            aside, current = torch.cuda.Stream(), torch.cuda.current_stream()
            aside.wait_stream(current)
            with torch.cuda.stream(aside):  # What a first call makes is no part of the graph.
                self._run()
                self._position.zero_()
            current.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._run()
        self._graph = graph

    def _check_room(self, length: int) -> None:
        if length > self.max_tokens:
            raise ValueError(
                f"DecodingGraph: max_tokens must be at least {length}, the tokens of a sequence, "
                f"got {self.max_tokens}."
            )
