"""Errors in experts on the CPU beside a GPU, and training of them that is killed."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path

import pytest
import torch
from tests.helpers.fresh_python import run_python

import moe_ops
import moe_ops.hf

from .models import build, loss_and_gradients, tokens
from .placed_models import experts_of, generate, pair

SECONDS = 60


def within(seconds, call):
    """Returns the result of a call, or raises its error; a call that hangs fails the test."""
    found: dict = {}

    def run():
        try:
            found["result"] = call()
        except BaseException as error:
            found["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"the call hangs for {seconds} seconds"
    if "error" in found:
        raise found["error"]
    return found["result"]


def changing(model, change, min_tokens=0, max_tokens=1 << 20):
    """Changes the ids and weights of the last layer's calls of experts with these many tokens."""
    bank = experts_of(model)[-1]

    def hook(module, args):
        x, ids, weights = args
        return (x, *change(ids, weights)) if min_tokens <= len(x) <= max_tokens else None

    return bank.register_forward_pre_hook(hook)


@pytest.mark.parametrize("config", [None, moe_ops.Int8WeightConfig()], ids=["float", "int8"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("decoding", [False, True])
def test_an_error_of_a_kernel_ends_generate(decoding, model_type, config, dense):
    """In the prompt and in a later step; it is the op's own."""
    model = build(model_type, hidden_size=64, moe_intermediate_size=32).cpu()
    moe_ops.hf.place(model, dense, quantization=config)
    want = generate(model, dense)
    hook = changing(model, lambda ids, weights: (ids, weights[:, :1]), 0, 2 if decoding else 1000)
    with pytest.raises(ValueError, match=r"moe_ffn(_quantized)?: topk_weights must have K = 3"):
        within(SECONDS, lambda: generate(model, dense))
    hook.remove()
    for _ in range(2):
        assert torch.equal(within(SECONDS, lambda: generate(model, dense)), want)


def test_ids_out_of_range_are_empty_slots(dense):
    """They add nothing, like those of experts that are not placed."""
    want, got = pair("qwen3_moe", dense)
    ids = tokens().to(dense)

    def change(ids, weights):
        return torch.where(ids == ids[:, :1], ids + 1000, ids), weights

    changing(got, change)
    block = want.model.layers[-1].mlp.experts
    block.register_forward_pre_hook(lambda module, args: (args[0], *change(*args[1:])))
    with torch.no_grad():
        torch.testing.assert_close(got(ids).logits, want(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_error_in_backward(checkpointing, dense):
    """Weights or routing changed between the passes: autograd's error, or the op's in a repeated
    forward."""
    want, model = pair("deepseek_v3", dense)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train(), want.train()
    ids = tokens().to(dense)
    loss = model(ids, labels=ids, use_cache=False).loss
    if checkpointing:
        hook = changing(model, lambda ids, weights: (ids, weights[:, :1]))
        match, kind = "moe_ffn: topk_weights must have K = 3", ValueError
    else:
        with torch.no_grad():
            experts_of(model)[0].down_proj.mul_(1)
        match, kind = "modified by an inplace operation", RuntimeError
    with pytest.raises(kind, match=match):
        within(SECONDS, loss.backward)
    if checkpointing:
        hook.remove()
    theirs = loss_and_gradients(want, ids)
    ours = within(SECONDS, lambda: loss_and_gradients(model, ids))
    assert ours[2].keys() == theirs[2].keys()
    for name, gradient in theirs[2].items():
        torch.testing.assert_close(ours[2][name].cpu(), gradient.cpu(), rtol=1e-3, atol=1e-5)


@pytest.mark.cpu_only
def test_a_killed_trainer_resumes(tmp_path):
    """SIGKILL in the backward of step 5; the next process repeats steps 5 to 8."""

    pytest.importorskip("accelerate")
    pytest.importorskip("peft")

    def run(folder: Path, *options: str):
        arguments = ("-m", "tests.hf.placed_training", str(folder), *options)
        return run_python(*arguments, transformers=True, timeout=300)

    whole = run(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    killed = run(tmp_path / "killed", "kill")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    resumed = run(tmp_path / "killed")
    assert resumed.returncode == 0, resumed.stderr
    want, got = (json.loads(each.stdout.splitlines()[-1]) for each in (whole, resumed))
    assert Path(got["resumed"]).name == "checkpoint-4" and want["resumed"] is None
    assert len(want["losses"]) == 8 and want["losses"][-1] < want["losses"][0]
    assert got["losses"] == want["losses"]
