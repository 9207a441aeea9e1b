"""Programs that were saved call the ops by schema: what a schema takes, it goes on taking.

TorchScript keeps its calls as text, so a program that somebody saved can stand here as it is.
"""

from __future__ import annotations

import io

import pytest
import torch
from tests.helpers.op_case import BARE_OP_ERROR

import moe_ops

pytestmark = pytest.mark.cpu_only

# Names that programs hold as strings; a number in their place would refuse those programs.
STRINGS = {
    "attention_decode": ("formats",),
    "grouped_gemm_quantized": ("format",),
    "mla_decode": ("formats",),
    "all_experts_ffn": ("activation",),
    "expert_choice_router": ("score_func",),
    "gated_act": ("activation",),
    "gated_mlp_decode": ("activation", "formats"),
    "mix_expert_outputs": ("activation",),
    "moa_attention": ("kind",),
    "moe_ffn": ("activation",),
    "moe_ffn_fp8": ("activation",),
    "moe_ffn_packed": ("activation",),
    "moe_ffn_quantized": ("format", "activation"),
    "peer_ffn": ("activation",),
    "topk_router": ("score_func", "group_score"),
}
SCRIPT = """
def forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    logits = torch.matmul(x, gate)
    weights, ids = torch.ops.moe_ops.topk_router(logits, 2, "sigmoid", False, True, 1., None, 1, 1, "max")
    y = torch.ops.moe_ops.moe_ffn(x, up, down, weights, ids, None, None, "geglu", False, False, 1.702, 7.)
    z = torch.ops.moe_ops.gated_act(torch.cat([y, x], -1), "reglu", interleaved=True)
    every, chosen = torch.ops.moe_ops.expert_choice_router(logits, 2, score_func="sigmoid")
    return torch.cat([z, every], -1)
"""  # noqa: E501


def forward(x, gate, up, down):
    logits = torch.matmul(x, gate)
    weights, ids = moe_ops.topk_router(logits, 2, score_func="sigmoid", renormalize=True)
    y = moe_ops.moe_ffn(x, up, down, weights, ids, activation="geglu")
    z = moe_ops.gated_act(torch.cat([y, x], -1), "reglu", interleaved=True)
    every, _ = moe_ops.expert_choice_router(logits, 2, score_func="sigmoid")
    return torch.cat([z, every], -1)


def operands():
    t, h, i, e = 5, 6, 4, 3
    return (
        torch.randn(t, h),
        torch.randn(h, e),
        torch.randn(e, 2 * i, h),
        torch.randn(e, h, i),
    )


@pytest.mark.parametrize("op", STRINGS)
def test_names_are_strings(op):
    arguments = getattr(torch.ops.moe_ops, op).default._schema.arguments
    strings = [a.name for a in arguments if str(a.type) == "str"]
    assert tuple(strings) == STRINGS[op]


def test_script():
    program = torch.jit.CompilationUnit(SCRIPT)
    call = operands()
    assert torch.equal(program.forward(*call), forward(*call))


class Module(torch.nn.Module):
    def forward(self, x, gate, up, down):
        return forward(x, gate, up, down)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_traced_and_saved():
    call = operands()
    file = io.BytesIO()
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(Module(), call), file)
    file.seek(0)
    program = torch.jit.load(file)
    assert all(f'"{name}"' in program.code for name in ("sigmoid", "geglu", "reglu"))
    assert torch.equal(program(*call), forward(*call))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_traced_with_weights_that_require_gradients():
    """Modules have such weights: a trace holds ops, and no call of Python."""
    call = tuple(t.requires_grad_() for t in operands())
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(Module(), call, check_trace=False), file)
    file.seek(0)
    program = torch.jit.load(file)
    assert "moe_ops.moe_ffn(" in program.code
    assert torch.equal(program(*call), forward(*call))


def test_exported_and_saved():
    call = operands()
    file = io.BytesIO()
    torch.export.save(torch.export.export(Module(), call), file)
    file.seek(0)
    program = torch.export.load(file)
    held = [a for n in program.graph.nodes for a in (*n.args, *n.kwargs.values())]
    assert {"sigmoid", "geglu", "reglu"} <= {a for a in held if isinstance(a, str)}
    assert torch.equal(program.module()(*call), forward(*call))


def test_unknown_name():
    with pytest.raises(BARE_OP_ERROR, match=r"^topk_router: score_func must be one of .*'tanh'\.$"):
        torch.ops.moe_ops.topk_router(torch.randn(2, 3), 1, "tanh")
