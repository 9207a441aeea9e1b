"""Stand-ins for what torchtitan needs and CPUs lack. Import this module before torchtitan.

torchtitan looks for an accelerator: torch names the CPU as one, with the functions that torchtitan
calls for memory statistics. FlexAttention has no backward on CPUs: an override replaces it.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

torch._utils._get_available_device_type = lambda: "cpu"
cpu: Any = torch.cpu
cpu.get_device_name = lambda device=None: "cpu"
cpu.get_device_properties = lambda device=None: SimpleNamespace(total_memory=1 << 34)
cpu.memory_stats = lambda device=None: {}
cpu.reset_peak_memory_stats = lambda device=None: None
cpu.empty_cache = lambda: None
cpu.current_device = lambda: 0
if not hasattr(torch.distributed, "set_timeout"):  # torchtitan 0.3.0 needs a torch after 2.13.
    distributed: Any = torch.distributed
    distributed.set_timeout = lambda *args, **options: None


def step_of_micro_batches(
    self: Any, *, arg_mbs: list | None, kwarg_mbs: list, target_mbs: list | None, **options: Any
) -> Any:
    """Runs a pipeline on a list of micro-batches, which `step` of a later torch takes."""
    self._split_inputs = lambda *_: (arg_mbs, kwarg_mbs)
    target = None if target_mbs is None else torch.cat(target_mbs)
    return step_of_a_batch(self, target=target, **options)


step_of_a_batch = PipelineScheduleSingle.step
if "arg_mbs" not in inspect.signature(step_of_a_batch).parameters:
    PipelineScheduleSingle.step = step_of_micro_batches  # type: ignore[method-assign]

from torchtitan.config import override  # noqa: E402
from torchtitan.models.common.attention import (  # noqa: E402
    FlexAttention,
    ScaledDotProductAttention,
)


@override(target=FlexAttention.Config, description="Causal attention, across documents.")
def causal(cfg: FlexAttention.Config) -> ScaledDotProductAttention.Config:
    return ScaledDotProductAttention.Config(sharding_config=cfg.sharding_config)
