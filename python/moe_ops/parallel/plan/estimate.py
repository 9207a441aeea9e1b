"""Estimates of a model's needs on a cluster, and suggested changes.

Letters: E experts, K experts per token, n ranks that share the experts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .cluster import GIB, Cluster, Layout, ParallelJob
from .memory import Memory, memory_of
from .shape import ModelShape
from .timing import Time, timing
from .traffic import Message, Rows, layer_messages, rows_of, visits

# Usable fraction of a device's memory; the rest is for its driver, communication buffers and
# fragmentation.
USABLE = 0.9
# Minimum relative saving of a suggested change.
WORTH = 0.03


@dataclass(frozen=True)
class Plan:
    """Result of `estimate_plan`.

    Attributes:
        shape, cluster, job, layout: inputs of the plan.
        rows: rows that are sent, and the name of the dispatcher.
        reason: why `make_dispatcher` selects it.
        memory, time: of the busiest rank.
        messages: the collectives of a layer with experts.
        ranks_visited, nodes_visited: mean numbers of ranks and nodes that have one of a token's
            experts.
    """

    shape: ModelShape
    cluster: Cluster
    job: ParallelJob
    layout: Layout
    rows: Rows
    reason: str
    memory: Memory
    time: Time
    messages: list[Message]
    ranks_visited: float
    nodes_visited: float

    @property
    def fits(self) -> bool:
        return self.memory.total <= USABLE * self.cluster.memory

    def bytes_per_token(self, phase: str) -> tuple[float, float]:
        """Returns the bytes sent and received per token by dispatch and combine in a layer, for
        phase "forward" or "backward"."""
        chosen = [m for m in self.messages if m.group == "ep" and m.phase == phase]
        tokens = self.job.tokens
        return sum(m.sent for m in chosen) / tokens, sum(m.received for m in chosen) / tokens

    @property
    def tokens_per_second(self) -> float:
        """Returns the tokens per second of all ranks together."""
        return self.cluster.ranks * self.job.tokens / self.time.step

    @property
    def cache_tokens(self) -> int:
        """Returns the number of tokens whose keys and values fit in a rank's memory in
        inference."""
        free = USABLE * self.cluster.memory - self.memory.total
        size = self.shape.cache_elements * self.job.element_size / self.job.tp
        return max(0, int(free / size))

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values, in bytes and seconds."""
        forward = {name: value for name, value in _public(self.time).items() if value is not None}
        return {
            "model": {
                **dataclasses.asdict(self.shape),
                "total_weights": self.shape.total_weights,
                "active_weights": self.shape.active_weights,
            },
            "cluster": dataclasses.asdict(self.cluster),
            "job": dataclasses.asdict(self.job),
            "layout": dataclasses.asdict(self.layout),
            "dispatcher": {
                "name": self.rows.name,
                "reason": self.reason,
                "rows_sent": self.rows.num_sent,
                "rows_received": self.rows.num_received,
                "ranks_a_token": self.ranks_visited,
                "nodes_a_token": self.nodes_visited,
            },
            "memory": {
                **dataclasses.asdict(self.memory),
                "total": self.memory.total,
                "available": self.cluster.memory,
                "fits": self.fits,
            },
            "messages_a_layer": [m._asdict() for m in self.messages],
            "seconds": forward,
            "tokens_per_second": self.tokens_per_second,
        }


def _public(time: Time) -> dict[str, Any]:
    passes = ("forward", "backward", "dense_forward", "dense_backward")
    found: dict[str, Any] = {"ends": time.ends, "step": time.step}
    for name in passes:
        value = getattr(time, name)
        if value is not None:
            sums = {k: getattr(value, k) for k in ("compute", "communication", "hidden", "total")}
            found[name] = {**dataclasses.asdict(value), **sums}
    return found


