"""Offloading of experts to disk or CPU memory, with a cache for a few of them on the device.

Example:
    from moe_ops.offload import offload_experts

    cache = offload_experts(model, max_bytes=2**30, path="experts.safetensors")
    model.generate(tokens, 32)

`offload_experts` works for the layers of `moe_ops.layers`, the language models of the zoo and the
models of transformers that `moe_ops.hf` supports, float or quantized. Policies determine which
experts stay in the cache and which are prefetched; `record_expert_trace` records routes, which
`BeladyPolicy` uses as the known future, and from which `train_predictor` trains a predictor for
`PredictivePolicy`; `split_batch_by_experts` groups sequences that use similar experts.
"""

from __future__ import annotations

from .cache import ExpertCache
from .convert import offload_experts
from .experts import OffloadedExperts
from .policy import BeladyPolicy, CachePolicy, PredictivePolicy
from .predictor import ExpertPredictor, train_predictor
from .schedule import generate_in_halves, split_batch_by_experts
from .store import ExpertStore, save_experts
from .trace import ExpertTrace, record_expert_trace

__all__ = [
    "BeladyPolicy",
    "CachePolicy",
    "ExpertCache",
    "ExpertPredictor",
    "ExpertStore",
    "ExpertTrace",
    "OffloadedExperts",
    "PredictivePolicy",
    "generate_in_halves",
    "offload_experts",
    "record_expert_trace",
    "save_experts",
    "split_batch_by_experts",
    "train_predictor",
]
