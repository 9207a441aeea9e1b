"""Runs torchtitan's trainer on CPU processes: `python -m tests.torchtitan.train` with its options.

torchtitan looks for an accelerator. Here torch names the CPU as one, with the functions that
torchtitan calls for memory statistics. Each rank prints its losses as JSON behind LOSSES.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule


def use_cpu() -> None:
    torch._utils._get_available_device_type = lambda: "cpu"
    cpu: Any = torch.cpu
    cpu.get_device_name = lambda device=None: "cpu"
    cpu.get_device_properties = lambda device=None: SimpleNamespace(total_memory=1 << 34)
    cpu.memory_stats = lambda device=None: {}
    cpu.reset_peak_memory_stats = lambda device=None: None
    cpu.empty_cache = lambda: None
    cpu.current_device = lambda: 0
    if not hasattr(torch.distributed, "set_timeout"):  # torchtitan 0.3.0 needs a torch after 2.13
        distributed: Any = torch.distributed
        distributed.set_timeout = lambda *args, **options: None


def main(args: list[str]) -> None:
    use_cpu()
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.config import ConfigManager

    losses: list[float] = []
    log = MetricsProcessor.log

    def record(self: Any, step: int, loss: float, *rest: Any, **options: Any) -> None:
        losses.append(loss)
        log(self, step, loss, *rest, **options)

    MetricsProcessor.log = record
    config = ConfigManager().parse_args(args)
    config.override.imports.append("tests.torchtitan.cpu_attention.causal")
    trainer = config.build()
    for part in trainer.model_parts:
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other.
    trainer.train()
    trainer.close()
    print("LOSSES", json.dumps(losses), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