def estimate_plan(shape: ModelShape, cluster: Cluster, job: ParallelJob) -> Plan:
    """Computes a plan from formulas, within microseconds; `trace_step` verifies its bytes.

    Args:
        shape: shape of the model: `find_shape`.
        cluster: cluster: `find_cluster`.
        job: workload of the cluster.

    Raises:
        ValueError: incompatible sizes.
    """
    layout = Layout.of(cluster, job)
    if shape.num_experts % job.ep and not job.redundant:
        raise ValueError(
            f"plan: ep must divide the {shape.num_experts} experts unless some are redundant, got "
            f"{job.ep}."
        )
    rows = rows_of(shape, job)
    needed = memory_of(shape, cluster, job)
    nodes = -(-job.ep // cluster.ranks_per_node)
    visited = visits(shape, job.ep)
    return Plan(
        shape,
        cluster,
        job,
        layout,
        rows,
        _reason(shape, job, rows.name, visited),
        needed,
        timing(shape, cluster, job, needed),
        layer_messages(shape, layout, job, True),
        visited,
        visits(shape, nodes) if nodes > 1 else 1.0,
    )


def _reason(shape: ModelShape, job: ParallelJob, name: str, visited: float) -> str:
    """Returns the reason for which `make_dispatcher` selects this dispatcher."""
    n, k = job.ep, shape.top_k
    if job.dispatch != "auto":
        return "as asked for"
    if name == "local":
        return "one rank has all experts"
    if name == "shared":
        return "all ranks have the same tokens"
    if job.same_bits:
        return "the bits of one process were asked for"
    if name == "gather":
        return f"{n} ranks are at most half of a token's {k} experts: all to all would send as much"
    if name == "slots":
        return f"a token's {k} experts are on about as many of the {n} ranks"
    return f"a token's {k} experts are on {visited:.1f} of {n} ranks: it is sent once to each"


# ------------------------------------------------------------------------------------- what to do


@dataclass(frozen=True)
class Advice:
    """A suggested change and its effect.

    Attributes:
        text: a sentence.
        plan: the changed plan, if the change is one of the job.
    """

    text: str
    plan: Plan | None = None


def alternatives(shape: ModelShape, cluster: Cluster, job: ParallelJob) -> list[Plan]:
    """Returns the plans with each EP size that works."""
    plans = []
    ep = 1
    while ep <= cluster.ranks:
        dispatch = job.dispatch if (job.dispatch == "local") == (ep == 1) else "auto"
        try:
            changed = dataclasses.replace(job, ep=ep, dispatch=dispatch)
            plans.append(estimate_plan(shape, cluster, changed))
        except ValueError:
            pass  # EP does not divide the ranks or the experts.
        ep *= 2
    return plans


def best(plans: list[Plan]) -> Plan:
    """Returns the fastest plan that fits; if none does, the one that needs the least memory."""
    fitting = [p for p in plans if p.fits]
    if fitting:
        return min(fitting, key=lambda p: p.time.step)
    return min(plans, key=lambda p: p.memory.total)


def suggest_changes(plan: Plan) -> list[Advice]:
    """Returns suggested changes, by their savings; [] if none saves enough."""
    found = [*_settings(plan), *_across_nodes(plan), *_imbalanced(plan)]
    if not plan.fits and not any(a.plan is not None and a.plan.fits for a in found):
        found.append(_how_many(plan))
    return found


def _settings(plan: Plan) -> list[Advice]:
    job = plan.job
    changes: list[tuple[str, dict[str, Any]]] = []
    changes += [(f"EP over {ep} ranks", {"ep": ep}) for ep in (job.ep * 2, job.ep // 2)]
    if job.training:
        word = "no recomputation" if job.recompute else "recomputation of each block"
        changes.append((word, {"recompute": not job.recompute}))
    if not job.fp8:
        changes.append(("rows in fp8", {"fp8": True}))
    changes += [
        (f"the dispatcher {name!r}", {"dispatch": name})
        for name in ("slots", "tokens", "gather")
        if name != plan.rows.name
    ]
    changes += [(f"{n} tokens a rank", {"tokens": n}) for n in (job.tokens * 2, job.tokens // 2)]
    if not job.training or job.tp > 1:
        changes.append((f"tensor parallelism over {job.tp * 2} ranks", {"tp": job.tp * 2}))
    tried = []
    for word, change in changes:
        if "ep" in change:
            change = {**change, "dispatch": "auto"}
        try:
            other = estimate_plan(plan.shape, plan.cluster, dataclasses.replace(job, **change))
        except ValueError:
            continue  # Invalid for these sizes.
        tried.append((word, other))
    if not plan.fits:
        less = [t for t in tried if t[1].memory.total < (1 - WORTH) * plan.memory.total]
        less.sort(key=lambda t: t[1].memory.total)
        return [_memory_advice(plan, word, other) for word, other in less]
    rate = plan.tokens_per_second
    faster = [t for t in tried if t[1].fits and t[1].tokens_per_second > (1 + WORTH) * rate]
    faster.sort(key=lambda t: -t[1].tokens_per_second)
    return [
        Advice(
            f"{_capital(word)}: {other.tokens_per_second / rate - 1:+.0%} tokens a second, "
            f"{other.memory.total / GIB:.1f} GiB.",
            other,
        )
        for word, other in faster
    ]


def _memory_advice(plan: Plan, word: str, other: Plan) -> Advice:
    saved = (plan.memory.total - other.memory.total) / GIB
    fits = "which fits" if other.fits else "which does not fit yet"
    rate = other.tokens_per_second / plan.tokens_per_second - 1
    return Advice(
        f"{_capital(word)}: {saved:.1f} GiB less, {other.memory.total / GIB:.1f} GiB in all, "
        f"{fits}; {rate:+.0%} tokens a second.",
        other,
    )


def _across_nodes(plan: Plan) -> list[Advice]:
    """Suggests changes for rows that are sent to other nodes."""
    shape, cluster, job = plan.shape, plan.cluster, plan.job
    nodes = -(-job.ep // cluster.ranks_per_node)
    if nodes < 2 or plan.rows.name not in ("slots", "tokens"):
        return []
    n, m = job.ep, cluster.ranks_per_node
    row = shape.hidden_size * job.element_size / 1024
    across = plan.rows.num_sent / job.tokens * (n - m) / n
    once = plan.nodes_visited * (nodes - 1) / nodes
    found = []
    if once < (1 - 5 * WORTH) * across:
        found.append(
            Advice(
                f"A dispatcher that sends a token once to a node (DeepEP or NCCL EP, by "
                f"register_dispatcher): {once * row:.0f} KiB a token across nodes in place of "
                f"{across * row:.0f}."
            )
        )
    if shape.num_groups == 1 and job.training and shape.num_experts % nodes == 0:
        chosen = max(1, -(-shape.top_k // 2))
        if chosen < nodes and shape.num_experts // nodes * chosen >= shape.top_k:
            grouped = dataclasses.replace(shape, num_groups=nodes, num_topk_groups=chosen)
            visited = visits(grouped, nodes)
            found.append(
                Advice(
                    f"For a model that you train anew: a router with num_groups={nodes}, "
                    f"num_topk_groups={chosen} keeps a token on {visited:.1f} nodes in place of "
                    f"{plan.nodes_visited:.1f}."
                )
            )
    return found


def _imbalanced(plan: Plan) -> list[Advice]:
    job = plan.job
    if job.imbalance < 1.1 or job.ep == 1:
        return []
    even = estimate_plan(plan.shape, plan.cluster, dataclasses.replace(job, imbalance=1.0))
    shape = plan.shape
    copy = shape.num_moe_layers * shape.expert_weights * (16 if job.training else job.element_size)
    copy //= plan.layout.expert_shards
    rate = even.tokens_per_second / plan.tokens_per_second - 1
    if rate < WORTH:
        return []
    return [
        Advice(
            f"The busiest rank has {job.imbalance:.2f} times the mean: balanced ranks would give "
            f"{rate:+.0%} tokens a second. One redundant expert a rank and layer "
            f"(Placement.balanced) takes {copy / GIB:.1f} GiB."
        )
    ]


def _how_many(plan: Plan) -> Advice:
    """Suggests a number of ranks with enough memory."""
    ranks = plan.cluster.ranks
    for factor in (2, 4, 8, 16, 32, 64, 128):
        cluster = dataclasses.replace(plan.cluster, ranks=ranks * factor)
        job = dataclasses.replace(plan.job, recompute=plan.job.training, dispatch="auto")
        fitting = [p for p in alternatives(plan.shape, cluster, job) if p.fits]
        if fitting:
            other = best(fitting)
            how = " and recomputation" if job.recompute else ""
            return Advice(
                f"No change of these is enough; {cluster.ranks} ranks with EP over "
                f"{other.job.ep}{how} are ({other.memory.total / GIB:.1f} GiB a rank).",
                other,
            )
    return Advice("No change of these is enough, nor are 128 times as many ranks.")


def _capital(text: str) -> str:
    return text if text.startswith("EP") else text[0].upper() + text[1:]
