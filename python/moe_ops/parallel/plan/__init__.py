"""Planning of expert parallelism: memory, traffic and time of a rank, computed without a cluster.

Example:
    from moe_ops.parallel import plan

    shape = plan.find_shape("deepseek_v3")  # or a folder with a config.json
    cluster = plan.find_cluster("h100", ranks=2048)
    job = plan.ParallelJob(ep=64, recompute=True)
    result = plan.estimate_plan(shape, cluster, job)
    print(result.memory.total, result.time.step, plan.suggest_changes(result))
    plan.trace_step(shape, cluster, job)  # by running the code, without data

``moe-ops plan`` prints it.
"""

from __future__ import annotations

from .cluster import Cluster, ParallelJob, find_cluster
from .estimate import Plan, alternatives, best, estimate_plan, suggest_changes
from .shape import ModelShape, find_shape
from .tracing import trace_step

__all__ = [
    "Cluster",
    "ModelShape",
    "ParallelJob",
    "Plan",
    "alternatives",
    "best",
    "estimate_plan",
    "find_cluster",
    "find_shape",
    "suggest_changes",
    "trace_step",
]
