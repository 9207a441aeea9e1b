"""Routing replay and recording of every family: exact experts and gradients."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

import moe_ops.hf
from moe_ops.hf.routing.taps import Taps

from . import families, models
from .families import FAMILIES

IDS = models.tokens(2, 7) % 60 + 1


def loss_of(model, ids=IDS, **inputs):
    torch.manual_seed(0)  # A canvas to denoise is drawn.
    logits = model(input_ids=ids, use_cache=False, **inputs).logits
    return logits.float().logsumexp(-1).square().mean() + logits.float()[..., 1].mean()


def backward(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def draw(taps: Taps, num_tokens: int, seed: int = 0) -> np.ndarray:
    """Returns valid ids [T, L, K] for all rows."""
    rng = np.random.default_rng(seed)
    most = max(tap.top_k for tap in taps.taps)
    ids = np.zeros((num_tokens, taps.num_rows, most), np.int16)
    for tap in taps.taps:
        for row in tap.rows:
            scores = rng.random((num_tokens, tap.num_experts))
            ids[:, row, : tap.top_k] = scores.argsort(1)[:, : tap.top_k]
    return ids


def router_gradients(model, taps, gradients):
    """Returns the gradients of all parameters of routers."""
    names = {id(p): n for n, p in model.named_parameters()}
    own = {names[id(p)] for tap in taps.taps if tap.selects for p in _router(tap).parameters()}
    return {n: g for n, g in gradients.items() if n in own}


def _router(tap):
    return getattr(tap.module, "router", tap.module)


@contextlib.contextmanager
def watched_experts(taps):
    """Yields the ids that experts are called with, by layer, seen from outside of the tap."""
    seen, handles = {}, []
    for tap in taps.taps:

        def of_experts(module, args, name=tap.name):
            seen.setdefault(name, []).append(args[1].reshape(-1, args[1].shape[-1]))

        def of_jetmoe(module, args, output, tap=tap):
            order, sizes = output[0], torch.tensor(output[3])
            experts = torch.arange(tap.num_experts).repeat_interleave(sizes)
            slots = torch.empty_like(order).scatter(0, order, experts)
            seen.setdefault(tap.name, []).append(slots.view(-1, tap.top_k))

        def of_llama4(module, args, output, tap=tap):
            seen.setdefault(tap.name, []).append(output[0].topk(tap.top_k).indices)

        block = tap.block
        if type(block).__name__ == "JetMoeMoE":
            handles.append(block.router.register_forward_hook(of_jetmoe))
        elif type(block).__name__ == "Llama4TextMoe":
            handles.append(block.router.register_forward_hook(of_llama4))
        else:
            handles.append(block.experts.register_forward_pre_hook(of_experts))
    yield seen
    for handle in handles:
        handle.remove()


@contextlib.contextmanager
def masked_scores(taps, given):
    """The reference: selects the given experts by masking the scores of all others before the
    model's own top-k, with all groups allowed."""
    current, before = [], (torch.topk, torch.Tensor.topk)
    calls = {tap.name: 0 for tap in taps.taps}

    def topk(scores, k, dim=-1, *rest, **options):
        if current and (k, scores.shape[-1]) == (current[-1].top_k, current[-1].num_experts):
            tap = current[-1]
            row = tap.rows[calls[tap.name] % len(tap.rows)]
            ids = torch.as_tensor(given[:, row, : tap.top_k].astype(np.int64))
            chosen = torch.zeros(len(ids), tap.num_experts, dtype=torch.bool)
            chosen = chosen.scatter(1, ids, True).view(scores.shape)
            scores = scores.masked_fill(~chosen, -torch.inf)
        return before[0](scores, k, dim, *rest, **options)

    handles, groups = [], []
    for tap in taps.taps:
        tap_module = tap.module

        def enter(module, args, tap=tap):
            current.append(tap)

        def leave(module, args, output, tap=tap):
            current.pop()
            calls[tap.name] += 1

        handles.append(tap_module.register_forward_pre_hook(enter))
        handles.append(tap_module.register_forward_hook(leave))
        if hasattr(tap_module, "topk_group"):
            groups.append((tap_module, tap_module.topk_group))
            tap_module.topk_group = tap_module.num_group
    torch.topk = torch.Tensor.topk = topk
    try:
        yield
    finally:
        torch.topk, torch.Tensor.topk = before
        for handle in handles:
            handle.remove()
        for module, value in groups:
            module.topk_group = value


def equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def close(first, second):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=2e-4, atol=2e-5, msg=name)


def parts_of(model):
    """Returns the parts of a model that are replayed separately, with their numbers of tokens."""
    if type(model).__name__ != "DiffusionGemmaForBlockDiffusion":
        return [(model, IDS.numel())]
    return [(model.model.encoder, IDS.numel()), (model.model.decoder, 2 * 8)]


def own_experts(model, parts):
    """Returns arrays of the experts that the model selects by itself."""
    if len(parts) == 1:
        with moe_ops.hf.record(model) as record:
            loss_of(model)
        return [record.routed_experts()]
    arrays, handles = [], []  # Not a model of causal language, for which `record` is.
    for part, num_tokens in parts:
        taps = Taps(part, "test")
        array = np.full((num_tokens, taps.num_rows, taps.taps[0].top_k), -1)
        arrays.append(array)
        for tap in taps.taps:

            def hook(module, args, output, array=array, row=tap.rows[0]):
                array[:, row] = output[2]

            handles.append(tap.module.register_forward_hook(hook))
    loss_of(model)
    for handle in handles:
        handle.remove()
    return arrays


