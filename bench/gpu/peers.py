"""Other libraries' expert blocks on a GPU, if they can be imported.

This project installs none of them: ScatterMoE comes from its repository, SonicMoE from the package
``sonic-moe``, vLLM from ``vllm``, each with the torch and Triton that it requires. A peer that
raises, or whose result is wrong, is reported with the reason and not timed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Peer:
    """Other library. `module` is imported, `package` is the distribution whose version is
    reported."""

    name: str = ""
    module: str = ""
    package: str = ""
    trains: bool = True

    def missing(self, device: torch.device) -> str | None:
        """Returns a short reason why it cannot run here."""
        if importlib.util.find_spec(self.module) is None:
            return f"{self.package} is not installed"
        if device.type != "cuda":
            return "needs a CUDA device"
        return None

    def version(self) -> str | None:
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def block(
        self, x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, ids: Tensor
    ) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class ScatterMoE(Peer):
    """Two calls of its parallel_linear: gathering and scattering are part of the GEMMs."""

    name: str = "ScatterMoE"
    module: str = "scattermoe"
    package: str = "scattermoe"

    def block(
        self, x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, ids: Tensor
    ) -> Tensor:
        from scattermoe.parallel_experts import parallel_linear

        E, K = w_gate_up.shape[0], ids.shape[1]
        with torch.no_grad():
            experts, order = torch.sort(ids.reshape(-1))
            ends = torch.histc(experts, E, 0, E - 1).cumsum(0, dtype=torch.int64)
        pre = parallel_linear(
            x, w_gate_up.transpose(1, 2), K, experts, order, ends, grouped_out=True
        )
        gate, up = pre.chunk(2, dim=-1)
        return parallel_linear(
            F.silu(gate) * up,
            w_down.transpose(1, 2),
            1,
            experts,
            order,
            ends,
            gates=weights.to(x.dtype),
            grouped_in=True,
        )


@dataclass(frozen=True)
class SonicMoE(Peer):
    """Its entry point for given routing, with weights in Hugging Face's layout."""

    name: str = "SonicMoE"
    module: str = "sonicmoe"
    package: str = "sonic-moe"

    def block(
        self, x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, ids: Tensor
    ) -> Tensor:
        from sonicmoe import moe_general_routing_inputs
        from sonicmoe.enums import ActivationType

        T, K = ids.shape
        tokens = torch.arange(T, device=x.device, dtype=torch.int32).repeat_interleave(K)
        y, _ = moe_general_routing_inputs(
            x,
            weights.reshape(-1),
            tokens,
            ids.reshape(-1),
            w_gate_up.permute(1, 2, 0),
            None,
            w_down.permute(1, 2, 0),
            None,
            E=w_gate_up.shape[0],
            stream_id=torch.cuda.current_stream(x.device).cuda_stream,
            activation_type=ActivationType.SWIGLU,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
            concat_layout=True,
        )
        return y


@dataclass(frozen=True)
class VllmTriton(Peer):
    """vLLM's fused_experts in Triton; for inference."""

    name: str = "vLLM fused_experts"
    module: str = "vllm"
    package: str = "vllm"
    trains: bool = False

    def block(
        self, x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, ids: Tensor
    ) -> Tensor:
        from vllm.model_executor.layers.fused_moe import fused_experts

        return fused_experts(x, w_gate_up, w_down, weights, ids)


PEERS: tuple[Peer, ...] = (ScatterMoE(), SonicMoE(), VllmTriton())
