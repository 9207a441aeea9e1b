"""Models with the routing of 2026: moe_ops gives what transformers' eager experts give."""

from __future__ import annotations

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moe_ops.hf

from .models import NEWER, build, loss_and_gradients, tokens
from .test_models import CountOps, assert_close

newer = pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                name not in CONFIG_MAPPING, reason="this release of transformers does not have it"
            ),
        )
        for name in NEWER
    ],
)
# Blocks on moe_ops, and the ops that run in them.
BLOCKS = {
    "deepseek_v4": (["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"], {"moe_ffn"}),
    "longcat_flash": (["model.layers.0.mlp.experts"], {"moe_ffn"}),
    "nemotron_h": (["model.layers.1.mixer.experts"], {"moe_ffn"}),
    "kimi_linear": (["model.layers.1.mlp.experts"], {"moe_ffn"}),
}


@newer
def test_outputs_and_gradients_equal_eager(model_type):
    """In fp64, where gradients of hyper-connections, sums that cancel, can be told from noise. Some
    of these models sum or route in fp32 on the way."""
    eps = torch.finfo(torch.float32).eps
    loss, logits, gradients = loss_and_gradients(build(model_type, dtype=torch.float64), tokens())
    model = build(model_type, dtype=torch.float64)
    blocks, ops = BLOCKS[model_type]
    assert list(moe_ops.hf.enable(model)) == blocks
    with moe_ops.hf.assert_used(model) as calls, CountOps() as count:
        loss_ours, logits_ours, gradients_ours = loss_and_gradients(model, tokens())
    assert calls == dict.fromkeys(blocks, 1)
    assert {name.removesuffix("_fwd") for name in count.calls if "_bwd" not in name} >= ops
    assert_close(logits_ours, logits, "logits", eps)
    assert_close(loss_ours, loss, "loss", eps)
    assert gradients_ours.keys() == gradients.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        assert_close(gradients_ours[name], gradient, f"gradient of {name}", eps)


@newer
def test_generate_gives_the_same_tokens(model_type):
    """Optimized too; then the model is as it was."""
    model, prompt = build(model_type), tokens(2, 5)
    arguments = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(prompt, **arguments)
    moe_ops.hf.optimize(model)
    assert set(moe_ops.hf.status(model).values()) == {"moe_ops"}
    assert torch.equal(model.generate(prompt, **arguments), expected)
    moe_ops.hf.restore(model)
    assert "moe_ops" not in moe_ops.hf.status(model).values()
    assert torch.equal(model.generate(prompt, **arguments), expected)


@pytest.mark.skipif("longcat_flash" not in CONFIG_MAPPING, reason="transformers does not have it")
def test_longcat_experts_that_return_their_input():
    """All of a token's experts, none, and in bfloat16; and nothing but those."""
    block = build("longcat_flash").get_submodule("model.layers.0.mlp")
    x, weights = torch.randn(1, 3, 32), torch.rand(3, 4)
    ids = torch.tensor([[6, 7, 8, 6], [0, 1, 2, 3], [5, 6, 4, 8]])
    block.router.forward = lambda _: (None, weights, ids)
    with torch.no_grad():
        expected = block(x)
        (method,) = moe_ops.hf.enable(block).values()
        assert_close(block(x), expected)
        assert_close(block(x)[0, 0], x[0, 0] * weights[0].sum())
        half = block.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).norm() <= 0.03 * expected.norm()
    # From transformers 5.25 on these experts follow its interface of experts.
    assert method in ("forward", "experts_implementation")
    moe_ops.hf.disable(block)
