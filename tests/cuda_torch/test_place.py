"""Experts on the CPU beside a model on CUDA: memory, waits, streams, devices and threads.
tests/hf/test_place.py has what a CPU in place of the GPU can show, too."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from tests.hf.models import build, loss_and_gradients, tokens
from transformers import AutoModelForCausalLM

import moe_ops
import moe_ops.hf
from moe_ops import _seam
from moe_ops._slots import SlotStream
from moe_ops.hf.experts.placed import is_placed

LAYERS = 2


def placed(model_type="qwen3_moe", dense="cuda", **options):
    with torch.device("cpu"):
        model = build(model_type, **options)
        moe_ops.hf.place(model, dense)
    return model


def rows(*shape, requires_grad=False):
    x = torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    return x.cuda().requires_grad_(requires_grad)


def test_no_bank_is_on_the_card():
    """The peak is the dense weights and activations: smaller than a single bank."""
    torch.cuda.synchronize()
    sizes = {"moe_intermediate_size": 2048, "num_experts": 32}
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = placed(**sizes)
    bank = sum(p.nbytes for p in model.model.layers[0].mlp.experts.parameters())
    dense = sum(p.nbytes for p in (*model.parameters(), *model.buffers()) if p.is_cuda)
    # The allocator rounds each tensor up to 512 bytes.
    count = len([*model.parameters(), *model.buffers()])
    assert torch.cuda.memory_allocated() - before <= dense + 512 * count
    ids = tokens().cuda()
    with torch.no_grad():
        model(ids)
    model.cuda()
    model(ids, labels=ids).loss.backward()
    gradients = dense
    activations = 4 << 20
    assert torch.cuda.max_memory_allocated() - before < dense + gradients + activations < bank


def test_loading_puts_no_bank_on_the_card(tmp_path):
    """Its peak is the dense weights, also while experts are read and quantized."""
    with torch.device("cpu"):
        build("qwen3_moe", moe_intermediate_size=2048, num_experts=32).save_pretrained(tmp_path)
    for quantization in (None, moe_ops.Int8WeightConfig()):
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.device("cpu"):
            model = moe_ops.hf.load_placed(
                AutoModelForCausalLM, tmp_path, "cuda", quantization=quantization
            )
        tensors = [*model.parameters(), *model.buffers()]
        dense = sum(t.nbytes for t in tensors if t.is_cuda)
        assert 0 < dense < sum(t.nbytes for t in tensors if not t.is_cuda)
        assert torch.cuda.max_memory_allocated() - before <= dense + 512 * len(tensors)
        del model, tensors


def test_the_host_waits_once_per_layer_and_direction(monkeypatch):
    model = placed()
    waits = []
    wait = torch.cuda.Event.synchronize
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda e: (waits.append(e), wait(e))[1])
    ids = tokens().cuda()
    for owner in (torch.cuda, torch.cuda.Stream):
        monkeypatch.setattr(owner, "synchronize", _refused)
    with torch.no_grad():
        model(ids)
    assert len(waits) == LAYERS
    loss = model(ids, labels=ids).loss
    assert len(waits) == 2 * LAYERS
    loss.backward()
    assert len(waits) == 3 * LAYERS


def _refused(*args, **kwargs):
    raise AssertionError("a wait for the device")


def test_copies_are_asynchronous(monkeypatch):
    """Both directions copy from and to pinned memory, of which calls in training keep none."""
    pinned: list[tuple[str, bool]] = []
    down, to = _seam._copy_to_cpu, torch.Tensor.to

    def copy_to_cpu(*args):
        copies = down(*args)
        pinned.extend(("down", t.is_pinned()) for t in copies)
        return copies

    def copy(t, device, **options):
        if not t.is_cuda:
            pinned.append(("up", t.is_pinned() and options["non_blocking"]))
        return to(t, device, **options)

    monkeypatch.setattr(_seam, "_copy_to_cpu", copy_to_cpu)
    monkeypatch.setattr(torch.Tensor, "to", copy)
    seen = []

    def run(x, ids, weights):
        seen.append(x.is_pinned())
        return x * weights + ids

    x = rows(3, 4, requires_grad=True)
    ids = torch.zeros(3, 1, dtype=torch.long, device="cuda")
    y = _seam.run_on_cpu(run, x, ids, x[:, :1])
    y.sum().backward()
    with torch.no_grad():
        _seam.run_on_cpu(run, x, ids, x[:, :1])
    assert seen == [False, True]
    assert all(is_pinned for _, is_pinned in pinned)
    ways = [way for way, _ in pinned]
    assert ways.count("down") == 3 + 1 + 3
    assert ways.count("up") >= 1 + 2 + 1
    torch.testing.assert_close(x.grad, _gradient(x))


def _gradient(x):
    leaf = x.detach().requires_grad_()
    (leaf * leaf[:, :1]).sum().backward()
    return leaf.grad


def test_on_a_side_stream():
    """Forward on one stream, backward from another."""
    model, ids = placed("deepseek_v3"), tokens().cuda()
    want = loss_and_gradients(model, ids)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    model.zero_grad()
    with torch.cuda.stream(side):
        output = model(input_ids=ids, labels=ids, use_cache=False)
    torch.cuda.current_stream().wait_stream(side)
    output.loss.backward()
    torch.cuda.synchronize()
    torch.testing.assert_close(output.logits.detach(), want[1])
    for name, gradient in want[2].items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


def test_gradients_go_up_on_the_stream_of_the_forward():
    side = torch.cuda.Stream()
    seen = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            seen.append(torch.cuda.current_stream())
            return grad

    x = rows(3, 4, requires_grad=True)
    with torch.cuda.stream(side):
        y = _seam.run_on_cpu(torch.sin, Watch.apply(x))
    original = _seam._copy_to

    def copy_to(t, device):
        seen.append(torch.cuda.current_stream(device))
        return original(t, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_seam, "_copy_to", copy_to)
        y.sum().backward()
    torch.cuda.synchronize()
    assert seen == [side, side]


@pytest.mark.skipif("torch.cuda.device_count() < 2")
def test_on_the_second_device():
    """While the first is current: a copy or an event of the first would be an error."""
    with torch.device("cpu"):
        want = build("deepseek_v3", "moe_ops")
        ids = tokens()
    model = placed("deepseek_v3", "cuda:1")
    theirs, ours = loss_and_gradients(want, ids), loss_and_gradients(model, ids.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert {p.device for p in model.parameters()} == {torch.device("cpu"), torch.device("cuda:1")}
    torch.testing.assert_close(ours[1].cpu(), theirs[1], rtol=1e-4, atol=1e-5)
    for name, gradient in theirs[2].items():
        torch.testing.assert_close(ours[2][name].cpu(), gradient, rtol=1e-3, atol=1e-5)


def test_autocast():
    """That of CUDA holds for the calls on the CPU."""
    seen = []

    def run(x):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return x

    x = rows(3, 4)
    with torch.autocast("cuda", torch.bfloat16):
        _seam.run_on_cpu(run, x)
    with torch.autocast("cuda", torch.float16):
        _seam.run_on_cpu(run, x)
    _seam.run_on_cpu(run, x)
    assert seen[:2] == [(True, torch.bfloat16), (True, torch.float16)]
    assert not seen[2][0]
    model, ids = placed(), tokens().cuda()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def in_two_threads(model, ids, repeats):
    """Returns the logits of each half of ids, each from a thread with its own stream."""
    got: list = [None, None]

    def call(number):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(repeats):
                got[number] = model(ids[2 * number : 2 * number + 2]).logits
            torch.cuda.current_stream().synchronize()

    in_threads(call)
    return got


def in_threads(call):
    """Runs call(0) and call(1) in two threads."""
    threads = [threading.Thread(target=call, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_two_threads():
    """Calls of one model from two threads, each on its own stream."""
    model, ids = placed("deepseek_v3"), tokens(4, 7).cuda()
    with torch.no_grad():
        want = [model(part).logits for part in ids.split(2)]
    torch.cuda.synchronize()
    torch.testing.assert_close(in_two_threads(model, ids, 5), want)


def test_an_error_in_one_thread_leaves_the_other_alone():
    """Both call one model, each on its own stream; half of the calls of one thread fail."""
    model, ids = placed("deepseek_v3"), tokens(4, 7).cuda()
    with torch.no_grad():
        want = [model(part).logits for part in ids.split(2)]
    torch.cuda.synchronize()
    failing, errors, got = threading.local(), [], [None, None]

    def hook(module, args):
        return (*args[:2], args[2][:, :1]) if getattr(failing, "now", False) else None

    model.model.layers[1].mlp.experts.register_forward_pre_hook(hook)

    def call(number):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(8):
                failing.now = number == 0 and turn % 2 == 0
                try:
                    got[number] = model(ids[2 * number : 2 * number + 2]).logits
                except ValueError as error:
                    errors.append((number, str(error)))
            torch.cuda.current_stream().synchronize()

    in_threads(call)
    assert len(errors) == 4
    for number, message in errors:
        assert number == 0 and "moe_ffn: topk_weights must have K = 3" in message
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_an_error_in_a_backward_on_a_side_stream(device):
    """It comes from the thread of autograd for the device; the next backward has no trace of it."""
    if torch.device(device).index >= torch.cuda.device_count():
        pytest.skip("There is one device.")
    model, ids = placed("deepseek_v3", device), tokens().to(device)
    want = loss_and_gradients(model, ids)
    model.zero_grad()
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(side):
        loss = model(ids, labels=ids, use_cache=False).loss
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj.mul_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    torch.cuda.current_stream(device).wait_stream(side)
    got = loss_and_gradients(model, ids)
    torch.testing.assert_close(got[1], want[1])
    for name, gradient in want[2].items():
        torch.testing.assert_close(got[2][name], gradient)


@pytest.mark.parametrize("stream_min_tokens", [None, 1])
def test_unplace_to_a_card(stream_min_tokens):
    """The whole model and its gradients are there, and nothing is page-locked."""
    with torch.device("cpu"):
        model = build("qwen3_moe", hidden_size=256, moe_intermediate_size=256)
        moe_ops.hf.place(model, "cuda", stream_min_tokens=stream_min_tokens)
    ids = tokens().cuda()
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    _, want, gradients = loss_and_gradients(model, ids)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    optimizer.step()
    weights = [p.data for layer in model.model.layers for p in layer.mlp.experts.parameters()]
    assert all(t.is_pinned() == (stream_min_tokens is not None) for t in weights)
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert set(moe_ops.hf.unplace(model, "cuda").values()) == {"cuda"}
    assert not any(t.is_pinned() for t in weights)
    for name, parameter in model.named_parameters():
        assert parameter.is_cuda and parameter.grad.is_cuda
        assert torch.equal(parameter.detach().cpu(), values[name].cpu())
        torch.testing.assert_close(parameter.grad.cpu(), gradients[name].cpu())
    optimizer.load_state_dict(optimizer.state_dict())
    assert all(state["exp_avg"].is_cuda for state in optimizer.state.values())
    optimizer.step()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial[name])
        for device in ("cuda", "cpu"):
            got = model.to(device)(ids.to(device)).logits
            assert got.device.type == device
            torch.testing.assert_close(got.cpu(), want.cpu(), rtol=1e-4, atol=1e-4)
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def streamed(model_type="qwen3_moe", dense="cuda", min_tokens=8, **options):
    """Returns a model on the CPU, and one that streams the experts of calls with many tokens."""
    with torch.device("cpu"):
        want, got = build(model_type, "moe_ops", **options), build(model_type, **options)
        moe_ops.hf.place(got, dense, stream_min_tokens=min_tokens)
    for module in got.modules():
        if is_placed(module):
            module.requires_grad_(False)
    return want, got


def test_two_banks_are_on_the_card():
    """The peak is the dense weights, activations and two slots, in a model of six layers; autograd
    keeps no weights."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _, model = streamed(num_hidden_layers=6, moe_intermediate_size=1024, num_experts=32)
    bank = sum(p.nbytes for p in model.model.layers[0].mlp.experts.parameters())
    dense = sum(p.nbytes for p in (*model.parameters(), *model.buffers()) if p.is_cuda)
    ids = tokens().cuda()
    activations = 8 << 20
    with torch.no_grad():
        model(ids)
    assert 2 * bank <= torch.cuda.memory_allocated() - before
    model(ids, labels=ids).loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 2 * bank + 2 * dense + activations < 3 * bank
    moe_ops.hf.place(model, "cuda")
    model.zero_grad()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < bank


