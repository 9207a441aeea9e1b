"""moe_ops.onnx: what onnxruntime computes of an exported model is what the model computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.helpers.moe import build_moe
from torch import Tensor, nn

import moe_ops
from moe_ops import layers

pytest.importorskip("onnxscript", reason="needs onnxscript (the extra onnx)")
ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime (the extra onnx)")

from moe_ops.onnx import translation_table  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Of the exporter, about its own code.

T, H, I, E, K = 6, 8, 5, 4, 2
TOKENS = torch.export.Dim("tokens", min=2, max=512)


def run_exported(
    model: nn.Module,
    args: tuple[Tensor, ...],
    *others: tuple[Tensor, ...],
    dims: Any = None,
    rtol: float = 1e-4,
    wanted: nn.Module | None = None,
) -> None:
    """Compares the file with the model, or with another one, on the arguments of the export and on
    others."""
    for module in (model, wanted or model):
        module.eval()
    program = torch.onnx.export(
        model,
        args,
        dynamo=True,
        verbose=False,
        dynamic_shapes=dims,
        custom_translation_table=translation_table(),
    )
    file = program.model_proto.SerializeToString()
    assert not {n.domain for n in program.model_proto.graph.node} - {""}
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    for call in (args, *others):
        names = [i.name for i in session.get_inputs()]
        got = session.run(None, dict(zip(names, (t.numpy() for t in call), strict=True)))
        with torch.no_grad():
            out = (wanted or model)(*call)
        out = out if isinstance(out, tuple) else (out,)
        for g, w in zip(got, out, strict=True):
            torch.testing.assert_close(torch.from_numpy(g), w, rtol=rtol, atol=1e-5)


class Ops(nn.Module):
    def forward(
        self, logits: Tensor, bias: Tensor, x: Tensor, ids: Tensor, weights: Tensor, w: Tensor
    ) -> tuple[Tensor, ...]:
        groups = {"num_groups": 2, "num_topk_groups": 1, "expert_bias": bias}
        offsets, row_to_slot, slot_to_row = moe_ops.sort_by_expert(ids, E)
        rows = moe_ops.permute(x, offsets, row_to_slot)
        slots = moe_ops.moe_linear_map(x, w, ids)
        return (
            *moe_ops.topk_router(logits, K),
            *moe_ops.topk_router(logits, K, topk_first=True, routed_scaling_factor=2.0),
            *moe_ops.topk_router(logits, K, score_func="sigmoid", renormalize=True, **groups),
            *moe_ops.topk_router(
                logits, 1, score_func="sqrtsoftplus", group_score="top2_sum", **groups
            ),
            *moe_ops.topp_router(logits, 0.6, 3, min_k=1, renormalize=True),
            *moe_ops.expert_choice_router(logits, 3),
            moe_ops.router_linear(logits, bias[None], bias[:1]),
            offsets,
            row_to_slot,
            slot_to_row,
            rows,
            moe_ops.grouped_gemm(rows, w, offsets, bias=w[..., 0]),
            moe_ops.unpermute(rows, offsets, slot_to_row, weights),
            moe_ops.unpermute(rows, offsets, slot_to_row),
            slots,
            moe_ops.moe_linear_map(x, w, ids, bias=w[..., 0]),
            moe_ops.moe_linear_reduce(slots, w.transpose(1, 2), weights, ids),
        )


def routed() -> tuple[Tensor, Tensor]:
    """ids, some of no expert, and weights."""
    return torch.randint(-1, E + 1, (T, K), dtype=torch.int32), torch.rand(T, K)


def test_ops():
    logits = torch.randn(T, E)
    logits[1] = 0.5  # Ties.
    bias = torch.tensor([0.1, 0.3, -0.2, 0.0])
    run_exported(Ops(), (logits, bias, torch.randn(T, H), *routed(), torch.randn(E, I, H)))


class Network(nn.Module):
    """Layers of a language model, one of each kind."""

    def __init__(self) -> None:
        super().__init__()
        groups = {"num_groups": 2, "num_topk_groups": 1, "num_shared_experts": 1}
        oai = {"activation": "swiglu_oai", "interleaved": True, "bias": True}
        self.deepseek = build_moe(H, I, E, K, router="deepseek_v3", **groups)
        self.oai = build_moe(H, I, E, K, router="gpt_oss", **oai)
        self.llama4 = build_moe(H, I, E, 1, router="llama4", activation="geglu_tanh")
        self.plain = build_moe(H, I, E, K, activation="relu2", kind="topp", top_p=0.7)
        self.peer = layers.PEER(H, 9, 2, num_heads=2)
        self.attention = layers.AttentionExperts(
            layers.TopKRouter(H, E, K), 2, 4, rope_theta=1e4, window=3, softcap=5.0
        )
        self.sticks = layers.AttentionExperts(
            layers.TopKRouter(H, E, K), 2, 4, kind="stick_breaking", causal=False
        )
        self.norm = layers.AddRMSNorm(H)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        *parts, norm = self.children()
        return norm(x, sum(part(x) for part in parts))


def test_layers_with_a_dynamic_number_of_tokens():
    x, other = torch.randn(1, T, H), torch.randn(1, 9, H)
    run_exported(Network(), (x,), (other,), dims=({1: TOKENS},))


class Others(nn.Module):
    """Quantized, soft and dense experts."""

    def __init__(self) -> None:
        super().__init__()
        bank = layers.Experts(E, 64, 64, bias=True)
        self.int8 = moe_ops.quantize(bank, moe_ops.Int8WeightConfig())
        self.int4 = moe_ops.quantize(bank, moe_ops.Int4WeightConfig(32))
        self.soft = layers.SoftMoE(layers.Experts(E, 64, 3, activation="gelu"), 2)
        self.dense = layers.Experts(E, 64, 3, activation="relu", bias=True)
        self.norm = layers.ExpertBatchNorm(E, 64)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        outputs = self.norm(self.dense.outputs(x))
        return (
            self.int8(x, weights, ids),
            self.int4(x, weights, ids),
            self.soft(x[None]),
            layers.mix_outputs(outputs, weights.repeat(1, 2)),
        )


def test_other_banks():
    """Activations are not rounded to 8 bits, which kernels do."""
    model = Others()
    wanted = copy.deepcopy(model)
    wanted.int8, wanted.int4 = model.int8.dequantize(), model.int4.dequantize()
    run_exported(model, (torch.randn(T, 64), *routed()), wanted=wanted)


def test_half_precision():
    """Files take and give bfloat16; what onnxruntime makes of it is rounded alike."""
    model = build_moe(64, 8, E, K, dtype=torch.bfloat16, logits_dtype=torch.float32)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = model

        def forward(self, x: Tensor) -> Tensor:
            return self.moe(x.bfloat16()).float()

    run_exported(Wrapped(), (torch.randn(T, 64),), rtol=2**-7)


def test_a_model_of_transformers():
    """Its own experts cannot be exported: the loop over those hit depends on the routing, and
    grouped_mm has no translation."""
    pytest.importorskip("transformers")
    from tests.hf import models

    import moe_ops.hf

    model = models.build("qwen3_moe")
    moe_ops.hf.enable(model)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.model(input_ids=input_ids, use_cache=False).logits

    ids, other = (torch.randint(models.VOCAB, shape) for shape in ((2, 5), (3, 8)))
    dims = {0: torch.export.Dim("batch", min=1, max=8), 1: torch.export.Dim("tokens", min=2)}
    run_exported(Logits(), (ids,), (other,), dims=(dims,))


def test_refusals():
    import onnx_ir as ir

    ops, table = torch.ops.moe_ops, translation_table()

    def value(dtype: ir.DataType, *shape: int) -> ir.Value:
        return ir.Value(name="v", type=ir.TensorType(dtype), shape=ir.Shape(shape))

    with pytest.raises(ValueError, match=r"^gated_act: tensors of an ONNX export must be float32"):
        table[ops.gated_act.default](value(ir.DataType.DOUBLE, T, H))
    single, codes = value(ir.DataType.FLOAT, T, H), value(ir.DataType.UINT8, E, H, H)
    with pytest.raises(ValueError, match=r"^moe_ffn_quantized: weights .* int8 or int4, got mxfp4"):
        table[ops.moe_ffn_quantized.default](
            single, codes, codes, codes, codes, single, single, "mxfp4"
        )
    with pytest.raises(
        ValueError, match=r"^mix_expert_outputs: an ONNX export must be of a model in eval"
    ):
        table[ops.mix_expert_outputs.default](single, single, single)
