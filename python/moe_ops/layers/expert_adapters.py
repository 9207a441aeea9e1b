"""Low-rank adapters in the GEMMs of frozen experts: W + scaling * B A for each expert.

The rank-r GEMMs run on the rows, sorted by expert, that the GEMMs of the experts use, so W + B A is
never stored, forward or backward. Expert weights may be float or quantized.

Letters: T tokens, H hidden size, I intermediate size, E experts, K experts per token, N = T * K
rows, r rank, M adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_ops.formulas.activations import plain_act
from moe_ops.ops import gated_act, grouped_gemm, permute, sort_by_expert, unpermute
from moe_ops.ops._autograd import direct_call, in_transform
from moe_ops.ops._checks import accumulate_dtype
from moe_ops.ops._quantized import joined
from moe_ops.ops.gated_act import GATED_ACTIVATIONS

_ops = torch.ops.moe_ops
_quantized = direct_call("grouped_gemm_quantized")
_quantized_exact = direct_call("grouped_gemm_quantized_exact")
_moe_ffn_lora = direct_call("moe_ffn_lora_fwd")


class ExpertAdapter(NamedTuple):
    """Factors of one adapter and the scaling of their product.

    a_gate_up [E, r, H] and b_gate_up [E, 2I, r] of w_gate_up ([E, I, r] without a gate), a_down [E,
    r, I] and b_down [E, H, r] of w_down. A factor with 1 in place of E is shared by all experts.
    Both factors of a weight without an adapter are None. With M adapters, one per token, factors
    are [E, M, ...].
    """

    a_gate_up: Tensor | None
    b_gate_up: Tensor | None
    a_down: Tensor | None
    b_down: Tensor | None
    scaling: float


class FrozenWeight(NamedTuple):
    """One of the two expert weights, in the format of `grouped_gemm` or
    `grouped_gemm_quantized`."""

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    format: str = ""

    def product(self, rows: Tensor, expert_offsets: Tensor, exact: bool) -> Tensor:
        """Computes [N, out]. With `exact`, quantized weights are multiplied by unrounded rows, as
        in training."""
        bias = None if self.bias is None else self.bias.to(rows.dtype)
        if self.scale is None:
            return grouped_gemm(rows, self.weight.to(rows.dtype), expert_offsets, bias=bias)
        args = rows, self.weight, self.scale, expert_offsets, self.format, bias, self.zero
        if exact:
            return _quantized_exact(*args, False)
        return _quantized(*args)

    def gradient(self, grad: Tensor, expert_offsets: Tensor) -> Tensor:
        """Computes the gradient of `rows` in `product`."""
        if self.scale is None:
            weight = self.weight.to(grad.dtype).transpose(1, 2)
            return _ops.grouped_gemm(grad, weight, expert_offsets, None)
        args = grad, self.weight, self.scale, expert_offsets, self.format, None, self.zero
        return _ops.grouped_gemm_quantized_exact(*args, True)


class FrozenBank(NamedTuple):
    """Experts whose weights have no gradients. x_scale [H] multiplies the input of w_gate_up."""

    num_experts: int
    gate_up: FrozenWeight
    down: FrozenWeight
    x_scale: Tensor | None
    # Arguments of gated_act, the name of an activation without a gate, or any function.
    activation: dict[str, Any] | str | Callable[[Tensor], Tensor]

    def activate(self, preact: Tensor) -> Tensor:
        """Computes [N, I] from [N, 2I] (or [N, I])."""
        if isinstance(self.activation, dict):
            return gated_act(preact, **self.activation)
        if isinstance(self.activation, str):
            return plain_act(preact, self.activation)
        return self.activation(preact)

    def activate_gradient(self, grad_h: Tensor, preact: Tensor) -> Tensor:
        """Computes the gradient of preact."""
        if isinstance(self.activation, dict):
            how = {"interleaved": False, "alpha": 1.702, "limit": 7.0, **self.activation}
            return _ops.gated_act_bwd(grad_h, preact, **how)
        with torch.enable_grad():
            leaf = preact.detach().requires_grad_()
            return torch.autograd.grad(self.activate(leaf), leaf, grad_h)[0]


def activation_of_name(
    activation: str, interleaved: bool = False, alpha: float = 1.702, limit: float = 7.0
) -> dict[str, Any] | str:
    """Returns the value of `FrozenBank.activation` for an activation by name."""
    if activation not in GATED_ACTIVATIONS:
        return activation
    return {"activation": activation, "interleaved": interleaved, "alpha": alpha, "limit": limit}


def frozen_bank(experts: Any) -> FrozenBank:
    """Returns the weights of an `Experts` or a `QuantizedExperts`, all of which must be in this
    process."""

    def weight(part: str) -> FrozenWeight:
        name, formats = f"w_{part}", getattr(experts, "formats", None)
        scale, zero = (getattr(experts, f"{name}_{more}", None) for more in ("scale", "zero"))
        format = "" if formats is None else formats[name].label
        weight, bias = getattr(experts, name), getattr(experts, f"b_{part}")
        return FrozenWeight(weight, bias, scale, zero, format)

    options = (experts.activation, experts.interleaved, experts.alpha, experts.limit)
    return FrozenBank(
        experts.num_experts,
        weight("gate_up"),
        weight("down"),
        getattr(experts, "x_scale", None),
        activation_of_name(*options),
    )


def factors_of_peft(a: Tensor, b: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Converts peft's lora_A.weight [E * r, in] and lora_B.weight [out, r * E] to [E, r, in] and
    [E, out, r]."""
    b = b.view(b.shape[0], -1, num_experts).permute(2, 0, 1).contiguous()
    return a.view(num_experts, -1, a.shape[1]), b


