"""ONNX Runtime's `MoE` (fp32) and `QMoE` (int8, int4 in groups of 128) operators.

    pip install onnxruntime onnx

The operators route by themselves: they get the logarithms of our routing weights and normalize over
the selected experts, which gives those weights back.
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


class OnnxRuntime(Baseline):
    package = "onnxruntime"

    def __init__(self, weight_format: str) -> None:
        self.formats = (weight_format,)
        self.name = {"fp32": "ORT MoE", "int8": "ORT QMoE int8", "int4": "ORT QMoE int4"}[
            weight_format
        ]

    def missing(self) -> str | None:
        for package in ("onnxruntime", "onnx"):
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed"
        return beyond_isa()

    def prepare(self, bank: Bank, weight_format: str) -> Bind:
        session = _session(bank, weight_format)

        def bind(tokens: Tokens) -> Call:
            logits = torch.full((tokens.count, bank.shape.E), -1e4)
            logits.scatter_(1, tokens.topk_ids.long(), tokens.topk_weights.log())
            feed = {"x": tokens.x.float().numpy(), "logits": logits.numpy()}

            def call() -> Tensor:
                return torch.from_numpy(session.run(["y"], feed)[0])

            return call

        return bind


def _interleaved(w: Tensor) -> Tensor:
    """Returns [E, 2I, ...] with gate and up interleaved, as the operators require."""
    return torch.stack(w.chunk(2, dim=1), dim=2).flatten(1, 2)


def _session(bank: Bank, weight_format: str) -> Any:
    import onnxruntime
    from onnx import TensorProto, helper

    shape = bank.shape
    gate_up = _interleaved(bank.w_gate_up)
    values: dict[str, Tensor] = {}
    attributes: dict[str, Any] = {
        "k": shape.K,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "normalize_routing_weights": 1,
    }
    if weight_format == "fp32":
        values = {"fc1": gate_up, "fc2": bank.w_down}
        inputs = ["x", "logits", "fc1", "", "fc2"]
    else:
        bits = 8 if weight_format == "int8" else 4
        attributes["expert_weight_bits"] = bits
        if bits == 4:
            attributes["block_size"] = _GROUP
        for name, w in (("fc1", gate_up), ("fc2", bank.w_down)):
            if bits == 8:
                q, scales = quantize(w, "int8", _GROUP)
                q = (q.int() + 128).to(torch.uint8)
            else:
                q, scales = quantize(w, "int4", _GROUP)
            values[name], values[f"{name}_scales"] = q, scales
        inputs = ["x", "logits", "fc1", "fc1_scales", "", "fc2", "fc2_scales"]
    # The weights stay outside of the model, which a protobuf limits to 2 GB.
    initializers = []
    arrays = {}
    for name, value in values.items():
        arrays[name] = value.contiguous().numpy()
        tensor = TensorProto(name=name, dims=value.shape, data_location=TensorProto.EXTERNAL)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(arrays[name].dtype)
        tensor.external_data.add(key="location", value="weights")
        initializers.append(tensor)
    op = "MoE" if weight_format == "fp32" else "QMoE"
    node = helper.make_node(op, inputs, ["y"], domain="com.microsoft", **attributes)
    given = [("x", ["T", shape.H]), ("logits", ["T", shape.E])]
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in given],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", shape.H])],
        initializers,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_external_initializers(
        list(arrays), [onnxruntime.OrtValue.ortvalue_from_numpy(a) for a in arrays.values()]
    )
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
