"""Time of a layer and a step, from operations, bytes and the rates of a cluster.

A floor: products at the rate that good kernels reach, or weights read once, whichever is longer;
collectives at the rates of the links, which those inside a node and those across nodes use side by
side.

Letters: n ranks of a group, m those of them in one node.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .cluster import Cluster, Layout, ParallelJob
from .memory import Memory
from .shape import Matrix, ModelShape, count
from .traffic import Message, layer_messages, local_experts

# Bytes that Adam reads and writes for a weight: itself, its gradient, two moments, all float32.
_ADAM_BYTES = 28
_WAY_OUT = ("sizes", "dispatch", "scales", "weights", "ids")


@dataclass(frozen=True)
class Pass:
    """Seconds of one layer in one direction.

    Attributes:
        attention: with the router, norms left out. shared: shared experts, or the network of a
            dense layer. experts: of this rank.
        dispatch, combine: collectives before the experts and after them (in backward the other way
            round).
        sharding: FSDP2's.
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
        """Communication behind which something is computed: the dispatch has shared experts, and
        FSDP2 loads a layer ahead."""
        return min(self.dispatch, self.shared) + min(self.sharding, self.compute)

    @property
    def total(self) -> float:
        return self.compute + self.communication - self.hidden


@dataclass(frozen=True)
class Time:
    """Seconds: of a layer with experts, of one without, of the two ends of the model and Adam, and
    of a whole step. Backward is None in inference."""

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
    """How long a step takes at least with this library's overlap."""
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
    """Of one collective."""
    n, m = _group(message.group, cluster, layout)
    size = max(message.sent, message.received)
    if n == 1 or not size:
        return 0.0
    outside = size * (n - m) / (n - 1)
    if message.kind == "all_to_all":
        inside = size - outside
    else:
        # What comes from other nodes comes once, by the links of all m ranks.
        inside, outside = size, outside / m
    latency = cluster.latency if n == m else cluster.inter_latency
    return max(inside / cluster.intra_bandwidth, outside / cluster.inter_bandwidth) + latency


def _group(name: str, cluster: Cluster, layout: Layout) -> tuple[int, int]:
    """The ranks of a group, and those of them in one node. Neighbors share experts out."""
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
    if not job.training and job.tokens < job.context:  # A token a sequence: its cache is read.
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
    """Seconds of the products of all tokens with dense weights, forward. With tensor parallelism a
    rank has a share of the weights and the tokens of all its ranks."""
    elements = count(weights)
    read = elements / job.tp * job.element_size / cluster.memory_bandwidth
    return max(2 * job.tokens * elements / cluster.flops, read)
