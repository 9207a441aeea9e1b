"""Recording of the experts that a transformers model selects, in the arrays of engines.

B sequences, S tokens each, L decoder layers, K experts per token.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_ops.hf.models.cache_argument import find_cache
from moe_ops.layers.recompute import in_backward

from .taps import Tap, Taps


class RoutingRecorder:
    """Recorded experts of each rollout; made by `moe_ops.hf.record`.

    A rollout begins with a call without a cache, or with an empty one, and continues with the calls
    that extend the cache. `len` is their number, and an index returns one as an array [B, S, L, K].
    """

    def __init__(self, model: nn.Module) -> None:
        self.taps = Taps(model, "hf.record")
        self.top_k = max(tap.top_k for tap in self.taps.taps)
        self._model = _whole(model)
        self._rollouts: list[list[np.ndarray]] = []  # Arrays of consecutive calls.
        self._call: dict[int, Tensor] = {}
        self._start = 0
        self._stack: contextlib.ExitStack | None = None

    def __len__(self) -> int:
        return len(self._rollouts)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.concatenate(self._rollouts[index], 1)

    def routed_experts(self, attention_mask: Any = None, *, index: int = -1) -> Any:
        """Returns the experts of a rollout, as `moe_ops.hf.replay` takes them.

        Args:
            attention_mask: [B, S'] of the generated sequences, S' = S or S + 1: the last sampled
                token was never an input.
            index: number of the rollout; the last one by default.

        Returns:
            With a mask, a list of arrays [tokens, L, K], one per sequence, without padding.
            Otherwise an array [B, S, L, K]. int16 (int32 for more than 32,767 experts); -1 in
            layers without experts.

        Raises:
            ValueError: nothing was recorded, or the mask has another shape.
        """
        if not self._rollouts:
            raise ValueError("hf.record: a call of the model must come first, got none.")
        found = self[index]
        if attention_mask is None:
            return found
        mask = torch.as_tensor(attention_mask).cpu().numpy() != 0
        batch, length = found.shape[:2]
        if mask.ndim != 2 or len(mask) != batch or mask.shape[1] not in (length, length + 1):
            raise ValueError(
                f"hf.record: attention_mask must be [{batch}, {length}] or [{batch}, "
                f"{length + 1}], got shape {list(mask.shape)}."
            )
        return [rows[keep] for rows, keep in zip(found, mask[:, :length], strict=True)]

    def __enter__(self) -> RoutingRecorder:
        with contextlib.ExitStack() as stack:
            stack.callback(self.taps.close)
            self.taps.open()
            for tap in self.taps.taps:
                tap.watchers.append(self._watch)
                stack.callback(tap.watchers.remove, self._watch)
            before = self._model.register_forward_pre_hook(self._begin, with_kwargs=True)
            stack.callback(before.remove)
            after = self._model.register_forward_hook(self._end, with_kwargs=True)
            stack.callback(after.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._stack is not None
        self._stack.close()

    def _watch(self, tap: Tap, index: int, taken: Tensor, own: Tensor | None) -> None:
        self._call[tap.rows[index]] = taken

    def _begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self._call.clear()
        for tap in self.taps.taps:
            tap.num_calls = 0
        cache = find_cache(kwargs)
        self._start = 0
        if cache is not None:
            # A cache may begin with linear attention, which has no length.
            layers = [x for x in getattr(cache, "layers", ()) if hasattr(x, "get_seq_length")]
            self._start = max(int(part.get_seq_length()) for part in (cache, *layers))
            # `generate` calls it between the steps of a beam search only.
            cache.reorder_cache = _refuse_beams

    def _end(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if in_backward() or not self._call:
            return
        values = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])
        tokens = next((v for v in values if isinstance(v, Tensor)), None)
        if tokens is None:
            raise ValueError(
                f"hf.record: {type(model).__name__} must be called with input_ids or "
                f"inputs_embeds, got {', '.join(kwargs)}."
            )
        batch, length = tokens.shape[:2]
        many = max(tap.num_experts for tap in self.taps.taps) >= 2**15
        shape = batch, length, self.taps.num_rows, self.top_k
        ids = np.full(shape, -1, np.int32 if many else np.int16)
        for row, taken in self._call.items():
            if len(taken) != batch * length:
                raise ValueError(
                    f"hf.record: each MoE layer must route the {batch * length} tokens of a call, "
                    f"got {len(taken)} in layer {row}."
                )
            of_layer = taken.view(batch, length, -1)
            ids[:, :, row, : of_layer.shape[2]] = of_layer.cpu().numpy()
        if not self._start:
            self._rollouts.append([ids])
            return
        parts = self._rollouts[-1] if self._rollouts else [ids[:, :0]]
        length = sum(part.shape[1] for part in parts)
        if len(parts[0]) != batch or length < self._start:
            raise ValueError(
                f"hf.record: a call with a cache of {self._start} tokens must continue a recorded "
                f"rollout of {batch} sequences, got {len(parts[0])} with {length} tokens; open the "
                "context before the cache is filled."
            )
        while length > self._start:  # The cache dropped drafts.
            surplus = length - self._start
            last = parts.pop()
            if last.shape[1] > surplus:
                parts.append(last[:, : last.shape[1] - surplus])
            length = sum(part.shape[1] for part in parts)
        parts.append(ids)


def record(model: nn.Module) -> RoutingRecorder:
    """Records the experts that a transformers model selects, in `generate` or any other call.

    Example:
        with moe_ops.hf.record(model) as record:
            tokens = model.generate(prompts, attention_mask=mask, max_new_tokens=64)
        routed_experts = record.routed_experts()       # [B, S, L, K]

    Batches, padding, caches, chunked prefill and assisted decoding are recorded; beam search is
    not. Inside `moe_ops.hf.replay`, the experts taken are recorded. Eager mode only. Each call
    waits for the device.

    Args:
        model: a transformers model with MoE layers, or a module that has one inside, optimized,
            quantized or not.

    Returns:
        A `RoutingRecorder`, to be used as a context.

    Raises:
        ValueError: the model has no MoE layer; or (in a call) beam search, or a cache that the
            context has not seen being filled.
    """
    return RoutingRecorder(model)


def _refuse_beams(*args: Any) -> None:
    raise ValueError(
        "hf.record: generate must use num_beams=1, as beams exchange their sequences, got a beam "
        "search."
    )


def _whole(model: nn.Module) -> nn.Module:
    """Returns the outermost transformers model, which `generate` calls."""
    from transformers import PreTrainedModel

    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)
