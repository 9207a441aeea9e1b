"""Frozen experts with trainable low-rank adapters.

Letters: T tokens, H hidden size, I intermediate size, E experts, K experts per token, r rank, M
adapters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops.expert_weights import is_quantized
from moe_ops.ops._checks import check_index, check_positive

from .expert_adapters import ExpertAdapter, adapted_experts, factors_of_peft, factors_to_peft
from .experts import Experts
from .inputs import takes_dense

FACTORS = ("a_gate_up", "b_gate_up", "a_down", "b_down")
# Prefixes of a weight's factors in peft, which wraps experts in a layer for w_gate_up, and that in
# one for w_down.
_PEFT_LAYERS = {"gate_up": "base_layer.", "down": ""}


class ExpertLoRA(nn.Module):
    """LoRA on every expert: W + alpha / r * B A, with float or quantized W.

    Example:
        layer.experts = ExpertLoRA(layer.experts, rank=16)

    The original experts are frozen and no longer called: their GEMMs and the rank-r GEMMs run on
    the same rows, sorted by expert, forward and backward, without storing W + B A. Backward keeps
    the pre-activation of the rows.

    Parameters: a_gate_up [E, r, H], b_gate_up [E, 2I, r] ([E, I, r] without a gate), a_down [E, r,
    I], b_down [E, H, r]; 1 instead of E for factors shared by all experts; with num_adapters, M as
    a second dimension.

    Args:
        experts: an `Experts` (O = H, no fp8_training) or a `QuantizedExperts` with all experts in
            this process. Its requires_grad is set to False.
        rank: r, at least 1.
        alpha: B A is multiplied by alpha / r; None is r.
        shared: names of factors shared by all experts, any of `FACTORS`.
        num_adapters: M, for serving several adapters, one per token; None is one adapter.
        device, dtype: of the parameters; None is the experts' device, and float32. GEMMs run in the
            dtype of x.

    Initialization: A uniform in +-1/sqrt(fan_in), B zeros, so that a new layer equals the original
    experts.

    Raises:
        ValueError: unsupported experts, a size below 1, or an unknown factor name.

    Source: Hu et al. 2021, LoRA (arXiv 2106.09685); Dettmers et al. 2023, QLoRA (arXiv 2305.14314).
    """

    def __init__(
        self,
        experts: nn.Module,
        rank: int,
        *,
        alpha: float | None = None,
        shared: Collection[str] = (),
        num_adapters: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        bank: Any = experts
        _check_bank(bank)
        check_positive("ExpertLoRA", rank=rank)
        if num_adapters is not None:
            check_positive("ExpertLoRA", num_adapters=num_adapters)
        unknown = [name for name in shared if name not in FACTORS]
        if unknown:
            raise ValueError(f"ExpertLoRA: shared must be of {FACTORS}, got {unknown[0]!r}.")
        self.experts = bank.requires_grad_(False)
        self.num_experts: int = bank.num_experts
        self.hidden_size: int = bank.hidden_size
        self.rank = rank
        self.alpha = float(rank if alpha is None else alpha)
        self.num_adapters = num_adapters
        self._adapter_ids: Tensor | None = None
        width = bank.w_gate_up.shape[1]
        sizes = (rank, bank.hidden_size), (width, rank), (rank, bank.intermediate_size)
        for name, size in zip(FACTORS, (*sizes, (bank.hidden_size, rank)), strict=True):
            lead = [1 if name in shared else self.num_experts]
            lead += [] if num_adapters is None else [num_adapters]
            where = bank.w_down.device if device is None else device
            empty = torch.empty(*lead, *size, device=where, dtype=dtype or torch.float32)
            setattr(self, name, nn.Parameter(empty))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial values described in the class docstring."""
        for name in FACTORS:
            factor = getattr(self, name)
            if name.startswith("a_"):
                bound = factor.shape[-1] ** -0.5
                nn.init.uniform_(factor, -bound, bound)
            else:
                nn.init.zeros_(factor)

    @property
    def scaling(self) -> float:
        """Returns alpha / r."""
        return self.alpha / self.rank

    @takes_dense
    def forward(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        adapter_ids: Tensor | None = None,
        apply_router_weight_on_input: bool = False,
        overlap: Callable[[], object] | None = None,
    ) -> Tensor:
        """Computes y[t] = sum_k topk_weights[t, k] * expert topk_ids[t, k] of x[t], with adapters.

        Args:
            x, topk_weights, topk_ids, apply_router_weight_on_input, overlap: see `Experts.forward`.
            adapter_ids: [T], integer, with num_adapters: the adapter of each token; ids outside [0,
                M) use none. None: the ids of `use`.

        Returns:
            y: [T, H] in the dtype of x. x, topk_weights and the factors have gradients, but no
            second derivatives.

        Raises:
            ValueError: adapter_ids without num_adapters, none with it, or of another length.
        """
        adapter_ids = self._adapter_ids if adapter_ids is None else adapter_ids
        if (adapter_ids is None) != (self.num_adapters is None):
            wanted = "None" if self.num_adapters is None else "[T]"
            got = "None" if adapter_ids is None else f"shape {list(adapter_ids.shape)}"
            raise ValueError(
                f"ExpertLoRA: adapter_ids must be {wanted} with num_adapters = "
                f"{self.num_adapters}, got {got}."
            )
        if adapter_ids is not None:
            check_index("ExpertLoRA", "adapter_ids", adapter_ids, "[T]", T=x.shape[0])
        if overlap is not None:
            overlap()
        factors = {name: getattr(self, name) for name in FACTORS}
        return adapted_experts(
            self.experts,
            x,
            topk_weights,
            topk_ids,
            [ExpertAdapter(**factors, scaling=self.scaling)],
            adapter_ids=adapter_ids,
            apply_router_weight_on_input=apply_router_weight_on_input,
        )

    @contextlib.contextmanager
    def use(self, adapter_ids: Tensor) -> Iterator[None]:
        """Sets `adapter_ids` [T] for calls inside the context, for example of a layer or model."""
        before, self._adapter_ids = self._adapter_ids, adapter_ids
        try:
            yield
        finally:
            self._adapter_ids = before

    @torch.no_grad()
    def merged(self, adapter: int = 0) -> Experts:
        """Returns trainable float experts with W + alpha / r * B A of one adapter.

        The dtype is that of the float experts, and torch's default dtype for quantized ones.
        x_scale of quantized experts is folded into the weights.
        """
        if is_quantized(self.experts):
            bank = self.experts.dequantize()
        else:
            bank = self.experts.select(range(self.num_experts)).requires_grad_(True)
        for part in ("gate_up", "down"):
            a, b = (self._one(f"{side}_{part}", adapter).float() for side in "ab")
            weight = getattr(bank, f"w_{part}")
            for e in range(self.num_experts):
                weight[e] += (b[e] @ a[e] * self.scaling).to(weight.dtype)
        return bank

    @torch.no_grad()
    def peft_state_dict(self, adapter: int = 0, prefix: str = "") -> dict[str, Tensor]:
        """Returns the factors of one adapter in peft's format, for an experts module whose
        gate_up_proj and down_proj are `target_parameters`, with alpha as lora_alpha and rank as r.

        Args:
            adapter: index in num_adapters.
            prefix: of the names, for instance "base_model.model.model.layers.0.mlp.experts.".

        Returns:
            base_layer.lora_A.weight [E * r, H] and base_layer.lora_B.weight [2I, r * E] for
            w_gate_up, lora_A.weight [E * r, I] and lora_B.weight [H, r * E] for w_down. Factors
            shared by all experts are repeated.
        """
        found = {}
        for part, layer in _PEFT_LAYERS.items():
            a, b = (self._one(f"{side}_{part}", adapter) for side in "ab")
            for side, factor in zip("AB", factors_to_peft(a, b), strict=True):
                found[f"{prefix}{layer}lora_{side}.weight"] = factor.clone()
        return found

    @torch.no_grad()
    def load_peft_state_dict(
        self, tensors: Mapping[str, Tensor], adapter: int = 0, prefix: str = ""
    ) -> None:
        """Loads the result of `peft_state_dict`, or an adapter saved by peft.

        Args:
            tensors: may contain other tensors.
            adapter, prefix: see `peft_state_dict`.

        Raises:
            ValueError: a tensor that is missing or has another shape, or factors shared by experts.
        """
        wanted = self.peft_state_dict(adapter, prefix)
        shared = [name for name in FACTORS if getattr(self, name).shape[0] != self.num_experts]
        if shared:
            raise ValueError(
                f"load_peft_state_dict: {shared[0]} must be of each expert, as peft's factors are, "
                "got one that all share."
            )
        for name, tensor in wanted.items():
            got = tensors.get(name)
            if got is None or got.shape != tensor.shape:
                what = "none" if got is None else f"shape {list(got.shape)}"
                wish = f"{name} must have shape {list(tensor.shape)}"
                raise ValueError(f"load_peft_state_dict: {wish}, got {what}.")
        for part, layer in _PEFT_LAYERS.items():
            a, b = (tensors[f"{prefix}{layer}lora_{side}.weight"] for side in "AB")
            for side, factor in zip("ab", factors_of_peft(a, b, self.num_experts), strict=True):
                self._one(f"{side}_{part}", adapter).copy_(factor)

    def _one(self, name: str, adapter: int) -> Tensor:
        """Returns a factor of one adapter, [E, ...], as a view."""
        factor: Tensor = getattr(self, name)
        if self.num_adapters is not None:
            factor = factor[:, adapter]
        return factor.expand(self.num_experts, -1, -1)

    def pack_weights(self) -> int:
        """Returns 0: the training GEMMs read unpacked weights."""
        return 0

    def unpack_weights(self) -> int:
        """Returns 0: there are no packed copies."""
        return 0

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, num_adapters={self.num_adapters}"


def _check_bank(bank: Any) -> None:
    if not (isinstance(bank, Experts) or is_quantized(bank)):
        raise ValueError(
            "ExpertLoRA: experts must be a moe_ops.layers.Experts or QuantizedExperts, got "
            f"{type(bank).__name__}."
        )
    size = getattr(bank, "output_size", bank.hidden_size)
    if size != bank.hidden_size:
        raise ValueError(
            f"ExpertLoRA: experts must have output_size = {bank.hidden_size} like their input, got "
            f"{size}."
        )
    if getattr(bank, "fp8_training", False):
        raise ValueError("ExpertLoRA: experts must not have fp8_training, got it on.")
    if bank.dispatcher is not None or bank.sharding is not None:
        raise ValueError("ExpertLoRA: experts must all be in this process, got a sharded bank.")