@contextlib.contextmanager
def replayed(parts, arrays, **options):
    with contextlib.ExitStack() as stack:
        pairs = zip(parts, arrays, strict=True)
        yield [
            stack.enter_context(moe_ops.hf.replay(part, array, **options))
            for (part, _), array in pairs
        ]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    model = families.build(family)
    parts = parts_of(model)
    loss = loss_of(model)
    plain = backward(model, loss)

    # The model's own experts change nothing.
    with replayed(parts, own_experts(model, parts), measure=True) as replays:
        again = loss_of(model)
        equal(backward(model, again), plain)
    assert torch.equal(again, loss)
    assert all(r.agreement.as_dict()["choices"] == 0 for r in replays)

    # Other experts are taken exactly, and the gradients are those of masked scores.
    all_taps = [Taps(part, "test") for part, _ in parts]
    given = [draw(taps, n) for taps, (_, n) in zip(all_taps, parts, strict=True)]
    pairs = list(zip(all_taps, given, strict=True))
    with contextlib.ExitStack() as stack:
        stack.enter_context(replayed(parts, given))
        seen = [stack.enter_context(watched_experts(taps)) for taps in all_taps]
        loss = loss_of(model)
        gradients = backward(model, loss)
    for (taps, ids), found in zip(pairs, seen, strict=True):
        for tap in taps.taps:
            if tap.selects and not tap.name.endswith("vision_moe"):  # No token is an image.
                check_taken(family, tap, ids, found[tap.name])
        routers = router_gradients(model, taps, gradients)
        assert routers and any(g.any() for g in routers.values())
    if family != "phimoe":  # It has no top-k; see test_sparse_mixer.
        with contextlib.ExitStack() as stack:
            for taps, ids in pairs:
                stack.enter_context(masked_scores(taps, ids))
            reference = loss_of(model)
            expected = backward(model, reference)
        torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-6)
        close(gradients, expected)

    # Checkpointing repeats the experts.
    if model.supports_gradient_checkpointing:
        model.train().gradient_checkpointing_enable()
        with replayed(parts, given) as replays:
            loss = loss_of(model)
            for replay in replays:
                replay.set(None)
        checkpointed = backward(model, loss)
        model.gradient_checkpointing_disable()
        with replayed(parts, given):
            close(checkpointed, backward(model, loss_of(model)))


def check_taken(family, tap, given, seen):
    for row, ids in zip(tap.rows, seen, strict=True):
        expected = torch.as_tensor(given[:, row, : tap.top_k].astype(np.int64))
        if family == "zaya":  # Its last class skips the experts, which get expert 0.
            expected = expected.masked_fill(expected == tap.num_experts - 1, 0)
        assert torch.equal(ids.sort(1).values, expected.sort(1).values), tap.name


def test_sparse_mixer():
    """PhiMoE: a pick's weight is its probability among the experts near the best one left, and the
    given expert is always one of them."""
    model = families.build("phimoe")
    taps = Taps(model, "test")
    given = draw(taps, IDS.numel())
    seen = {}

    def watch(router, args, output):
        seen[len(seen)] = (router, *output)

    for tap in taps.taps:
        tap.module.register_forward_hook(watch)
    with moe_ops.hf.replay(model, given):
        loss_of(model)
    for row, (router, logits, weights, ids) in seen.items():
        left = logits
        for k in range(2):
            pick = torch.as_tensor(given[:, row, k : k + 1].astype(np.int64))
            assert torch.equal(ids[:, k : k + 1], pick)
            best = left.max(-1, keepdim=True).values
            near = (best - logits) / logits.abs().maximum(best) <= 2 * router.router_jitter_noise
            near = near.scatter(1, pick, True)
            expected = left.masked_fill(~near, -torch.inf).softmax(-1).gather(1, pick)
            torch.testing.assert_close(weights[:, k : k + 1], expected)
            left = left.scatter(1, pick, -torch.inf)
    model.train()
    with moe_ops.hf.replay(model, given):
        gradients = backward(model, loss_of(model))
    assert gradients["model.layers.0.mlp.router.weight"].any()


# Softmax of all, sigmoid and bias in groups, softmax of chosen in groups, and a block that routes.
KINDS = ("qwen3_moe", "deepseek_v3", "deepseek_v2", "dbrx")


@pytest.mark.parametrize("family", KINDS)
def test_free_rows(family):
    """Rows of -1 select as the router does, beside rows that are given."""
    model = families.build(family)
    taps = Taps(model, "test")
    given = draw(taps, IDS.numel())
    given[::2] = -1
    with moe_ops.hf.record(model) as record:
        loss_of(model)
    own = record[-1].reshape(given.shape)
    with moe_ops.hf.replay(model, given), moe_ops.hf.record(model) as record:
        loss_of(model)
    taken = record[-1].reshape(given.shape)
    first = taps.taps[0].rows[0]  # Later layers read other states.
    assert np.array_equal(taken[1::2, first], given[1::2, first])
    assert np.array_equal(taken[::2, first], own[::2, first])
