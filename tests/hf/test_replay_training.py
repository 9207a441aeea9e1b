"""Routing replay in training: checkpointing, compiled code, adapters, balance and rollouts."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import moe_ops
import moe_ops.hf
from moe_ops.hf.routing.agreement import RoutingAgreement
from moe_ops.hf.routing.taps import Taps
from moe_ops.layers import ExpertLoadStats, update_expert_bias
from moe_ops.surgery import find_routed_layers
from moe_ops.surgery.log_routing import count_in_training
from moe_ops.viz.routing import plot_agreement

from . import families
from .test_replay import IDS, backward, close, draw, equal, loss_of, watched_experts


@pytest.fixture(scope="module")
def small():
    model = families.build("qwen3_moe")
    return model, Taps(model, "test")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_micro_batches(small, reentrant):
    """Backward of several batches after all of their forwards, and after the context."""
    model, taps = small
    batches = [draw(taps, IDS.numel(), seed) for seed in range(3)]
    expected = None
    for given in batches:
        with moe_ops.hf.replay(model, given):
            found = backward(model, loss_of(model))
        expected = found if expected is None else {n: g + found[n] for n, g in expected.items()}
    try:
        with moe_ops.hf.replay(model) as replay:
            # As trainers do, after the context was opened.
            model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            losses = []
            for given in batches:
                replay.set(given)
                losses.append(loss_of(model))
        close(backward(model, sum(losses)), expected)
    finally:
        model.disable_input_require_grads()
        model.gradient_checkpointing_disable()
        model.eval()
    assert "forward" not in vars(taps.taps[0].module)


def test_engine_and_trainer(small):
    """A rollout of a quantized, optimized model, with padding, replayed by the trainer."""
    model, taps = small
    engine = families.build("qwen3_moe")
    moe_ops.hf.optimize(engine, quantization=moe_ops.Int8WeightConfig())
    prompts = IDS.clone()
    mask = torch.ones_like(prompts)
    mask[0, :3] = 0
    with moe_ops.hf.record(engine) as record:
        tokens = engine.generate(
            prompts, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False
        )
    mask = torch.cat([mask, torch.ones(2, 5, dtype=mask.dtype)], 1)
    arrays = record.routed_experts(mask)
    assert [a.shape for a in arrays] == [(8, 2, 3), (11, 2, 3)]
    assert (arrays[0][:, 0] == -1).all() and (arrays[0][:, 1] >= 0).all()
    stats = ExpertLoadStats()
    options = {"attention_mask": mask, "measure": True, "stats": stats}
    with moe_ops.hf.replay(model, arrays, **options) as replay, watched_experts(taps) as seen:
        model(input_ids=tokens, attention_mask=mask)
    (ids,) = seen["model.layers.1.mlp"]
    ids = ids.view(2, 12, 3)
    assert torch.equal(ids[0, 3:11], torch.as_tensor(arrays[0][:, 1].astype(np.int64)))
    assert torch.equal(ids[1, :11], torch.as_tensor(arrays[1][:, 1].astype(np.int64)))
    measured = replay.agreement.as_dict()
    assert 0 <= measured["choices"] <= measured["tokens"] < 0.5
    assert list(measured["layers"]) == ["model.layers.1.mlp"]
    # All tokens count, as the experts that were taken.
    assert torch.equal(
        stats.tokens_per_expert("model.layers.1.mlp"), ids.flatten().bincount(minlength=8)
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"prefill_chunk_size": 3}, {"prompt_lookup_num_tokens": 3},
     {"cache_implementation": "static"}],
    ids=str,
)  # fmt: skip
def test_recorded_generation(small, options):
    """The recorded experts are those of one call with all tokens, whatever the way to generate."""
    model, _ = small
    prompt = IDS[:1].repeat(1, 2)
    with moe_ops.hf.record(model) as record:
        tokens = model.generate(
            prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, **options
        )
        found = record.routed_experts(torch.ones_like(tokens))[0]
        model(input_ids=tokens)
    expected = record[-1][0, : tokens.shape[1] - 1]
    assert np.array_equal(np.sort(found[: len(expected)]), np.sort(expected))


@pytest.mark.parametrize("family", ["minimax", "jamba", "zaya", "qwen3_next", "inkling2_loop"])
def test_recorded_generation_of_other_caches(family):
    """Linear attention, convolutions, router states across layers and looped layers."""
    model = families.build(family)
    with moe_ops.hf.record(model) as record:
        tokens = model.generate(
            IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
        )
        found = record[-1]
        model(input_ids=tokens)
    assert len(record) == 2
    assert np.array_equal(np.sort(found), np.sort(record[-1][:, :-1]))


def test_beams_are_refused(small):
    with moe_ops.hf.record(small[0]), pytest.raises(ValueError, match="must use num_beams=1"):
        small[0].generate(IDS, max_new_tokens=3, num_beams=2)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_balance_losses_count_the_experts_taken(family):
    model = families.build(family)
    taps = Taps(model, "test")
    given = draw(taps, IDS.numel())
    given[:, :, 0], given[:, :, 1] = 0, 1
    for column in range(2, given.shape[2]):
        given[:, :, column] = column
    mask = torch.ones_like(IDS)
    given[3] = -1
    with moe_ops.hf.replay(model, given), watched_experts(taps) as seen:
        found = model(IDS, attention_mask=mask, labels=IDS, output_router_logits=True)
    probs = torch.cat([part.float() for part in found.router_logits]).softmax(-1)
    ids = torch.cat([part for parts in seen.values() for part in parts])
    share = torch.zeros_like(probs).scatter(1, ids, 1.0).mean(0)
    expected = probs.shape[1] * (share * probs.mean(0)).sum()
    torch.testing.assert_close(found.aux_loss, expected)
    free = model(IDS, attention_mask=mask, labels=IDS, output_router_logits=True).aux_loss
    assert abs(free - expected) > 0.01


def test_biases_and_logs_count_the_experts_taken():
    model = families.build("deepseek_v3").train()
    taps = Taps(model, "test")
    given = draw(taps, IDS.numel())
    (tap,) = taps.taps
    stats, watched = ExpertLoadStats(), ExpertLoadStats()
    handles = count_in_training(watched, find_routed_layers(model))
    with moe_ops.hf.replay(model, given, stats=stats):
        backward(model, loss_of(model))
    for handle in handles:
        handle.remove()
    counts = torch.as_tensor(given[:, tap.rows[0]].astype(np.int64)).flatten().bincount(minlength=8)
    assert torch.equal(stats.tokens_per_expert(tap.name), counts)
    assert torch.equal(watched.tokens_per_expert(tap.name), counts)
    bias = tap.module.e_score_correction_bias
    before = bias.clone()
    update_expert_bias(bias, stats.tokens_per_expert(tap.name), rate=0.5)
    assert torch.equal((bias - before).sign(), (counts.sum() - 8 * counts).sign().float())


def test_copies_made_inside_are_free(small):
    """A copy of the model has its own weights and selects by itself."""
    model, taps = small
    expected = loss_of(model)
    with moe_ops.hf.replay(model, draw(taps, IDS.numel())):
        other = copy.deepcopy(model)
        assert torch.equal(loss_of(other), expected)
        with moe_ops.hf.record(other) as record:
            loss_of(other)
        replayed_loss = loss_of(model)
    assert not torch.equal(replayed_loss, expected)
    with torch.no_grad():
        for tap in Taps(other, "test").taps:
            tap.module.weight.neg_()
    assert not torch.equal(loss_of(other), expected)
    assert len(record) == 1


def test_frozen_routers(small):
    model, taps = small
    frozen = taps.taps[0].module.weight.requires_grad_(False)
    try:
        with moe_ops.hf.replay(model, draw(taps, IDS.numel())):
            gradients = backward(model, loss_of(model))
    finally:
        frozen.requires_grad_(True)
    assert "model.layers.1.mlp.gate.weight" not in gradients
    assert gradients["model.layers.0.mlp.up_proj.weight"].any()


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [("qwen3_moe", False), ("deepseek_v3", False), ("qwen3_moe", True)],
)
def test_on_moe_ops_and_compiled(family, checkpointing):
    """One graph for all batches; with checkpointing, graphs end at the layers."""
    model = families.build(family)
    taps = Taps(model, "test")
    batches = [draw(taps, IDS.numel(), seed) for seed in range(2)]
    expected = []
    for given in batches:
        with moe_ops.hf.replay(model, given):
            expected.append(backward(model, loss_of(model)))
    moe_ops.hf.enable(model)
    if checkpointing:
        model.train().gradient_checkpointing_enable()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=not checkpointing)
    free = backward(model, loss_of(compiled))
    with moe_ops.hf.replay(compiled) as replay:
        for given, wanted in zip(batches, expected, strict=True):
            replay.set(given)
            close(backward(model, loss_of(compiled)), wanted)
    equal(backward(model, loss_of(compiled)), free)


@pytest.mark.parametrize("kind", ["adapters", "quantized"])
def test_adapters_and_quantized_experts(kind):
    model = families.build("qwen3_moe")
    if kind == "adapters":
        peft = pytest.importorskip("peft")
        targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets)
        model = peft.get_peft_model(model, config)
    else:
        moe_ops.quantize(model, moe_ops.Int8WeightConfig())
    taps = Taps(model, "test")
    given = draw(taps, IDS.numel())
    with moe_ops.hf.record(model) as record, moe_ops.hf.replay(model, given):
        gradients = backward(model, loss_of(model))
    row = taps.taps[0].rows[0]
    assert np.array_equal(record[-1].reshape(given.shape)[:, row], given[:, row])
    of_router = [g for n, g in gradients.items() if "mlp.gate" in n]
    assert any(g.any() for g in of_router)


def test_policies(tmp_path):
    agreement = RoutingAgreement()
    given = torch.tensor([[0, 1], [2, 3], [-1, -1], [4, 5]])
    own = torch.tensor([[1, 0], [2, 4], [0, 1], [0, 1]])
    agreement.add("layer", given, own)
    log_probs = torch.tensor([-1.0, -2.0, -3.0])
    agreement.add_log_probs(log_probs, log_probs + 0.1, torch.tensor([True, True, False]))
    found = agreement.as_dict()
    assert found["choices"] == 0.5 and found["tokens"] == pytest.approx(2 / 3)
    assert found["kl"] == pytest.approx(np.exp(0.1) - 1.1, rel=1e-4)
    pytest.importorskip("matplotlib")
    plot_agreement(agreement, path=tmp_path / "agreement.png")
    assert (tmp_path / "agreement.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="one shape"):
        agreement.add_log_probs(log_probs, log_probs[:1])


def test_refusals(small):
    model, taps = small
    given = draw(taps, 13)
    with moe_ops.hf.replay(model, given):
        with pytest.raises(ValueError, match=r"each of the 14 tokens of a call.*got 13"):
            loss_of(model)
        with pytest.raises(RuntimeError, match="already"), moe_ops.hf.replay(model, given):
            pass
    with pytest.raises(ValueError, match="must have MoE layers"):
        moe_ops.hf.replay(torch.nn.Linear(2, 2))
    router = taps.taps[0].module
    router.forward = lambda x: (x, x, torch.zeros(x.shape[0], 3, dtype=torch.long))
    try:
        with (
            moe_ops.hf.replay(model, draw(taps, IDS.numel())),
            pytest.raises(RuntimeError, match=r"must select its 3 of 8 experts by torch.topk"),
        ):
            loss_of(model)
    finally:
        del router.forward
    assert "forward" not in vars(router)
