"""Overrides that run the routed experts of torchtitan's models on moe_ops.

torchtitan imports this module when a run names one of its functions::

    torchrun --nproc-per-node 8 -m torchtitan.train --module deepseek_v3 \\
        --config deepseek_v3_debugmodel --override.imports moe_ops.torchtitan.moe_ffn

Parameters keep torchtitan's names, shapes and sharding, so a checkpoint of a run with an override
loads in a run without it, and the reverse. As in torchtitan, experts compute in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_ops import ops

try:
    from torchtitan.config import derive, override
    from torchtitan.models.common.moe import GroupedExperts
    from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts, ScaleBiasForward
except ImportError as error:
    raise ImportError(
        "moe_ops.torchtitan needs torchtitan 0.3.0: pip install torchtitan==0.3.0 triton "
        f"(the import failed with: {error})."
    ) from error

__all__ = ["grouped_gemm", "moe_ffn"]


def _grouped_mm(a: Tensor, b_t: Tensor, ends: Tensor) -> Tensor:
    return ops.grouped_gemm(a, b_t.transpose(-2, -1), F.pad(ends, (1, 0)))


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _routing(rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Returns topk_weights [R, 1] and topk_ids [R, 1] for rows [R, D] sorted by expert and the
    number of rows per expert [E]. Rows past the last expert's get id E, an empty slot."""
    row = torch.arange(rows.shape[0], device=rows.device)
    ids = torch.bucketize(row, counts.cumsum(0), right=True, out_int32=True)[:, None]
    return torch.ones_like(ids, dtype=torch.float32), ids


class GroupedGemmExperts(GroupedExperts):
    """torchtitan's experts with `moe_ops.grouped_gemm` for their three GEMMs."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def _grouped_mm(self, *, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
        return _grouped_mm(A, B_t, offs)


class GptOssGroupedGemmExperts(GptOssGroupedExperts):
    """torchtitan's gpt-oss experts with `moe_ops.grouped_gemm` for their two GEMMs."""

    @dataclass(kw_only=True, slots=True)
    class Config(GptOssGroupedExperts.Config):
        pass

    def _grouped_mm(self, *, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
        return _grouped_mm(A, B_t, offs)


class FusedExperts(GroupedExperts):
    """torchtitan's experts as one call of `moe_ops.moe_ffn`."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        w1, w2, w3 = (_local(w).bfloat16() for w in (self.w1_EFD, self.w2_EDF, self.w3_EFD))
        routing = _routing(x_RD, num_tokens_per_expert_E)
        y = ops.moe_ffn(x_RD.bfloat16(), torch.cat([w1, w3], dim=1), w2, *routing)
        return y.type_as(x_RD)


class GptOssFusedExperts(GptOssGroupedExperts):
    """torchtitan's gpt-oss experts as one call of `moe_ops.moe_ffn`."""

    @dataclass(kw_only=True, slots=True)
    class Config(GptOssGroupedExperts.Config):
        pass

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        tp_degree = 1
        if isinstance(self.mlp1_weight_EGD, DTensor):
            mesh = self.mlp1_weight_EGD.device_mesh
            if "tp" in (mesh.mesh_dim_names or ()):
                tp_degree = mesh["tp"].size()
        # Outputs of tensor-parallel ranks are added up, so each adds its share of the bias.
        b_down = ScaleBiasForward.apply(_local(self.mlp2_bias_ED), tp_degree, torch.bfloat16)
        return ops.moe_ffn(
            x_RD.bfloat16(),
            _local(self.mlp1_weight_EGD).bfloat16(),
            _local(self.mlp2_weight_EDF).bfloat16(),
            *_routing(x_RD, num_tokens_per_expert_E),
            b_gate_up=_local(self.mlp1_bias_EG).bfloat16(),
            b_down=b_down,
            activation="swiglu_oai",
            interleaved=True,
            limit=self.swiglu_limit,
        )


def _replace(name: str, cfg: GroupedExperts.Config, experts: type, gpt_oss: type) -> object:
    if type(cfg) is GroupedExperts.Config:
        return derive(cfg, experts.Config)  # type: ignore[attr-defined]
    if type(cfg) is GptOssGroupedExperts.Config:
        return derive(cfg, gpt_oss.Config)  # type: ignore[attr-defined]
    raise ValueError(
        f"moe_ops.torchtitan.{name}: cfg must be GroupedExperts.Config or "
        f"GptOssGroupedExperts.Config of torchtitan, got {type(cfg).__qualname__}."
    )


@override(target=GroupedExperts.Config, description="Grouped GEMMs of moe_ops.")
def grouped_gemm(cfg: GroupedExperts.Config) -> object:
    """Replaces `torch._grouped_mm` in all routed experts by `moe_ops.grouped_gemm`.

    Args:
        cfg: config of the experts of one layer; torchtitan passes it.

    Returns:
        The config with which torchtitan builds the layer's experts.

    Raises:
        ValueError: the config of experts with another formula or of a low-precision variant.
    """
    return _replace("grouped_gemm", cfg, GroupedGemmExperts, GptOssGroupedGemmExperts)


@override(target=GroupedExperts.Config, description="Expert FFN of moe_ops in one op.")
def moe_ffn(cfg: GroupedExperts.Config) -> object:
    """Replaces all routed experts by one call of `moe_ops.moe_ffn` per layer.

    It saves the pre-activation for backward, but not the activation. The activation is computed
    from unrounded fp32 sums, so results differ from torchtitan's by rounding to bfloat16.

    Args:
        cfg: config of the experts of one layer; torchtitan passes it.

    Returns:
        The config with which torchtitan builds the layer's experts.

    Raises:
        ValueError: the config of experts with another formula or of a low-precision variant.
    """
    return _replace("moe_ffn", cfg, FusedExperts, GptOssFusedExperts)
