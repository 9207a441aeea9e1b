"""Experts on the CPU that calls with many tokens copy to the GPU, against the model on the CPU."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch

import moe_ops
import moe_ops.hf
from moe_ops.hf.experts.streamed import Streamer

from .models import MODEL_TYPES, NUM_FFNS, build, loss_and_gradients, tokens
from .placed_models import SIZES, experts_of, failing, generate


def streamed(model_type, dense, min_tokens=1, **options):
    """Returns `pair`, with calls of at least `min_tokens` tokens computed on the GPU."""
    quantization = options.pop("quantization", None)
    want, got = build(model_type, **options).cpu(), build(model_type, **options).cpu()
    if quantization is not None:
        moe_ops.quantize(want, quantization)
    moe_ops.hf.enable(want)
    how = {"stream_min_tokens": min_tokens, "quantization": quantization}
    return want, got, moe_ops.hf.place(got, dense, **how)


def copies(monkeypatch):
    """Returns a list to which the index of each layer that is copied to a slot is appended."""
    copied, copy_layer = [], Streamer._copy

    def watched(self, index, *args):
        copied.append(index)
        return copy_layer(self, index, *args)

    monkeypatch.setattr(Streamer, "_copy", watched)
    return copied


def frozen(model):
    """Returns the model with experts that do not train."""
    for bank in experts_of(model):
        bank.requires_grad_(False)
    return model


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_streamed_values_gradients_and_tokens(model_type, dense):
    """Frozen experts; gradients of the rest of the model come through them."""
    if model_type in ("jetmoe", "llama4_text"):
        with pytest.raises(ValueError, match="without experts that can be streamed, got 1; quant"):
            streamed(model_type, dense)
        return
    want, got, where = streamed(model_type, dense)
    frozen(got)
    assert set(where.values()) <= {"cpu", f"cpu, {dense} from 1 tokens"}
    ids = tokens()
    with torch.device("cpu"):
        theirs = loss_and_gradients(want, ids.cpu())
    ours = loss_and_gradients(got, ids.to(dense))
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(mine.cpu(), other, rtol=1e-4, atol=1e-5)
    assert ours[2].keys() == {n for n, p in got.named_parameters() if p.requires_grad}
    for name, gradient in ours[2].items():
        torch.testing.assert_close(gradient.cpu(), theirs[2][name], rtol=1e-3, atol=1e-5)
    with torch.device("cpu"):
        wanted = want.generate(ids.cpu(), max_new_tokens=5, do_sample=False)
    assert torch.equal(generate(got, dense).cpu(), wanted)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "jetmoe", "llama4_text"])
@pytest.mark.parametrize(
    "config", [moe_ops.Int8WeightConfig(), moe_ops.Int4WeightConfig(32)], ids=lambda c: c.label
)
def test_streamed_quantized(model_type, config, dense, monkeypatch):
    sizes = SIZES | ({"moe_intermediate_size": 32} if model_type == "qwen3_moe" else {})
    want, got, _ = streamed(model_type, dense, quantization=config, **sizes)
    copied = copies(monkeypatch)
    ids = tokens().cpu()
    with torch.no_grad(), torch.device("cpu"):
        wanted = want(ids).logits
    found = got(ids.to(dense))
    # The kernels of the CPU round tokens to 8 or 16 bits.
    assert (found.logits.detach().cpu() - wanted).norm() <= 3e-2 * wanted.norm()
    assert copied == list(range(NUM_FFNS[model_type]))
    found.logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in got.parameters() if p.grad is not None)


def test_a_prompt_is_streamed_and_decoding_is_not(dense, monkeypatch):
    want, got, where = streamed("qwen3_moe", dense, 26)
    assert set(where.values()) == {f"cpu, {dense} from 26 tokens"}
    assert str(moe_ops.hf.report(got)).count(", streamed to the GPU from 26 tokens") == 2
    copied = copies(monkeypatch)
    ids = tokens().cpu()
    with torch.device("cpu"):
        wanted = want.generate(ids, max_new_tokens=5, do_sample=False)
    for _ in range(2):  # The second pass reads the weights again.
        assert torch.equal(generate(got, dense).cpu(), wanted)
        assert copied == [0, 1]
        copied.clear()
    with torch.no_grad():
        got(ids[:, :12].to(dense))
    assert not copied
    moe_ops.hf.place(got, dense)
    assert "streamed" not in str(moe_ops.hf.report(got))
    assert torch.equal(generate(got, dense).cpu(), wanted)
    assert not copied


@pytest.mark.parametrize("checkpoint", [False, True])
def test_order_of_copies(checkpoint, dense, monkeypatch):
    """The next layer is copied ahead, in both directions, and layers that are there are not."""
    want, got, _ = streamed("qwen3_moe", dense, num_hidden_layers=4)
    want, got = want.train(), frozen(got).train()
    if checkpoint:
        got.gradient_checkpointing_enable({"use_reentrant": False})
    copied, calls = copies(monkeypatch), []
    for number, bank in enumerate(experts_of(got)):
        bank.register_forward_pre_hook(lambda *_, n=number: calls.append((n, list(copied))))
    ids = tokens().cpu()
    ours = loss_and_gradients(got, ids.to(dense))
    assert copied == [0, 1, 2, 3, 1, 0]
    assert calls[:4] == [(0, []), (1, [0, 1]), (2, [0, 1, 2]), (3, [0, 1, 2, 3])]
    with torch.device("cpu"):
        theirs = loss_and_gradients(want, ids)
    for name, gradient in ours[2].items():
        torch.testing.assert_close(gradient.cpu(), theirs[2][name], rtol=1e-3, atol=1e-5)


def test_weights_that_train_are_not_streamed(dense, monkeypatch):
    _, got, _ = streamed("mixtral", dense)
    copied = copies(monkeypatch)
    ids = tokens().to(dense)
    got(ids, labels=ids).loss.backward()
    assert not copied
    assert all(p.grad is not None for bank in experts_of(got) for p in bank.parameters())
    with torch.no_grad():
        got(ids)
    assert copied == [0, 1]


def test_streamed_weights_may_change(dense):
    """In place, by a cast, in a copy of the model, and by loading a checkpoint."""
    want, got, _ = streamed("qwen3_moe", dense)
    ids = tokens().to(dense)

    def check(ours):
        with torch.no_grad(), torch.device("cpu"):
            wanted = want(ids.cpu()).logits
        with torch.no_grad():
            torch.testing.assert_close(ours(ids).logits.cpu(), wanted, rtol=1e-4, atol=1e-5)

    check(got)
    for model in (want, got):
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj.mul_(1.5)
            model.model.layers[0].mlp.experts.down_proj.data.mul_(1.5)
    check(got)
    check(copy.deepcopy(got))
    check(got.double().float())
    state = {name: t.cpu() * 0.9 for name, t in got.state_dict().items()}
    for model in (want, got):
        model.load_state_dict(state, assign=model is want)
    check(got)


def test_an_error_in_a_streamed_call_leaves_nothing_behind(dense, monkeypatch):
    want, got, _ = streamed("deepseek_v3", dense, num_hidden_layers=3)
    frozen(got)
    ids = tokens().cpu()
    own = type(experts_of(got)[1])._moe_ops_own
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError, match="in the kernel"):
        patch.setattr(own, "forward", failing("in the kernel"))
        got(ids.to(dense))
    loss = got(ids.to(dense), labels=ids.to(dense)).loss
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError, match="in backward"):
        patch.setattr(own, "forward", failing("in backward"))
        loss.backward()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError, match="in a copy"):
        patch.setattr(Streamer, "_copy", failing("in a copy"))
        got(ids.to(dense))
    ours = loss_and_gradients(got, ids.to(dense))
    with torch.device("cpu"):
        theirs = loss_and_gradients(want, ids)
    torch.testing.assert_close(ours[1].cpu(), theirs[1], rtol=1e-4, atol=1e-5)
    for name, gradient in ours[2].items():
        torch.testing.assert_close(gradient.cpu(), theirs[2][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fuse", [False, True])
def test_experts_with_adapters_are_not_streamed(fuse, dense, monkeypatch):
    peft = pytest.importorskip("peft")
    lora = importlib.import_module("moe_ops.hf.lora")
    want, got, _ = streamed("mixtral", dense, **SIZES)
    copied = copies(monkeypatch)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=4, target_parameters=targets)
    with torch.device("cpu"):
        tuned = peft.get_peft_model(got, config)
    if fuse:
        lora.fuse_adapters(tuned)
    ids = tokens().cpu()
    with torch.no_grad(), torch.device("cpu"):
        wanted = want(ids).logits
    found = tuned(ids.to(dense))
    torch.testing.assert_close(found.logits.detach().cpu(), wanted, rtol=1e-4, atol=1e-5)
    found.logits.sum().backward()
    assert not copied
    assert all(p.grad is not None for n, p in tuned.named_parameters() if "lora_B" in n)
