"""Other libraries' expert layers, as baselines. They are imported on first use."""

from __future__ import annotations

from bench.peers.ggml import GGML
from bench.peers.kt_kernel import KTKernel
from bench.peers.onnxruntime import OnnxRuntime
from bench.peers.openvino import OpenVino
from bench.peers.vllm_cpu import VllmCpu
from bench.peers.zentorch import Zentorch
from moe_ops.bench.baselines import Baseline

PEERS: list[Baseline] = [
    VllmCpu(),
    Zentorch(),
    *(GGML(weight_format, kind, repacked) for weight_format, kind, repacked in GGML.KINDS),
    OnnxRuntime("fp32"),
    OnnxRuntime("int8"),
    OnnxRuntime("int4"),
    *(OpenVino(weight_format) for weight_format in ("fp32", "bf16", "int8", "int4")),
    *(KTKernel(*kind) for kind in KTKernel.KINDS),
]
