"""Experts off the device: on disk or in CPU memory, with slots for a few of them on it.

    from moe_ops.offload import offload_experts

    cache = offload_experts(model, max_bytes=2**30, path="experts.safetensors")
    model.generate(tokens, 32)

`offload_experts` works for the layers of `moe_ops.layers`, the language models of the zoo and the
models of transformers that `moe_ops.hf` supports, float or quantised. Policies say which experts
stay in the slots and which are fetched ahead; `record_trace` records routes, from which `Belady`
knows the future and `train_predictor` makes a predictor for `Predicted`; `split_batch` groups
sequences that use the same experts.
"""

from __future__ import annotations

from .cache import CacheStats, ExpertCache
from .convert import offload_experts
from .experts import OffloadedExperts
from .policy import FIFO, LFU, LRU, Belady, Policy, Predicted
from .predictor import RoutePredictor, train_predictor
from .schedule import generate_in_halves, split_batch
from .store import ExpertStore, FileStore, MemoryStore, write_experts
from .trace import RoutingTrace, record_trace

__all__ = [
    "FIFO",
    "LFU",
    "LRU",
    "Belady",
    "CacheStats",
    "ExpertCache",
    "ExpertStore",
    "FileStore",
    "MemoryStore",
    "OffloadedExperts",
    "Policy",
    "Predicted",
    "RoutePredictor",
    "RoutingTrace",
    "generate_in_halves",
    "offload_experts",
    "record_trace",
    "split_batch",
    "train_predictor",
    "write_experts",
]
