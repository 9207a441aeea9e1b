"""AMD's `zentorch_fused_moe`.

    pip install --no-deps "zentorch==2.13.*"    # the minor version of torch

Only its library is loaded: importing the package would also replace functions of torch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import torch

from bench.harness.machine import beyond_isa
from moe_ops.bench.baselines import Baseline, Bind, Call
from moe_ops.bench.shapes import Bank, Tokens


class Zentorch(Baseline):
    name = "zentorch"
    package = "zentorch"

    def missing(self) -> str | None:
        if importlib.util.find_spec("zentorch") is None:
            return "zentorch is not installed"
        version = importlib.metadata.version("zentorch")
        if version.split(".")[:2] != torch.__version__.split(".")[:2]:
            return f"zentorch {version} is for another torch than {torch.__version__}"
        return beyond_isa()

    def prepare(self, bank: Bank, weight_format: str) -> Bind:
        spec = importlib.util.find_spec("zentorch")
        assert spec is not None and spec.origin is not None
        torch.ops.load_library(str(Path(spec.origin).parent / "libzentorch.so"))
        ops = torch.ops.zentorch
        # It reorders bf16 weights in place, and remembers their addresses.
        ops.zentorch_flush_moe_weight_cache()
        own = (bank.w_gate_up.clone(), bank.w_down.clone(), None, None)

        def bind(tokens: Tokens) -> Call:
            ids, out = tokens.topk_ids.int(), torch.empty_like(tokens.x)

            def call() -> torch.Tensor:
                ops.zentorch_fused_moe(out, tokens.x, *own, tokens.topk_weights, ids, False, "silu")
                return out

            return call

        return bind
