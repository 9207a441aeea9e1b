"""Time of a layer and a step, from operations, bytes and the rates of a cluster.

Times are lower bounds: GEMMs at the rate of good kernels, or reading the weights once, whichever is
longer; collectives at the rates of links, using links within and across nodes concurrently.

Letters: n ranks of a group, m of them in one node.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .cluster import Cluster, Layout, ParallelJob
from .memory import Memory
from .shape import Matrix, ModelShape, count
from .traffic import Message, layer_messages, local_experts

# Bytes that Adam reads and writes per weight: itself, its gradient, two moments, all float32.
_ADAM_BYTES = 28
_WAY_OUT = ("sizes", "dispatch", "weights")


@dataclass(frozen=True)
class Pass:
    """Seconds of one layer in one direction.

    Attributes:
        attention: with the router, without norms.
        shared: shared experts, or the network of a dense layer.
        experts: of this rank.
        dispatch, combine: collectives before and after the experts (reversed in backward).
        sharding: FSDP2's collectives.
    """

    attention: float
    shared: float
    experts: float
    dispatch: float
    combine: float
    sharding: float

    @property
    def compute(self) -> float:
        return self.attention + self.shared + self.experts

    @property
    def communication(self) -> float:
        return self.dispatch + self.combine + self.sharding

    @property
    def hidden(self) -> float:
        """Returns overlapped communication: shared experts overlap the dispatch, and FSDP2
        prefetches a layer."""
        return min(self.dispatch, self.shared) + min(self.sharding, self.compute)

    @property
    def total(self) -> float:
        return self.compute + self.communication - self.hidden


@dataclass(frozen=True)
class Time:
    """Seconds: of a layer with experts, of one without, of the embedding, head and Adam, and of a
    whole step. Backward is None in inference."""

    forward: Pass
    backward: Pass | None
    dense_forward: Pass
    dense_backward: Pass | None
    ends: float
    step: float

    @property
    def layer(self) -> list[Pass]:
        return [p for p in (self.forward, self.backward) if p is not None]


def timing(shape: ModelShape, cluster: Cluster, job: ParallelJob, memory: Memory) -> Time:
    """Computes the minimum time of a step with this library's overlap."""
    layout = Layout.of(cluster, job)
    passes = [
        _pass(shape, cluster, job, layout, moe, phase)
        for moe in (True, False)
        for phase in ("forward", "backward")[: 2 if job.training else 1]
    ]
    half = len(passes) // 2
    times = 3 if job.training else 1
    ends = times * _products([Matrix(shape.vocab_size, shape.hidden_size)], cluster, job)
    if job.training:
        ends += (memory.experts + memory.dense) / 4 * _ADAM_BYTES / cluster.memory_bandwidth
    step = ends + shape.num_moe_layers * sum(p.total for p in passes[:half])
    step += shape.num_dense_layers * sum(p.total for p in passes[half:])
    backward = (passes[1], passes[3]) if job.training else (None, None)
    return Time(passes[0], backward[0], passes[half], backward[1], ends, step)


def seconds(message: Message, cluster: Cluster, layout: Layout) -> float:
    """Returns the time of one collective."""
    n, m = _group(message.group, cluster, layout)
    size = max(message.sent, message.received)
    if n == 1 or not size:
        return 0.0
    outside = size * (n - m) / (n - 1)
    if message.kind == "all_to_all":
        inside = size - outside
    else:
        # Data of other nodes arrives once, through the links of all m ranks.
        inside, outside = size, outside / m
    latency = cluster.latency if n == m else cluster.inter_latency
    return max(inside / cluster.intra_bandwidth, outside / cluster.inter_bandwidth) + latency


def _group(name: str, cluster: Cluster, layout: Layout) -> tuple[int, int]:
    """Returns the ranks of a group, and the number of them in one node. Ranks that share experts
    are neighbors."""
    n, stride = {
        "ep": (layout.ep, 1),
        "tp": (layout.tp, 1),
        "dp": (layout.dense_shards, layout.tp),
        "efsdp": (layout.expert_shards, layout.ep),
        "dp copies": (layout.dp // layout.dense_shards, layout.dense_shards * layout.tp),
        "efsdp copies": (layout.efsdp // layout.expert_shards, layout.expert_shards * layout.ep),
    }[name]
    return n, min(n, max(1, cluster.ranks_per_node // stride))


def _pass(
    shape: ModelShape, cluster: Cluster, job: ParallelJob, layout: Layout, moe: bool, phase: str
) -> Pass:
    messages = [m for m in layer_messages(shape, layout, job, moe) if m.phase == phase]

    def spent(chosen: Iterable[Message]) -> float:
        return sum(seconds(m, cluster, layout) for m in chosen)

    times = 1 if phase == "forward" else 3 if job.recompute else 2
    heads = shape.num_heads * (shape.head_size + (shape.v_size or shape.head_size))
    scores = job.tokens * job.context * heads / cluster.flops
    if not job.training and job.tokens < job.context:  # One token per sequence: its cache is read.
        cache = job.tokens * job.context * shape.cache_elements / shape.num_layers
        scores = max(scores, cache * job.element_size / cluster.memory_bandwidth)
    attention = _products(shape.attention()[2:], cluster, job) + scores
    width = shape.shared_intermediate_size if moe else shape.dense_intermediate_size
    experts = 0.0
    if moe:
        attention += _products([Matrix(shape.num_experts, shape.hidden_size)], cluster, job)
        slots = job.tokens * shape.top_k * job.imbalance
        read = min(local_experts(shape, job), slots) * shape.expert_weights * job.element_size
        experts = max(
            2 * slots * shape.expert_weights / cluster.flops, read / cluster.memory_bandwidth
        )
    ep = [m for m in messages if m.group == "ep"]
    return Pass(
        times * attention,
        times * _products(shape.network(width), cluster, job),
        times * experts,
        spent(m for m in ep if m.name in _WAY_OUT),
        spent(m for m in ep if m.name not in _WAY_OUT),
        spent(m for m in messages if m.group != "ep"),
    )


def _products(weights: list[Matrix], cluster: Cluster, job: ParallelJob) -> float:
    """Returns the seconds of GEMMs of all tokens with dense weights, in forward. With tensor
    parallelism, a rank has a part of the weights and the tokens of all its ranks."""
    elements = count(weights)
    read = elements / job.tp * job.element_size / cluster.memory_bandwidth
    return max(2 * job.tokens * elements / cluster.flops, read)
