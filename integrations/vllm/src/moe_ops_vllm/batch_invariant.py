"""vLLM's dense layers and attention in the batch-invariant mode.

vLLM's kernels for dense layers choose the order of a sum by the number of rows. Its attention
splits the keys of a query over threads, and cuts keys into tiles whose size depends on the queries
of a request in this step, and so on how a prompt was cut into chunks.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from moe_ops.layers.functional import linear
from moe_ops_vllm import base


class _EmbeddingMethod(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """Embeddings and LM heads: the weight is as it was loaded."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pass

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, layer.weight, bias)


class _LinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Computes with the float weight that another method stands for."""

    def __init__(self, method: LinearMethodBase) -> None:
        self.method = method

    def create_weights(self, *args: Any, **options: Any) -> None:
        self.method.create_weights(*args, **options)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if isinstance(self.method, UnquantizedLinearMethod):
            return
        self.method.process_weights_after_loading(layer)
        depth = getattr(layer, "input_size_per_partition", None) or layer.embedding_dim
        eye = torch.eye(depth, dtype=get_current_vllm_config().model_config.dtype)
        weight = self.method.apply(layer, eye)
        if not torch.equal(self.method.apply(layer, eye / 2), weight / 2):
            kind = type(self.method).__name__
            raise ValueError(
                f"the batch-invariant mode needs linear maps, but {kind} rounds inputs of "
                f"{layer.prefix} to a fixed range"
            )
        for name in [name for name in layer._parameters if name != "bias"]:
            delattr(layer, name)
        base.replace(layer, "weight", weight.T.contiguous())

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, layer.weight, None if bias is None else bias.to(x.dtype))


class _BatchInvariant:
    """The part of a layer that replaces its method after vLLM has created its parameters."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        base.mark(get_current_vllm_config())
        method: Any = self.quant_method
        if isinstance(method, UnquantizedEmbeddingMethod):
            self.quant_method = _EmbeddingMethod()
        elif isinstance(method, LinearMethodBase):
            self.quant_method = _LinearMethod(method)


# vLLM's class -> the class to build in its place.
CLASSES: dict[str, Any] = {
    cls.__name__: type(f"BatchInvariant{cls.__name__}", (_BatchInvariant, cls), {})
    for cls in (
        ReplicatedLinear,
        ColumnParallelLinear,
        MergedColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
        GateLinear,
        VocabParallelEmbedding,
        ParallelLMHead,
    )
}


class _MetadataBuilder(CPUAttentionMetadataBuilder):  # type: ignore[misc]
    """Describes each token to the kernel as a request of one query, as in decoding."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        step = common_attn_metadata
        if self.is_cross_attention or self.is_encoder_only_attention or step.causal is not True:
            raise ValueError("the batch-invariant mode computes causal attention of decoders alone")
        starts = step.query_start_loc
        count = step.num_actual_tokens
        row = torch.repeat_interleave(starts.diff().long(), output_size=count)
        token = torch.arange(count + 1, dtype=starts.dtype)
        after = starts[row + 1] - 1 - token[:-1]  # tokens of the request after this one
        by_token = replace(
            step,
            query_start_loc=token,
            query_start_loc_cpu=token,
            seq_lens=step.seq_lens[row] - after,
            num_reqs=count,
            max_query_len=1,
            block_table_tensor=step.block_table_tensor[row],
        )
        return super().build(common_prefix_len, by_token, fast_build)


class AttentionBackend(CPUAttentionBackend):  # type: ignore[misc]
    """vLLM's attention, token by token."""

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return _MetadataBuilder


def register_attention() -> None:
    """Makes vLLM use `AttentionBackend`, and no split of keys."""
    os.environ["VLLM_CPU_ATTN_SPLIT_KV"] = "0"
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.AttentionBackend")
