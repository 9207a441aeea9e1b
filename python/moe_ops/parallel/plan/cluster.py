"""Properties of a cluster, and the parallelism of a job on it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from moe_ops._fields import check_names

GIB = 2**30


@dataclass(frozen=True)
class Cluster:
    """Ranks (one device each) and their links.

    Rates are those of good kernels, about half to three quarters of a data sheet's peak.

    Attributes:
        ranks, ranks_per_node: number of devices, and of devices in a domain with fast links
            (NVLink).
        memory: bytes per device.
        flops: floating point operations per second of bfloat16 GEMMs.
        memory_bandwidth: bytes per second of the device's memory.
        intra_bandwidth, inter_bandwidth: bytes per second and direction of a device, within its
            node and to other nodes.
        latency: seconds of a collective without data, within a node.
        inter_latency: seconds of a collective without data, across nodes.
    """

    ranks: int
    ranks_per_node: int = 8
    memory: int = 80 * GIB
    flops: float = 500e12
    memory_bandwidth: float = 2.6e12
    intra_bandwidth: float = 300e9
    inter_bandwidth: float = 45e9
    latency: float = 20e-6
    inter_latency: float = 40e-6

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if (
                not math.isfinite(value)
                or value < 0
                or (value == 0 and "latency" not in field.name)
            ):
                raise ValueError(f"plan: {field.name} must be above 0, got {value}.")

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.ranks_per_node)


# Rates of the H100 and H800 are close to published measurements (docs/parallel.md); others are the
# same fractions of the data sheets' peaks.
CLUSTERS: dict[str, dict[str, Any]] = {
    "h100": {},
    "h200": {"memory": 141 * GIB, "memory_bandwidth": 3.8e12},
    "h800": {"intra_bandwidth": 155e9},
    "b200": {
        "memory": 180 * GIB,
        "flops": 1100e12,
        "memory_bandwidth": 6.2e12,
        "intra_bandwidth": 600e9,
    },
    "gb200_nvl72": {
        "ranks_per_node": 72,
        "memory": 186 * GIB,
        "flops": 1200e12,
        "memory_bandwidth": 6.2e12,
        "intra_bandwidth": 600e9,
    },
    "a100": {
        "flops": 180e12,
        "memory_bandwidth": 1.6e12,
        "intra_bandwidth": 200e9,
        "inter_bandwidth": 22e9,
    },
}


def find_cluster(name: str, ranks: int, **changes: Any) -> Cluster:
    """Returns a cluster of a preset, with values replaced by those that are not None.

    Raises:
        ValueError: an unknown preset or attribute, or an invalid value.
    """
    key = name.lower().replace("-", "_")
    if key not in CLUSTERS:
        raise ValueError(f"plan: cluster must be one of {', '.join(CLUSTERS)}, got {name!r}.")
    changes = {k: v for k, v in changes.items() if v is not None}
    check_names(Cluster, changes, "plan")
    return Cluster(ranks, **{**CLUSTERS[key], **changes})


@dataclass(frozen=True)
class ParallelJob:
    """Workload of a cluster, and its parallelism.

    Attributes:
        ep: ranks that share the experts.
        tp: ranks of tensor parallelism, for attention and dense networks; each passes its own
            tokens to the experts (sequence parallelism).
        fsdp: ranks over which FSDP2 shards dense weights; experts are sharded over fsdp * tp / ep.
            1 disables sharding. None is all ranks of data parallelism in training, and 1 in
            inference.
        tokens: T, per rank and forward.
        context: tokens per sequence, which determine the cost of attention.
        training: forward, backward and Adam with float32 master weights; else only forward.
        dtype: "bfloat16", "float16" or "float32", of weights in use, activations and traffic.
        recompute: activation checkpointing of every block (training).
        fp8: rows are sent as float8_e4m3fn (dispatchers "slots" and "tokens").
        fp32_combine: results return in float32 and are rounded once.
        dispatch: see `moe_ops.parallel.make_dispatcher`.
        same_bits, shared_batch: see `make_dispatcher`.
        imbalance: the busiest rank's tokens over the mean; sizes are those of the busiest rank.
        redundant: physical experts per rank beyond E / n.
    """

    ep: int
    tp: int = 1
    fsdp: int | None = None
    tokens: int = 4096
    context: int = 4096
    training: bool = True
    dtype: str = "bfloat16"
    recompute: bool = False
    fp8: bool = False
    fp32_combine: bool = False
    dispatch: str = "auto"
    same_bits: bool = False
    shared_batch: bool = False
    imbalance: float = 1.0
    redundant: int = 0

    def __post_init__(self) -> None:
        for name in ("ep", "tp", "tokens", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"plan: {name} must be at least 1, got {getattr(self, name)}.")
        if self.dtype not in ELEMENT_SIZES:
            raise ValueError(
                f"plan: dtype must be one of {', '.join(ELEMENT_SIZES)}, got {self.dtype!r}."
            )
        if not 1 <= self.imbalance < math.inf:
            raise ValueError(f"plan: imbalance must be at least 1, got {self.imbalance}.")
        if self.redundant < 0:
            raise ValueError(f"plan: redundant must be at least 0, got {self.redundant}.")

    @property
    def element_size(self) -> int:
        return ELEMENT_SIZES[self.dtype]

    @property
    def result_size(self) -> int:
        """Returns the bytes per element of the experts' returned results."""
        return 4 if self.fp32_combine else self.element_size


ELEMENT_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Layout:
    """Validated sizes of all groups of ranks.

    Attributes:
        dp, efsdp: see `moe_ops.parallel.init_moe_meshes`: ranks / tp and ranks / ep.
        dense_shards, expert_shards: ranks over which FSDP2 shards dense weights and experts; 1 is
            no sharding.
    """

    ranks: int
    ep: int
    tp: int
    dp: int
    efsdp: int
    dense_shards: int
    expert_shards: int

    @classmethod
    def of(cls, cluster: Cluster, job: ParallelJob) -> Layout:
        """Returns the layout; raises ValueError if sizes do not divide each other."""
        ranks = cluster.ranks
        for name, size in (("ep", job.ep), ("tp", job.tp)):
            if ranks % size:
                raise ValueError(f"plan: {name} must divide the {ranks} ranks, got {size}.")
        dp, efsdp = ranks // job.tp, ranks // job.ep
        shards = job.fsdp or (dp if job.training else 1)
        if shards < 1 or dp % shards:
            raise ValueError(
                f"plan: fsdp must divide the {dp} ranks of data parallelism, got {shards}."
            )
        experts = max(1, shards * job.tp // job.ep) if shards > 1 else 1
        if efsdp % experts:
            raise ValueError(
                f"plan: fsdp * tp / ep must divide the {efsdp} ranks that have the same experts, "
                f"got {experts}."
            )
        return cls(ranks, job.ep, job.tp, dp, efsdp, shards, experts)
