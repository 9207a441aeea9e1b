"""Expert feed-forward networks.

Letters: T tokens, H hidden size, I intermediate size, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops import packing
from moe_ops._sharded import check_whole, local_part
from moe_ops.expert_weights.packing import expert_ffn, invalidate, invalidate_if_changed
from moe_ops.ops import gated_act, moe_linear_map, moe_linear_reduce
from moe_ops.ops._checks import check_positive
from moe_ops.ops.all_experts_ffn import all_experts_ffn
from moe_ops.ops.gated_act import GATED_ACTIVATIONS, PLAIN_ACTIVATIONS

from .all_experts import expert_inputs, fits_all_experts_ffn, grouped_linear, mix_outputs, segments
from .expert_ops import experts as expert_ops
from .fp8 import fp8_ffn
from .functional import plain_activation
from .inputs import takes_dense

# Attributes of the experts that are arguments of moe_ffn.
ACTIVATION_OPTIONS = ("activation", "interleaved", "alpha", "limit")


_Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # w_gate_up, w_down, biases


def _local(weights: _Weights) -> _Weights:
    """Returns the weights and biases of the experts in this process."""
    w_gate_up, w_down, b_gate_up, b_down = weights
    return local_part(w_gate_up), local_part(w_down), local_part(b_gate_up), local_part(b_down)


def _whole(weights: _Weights) -> _Weights:
    """Returns all weights and biases; raises ValueError if some experts are in other processes."""
    local = _local(weights)
    if local[0].shape != weights[0].shape or local[1].shape != weights[1].shape:
        advice = "moe_ops.parallel.shard_experts shares it out"
        check_whole("Experts", "w_gate_up", weights[0], advice)
        check_whole("Experts", "w_down", weights[1], advice)
    return local


class Experts(nn.Module):
    """E feed-forward networks of one shape. Calls have no side effects.

    Parameters:
        w_gate_up: [E, 2I, H], gate half first (with `interleaved`, gate rows even and up rows odd);
            [E, I, H] when the activation is not gated.
        w_down: [E, O, I]; O is `output_size`, H unless given.
        b_gate_up, b_down: [E, 2I] (or [E, I]) and [E, O], with `bias=True`.

    Args:
        num_experts, hidden_size, intermediate_size: E, H and I, at least 1.
        output_size: O, at least 1; None is H. With O different from H, two GEMMs run with the
            pre-activation in memory between them; weights are not packed and cannot be quantized.
        activation: gated: "swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_oai"; not gated:
            "silu", "gelu", "gelu_tanh", "relu", "relu2". `moe_ops.moe_ffn` defines them.
        bias: adds biases to both GEMMs.
        interleaved: layout of the gate and up rows.
        alpha, limit: parameters of "swiglu_oai".
        fp8_training: the GEMMs multiply float8_e4m3fn, forward and backward, with these parameters
            as master weights (`fp8_ffn`; O must be H). This attribute may be changed at any time.
        device, dtype: of the parameters.

    Initialization: each expert like `nn.Linear`, uniform in +-1/sqrt(fan_in) (H for w_gate_up, I
    for w_down); biases 0.

    The operations `select`, `append`, `split` and `merge` return new experts with their own
    parameters, which keep dtype, device and requires_grad. The old experts and optimizer states are
    unchanged. Routers have these operations too, and `MoE` applies both. For experts sharded by
    `moe_ops.parallel.shard_experts`, all ranks must call them together; the result is sharded in
    the same way, and each rank temporarily holds all experts.

    In `eval()`, calls without gradients on the CPU may read a packed copy of the weights.
    `pack_weights` makes it immediately, repeated calls make it automatically; see
    `moe_ops.set_packing_policy`. It is dropped when the weights change and at `train()`, and is not
    part of state dicts, pickles or deep copies.

    Raises:
        ValueError: a size below 1, an unknown activation, `interleaved` without a gate, or
            `fp8_training` with another O than H.
    """

    fp8_training: bool = False
    # Expert parallelism: sends tokens to the processes of their experts and back. Called like
    # `forward`, with the experts as first argument; it runs `forward_local`. See
    # `moe_ops.parallel`.
    dispatcher: Callable[..., Tensor] | None = None
    sharding: Any = None  # How `moe_ops.parallel.shard_experts` sharded the experts.

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        output_size: int | None = None,
        activation: str = "swiglu",
        bias: bool = False,
        interleaved: bool = False,
        alpha: float = 1.702,
        limit: float = 7.0,
        fp8_training: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        output_size = hidden_size if output_size is None else output_size
        sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
        check_positive("Experts", num_experts=num_experts, **sizes, output_size=output_size)
        gated = check_activation("Experts", activation, interleaved)
        if fp8_training and output_size != hidden_size:
            raise ValueError(
                f"Experts: output_size must be {hidden_size} like hidden_size with fp8_training, "
                f"got {output_size}."
            )
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.output_size = output_size
        self.activation = activation
        self.gated = gated
        self.interleaved = interleaved
        self.alpha = alpha
        self.limit = limit
        self.fp8_training = fp8_training

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        width = intermediate_size * (2 if gated else 1)
        self.w_gate_up = parameter(num_experts, width, hidden_size)
        self.w_down = parameter(num_experts, output_size, intermediate_size)
        self.b_gate_up = parameter(num_experts, width) if bias else None
        self.b_down = parameter(num_experts, output_size) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial values described in the class docstring."""
        for weight in (self.w_gate_up, self.w_down):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
        for bias in (self.b_gate_up, self.b_down):
            if bias is not None:
                nn.init.zeros_(bias)

    @takes_dense
    def forward(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        apply_router_weight_on_input: bool = False,
        overlap: Callable[[], None] | None = None,
    ) -> Tensor:
        """Computes y[t] = sum_k topk_weights[t, k] * expert topk_ids[t, k] of x[t].

        Args:
            x: [T, H], in the dtype of the parameters (any under autocast and with fp8_training).
            topk_weights: [T, K] float, used in fp32.
            topk_ids: [T, K] int32 or int64; ids outside [0, E) contribute nothing.
            apply_router_weight_on_input: multiply x[t] by the weight instead (Llama 4).
            overlap: called once before y is computed, for work that needs no expert. A `dispatcher`
                runs it while tokens are sent to other processes.

        Returns:
            y: [T, O] in the dtype of x. T = 0 is supported. Experts without tokens get zero
            gradients.
        """
        on_input = apply_router_weight_on_input
        if self.dispatcher is not None:
            rows = x, topk_weights, topk_ids
            how: Any = {"apply_router_weight_on_input": on_input, "overlap": overlap}
            return self.dispatcher(self, *rows, **how)
        weights = self._weights()
        if not type(weights[0]) is type(weights[1]) is nn.Parameter:
            weights = _whole(weights)
        if overlap is not None:
            overlap()
        return self._run(weights, x, topk_weights, topk_ids, on_input)

    def forward_local(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        apply_router_weight_on_input: bool = False,
        x_scale: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Computes `forward` with only those sharded experts that are in this process.

        Args:
            topk_ids: [T, K], relative to the first of these experts; ids outside [0, number of
                local experts) contribute nothing.
            x_scale: scales of x in float8_e4m3fn, with `takes_fp8` and without gradients; requires
                out_dtype. See `moe_ops.moe_ffn_fp8` for both.
            out_dtype: None for the dtype of x, or float32 for a token's sum before rounding. With
                gradients and fp8_training, or with O different from H, the rounded sum.
        """
        weights = _local(self._weights())
        if self.sharding is not None:
            weights = self.sharding.tie_replicas(weights)
        on_input = apply_router_weight_on_input
        return self._run(weights, x, topk_weights, topk_ids, on_input, x_scale, out_dtype)

    @property
    def takes_fp8(self) -> bool:
        """True if `forward_local` accepts inputs quantized by `moe_ops.quantize_fp8` (no
        gradients)."""
        return self.fp8_training

    def _weights(self) -> _Weights:
        # Module.__getattr__ for four parameters takes a fifth of a small call.
        p: dict[str, Any] = self._parameters
        try:
            return p["w_gate_up"], p["w_down"], p["b_gate_up"], p["b_down"]
        except KeyError:  # torch.nn.utils.parametrize makes properties of parameters.
            return self.w_gate_up, self.w_down, self.b_gate_up, self.b_down

    def _run(
        self,
        weights: _Weights,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        on_input: bool,
        x_scale: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        if self.output_size != self.hidden_size:
            y = self._two_products(weights, x, topk_weights, topk_ids, on_input)
            return y if out_dtype is None else y.to(out_dtype)
        w_gate_up, w_down, b_gate_up, b_down = weights
        if self.fp8_training:
            dtype = x.dtype if x_scale is None else out_dtype
            return fp8_ffn(
                x,
                w_gate_up,
                w_down,
                topk_weights,
                topk_ids,
                b_gate_up=None if b_gate_up is None else b_gate_up.to(dtype),
                b_down=None if b_down is None else b_down.to(dtype),
                activation=self.activation,
                interleaved=self.interleaved,
                apply_router_weight_on_input=on_input,
                alpha=self.alpha,
                limit=self.limit,
                x_scale=x_scale,
                out_dtype=out_dtype,
            )
        return expert_ffn(
            self,
            x,
            w_gate_up,
            w_down,
            topk_weights,
            topk_ids,
            b_gate_up=b_gate_up,
            b_down=b_down,
            activation=self.activation,
            interleaved=self.interleaved,
            apply_router_weight_on_input=on_input,
            alpha=self.alpha,
            limit=self.limit,
            out_dtype=out_dtype,
        )

    def _two_products(
        self, bank: _Weights, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, on_input: bool
    ) -> Tensor:
        w_gate_up, w_down, b_gate_up, b_down = bank
        weights = topk_weights
        if on_input:
            # A slot's input is its token times its weight: each slot becomes a separate token.
            num_slots = topk_ids.shape[1]
            x = (x[:, None] * topk_weights[..., None].to(x.dtype)).flatten(0, 1)
            topk_ids, weights = topk_ids.reshape(-1, 1), torch.ones_like(topk_weights).view(-1, 1)
        h = self._activate(moe_linear_map(x, w_gate_up, topk_ids, bias=b_gate_up))
        y = moe_linear_reduce(h, w_down, weights, topk_ids, bias=b_down)
        return y.unflatten(0, (-1, num_slots)).sum(1) if on_input else y

    def outputs(self, x: Tensor, input_ids: Sequence[int] | None = None) -> Tensor:
        """Computes the outputs of all experts for all tokens, without routing, in GEMMs over all
        experts.

        Args:
            x: [T, H], the input of all experts; or [T, G, H], one input per group of experts.
            input_ids: E indices, the input in [0, G) of each expert; None: the first E / G experts
                read input 0, the next E / G input 1, and so on. Each run of experts with one input
                is one GEMM; runs of equal length on consecutive inputs form a batched GEMM.

        Returns:
            [T, E, O] in the dtype of x.

        Raises:
            ValueError: shapes that do not match, or ids outside [0, G).

        Second derivatives are not supported.
        """
        x, ids = expert_inputs(x, input_ids, self.num_experts, self.hidden_size)
        w_gate_up, w_down, b_gate_up, b_down = _whole(self._weights())
        if not self.gated and fits_all_experts_ffn(x, w_gate_up, w_down):
            return all_experts_ffn(
                x,
                w_gate_up,
                w_down,
                torch.tensor(ids, dtype=torch.int32, device=x.device),
                b_up=b_gate_up,
                b_down=b_down,
                activation=self.activation,
            )
        h = self._activate(grouped_linear(x, w_gate_up, b_gate_up, segments(ids)))
        return grouped_linear(h, w_down, b_down)

    def _activate(self, h: Tensor) -> Tensor:
        if self.gated:
            return gated_act(
                h,
                self.activation,
                interleaved=self.interleaved,
                alpha=self.alpha,
                limit=self.limit,
            )
        if self.activation == "relu":
            return F.relu(h, inplace=True)
        return plain_activation(h, self.activation)

    def mix(self, x: Tensor, weights: Tensor, input_ids: Sequence[int] | None = None) -> Tensor:
        """Computes M mixtures of all experts: y[t, m] = sum_e weights[t, m, e] * expert e of its
        input.

        Args:
            x, input_ids: see `outputs`.
            weights: [T, E] for one mixture, or [T, M, E].

        Returns:
            [T, O], or [T, M, O].
        """
        return mix_outputs(self.outputs(x, input_ids), weights)

    def pack_weights(self) -> int:
        """Packs the weights now and returns the bytes of the copies; see `moe_ops.pack_weights`."""
        return packing.pack_weights(self)

    def unpack_weights(self) -> int:
        """Drops the packed copies, if any, and returns their bytes."""
        return packing.unpack_weights(self)

    def train(self, mode: bool = True) -> Experts:
        """Sets the mode like `nn.Module.train`. Training drops the packed copies."""
        if mode:
            invalidate(self)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts:
        # After .to() and similar methods, no call uses the old weights.
        super()._apply(fn, recurse)
        invalidate_if_changed(self)
        return self

    def config(self) -> dict[str, Any]:
        """Returns the arguments for experts like these: all except num_experts, device and
        dtype."""
        names = ("hidden_size", "intermediate_size", "output_size", *ACTIVATION_OPTIONS)
        config = {name: getattr(self, name) for name in names}
        return {**config, "fp8_training": self.fp8_training, "bias": self.b_down is not None}

    def blank(self, num_experts: int, **changes: Any) -> Experts:
        """Returns new experts like these; `changes` are arguments of the class."""
        return Experts(num_experts, **{**self.config(), **changes})

    # ------------------------------------------------------------------- operations on the experts

    def select(self, ids: Sequence[int] | Tensor) -> Experts:
        """Returns new experts: those with `ids`, in that order (repeats allowed).

        Raises:
            ValueError: no id, or an id outside [0, E).
        """
        return expert_ops.select(self, ids)

    def append(self, other: int | Experts, *, init: str = "random") -> Experts:
        """Returns new experts: these, followed by additional ones.

        Args:
            other: the number of experts to add (at least 1), or `Experts` of equal sizes and
                activation to add.
            init: initial values if `other` is a number: "random" (like new experts), "zero_output"
                (random, with w_down and b_down 0: they contribute nothing until trained), "copy"
                (experts 0, 1, ... again), "mean" (the mean of all experts).

        Raises:
            ValueError: an unknown `init`, a number below 1, or incompatible experts.
        """
        return expert_ops.append(self, other, init)

    def split(
        self,
        ids: Sequence[int] | Tensor | None = None,
        factor: int = 2,
        *,
        mode: str = "slice",
        noise: float = 0.0,
    ) -> Experts:
        """Returns new experts in which each expert of `ids` is replaced by `factor` experts.

        mode="slice": each takes I / factor consecutive hidden neurons and 1 / factor of b_down, so
        that the slices of an expert add up to it. If all experts are split, the new intermediate
        size is I / factor (fine-grained experts). If only some are, it stays I and the slices are
        padded with zeros. mode="copy": each is a copy of the expert; with `noise`, every weight of
        the copies is multiplied by 1 + noise * (a standard normal number).

        Args:
            ids: experts to split, without repeats; None is all.
            factor: number of parts per expert, at least 1.
            mode: "slice" or "copy".
            noise: relative noise of mode="copy".

        Raises:
            ValueError: invalid ids, factor or mode, noise with slices, or a factor that does not
                divide I.

        Source: Dai et al. 2024 (fine-grained experts, arXiv 2401.06066); Zhao et al. 2024
        (FactorLLM, arXiv 2408.11855).
        """
        return expert_ops.split(self, ids, factor, mode, noise)

    def merge(
        self,
        groups: Sequence[Sequence[int]],
        weights: Tensor | Sequence[float] | None = None,
        *,
        mode: str = "mean",
        neuron_order: Tensor | None = None,
    ) -> Experts:
        """Returns new experts, one per group of old ones; experts in no group are dropped.

        mode="mean": the weighted mean of their parameters. Hidden neurons have no natural order, so
        separately trained experts should be aligned first: `neuron_order` permutes each expert's
        neurons before the mean (which does not change the expert's function). mode="concat":
        concatenates their neurons and adds their b_down. The new expert computes the sum of its
        members, with intermediate size I * (group size). This inverts `split` with mode="slice".

        Args:
            groups: lists of ids, each id at most once over all lists, no list empty.
            weights: [E] nonnegative weights of the mean, normalized in each group; None is equal
                weights. Only with mode="mean".
            mode: "mean" or "concat" (groups of equal size).
            neuron_order: [E, I] integers, each row a permutation of 0..I-1: neuron j of expert e is
                its old neuron neuron_order[e, j].

        Raises:
            ValueError: invalid groups, weights, mode or neuron_order.

        Source of the alignment before merging: Sarkar et al. 2024 (UNCURL, arXiv 2409.01483).
        """
        return expert_ops.merge(self, groups, weights, mode, neuron_order)

    def extra_repr(self) -> str:
        packed = packing.packed_weight_bytes(self)
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, "
            + (f"output_size={self.output_size}, " if self.output_size != self.hidden_size else "")
            + f"activation={self.activation!r}, "
            f"bias={self.b_down is not None}, interleaved={self.interleaved}"
            + (", fp8_training=True" if self.fp8_training else "")
            + (f", dispatcher={self.dispatcher!r}" if self.dispatcher is not None else "")
            + (f", packed={packed / 2**20:.1f} MiB" if packed else "")
        )


def activation_of(experts: Any) -> dict[str, Any]:
    """Returns the arguments of a layer of experts that say what is between its products."""
    return {name: getattr(experts, name) for name in ACTIVATION_OPTIONS}


def check_activation(name: str, activation: str, interleaved: bool) -> bool:
    """Returns whether the activation is gated; raises ValueError if it is unknown or cannot be
    interleaved."""
    if activation not in GATED_ACTIVATIONS + PLAIN_ACTIVATIONS:
        known = ", ".join(GATED_ACTIVATIONS + PLAIN_ACTIVATIONS)
        raise ValueError(f"{name}: activation must be one of {known}, got {activation!r}.")
    gated = activation in GATED_ACTIVATIONS
    if interleaved and not gated:
        raise ValueError(f"{name}: interleaved must be False for {activation!r}, got True.")
    return gated