def test_streamed_copies_are_asynchronous(monkeypatch):
    """They come from page-locked memory, on a stream of their own; the host never waits."""
    want, model = streamed(hidden_size=256, moe_intermediate_size=256)
    copied, copy = [], torch.Tensor.copy_

    def watched(target, source, **options):
        if target.is_cuda and not source.is_cuda:
            stream = torch.cuda.current_stream() != torch.cuda.default_stream()
            copied.append((source.is_pinned(), options["non_blocking"], stream))
        return copy(target, source, **options)

    monkeypatch.setattr(torch.Tensor, "copy_", watched)
    for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
        monkeypatch.setattr(owner, "synchronize", _refused)
    ids = tokens().cuda()
    with torch.no_grad():
        found = model(ids).logits
    assert set(copied) == {(True, True, True)}
    monkeypatch.undo()
    with torch.no_grad(), torch.device("cpu"):
        wanted = want(ids.cpu()).logits
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-4)


def test_memory_is_unlocked_before_it_is_freed():
    _, model = streamed(hidden_size=256, moe_intermediate_size=256)
    weights = [p for layer in model.model.layers for p in layer.mlp.experts.parameters()]
    old = [p.data for p in weights]
    assert all(t.is_pinned() for t in old)
    model.double()
    assert not any(t.is_pinned() for t in old)
    with torch.no_grad():
        model(tokens().cuda())
    old = [p.data for p in weights]
    assert all(t.is_pinned() for t in old)
    del model, weights
    gc.collect()
    assert not any(t.is_pinned() for t in old)


