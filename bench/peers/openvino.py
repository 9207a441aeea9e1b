"""OpenVINO's experts on the CPU: bf16 or fp32 weights, int8 with a scale per row, int4 in groups of
128.

    pip install openvino

The graph has the form in which OpenVINO exports a mixture of experts: tokens are tiled over all
experts and multiplied by routing weights that are zero for the experts that were not selected. Its
CPU plugin replaces this form by GatherMatmul, which computes the selected experts only; `prepare`
raises an error if it did not. Tokens and sums are fp32, computation is bf16 except in fp32.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from bench.cpu.quantized import quantize
from bench.harness.machine import beyond_isa
from moe_ops.bench.baselines import Baseline, Bind, Call
from moe_ops.bench.shapes import Bank, Tokens

_GROUP = 128


class OpenVino(Baseline):
    package = "openvino"

    def __init__(self, weight_format: str) -> None:
        self.formats = (weight_format,)
        self.name = f"OpenVINO {weight_format}"

    def missing(self) -> str | None:
        if importlib.util.find_spec("openvino") is None:
            return "openvino is not installed"
        return beyond_isa()

    def prepare(self, bank: Bank, weight_format: str) -> Bind:
        import openvino

        precision = "f32" if weight_format == "fp32" else "bf16"
        arrays: list[Any] = []
        compiled = openvino.Core().compile_model(
            _model(bank, weight_format, arrays),
            "CPU",
            {
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "NUM_STREAMS": 1,
                "ENABLE_CPU_PINNING": False,
                "INFERENCE_PRECISION_HINT": precision,
            },
        )
        nodes = compiled.get_runtime_model().get_ops()
        kinds = {node.get_rt_info()["layerType"].astype(str) for node in nodes}
        if not any(kind.startswith("GatherMatmul") for kind in kinds):
            raise RuntimeError(f"OpenVINO computes all experts, by {sorted(kinds)}")

        def bind(tokens: Tokens) -> Call:
            request = compiled.create_infer_request()
            feed = (tokens.x.float()[None], tokens.topk_ids.int(), tokens.topk_weights)
            for place, value in enumerate(feed):
                request.set_input_tensor(place, openvino.Tensor(value.contiguous().numpy()))

            def call() -> Tensor:
                request.infer()
                assert arrays  # Constants refer to them.
                return torch.from_numpy(request.get_output_tensor().data)[0]

            return call

        return bind


def _model(bank: Bank, weight_format: str, arrays: list[Any]) -> Any:
    """Returns the layer. Its constants refer to what is appended to `arrays`."""
    import openvino
    from openvino import opset13 as op
    from openvino.utils.node_factory import NodeFactory

    E, H, K = bank.shape.E, bank.shape.H, bank.shape.K
    real, whole = openvino.Type.f32, openvino.Type.i32
    x = op.parameter([-1, -1, H], real)  # Sequences: a Reshape of rows would be removed.
    ids, weights = op.parameter([-1, K], whole), op.parameter([-1, K], real)
    tiled = op.tile(op.reshape(x, [-1, H], False), [E, 1])
    rows = op.reshape(tiled, [E, -1, H], False)
    gate, up, down = (
        _weight(w, weight_format, arrays) for w in (*bank.w_gate_up.chunk(2, dim=1), bank.w_down)
    )
    # Without beta, which op.swish adds and the plugin's pattern lacks.
    silu = NodeFactory("opset4").create("Swish", [op.matmul(rows, gate, False, True).output(0)])
    h = op.multiply(silu, op.matmul(rows, up, False, True))
    out = op.reshape(op.matmul(h, down, False, True), [E, 1, -1, H], False)
    count = op.gather(op.shape_of(ids), [0], 0)
    zeros = op.broadcast(op.constant(0.0, real), op.concat([count, [E]], 0))
    routing = op.transpose(op.scatter_elements_update(zeros, ids, weights, 1), [1, 0])
    routing = op.unsqueeze(op.reshape(routing, [E, 1, -1], False), -1)
    y = op.reduce_sum(op.multiply(out, routing), [0], False)
    return openvino.Model([y], [x, ids, weights])


def _weight(w: Tensor, weight_format: str, arrays: list[Any]) -> Any:
    """Returns [E, O, D] as a constant, or as the operators that decode one."""
    import openvino
    from openvino import opset13 as op

    def constant(value: Tensor, size: list[int], kind: str) -> Any:
        arrays.append(value.contiguous().numpy())
        return op.constant(openvino.Tensor(arrays[-1], size, getattr(openvino.Type, kind)))

    size = list(w.shape)
    if weight_format == "fp32":
        return constant(w, size, "f32")
    if weight_format == "bf16":
        return op.convert(constant(w.view(torch.int16), size, "bf16"), "f32")
    q, scales = quantize(w, weight_format, _GROUP)
    if weight_format == "int8":
        values, grouped = op.convert(constant(q, size, "i8"), "f16"), size
    else:
        grouped = [*size[:2], size[2] // _GROUP, _GROUP]
        zero = constant(torch.tensor([8], dtype=torch.uint8), [1], "u4")
        codes = constant(q, grouped, "u4")
        values = op.subtract(op.convert(codes, "f16"), op.convert(zero, "f16"))
    values = op.multiply(values, constant(scales.half(), [*grouped[:-1], 1], "f16"))
    return op.convert(op.reshape(values, size, False), "f32")
