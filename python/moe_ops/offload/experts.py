"""Experts whose weights are offloaded, with some of them in cache slots on the device.

Letters: T tokens, H hidden size, I intermediate size, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops.layers.without_backward import WithoutBackward
from moe_ops.ops import moe_ffn, moe_ffn_quantized

from .cache import ExpertCache

_HALF = (torch.bfloat16, torch.float16)


class OffloadedExperts(nn.Module):
    """Replaces an `Experts` or `QuantizedExperts`, with the same interface, for inference.

    A call loads the experts that its tokens use into cache slots and runs them with slots as ids.
    If they are more than the slots, it runs in rounds and adds the results in fp32. The module has
    no parameters: a state dict of the model cannot be made, and `.to()` moves only the rest of the
    model. Eager mode only: the host must know the ids.

    Args:
        cache: the cache.
        bank_number: index of these experts in its store.
        activation: the arguments of moe_ffn that define the activation.
        x_scale: [H] fp32, for quantized experts that have one.
        format: format of quantized experts.
    """

    # Expert parallelism is not supported.
    dispatcher: None = None
    format_name = "offloaded"  # The format name in place of a quantized one
    no_gradient = (
        "OffloadedExperts: there is no gradient through offloaded experts; train the model "
        "before offload_experts, or call it under torch.no_grad()."
    )

    def __init__(
        self,
        cache: ExpertCache,
        bank_number: int,
        activation: Mapping[str, Any],
        x_scale: Tensor | None = None,
        format: str = "",
    ) -> None:
        super().__init__()
        self.cache = cache
        self.bank_number = bank_number
        self.activation = dict(activation)
        self.format = format
        self.num_experts = cache.store.num_experts
        self.hidden_size = cache.store.tensors["w_down"].shape[0]
        self.x_scale = None if x_scale is None else x_scale.detach().to(cache.device)

    def forward(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        apply_router_weight_on_input: bool = False,
        overlap: Callable[[], object] | None = None,
    ) -> Tensor:
        """Computes y[t] = sum_k topk_weights[t, k] * expert topk_ids[t, k] of x[t], like `Experts`.

        Args:
            x: [T, H] float; computed in the type of float experts.
            topk_weights: [T, K] float, used in fp32.
            topk_ids: [T, K] int32 or int64; ids outside [0, E) contribute nothing.
            apply_router_weight_on_input: multiply x[t] by the weight instead (Llama 4).
            overlap: see `Experts.forward`.

        Returns:
            y: [T, H] in the dtype of x. Backward raises NotImplementedError.
        """
        if overlap is not None:
            overlap()
        if torch.is_grad_enabled() and (x.requires_grad or topk_weights.requires_grad):
            return WithoutBackward.apply(
                x, topk_weights, topk_ids, self, apply_router_weight_on_input
            )
        return self._run(x, topk_weights, topk_ids, apply_router_weight_on_input)

    @torch.no_grad()
    def _run(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, on_input: bool) -> Tensor:
        valid = (topk_ids >= 0) & (topk_ids < self.num_experts)
        ids = topk_ids.masked_fill(~valid, self.num_experts).long()
        experts = [e for e in ids.unique().tolist() if e < self.num_experts]
        total: Tensor | None = None
        with self.cache.turn:
            for pairs in self.cache.rounds(self.bank_number, experts):
                slot_of = torch.full((self.num_experts + 1,), -1, dtype=torch.int32, device="cpu")
                for expert, slot in pairs:
                    slot_of[expert] = slot
                slots = slot_of.to(ids.device)[ids]
                several = len(pairs) < len(experts)
                part = self._run_slots(x, topk_weights, slots, on_input, in_fp32=several)
                total = part if total is None else total.add_(part)
        return x.new_zeros(x.shape) if total is None else total.to(x.dtype)

    def _run_slots(
        self,
        x: Tensor,
        topk_weights: Tensor,
        slot_ids: Tensor,
        on_input: bool,
        in_fp32: bool,
    ) -> Tensor:
        slots = self.cache.slots
        rest = {"apply_router_weight_on_input": on_input, **self.activation}
        biases = (slots.get("b_gate_up"), slots.get("b_down"))
        if "w_down_scale" in slots:
            y = moe_ffn_quantized(
                x,
                slots["w_gate_up"],
                slots["w_gate_up_scale"],
                slots["w_down"],
                slots["w_down_scale"],
                topk_weights,
                slot_ids,
                format=self.format,
                x_scale=self.x_scale,
                b_gate_up=None if biases[0] is None else biases[0].to(x.dtype),
                b_down=None if biases[1] is None else biases[1].to(x.dtype),
                w_gate_up_zero=slots.get("w_gate_up_zero"),
                w_down_zero=slots.get("w_down_zero"),
                **rest,
            )
            return y.float() if in_fp32 else y
        dtype = slots["w_down"].dtype
        return moe_ffn(
            x.to(dtype),
            slots["w_gate_up"],
            slots["w_down"],
            topk_weights,
            slot_ids,
            b_gate_up=biases[0],
            b_down=biases[1],
            out_dtype=torch.float32 if in_fp32 and dtype in _HALF else None,
            **rest,
        )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Raises NotImplementedError: the weights are not in the model."""
        raise NotImplementedError(
            "OffloadedExperts: a state dict would lack the experts, whose weights are not in the "
            "model; save it before offload_experts."
        )

    def pack_weights(self) -> int:
        """Returns 0: the contents of slots change, so they are not packed."""
        return 0

    def unpack_weights(self) -> int:
        """Returns 0: there are no packed copies."""
        return 0

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, bank_number={self.bank_number}, {self.cache!r}"
