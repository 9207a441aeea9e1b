"""A bank of experts whose weights are stored in few bits and do not change.

Letters: T tokens, H hidden size, I intermediate size, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops import memory, packing
from moe_ops._sharded import check_whole, local_part
from moe_ops.expert_weights import ExpertWeights
from moe_ops.formulas.codes import dequantized
from moe_ops.layers.expert_ops.rows import as_ids
from moe_ops.layers.experts import ACTIVATION_OPTIONS, Experts, activation_of, check_activation
from moe_ops.layers.inputs import takes_dense
from moe_ops.ops import moe_ffn_fp8, moe_ffn_quantized
from moe_ops.ops._checks import check_positive, dtype_name
from moe_ops.weight_formats import joined_label

from .formats import WEIGHTS, formats_of

_FROZEN = (*(name + part for name in WEIGHTS for part in ("", "_scale", "_zero")), "x_scale")


class QuantizedExperts(nn.Module):
    """`Experts` with weights of few bits: the same call, about a quarter of the memory.

    Buffers, not parameters; a state dict holds them as they are:

    Attributes:
        w_gate_up, w_down, and their `_scale` and `_zero` (or None): the tensors of a weight
            [E, 2I, H] and one [E, H, I] of their formats, see :func:`moe_ops.moe_ffn_quantized`.
        x_scale: fp32 [H], what x is multiplied by before w_gate_up, or None.
        b_gate_up, b_down: floating point, [E, 2I] and [E, H], or None.

    `.to(dtype)` and its kin change the biases only; weights and scales keep their types. x and
    topk_weights have gradients; nothing of the layer has one.

    Args:
        num_experts, hidden_size, intermediate_size: E, H and I, at least 1.
        format: the name of the weights' format, or of each: "int8", "int4 g64", "q4_k, q6_k".
        x_scale: whether there is an activation-aware scale of the input.
        activation, bias, interleaved, alpha, limit: as of `Experts`.
        device: of the buffers.
        dtype: of the biases.

    A new layer computes zeros. `moe_ops.quantize` makes one of `Experts`; `load_state_dict` fills
    one from a file.

    Raises:
        ValueError: a size below 1, an unknown format or activation, groups that do not divide.
    """

    quantized_bank = True
    # Of expert parallelism, as in `Experts`.
    dispatcher: Callable[..., Tensor] | None = None
    sharding: Any = None
    w_gate_up: Tensor
    w_gate_up_scale: Tensor
    w_gate_up_zero: Tensor | None
    w_down: Tensor
    w_down_scale: Tensor
    w_down_zero: Tensor | None
    x_scale: Tensor | None
    b_gate_up: Tensor | None
    b_down: Tensor | None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        format: str = "int4 g64",
        x_scale: bool = False,
        activation: str = "swiglu",
        bias: bool = False,
        interleaved: bool = False,
        alpha: float = 1.702,
        limit: float = 7.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
        check_positive(name, num_experts=num_experts, **sizes)
        self.formats = formats_of(name, format, (hidden_size, intermediate_size))
        self.format = joined_label(self.formats)
        self._all_fp8 = self.format == "fp8"
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.activation = activation
        self.gated = check_activation(name, activation, interleaved)
        self.interleaved = interleaved
        self.alpha = alpha
        self.limit = limit
        # Which exponent `quantize` found best; not kept in the state dict.
        self.scale_exponent: float | None = None

        width = intermediate_size * (2 if self.gated else 1)
        where: dict[str, Any] = {"device": device}
        for weight, out, size in (
            ("w_gate_up", width, hidden_size),
            ("w_down", hidden_size, intermediate_size),
        ):
            tensors = self.formats[weight].tensors(out, size)
            for part in ("", "_scale", "_zero"):
                zeros = None
                if part in tensors:
                    shape, kind = tensors[part]
                    zeros = memory.new_zeros(num_experts, *shape, dtype=kind, **where)
                self.register_buffer(weight + part, zeros)
        ones = torch.ones(hidden_size, dtype=torch.float32, **where) if x_scale else None
        self.register_buffer("x_scale", ones)
        for b, size in (("b_gate_up", width), ("b_down", hidden_size)):
            values = torch.zeros(num_experts, size, dtype=dtype, **where) if bias else None
            self.register_buffer(b, values)

    @classmethod
    def for_weights(
        cls,
        weights: ExpertWeights,
        *,
        format: str,
        x_scale: bool = False,
    ) -> QuantizedExperts:
        """Returns a layer that can take the place of `weights`, its buffers not filled.

        Raises:
            ValueError: sizes that the groups do not divide.
        """
        return cls(
            weights.num_experts,
            weights.hidden_size,
            weights.intermediate_size,
            format=format,
            x_scale=x_scale,
            bias=weights.b_down is not None,
            device=weights.down.device,
            dtype=None if weights.b_down is None else weights.b_down.dtype,
            **weights.activation,
        )

    @takes_dense
    def forward(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        apply_router_weight_on_input: bool = False,
        overlap: Callable[[], object] | None = None,
    ) -> Tensor:
        """y[t] = sum_k topk_weights[t, k] * expert topk_ids[t, k] of x[t], as `Experts`.

        Args:
            x: [T, H], float32, bfloat16 or float16.
            topk_weights: [T, K] float, used in fp32.
            topk_ids: [T, K] int32 or int64; ids outside [0, E) contribute nothing.
            apply_router_weight_on_input: multiply x[t] by the weight instead (Llama 4).
            overlap: as of `Experts.forward`.

        Returns:
            y: [T, H] in the dtype of x.
        """
        return self.run(x, topk_weights, topk_ids, apply_router_weight_on_input, overlap)

    def forward_local(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        apply_router_weight_on_input: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """`forward` by the experts that this process has, as `Experts.forward_local`; out_dtype is
        given to a sum that is rounded to the dtype of x."""
        y = self._run(x, topk_weights, topk_ids, apply_router_weight_on_input)
        return y if out_dtype is None else y.to(out_dtype)

    def run(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool = False,
        overlap: Callable[[], object] | None = None,
    ) -> Tensor:
        """`forward`, whatever a subclass makes of that."""
        if self.dispatcher is not None:
            how: dict[str, Any] = {"apply_router_weight_on_input": apply_router_weight_on_input}
            return self.dispatcher(self, x, topk_weights, topk_ids, overlap=overlap, **how)
        if overlap is not None:
            overlap()
        return self._run(x, topk_weights, topk_ids, apply_router_weight_on_input)

    def _run(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, on_input: bool) -> Tensor:
        # A module finds a buffer by __getattr__, which for seven takes as long as a small layer.
        b: dict[str, Any] = self._buffers
        b_gate_up, b_down = b["b_gate_up"], b["b_down"]
        weights = (
            local_part(b["w_gate_up"]),
            local_part(b["w_gate_up_scale"]),
            local_part(b["w_down"]),
            local_part(b["w_down_scale"]),
        )
        how: dict[str, Any] = {
            "b_gate_up": None if b_gate_up is None else local_part(b_gate_up).to(x.dtype),
            "b_down": None if b_down is None else local_part(b_down).to(x.dtype),
            "apply_router_weight_on_input": on_input,
            "activation": self.activation,
            "interleaved": self.interleaved,
            "alpha": self.alpha,
            "limit": self.limit,
        }
        if self._all_fp8 and self._takes_fp8(x, topk_weights):
            return moe_ffn_fp8(x, *weights, topk_weights, topk_ids, **how)
        for name in ("w_gate_up_zero", "w_down_zero"):
            if (zero := b[name]) is not None:
                how[name] = local_part(zero)
        how["format"], how["x_scale"] = self.format, b["x_scale"]
        return moe_ffn_quantized(x, *weights, topk_weights, topk_ids, **how)

    def _takes_fp8(self, x: Tensor, topk_weights: Tensor) -> bool:
        """Returns whether tokens may be rounded to fp8 too, as these checkpoints are meant to be
        run. There is no gradient through that."""
        wanted = torch.is_grad_enabled() and (x.requires_grad or topk_weights.requires_grad)
        return not wanted and self.x_scale is None

    def dequantize(self, dtype: torch.dtype | None = None) -> Experts:
        """A float bank that computes the same, its weights rounded as here; x_scale is in them.

        Args:
            dtype: of its parameters; None is torch's default dtype.
        """
        self._check_whole("dequantize")
        result = Experts(
            self.num_experts,
            self.hidden_size,
            self.intermediate_size,
            bias=self.b_down is not None,
            device="meta",
            **activation_of(self),
        )
        target = torch.get_default_dtype() if dtype is None else dtype
        where: dict[str, Any] = {"dtype": target, "device": self.w_down.device}
        scale = 1.0 if self.x_scale is None else self.x_scale
        result.w_gate_up = nn.Parameter(torch.empty(result.w_gate_up.shape, **where))
        result.w_down = nn.Parameter(torch.empty(result.w_down.shape, **where))
        with torch.no_grad():
            for e in range(self.num_experts):
                result.w_gate_up[e].copy_(self.weight_of("w_gate_up", e) * scale)
                result.w_down[e].copy_(self.weight_of("w_down", e))
        for name in ("b_gate_up", "b_down"):
            bias = getattr(self, name)
            if bias is not None:
                setattr(result, name, nn.Parameter(bias.to(target, copy=True)))
        return result.train(self.training)

    def weight_of(self, name: str, expert: int) -> Tensor:
        """w_gate_up [2I, H] or w_down [H, I] of one expert, float32; x_scale is not in it."""
        codes, scale, zero = (getattr(self, name + part) for part in ("", "_scale", "_zero"))
        zero = None if zero is None else zero[expert]
        how: dict[str, Any] = {"format": self.formats[name].label, "dtype": torch.float32}
        return dequantized(codes[expert], scale[expert], zero, **how)

    def select(self, ids: Sequence[int] | Tensor) -> QuantizedExperts:
        """A new bank of the experts `ids`, in that order (repeats allowed).

        Raises:
            ValueError: no id, or one outside [0, E).
        """
        self._check_whole("select")
        index = as_ids("QuantizedExperts.select", ids, self.num_experts)
        rows = torch.tensor(index, device=self.w_down.device)
        result = type(self)(len(index), device="meta", **self.config())
        for name, buffer in self.named_buffers(recurse=False):
            setattr(result, name, buffer.clone() if name == "x_scale" else buffer[rows])
        result.scale_exponent = self.scale_exponent
        return result.train(self.training)

    def append(self, *_: Any, **__: Any) -> QuantizedExperts:
        """Not for quantized banks; as `split` and `merge`, it raises NotImplementedError."""
        raise self._only_float("append")

    def split(self, *_: Any, **__: Any) -> QuantizedExperts:
        """See `append`."""
        raise self._only_float("split")

    def merge(self, *_: Any, **__: Any) -> QuantizedExperts:
        """See `append`."""
        raise self._only_float("merge")

    def _check_whole(self, operation: str) -> None:
        name = f"QuantizedExperts.{operation}"
        check_whole(name, "w_gate_up", self.w_gate_up, f"{operation} before sharding the model")

    def _only_float(self, operation: str) -> NotImplementedError:
        return NotImplementedError(
            f"QuantizedExperts: {operation} needs float weights; call dequantize(), {operation}, "
            "and quantize the result."
        )

    def pack_weights(self) -> int:
        """Warns and returns 0: the kernels read the quantized weights as they lie."""
        return packing.pack_weights(self)

    def unpack_weights(self) -> int:
        """Nothing to drop; returns 0."""
        return 0

    def config(self) -> dict[str, Any]:
        """The arguments of the class besides num_experts, device and dtype."""
        names = ("hidden_size", "intermediate_size", "format", *ACTIVATION_OPTIONS)
        return {
            **{name: getattr(self, name) for name in names},
            "x_scale": self.x_scale is not None,
            "bias": self.b_down is not None,
        }

    @property
    def num_bytes(self) -> int:
        """Memory of all buffers."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    @property
    def format_name(self) -> str:
        """ "int8", "int4 g64", or "q4_k, q6_k" of w_gate_up and w_down."""
        return self.format

    def stand_in(self, bank: nn.Module) -> nn.Module:
        """Returns what is to take this module's place for `bank`, which is called as `Experts`
        are."""
        return bank

    def move_to_huge_pages(self) -> None:
        """Moves weights and scales to huge pages, see `moe_ops.memory`.

        The buffers of a new layer lie there already; those of a checkpoint that was mapped, or that
        `load_state_dict(assign=True)` put here, do not, and to move them takes time.
        """
        memory.use_huge_pages(self.w_gate_up, self.w_gate_up_scale, self.w_down, self.w_down_scale)

    def check(self, name: str = "QuantizedExperts") -> None:
        """Raises ValueError where a buffer does not have the type and shape of the format."""
        wanted = type(self)(self.num_experts, device="meta", **self.config())
        for key, buffer in wanted.named_buffers(recurse=False):
            problem = _mismatch(key, getattr(self, key), buffer)
            if problem:
                raise ValueError(f"{name}: {problem}")

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, format={self.format_name!r}, "
            f"activation={self.activation!r}, bias={self.b_down is not None}, "
            f"interleaved={self.interleaved}, x_scale={self.x_scale is not None}, "
            f"size={self.num_bytes / 2**20:.1f} MiB"
        )

    # ------------------------------------------------------------------------------ module hooks

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedExperts:
        before = {name: getattr(self, name) for name in _FROZEN}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if old is not None and new.dtype != old.dtype:
                # A cast, perhaps with a move: numbers of 8 bits and their scales have one type.
                on_meta = "meta" in (old.device.type, new.device.type)
                same = torch.empty_like(old, device=new.device) if on_meta else old.to(new.device)
                self._buffers[name] = same
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        # torch checks shapes only: copying would round float weights to integers without a word.
        problems = []
        for name, buffer in self.named_buffers(recurse=False):
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and name in _FROZEN:
                problem = _mismatch(prefix + name, value, buffer)
                if problem:
                    problems.append(f"{type(self).__name__}: {problem}")
        if problems:
            error_messages = others[-1]
            error_messages.extend(problems)
            return
        super()._load_from_state_dict(state_dict, prefix, *others)


def _mismatch(name: str, got: Tensor | None, wanted: Tensor) -> str | None:
    frozen = name.rpartition(".")[2] in _FROZEN
    if got is not None and got.shape == wanted.shape:
        if got.dtype == wanted.dtype or (not frozen and got.is_floating_point()):
            return None
    kind = dtype_name(wanted.dtype) if frozen else "floating point"
    what = "none" if got is None else f"{dtype_name(got.dtype)} of shape {list(got.shape)}"
    return f"{name} must be {kind} of shape {list(wanted.shape)}, got {what}."
