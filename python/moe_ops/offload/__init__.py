"""Experts off the device: on disk or in CPU memory, with slots for a few of them on it.

    from moe_ops.offload import offload_experts

    cache = offload_experts(model, max_bytes=2**30, path="experts.safetensors")
    model.generate(tokens, 32)

`offload_experts` works for the layers of `moe_ops.layers`, the language models of the zoo and the
models of transformers that `moe_ops.hf` supports, float or quantized. Policies say which experts
stay in the slots and which are fetched ahead; `record_expert_trace` records routes, from which
`BeladyPolicy` knows the future and `train_predictor` makes a predictor for `PredictivePolicy`;
`split_batch_by_experts` groups sequences that use the same experts.
"""

from __future__ import annotations

from .cache import CacheStats, ExpertCache
from .convert import offload_experts
from .experts import OffloadedExperts
from .policy import BeladyPolicy, CachePolicy, PredictivePolicy
from .predictor import ExpertPredictor, train_predictor
from .schedule import generate_in_halves, split_batch_by_experts
from .store import ExpertStore, FileStore, MemoryStore, save_experts
from .trace import ExpertTrace, record_expert_trace

__all__ = [
    "BeladyPolicy",
    "CachePolicy",
    "CacheStats",
    "ExpertCache",
    "ExpertPredictor",
    "ExpertStore",
    "ExpertTrace",
    "FileStore",
    "MemoryStore",
    "OffloadedExperts",
    "PredictivePolicy",
    "generate_in_halves",
    "offload_experts",
    "record_expert_trace",
    "save_experts",
    "split_batch_by_experts",
    "train_predictor",
]
