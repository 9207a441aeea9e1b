"""JetMoE's attention experts: masks, caches, dropout and compilation."""

from __future__ import annotations

import collections

import pytest
import torch
from transformers import DynamicCache

import moe_ops.hf
from moe_ops.hf.experts.jetmoe_attention import _is_causal

from .models import CACHE, build, loss_and_gradients, tokens
from .test_models import CountOps, assert_close

IMPLEMENTATIONS = ("eager", "sdpa", "moe_ops")


def model_with(implementation, **overrides):
    model = build("jetmoe", **overrides)
    model.set_attn_implementation(implementation)
    return model


def attention_calls(model, **arguments):
    with torch.no_grad(), CountOps() as count:
        output = model(**arguments)
    return count.calls["moa_attention"], output


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logits_and_gradients(implementation):
    model = model_with(implementation)
    loss, logits, gradients = loss_and_gradients(model, tokens(length=40))
    moe_ops.hf.enable(model)
    assert attention_calls(model, input_ids=tokens(length=40))[0] == 2
    loss_ours, logits_ours, gradients_ours = loss_and_gradients(model, tokens(length=40))
    assert_close(logits_ours, logits, "logits")
    assert_close(loss_ours, loss, "loss")
    for name, gradient in gradients.items():
        assert_close(gradients_ours[name], gradient, f"gradient of {name}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_goes_through_the_models_own_attention(side, implementation):
    model = model_with(implementation)
    mask = torch.ones(2, 13, dtype=torch.int64)
    mask[0, slice(0, 4) if side == "left" else slice(9, 13)] = 0
    arguments = {"input_ids": tokens(), "attention_mask": mask}
    with torch.no_grad():
        expected = model(**arguments).logits
    moe_ops.hf.enable(model)
    calls, output = attention_calls(model, **arguments)
    assert calls == 0
    real = mask.bool()
    assert_close(output.logits[real], expected[real], "logits")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_mask_that_hides_nothing_costs_nothing(implementation):
    model = model_with(implementation)
    moe_ops.hf.enable(model)
    mask = torch.ones(2, 13, dtype=torch.int64)
    assert attention_calls(model, input_ids=tokens(), attention_mask=mask)[0] == 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_steps_with_a_cache_equal_the_whole(implementation):
    model = model_with(implementation)
    moe_ops.hf.enable(model)
    ids = tokens(length=12)
    _, whole = attention_calls(model, input_ids=ids)
    cache, logits, calls = DynamicCache(), [], 0
    for start, end in ((0, 6), (6, 7), (7, 11), (11, 12)):
        count, output = attention_calls(
            model, input_ids=ids[:, start:end], use_cache=True, **{CACHE: cache}
        )
        calls += count
        logits.append(output.logits)
    assert calls == 8
    assert_close(torch.cat(logits, 1), whole.logits, "logits")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_generate_with_left_padding(implementation):
    arguments = {"max_new_tokens": 5, "do_sample": False}
    prompt, mask = tokens(length=6), torch.ones(2, 6, dtype=torch.int64)
    prompt[0, :3], mask[0, :3] = 0, 0
    model = model_with(implementation)
    expected = model.generate(prompt, attention_mask=mask, **arguments)
    moe_ops.hf.enable(model)
    assert torch.equal(model.generate(prompt, attention_mask=mask, **arguments), expected)


def test_dropout_goes_through_the_models_own_attention():
    model = model_with("eager", attention_dropout=0.5).train()
    torch.manual_seed(0)
    expected = model(input_ids=tokens()).logits
    moe_ops.hf.enable(model)
    torch.manual_seed(0)
    calls, _ = attention_calls(model, input_ids=tokens())
    assert calls == 0
    torch.manual_seed(0)
    assert_close(model(input_ids=tokens()).logits, expected, "logits")


def test_attention_weights_can_be_had():
    model = model_with("eager")
    with torch.no_grad():
        expected = model(input_ids=tokens(), output_attentions=True).attentions
    moe_ops.hf.enable(model)
    calls, output = attention_calls(model, input_ids=tokens(), output_attentions=True)
    for ours, theirs in zip(output.attentions, expected, strict=True):
        if theirs is not None and ours is not None:
            assert_close(ours, theirs, "attentions")
    assert calls == 0


def test_compiled_graph_holds_the_op():
    model = model_with("moe_ops")
    moe_ops.hf.enable(model)
    _, logits, gradients = loss_and_gradients(model, tokens())
    ops = collections.Counter()
    aot_eager = torch._dynamo.lookup_backend("aot_eager")

    def backend(graph_module, inputs):
        for node in graph_module.graph.nodes:
            if str(node.target).startswith("moe_ops."):
                ops[str(node.target).split(".")[1]] += 1
        return aot_eager(graph_module, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    output = compiled(input_ids=tokens(), labels=tokens())
    model.zero_grad()
    output.loss.backward()
    assert ops["moa_attention"] == ops["moe_linear_map"] == ops["moe_linear_reduce"] == 2
    assert_close(output.logits.detach(), logits, "logits")
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name], f"gradient of {name}")


def additive(seen):
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("form", [additive, lambda seen: seen], ids=["added", "bool"])
def test_what_counts_as_causal(form):
    seen = torch.ones(2, 1, 4, 6, dtype=torch.bool).tril(2)
    assert _is_causal(form(seen), 6)
    assert not _is_causal(form(seen), 7)
    for index in ((0, 0, 1, 0), (1, 0, 0, 4)):
        other = seen.clone()
        other[index] = ~other[index]
        assert not _is_causal(form(other), 6)


def test_a_mask_that_changes_is_read_again():
    mask = additive(torch.ones(1, 1, 4, 4, dtype=torch.bool).tril())
    assert _is_causal(mask, 4)
    mask[0, 0, 3, 0] = -1.0
    assert not _is_causal(mask, 4)


def test_a_slight_bias_is_no_causal_mask():
    mask = torch.zeros(1, 1, 4, 4).masked_fill(~torch.ones(4, 4, dtype=torch.bool).tril(), -1.0)
    assert not _is_causal(mask, 4)
