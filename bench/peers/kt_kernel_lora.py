"""Training steps of kt-kernel's experts with LoRA.

`bench.peers.kt_kernel` describes the library, its threads and where the process must run.
`ExpertLoRA` multiplies x by one factor for gate and up, [r, H]. The library has one for gate and
one for up: both are given that factor, and the sum of their gradients is compared. Its factors and
their gradients are bf16, and it writes gradients into buffers that stay, where `ExpertLoRA` has
fp32 factors and allocates their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.peers import kt_kernel as experts
from moe_ops.layers import ExpertLoRA

CLASSES = {"bfloat16": "AMXBF16_SFT_MOE", "int4": "AMXInt4_KGroup_SFT_MOE"}
_PARTS = ("gate", "up", "down")
# The library allocates for a multiple of this many tokens.
_TOKEN_STEP = 32


class KTExpertLoRA:
    """Experts with LoRA in kt-kernel, with the weights and factors of an `ExpertLoRA`.

    Args:
        lora: SwiGLU experts without shared factors; its experts have bf16 weights or int4 weights
            in groups of 32 (fp32 scales, which become bf16), as `weight_format` states.
        top_k: experts per token.
        weight_format: a key of `CLASSES`.
        max_tokens: the most tokens of a step.
    """

    def __init__(self, lora: ExpertLoRA, top_k: int, weight_format: str, max_tokens: int) -> None:
        import kt_kernel

        moe = kt_kernel.kt_kernel_ext.moe
        pool = experts.worker_pool(torch.get_num_threads())
        weights = lora.experts
        self.top_k = top_k
        self.factors = _split(lora.a_gate_up, lora.b_gate_up, lora.a_down, lora.b_down)
        self.grads = [torch.full_like(factor, float("nan")) for factor in self.factors]
        config = moe.MOESFTConfig()
        config.expert_num, config.num_experts_per_tok = lora.num_experts, top_k
        config.hidden_size = lora.hidden_size
        config.intermediate_size = lora.a_down.shape[-1]
        config.lora_rank, config.lora_alpha, config.lora_dropout = lora.rank, lora.alpha, 0.0
        config.max_cache_depth = 1
        config.max_len = -(-max_tokens // _TOKEN_STEP) * _TOKEN_STEP
        config.authoritative_optimizer_grads = True  # Else some gradients are not written.
        config.pool = pool.backend_
        order = torch.arange(lora.num_experts)
        config.physical_to_logical_map = order.data_ptr()
        loaded = [_thirds(weights.w_gate_up, weights.w_down)]
        names = ["proj"]
        if weight_format == "int4":
            loaded += [_thirds(weights.w_gate_up_scale, weights.w_down_scale, torch.bfloat16)]
            names += ["scale"]
            config.quant_config.bits, config.quant_config.group_size = 4, 32
            config.quant_config.zero_point = False
        for name, parts in zip(names, loaded, strict=True):
            for part, tensor in zip(_PARTS, parts, strict=True):
                setattr(config, f"{part}_{name}", tensor.data_ptr())
        for part, a, b in zip(_PARTS, self.factors[0::2], self.factors[1::2], strict=True):
            setattr(config, f"{part}_lora_a", a.data_ptr())
            setattr(config, f"{part}_lora_b", b.data_ptr())
        self.layer = getattr(moe, CLASSES[weight_format])(config)
        pool.submit(self.layer.load_weights_task())  # Copies the weights.
        pool.sync()

    def bind(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, grad_y: Tensor
    ) -> Callable[[], list[Tensor]]:
        """Returns a step: forward and backward, on factors that may have changed in place.

        The step returns y, the gradients of x and topk_weights, and those of the library's six
        factors, which `joined` converts. They are overwritten by the next step.
        """
        count = torch.tensor([x.shape[0]], dtype=torch.int32)
        ids, weights = topk_ids.long(), topk_weights.detach().clone()
        x = x.detach().clone()
        y, grad_x = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
        grad_weights = torch.full_like(weights, float("nan"))
        inputs = [t.data_ptr() for t in (ids, weights, x, y)]
        factors = [factor.data_ptr() for factor in self.factors]
        grads = [t.data_ptr() for t in (grad_y, grad_x, *self.grads, grad_weights)]
        results = [y, grad_x, grad_weights, *self.grads]
        kept = (count, ids, x, weights, grad_y)  # The library has their addresses only.

        def step() -> list[Tensor]:
            assert kept
            self.layer.update_lora_weights(*factors)
            self.layer.forward_sft(count.data_ptr(), self.top_k, *inputs, True)
            self.layer.backward(*grads, 0, 0, 0)  # No gradients of the experts' weights.
            return results

        return step


def joined(results: Sequence[Tensor]) -> list[Tensor]:
    """Returns results of a step with the gradients of `ExpertLoRA`'s four factors."""
    *outer, gate_a, gate_b, up_a, up_b, down_a, down_b = results
    return [*outer, gate_a.float() + up_a.float(), torch.cat((gate_b, up_b), 1), down_a, down_b]


def _split(a_gate_up: Tensor, b_gate_up: Tensor, a_down: Tensor, b_down: Tensor) -> list[Tensor]:
    """Returns A and B of gate, up and down."""
    gate_b, up_b = b_gate_up.chunk(2, dim=1)
    factors = (a_gate_up, gate_b, a_gate_up, up_b, a_down, b_down)
    return [factor.detach().bfloat16().contiguous() for factor in factors]


def _thirds(gate_up: Tensor, down: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    parts = (*gate_up.detach().chunk(2, dim=1), down.detach())
    return [part.to(dtype or part.dtype).contiguous() for part in parts]