def test_copies_wait_for_the_work_that_reads_a_slot(monkeypatch):
    """And that work waits for them: the order of events, of which the simulator has no use."""
    log = []
    for name in ("wait_for", "used"):
        original = getattr(SlotStream, name)

        def watched(self, slots, name=name, original=original):
            log.append((name, *slots))
            return original(self, slots)

        monkeypatch.setattr(SlotStream, name, watched)
    filling = SlotStream.filling
    monkeypatch.setattr(
        SlotStream,
        "filling",
        lambda self, slot: (log.append(("fill", slot)), filling(self, slot))[1],
    )
    _, model = streamed(num_hidden_layers=3)
    with torch.no_grad():
        model(tokens().cuda())
    assert log == [
        *(("used", 0, 1), ("fill", 0), ("fill", 1), ("wait_for", 0), ("used", 0)),
        *(("fill", 0), ("wait_for", 1), ("used", 1)),
        *(("wait_for", 0), ("used", 0)),
    ]


@pytest.mark.skipif("torch.cuda.device_count() < 2")
def test_streams_to_the_second_device():
    want, model = streamed("deepseek_v3", "cuda:1", num_hidden_layers=3)
    ids = tokens().cpu()
    with torch.device("cpu"):
        theirs = loss_and_gradients(want, ids)
    for device in ("cuda:1", "cuda:0"):  # The slots follow the rest of the model.
        model.to(device)
        ours = loss_and_gradients(model, ids.to(device))
        torch.testing.assert_close(ours[1].cpu(), theirs[1], rtol=1e-4, atol=1e-5)
        for name, gradient in ours[2].items():
            assert gradient.device == torch.device(device)
            torch.testing.assert_close(gradient.cpu(), theirs[2][name], rtol=1e-3, atol=1e-5)


def test_streamed_from_two_threads_and_under_autocast():
    want, model = streamed("deepseek_v3", num_hidden_layers=3)
    ids = tokens(4, 7).cuda()
    with torch.no_grad(), torch.device("cpu"):
        wanted = [want(part.cpu()).logits for part in ids.split(2)]
    got = [logits.cpu() for logits in in_two_threads(model, ids, 3)]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