def factors_to_peft(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Inverts `factors_of_peft`."""
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def sum_of(adapters: Sequence[ExpertAdapter]) -> ExpertAdapter:
    """Returns one adapter equal to the sum of several, by concatenating their ranks."""
    if len(adapters) == 1:
        return adapters[0]
    factors: dict[str, Any] = dict.fromkeys(ExpertAdapter._fields[:4])
    for part in ("gate_up", "down"):
        a, b = [], []
        for adapter in adapters:
            own_a, own_b = getattr(adapter, f"a_{part}"), getattr(adapter, f"b_{part}")
            if own_a is not None:
                a.append(own_a)
                b.append(own_b * adapter.scaling)
        if a:
            factors[f"a_{part}"], factors[f"b_{part}"] = torch.cat(a, -2), torch.cat(b, -1)
    return ExpertAdapter(**factors, scaling=1.0)


def stack_of(adapters: Sequence[ExpertAdapter]) -> ExpertAdapter:
    """Stacks M adapters of the same weights, of which each token uses one; smaller ranks are padded
    with zeros."""
    factors: dict[str, Any] = dict.fromkeys(ExpertAdapter._fields[:4])
    for part in ("gate_up", "down"):
        pairs = [(getattr(each, f"a_{part}"), getattr(each, f"b_{part}")) for each in adapters]
        if all(a is None for a, _ in pairs):
            continue
        if any(a is None for a, _ in pairs):
            raise ValueError(f"adapters: all of a batch must adapt w_{part}, got some that do not.")
        rank = max(a.shape[-2] for a, _ in pairs)
        a = [F.pad(a, (0, 0, 0, rank - a.shape[-2])) for a, _ in pairs]
        b = [
            F.pad(b * each.scaling, (0, rank - b.shape[-1]))
            for (_, b), each in zip(pairs, adapters, strict=True)
        ]
        factors[f"a_{part}"], factors[f"b_{part}"] = torch.stack(a, 1), torch.stack(b, 1)
    return ExpertAdapter(**factors, scaling=1.0)


def adapted_experts(
    experts: Any,
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    adapters: Sequence[ExpertAdapter],
    *,
    adapter_ids: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
) -> Tensor:
    """Computes `experts(x, topk_weights, topk_ids)` with adapters; expert weights have no
    gradients.

    Args:
        experts: an `Experts`, a `QuantizedExperts` or a `FrozenBank` with all weights in this
            process.
        x: [T, H]; float32, bfloat16 or float16 (also float64 with float weights).
        topk_weights, topk_ids: [T, K].
        adapters: the sum of these is used. Their GEMMs run in the dtype of x, or of autocast.
        adapter_ids: [T], integer, for factors of M adapters: the adapter of each token; ids outside
            [0, M) use none.
        apply_router_weight_on_input: see `Experts`.

    Returns:
        [T, H] in the dtype of x. Gradients: x, topk_weights and all factors, once differentiable.
        An expert without tokens gets zeros for its factors. Quantized weights are multiplied by
        rounded rows, as `moe_ffn_quantized` describes; by unrounded ones if x is float32 and a
        gradient is wanted.

    Raises:
        ValueError: expert weights that require a gradient.
        NotImplementedError: in forward mode and under torch.func's transforms.
    """
    if in_transform():
        raise NotImplementedError(
            "adapted_experts: forward-mode AD is not implemented, nor are torch.func's transforms; "
            "merge the adapters, or use moe_ffn with the weights added, under them."
        )
    bank = experts if isinstance(experts, FrozenBank) else frozen_bank(experts)
    adapter = sum_of(adapters)
    kind = x.device.type
    result_dtype = x.dtype
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    has_op = _has_op(bank, x)
    # The op reads factors of any type.
    factors = [f if f is None or has_op else f.to(x.dtype) for f in adapter[:4]]
    num_adapters = 0
    if adapter_ids is not None:
        num_adapters = next(f.shape[1] for f in factors if f is not None)
        lead = bank.num_experts, num_adapters
        factors = [
            None if f is None else f.expand(*lead, *f.shape[2:]).flatten(0, 1) for f in factors
        ]
    tensors = (x, topk_weights, *factors)
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    stored = (*bank.gate_up[:4], *bank.down[:4], bank.x_scale)
    if training and any(t is not None and t.requires_grad for t in stored):
        raise ValueError(
            "adapted_experts: the weights and biases of the bank must be frozen, got some that "
            "require a gradient; call requires_grad_(False) on it."
        )
    call = _Call(
        bank.num_experts,
        (bank.gate_up.format, bank.down.format),
        bank.activation,
        adapter.scaling,
        num_adapters,
        apply_router_weight_on_input,
        training,
    )
    with torch.autocast(kind, enabled=False):
        if has_op:
            y: Tensor = _run_op(call, bank, x, topk_weights, topk_ids, factors, adapter_ids)
        else:
            y = _AdaptedExperts.apply(
                call, x, topk_weights, *factors, topk_ids, adapter_ids, *stored
            )
    return y.to(result_dtype)


def _has_op(bank: FrozenBank, x: Tensor) -> bool:
    """Returns whether moe_ffn_lora computes a bank: on the CPU, with an activation by name."""
    return x.device.type == "cpu" and bank.x_scale is None and not callable(bank.activation)


def _run_op(
    call: _Call,
    bank: FrozenBank,
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    factors: Sequence[Tensor | None],
    adapter_ids: Tensor | None,
) -> Tensor:
    weights: list[Tensor | None] = []
    biases: list[Tensor | None] = []
    for part in (bank.gate_up, bank.down):
        weight = part.weight if part.scale is not None else part.weight.to(x.dtype)
        weights += [weight, part.scale, part.zero]
        biases.append(None if part.bias is None else part.bias.to(x.dtype))
    named: Any = bank.activation
    if isinstance(named, str):
        named = {"activation": named}
    how = {"interleaved": False, "alpha": 1.702, "limit": 7.0, **named}
    y: Tensor = _moe_ffn_lora(
        x,
        *weights,
        call.formats[0] if len({*call.formats}) == 1 else joined(call.formats),
        *biases,
        topk_weights,
        topk_ids,
        *factors,
        call.scaling,
        adapter_ids,
        call.num_adapters,
        how["activation"],
        how["interleaved"],
        call.on_input,
        how["alpha"],
        how["limit"],
        call.training,
    )[0]
    return y


class _Call(NamedTuple):
    """Arguments of a call other than tensors."""

    num_experts: int
    formats: tuple[str, str]
    activation: Any
    scaling: float
    num_adapters: int
    on_input: bool
    training: bool

    def bank_of(self, stored: Sequence[Any]) -> FrozenBank:
        up, down = self.formats
        gate_up = FrozenWeight(*stored[:4])._replace(format=up)
        w_down = FrozenWeight(*stored[4:8])._replace(format=down)
        return FrozenBank(self.num_experts, gate_up, w_down, stored[8], self.activation)


class _Rows(NamedTuple):
    """Maps between slots and rows. groups are the rows that share one pair of factors."""

    expert_offsets: Tensor  # [E + 1]
    groups: Tensor  # [E + 1], or [E * M + 1]
    row_to_slot: Tensor  # [N]
    slot_to_row: Tensor  # [T, K]
    plain: Tensor | None  # [N, 1], rows without an adapter

    def of(self, factor: Tensor) -> Tensor:
        """Returns the row offsets for each matrix of a factor."""
        if factor.shape[0] == self.groups.shape[0] - 1:
            return self.groups
        return self.groups[:: self.groups.shape[0] - 1].contiguous()  # One for all rows.

    def low(self, rows: Tensor, factor: Tensor, scaling: float) -> Tensor:
        """Computes the rank-r activations of an adapter, [N, r]."""
        found = grouped_gemm(rows, factor, self.of(factor)) * scaling
        return found if self.plain is None else found.masked_fill_(self.plain, 0.0)

    def wgrad(self, grad: Tensor, rows: Tensor, factor: Tensor) -> Tensor:
        """Computes the gradient of a factor."""
        return _ops.grouped_gemm_wgrad(grad, rows, self.of(factor))


def _sort(
    topk_ids: Tensor, adapter_ids: Tensor | None, num_experts: int, num_adapters: int
) -> _Rows:
    if adapter_ids is None:
        offsets, row_to_slot, slot_to_row = sort_by_expert(topk_ids, num_experts)
        return _Rows(offsets, offsets, row_to_slot, slot_to_row, None)
    own = (adapter_ids >= 0) & (adapter_ids < num_adapters)
    valid = (topk_ids >= 0) & (topk_ids < num_experts)
    ids = topk_ids.long() * num_adapters + torch.where(own, adapter_ids, 0)[:, None]
    groups, row_to_slot, slot_to_row = sort_by_expert(
        torch.where(valid, ids, -1), num_experts * num_adapters
    )
    plain = ~own[row_to_slot.long() // topk_ids.shape[1], None]
    return _Rows(groups[::num_adapters].contiguous(), groups, row_to_slot, slot_to_row, plain)


def _row_weights(topk_weights: Tensor, rows: _Rows, dtype: torch.dtype) -> Tensor:
    """Returns routing weights by row, [N, 1] in fp32 (fp64 for fp64 rows); 0 for empty slots,
    whatever their weight."""
    weights = topk_weights.flatten()[rows.row_to_slot.long()].to(accumulate_dtype(dtype))
    count = torch.arange(len(weights), device=weights.device)
    return weights.masked_fill(count >= rows.expert_offsets[-1], 0.0)[:, None]


class _AdaptedExperts(torch.autograd.Function):
    """Saves x, the pre-activation and the rank-r activations of w_gate_up for backward, which
    recomputes the rest."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Any) -> Tensor:
        x, topk_weights, a_gate_up, b_gate_up, a_down, b_down, topk_ids, adapter_ids = tensors[:8]
        bank = call.bank_of(tensors[8:])
        rows = _sort(topk_ids, adapter_ids, bank.num_experts, call.num_adapters)
        offsets = rows.expert_offsets
        inputs = permute(x, offsets, rows.row_to_slot)
        if call.on_input:
            inputs = (inputs * _row_weights(topk_weights, rows, x.dtype)).to(x.dtype)
        low = None
        scaled = inputs if bank.x_scale is None else (inputs * bank.x_scale).to(x.dtype)
        preact = bank.gate_up.product(scaled, offsets, call.training)
        if a_gate_up is not None:
            low = rows.low(inputs, a_gate_up, call.scaling)
            preact += grouped_gemm(low, b_gate_up, rows.of(b_gate_up))
        del inputs, scaled
        h = bank.activate(preact)
        out = bank.down.product(h, offsets, call.training)
        if a_down is not None:
            out += grouped_gemm(rows.low(h, a_down, call.scaling), b_down, rows.of(b_down))
        y = unpermute(out, offsets, rows.slot_to_row, None if call.on_input else topk_weights)
        if call.training:
            ctx.call = call
            ctx.num_tensors = len(tensors)
            factors = a_gate_up, b_gate_up, a_down, b_down
            ctx.save_for_backward(x, topk_weights, *factors, low, preact, *rows, *tensors[8:])
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        with torch.autocast(grad_y.device.type, enabled=False):
            return _backward(ctx, grad_y)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    call: _Call = ctx.call
    saved = ctx.saved_tensors  # Read once: under checkpointing, each read runs the forward again.
    x, topk_weights, a_gate_up, b_gate_up, a_down, b_down, low, preact = saved[:8]
    rows, bank = _Rows(*saved[8:13]), call.bank_of(saved[13:])
    offsets = rows.expert_offsets
    need_x, need_weights, need_a_up, need_b_up, need_a_down, need_b_down = ctx.needs_input_grad[1:7]
    grads: list[Tensor | None] = [None] * 6
    weights = _row_weights(topk_weights, rows, x.dtype)
    dtype = x.dtype

    # A row's weight multiplies its expert's output, so the gradient passes through w_down without
    # it, and its dot product with h is the gradient of the weight.
    grad = permute(grad_y, offsets, rows.row_to_slot)
    h = bank.activate(preact)
    grad_h = bank.down.gradient(grad, offsets)
    own = None if call.on_input else weights
    if a_down is not None:
        low_out = rows.low(grad, b_down.transpose(1, 2), call.scaling)
        grad_h += grouped_gemm(low_out, a_down.transpose(1, 2), rows.of(a_down))
        if need_a_down:
            grads[4] = rows.wgrad(_times(low_out, own), h, a_down)
        if need_b_down:
            low_h = _times(rows.low(h, a_down, call.scaling), own)
            grads[5] = rows.wgrad(grad, low_h, b_down)
    grad_weights = None
    if need_weights and not call.on_input:
        grad_weights = _row_dot(grad_h, h)
        if bank.down.bias is not None:
            grad_weights += _row_dot(grad, _of_rows(bank.down.bias, offsets, len(grad)))
    del grad, h
    grad_h = _times(grad_h, own)

    grad = bank.activate_gradient(grad_h, preact)
    del grad_h
    low_grad: Tensor | None = None
    grad_inputs: Tensor | None = None
    if a_gate_up is not None:
        low_grad = rows.low(grad, b_gate_up.transpose(1, 2), call.scaling)
        if need_b_up:
            grads[3] = rows.wgrad(grad, low, b_gate_up)
        if need_a_up:
            scaled = _times(low_grad, weights if call.on_input else None)
            grads[2] = rows.wgrad(scaled, permute(x, offsets, rows.row_to_slot), a_gate_up)
    if need_x or (need_weights and call.on_input):
        grad_inputs = bank.gate_up.gradient(grad, offsets)
        del grad  # Frees a large tensor before the adapter's sums are allocated.
        if bank.x_scale is not None:
            grad_inputs = (grad_inputs * bank.x_scale).to(dtype)
        if low_grad is not None:
            grad_inputs += grouped_gemm(low_grad, a_gate_up.transpose(1, 2), rows.of(a_gate_up))
    if grad_inputs is not None:
        if need_weights and call.on_input:
            grad_weights = _row_dot(grad_inputs, permute(x, offsets, rows.row_to_slot))
        if need_x:
            grad_inputs = _times(grad_inputs, weights if call.on_input else None)
            grads[0] = _ops.permute_bwd(
                grad_inputs, offsets, rows.row_to_slot, x.shape[0], topk_weights.shape[1]
            )
    if grad_weights is not None:
        grads[1] = grad_weights[rows.slot_to_row.long()].to(topk_weights.dtype)
    return None, *grads, *(None,) * (ctx.num_tensors - 6)


def _times(rows: Tensor, weights: Tensor | None) -> Tensor:
    return rows if weights is None else (rows * weights).to(rows.dtype)


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Computes row-wise dot products, [N] in fp32 (fp64 for fp64)."""
    wide = accumulate_dtype(a.dtype)
    return torch.linalg.vecdot(a.to(wide), b.to(wide))


def _of_rows(values: Tensor, expert_offsets: Tensor, num_rows: int) -> Tensor:
    """Gathers [N, O] from per-expert values [E, O]; rows without an expert get the last expert's
    values."""
    row = torch.arange(num_rows, device=values.device, dtype=expert_offsets.dtype)
    expert = torch.bucketize(row, expert_offsets[1:].contiguous(), right=True)
    return values[expert.clamp_(max=values.shape[0] - 1)]
