"""Models whose experts stay on the CPU, against all of it in one place."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from transformers import AutoModelForCausalLM

import moe_ops
import moe_ops.hf
from moe_ops import _seam
from moe_ops.hf.checkpoints.placing import _PlaceWhileLoading
from moe_ops.hf.decode import fused
from moe_ops.hf.experts import placed

from .models import MODEL_TYPES, NUM_FFNS, build, loss_and_gradients, tokens
from .placed_models import SIZES, experts_of, failing, generate, pair


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_values_gradients_and_tokens(model_type, dense):
    want, got = pair(model_type, dense)
    ids = tokens().to(dense)
    theirs, ours = (loss_and_gradients(model, ids) for model in (want, got))
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-4, atol=1e-5)
    assert ours[2].keys() == theirs[2].keys()
    for name, gradient in theirs[2].items():
        close = {"rtol": 1e-3, "atol": 1e-5, "check_device": False}
        torch.testing.assert_close(ours[2][name].cpu(), gradient.cpu(), **close)
        assert ours[2][name].device == got.get_parameter(name).device
    assert torch.equal(generate(got, dense), generate(want, dense))
    held = {id(p) for bank in experts_of(got) for p in bank.parameters()}
    assert len(held) >= 2 * NUM_FFNS[model_type]
    for parameter in got.parameters():
        assert parameter.device.type == ("cpu" if id(parameter) in held else dense)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_bfloat16(model_type, dense):
    want, got = pair(model_type, dense, torch.bfloat16)
    with torch.no_grad():
        ids = tokens()
        wanted = want.cpu()(ids.cpu()).logits.float()
        found = got(ids.to(dense)).logits.float().cpu()
    # Rounding differs where a GPU computes, and may then choose another expert for a near tie.
    assert (found - wanted).norm() <= 5e-2 * wanted.norm()


def test_moves_and_casts(dense):
    _, model = pair("deepseek_v3", dense)
    want = generate(model, dense)
    assert not hasattr(model, "hf_device_map")
    for move in (lambda m: m.to(dense), lambda m: m.to("meta"), lambda m: m.double().float()):
        again = move(copy.deepcopy(model))
        assert all(p.device.type == "cpu" for b in experts_of(again) for p in b.parameters())
    again = copy.deepcopy(model).to(dense, torch.bfloat16)
    assert {p.dtype for b in experts_of(again) for p in b.parameters()} == {torch.bfloat16}
    again(tokens().to(dense))
    assert torch.equal(generate(copy.deepcopy(model).to(dense), dense), want)
    moved = []
    bank = experts_of(model)[0]
    bank._apply(lambda t: moved.append(t.numel()) or t.to("meta"))
    assert set(moved) == {0}  # No weight goes to the other device, not even for a moment.


@pytest.mark.parametrize("model_type", ["mixtral", "dbrx", "jetmoe", "llama4_text"])
def test_other_implementations_run_on_the_cpu_too(model_type, dense):
    """`disable` gives experts their own forward and leaves them where they are."""
    want, got = pair(model_type, dense)
    ids = tokens().to(dense)
    wanted, banks = want(ids).logits, experts_of(got)
    for change in (moe_ops.hf.disable, moe_ops.hf.enable):
        change(got)
        assert experts_of(got) == banks
        got.to(dense)
        torch.testing.assert_close(got(ids).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["deepseek_v4", "longcat_flash"])
def test_newer_models(model_type, dense):
    """Tables of token ids; experts that return their input."""
    _check_logits(model_type, dense)


@pytest.mark.parametrize("model_type", ["nemotron_h", "kimi_linear"])
def test_newer_models_with_convolutions(model_type, dense):
    """Experts without a gate in a latent width; linear attention beside experts."""
    _check_logits(model_type, dense)


def _check_logits(model_type, dense):
    want, got = pair(model_type, dense)
    ids = tokens().to(dense)
    assert experts_of(got)
    with torch.no_grad():
        torch.testing.assert_close(got(ids).logits, want(ids).logits, rtol=1e-4, atol=1e-5)


def test_some_layers(dense):
    model = build("qwen3_moe").cpu()
    found = moe_ops.hf.place(model, dense, layers="model.layers.1.*")
    first, second = (f"model.layers.{i}.mlp.experts" for i in (0, 1))
    assert {n: torch.device(d).type for n, d in found.items()} == {first: dense, second: "cpu"}
    assert experts_of(model) == [model.get_submodule(second)]
    assert model.get_submodule(first).gate_up_proj.device.type == dense
    assert torch.equal(generate(model, dense), generate(pair("qwen3_moe", dense)[0], dense))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "jetmoe", "llama4_text"])
@pytest.mark.parametrize(
    "config", [moe_ops.Int8WeightConfig(), moe_ops.Int4WeightConfig(32)], ids=lambda c: c.label
)
def test_quantized(model_type, config, dense):
    sizes = SIZES | ({"moe_intermediate_size": 32} if model_type == "qwen3_moe" else {})
    want = moe_ops.quantize(build(model_type, **sizes).cpu(), config)
    got = build(model_type, **sizes).cpu()
    moe_ops.hf.place(got, dense, quantization=config)
    with torch.no_grad(), torch.device("cpu"):
        ids = tokens()
        wanted = want(ids).logits
    with torch.no_grad():
        # Tokens are rounded to 8 bits too, so that a rounding before may change one by a step.
        torch.testing.assert_close(got(ids.to(dense)).logits.cpu(), wanted, rtol=2e-2, atol=2e-2)
    assert all(b.device.type == "cpu" for bank in experts_of(got) for b in bank.buffers())
    assert {s for s in moe_ops.hf.status(got).values() if "int" in s} == {
        f"moe_ops ({config.label})"
    }


def test_optimized(dense):
    """Fused decode steps call placed experts like modules."""
    want, got = pair("deepseek_v3", dense)
    moe_ops.hf.optimize(got)
    assert torch.equal(generate(got, dense), generate(want, dense))
    with pytest.raises(ValueError, match="must not be optimized yet"):
        moe_ops.hf.place(got, dense)
    moe_ops.hf.restore(got)
    assert experts_of(got)
    assert torch.equal(generate(got, dense), generate(want, dense))


def test_shared_experts_run_before_the_host_waits(dense, monkeypatch):
    # Networks of a model that was optimized before have a class of another kind.
    monkeypatch.setattr(fused, "_classes", {})
    moe_ops.hf.optimize(build("deepseek_v3"))
    _, model = pair("deepseek_v3", dense)
    block = model.model.layers[1].mlp
    events = []
    block.shared_experts.down_proj.register_forward_hook(lambda *_: events.append("shared"))
    run = placed.run_on_cpu

    def watched(function, *args, **kwargs):
        def on_cpu(*args, **kwargs):
            events.append("experts")
            return function(*args, **kwargs)

        return run(on_cpu, *args, **kwargs)

    monkeypatch.setattr(placed, "run_on_cpu", watched)
    model(tokens().to(dense))
    assert events == ["shared", "experts"]
    # Results are used for the tokens of the experts only; unused ones end the calls ahead of time.
    ids = torch.zeros(3, 1, dtype=torch.long, device=dense)
    with torch.no_grad():
        x = torch.randn(3, 32, device=dense)
        block.experts(x, ids, x[:, :1].sigmoid())
        other = block.shared_experts(x + 1)
        torch.testing.assert_close(block.shared_experts(x + 1), other)
        block.experts(x, ids, x[:, :1].sigmoid())
        events.clear()
        block.experts(x, ids, x[:, :1].sigmoid())
    assert events == ["experts"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, dense):
    want, got = pair("deepseek_v3", dense)
    for model in (want, got):
        model.train()
    got.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ids = tokens().to(dense)
    theirs, ours = (loss_and_gradients(model, ids) for model in (want, got))
    assert ours[2].keys() == theirs[2].keys()
    for name, gradient in theirs[2].items():
        torch.testing.assert_close(ours[2][name].cpu(), gradient.cpu(), rtol=1e-3, atol=1e-5)


def test_full_tuning(dense):
    """The optimizer's state of experts is on the CPU, that of the rest with the rest."""
    want, got = pair("mixtral", dense)
    ids = tokens().to(dense)
    losses = []
    for model in (want, got):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(3):
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        losses.append(loss.detach())
        for parameter, state in optimizer.state.items():
            assert state["exp_avg"].device == parameter.device
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapt_first", [False, True])
@pytest.mark.parametrize("quantization", [None, moe_ops.Int8WeightConfig()], ids=["float", "int8"])
@pytest.mark.parametrize("fuse", [False, True])
def test_lora(adapt_first, quantization, fuse, dense, tmp_path):
    peft = pytest.importorskip("peft")
    lora = importlib.import_module("moe_ops.hf.lora")
    if quantization is not None and (adapt_first or fuse):
        pytest.skip("Experts are quantized before they get adapters, and fused anyway.")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=targets)
    ids = tokens().to(dense)
    steps = []
    for where in (None, dense):
        model = build("mixtral", **SIZES).cpu()
        if quantization is not None and where is None:
            moe_ops.quantize(model, quantization)
        if where is not None and not adapt_first:
            moe_ops.hf.place(model, where, quantization=quantization)
        with torch.device("cpu"):
            torch.manual_seed(0)
            model = peft.get_peft_model(model, config)
        if where is not None and adapt_first:
            moe_ops.hf.place(model, where)
        model.to("cpu" if where is None else dense)
        if fuse:
            assert len(lora.fuse_adapters(model)) == 2
        generator = torch.Generator("cpu").manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                draw = torch.empty(parameter.shape, device="cpu").normal_(
                    0, 0.1, generator=generator
                )
                parameter.data.copy_(draw)
            if where is not None and "lora_" in name:
                assert parameter.device.type == ("cpu" if "experts" in name else dense)
        tuned = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(tuned, 0.1)
        inputs = ids.to("cpu" if where is None else dense)
        loss = model(inputs, labels=inputs).loss
        loss.backward()
        optimizer.step()
        steps.append({n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad})
    assert steps[0].keys() == steps[1].keys()
    close = {"rtol": 2e-2, "atol": 2e-3} if quantization else {"rtol": 1e-3, "atol": 1e-5}
    for name, value in steps[0].items():
        torch.testing.assert_close(steps[1][name], value, **close)
    model.save_pretrained(tmp_path)
    with torch.device("cpu"):
        again = peft.PeftModel.from_pretrained(build("mixtral", **SIZES).cpu(), tmp_path)
    for name, value in again.named_parameters():
        if "lora_" in name:
            assert torch.equal(value.cpu(), steps[1][name])


def test_saves_plain_files(dense, tmp_path):
    want, got = pair("gpt_oss", dense)
    got.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    values = again.state_dict()
    assert values.keys() == want.state_dict().keys()
    for name, value in want.state_dict().items():
        assert torch.equal(values[name].cpu(), value.cpu())


# Experts with names of their own in files, an expert bias that stays float32, and blocks that
# contain their router.
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "jetmoe", "llama4_text"])
@pytest.mark.parametrize("config", [None, moe_ops.Int8WeightConfig()], ids=["float", "int8"])
def test_loads_into_place(model_type, config, dense, tmp_path):
    build(model_type).cpu().save_pretrained(tmp_path)
    for options in ({}, {"dtype": torch.bfloat16}, {"layers": "*.1.*"}):
        load = {k: v for k, v in options.items() if k == "dtype"}
        layers = options.get("layers")
        with torch.device("cpu"):
            want = AutoModelForCausalLM.from_pretrained(tmp_path, **load)
        moe_ops.hf.place(want, dense, layers=layers, quantization=config)
        how = {**options, "quantization": config}
        with torch.device("cpu"):
            got = moe_ops.hf.load_placed(AutoModelForCausalLM, tmp_path, dense, **how)
        theirs, ours = (dict(m.state_dict(keep_vars=True)) for m in (want, got))
        assert ours.keys() == theirs.keys()
        for name, t in theirs.items():
            found = ours[name]
            assert (found.device, found.dtype) == (t.device, t.dtype)
            assert found.requires_grad == t.requires_grad
            assert torch.equal(found, t)
        assert len(experts_of(got)) == len(experts_of(want)) > 0
        ids = tokens().to(dense)
        with torch.no_grad():
            assert torch.equal(got(ids).logits, want(ids).logits)
        assert getattr(got, "hf_quantizer", None) is None or config is not None
        got.save_pretrained(tmp_path / "again")
        with torch.device("cpu"):
            again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
        assert all(torch.equal(again[name].cpu(), t.cpu()) for name, t in ours.items())


@pytest.mark.parametrize("config", [None, moe_ops.Int8WeightConfig()], ids=["float", "int8"])
def test_dense_weights_leave_the_cpu_when_they_are_read(config, tmp_path, monkeypatch):
    """A meta tensor has no memory, and stands for one on the GPU."""
    build("qwen3_moe").cpu().save_pretrained(tmp_path)
    left, to = {}, torch.Tensor.to

    def moved(t, *args, **kwargs):
        if args and args[0] == torch.device("meta") and not t.is_meta:
            left[id(t)] = t  # torch.device calls it twice.
        return to(t, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", moved)
    loading = _PlaceWhileLoading(torch.device("meta"), None, config)
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=loading, use_kernels=False
        )
    experts = {n for n in model.state_dict() if ".experts." in n}
    dense = {n: t for n, t in model.state_dict().items() if n not in experts}
    assert experts
    assert all(model.state_dict()[n].device.type == "cpu" for n in experts)
    assert all(t.is_meta for t in dense.values())
    assert sorted(t.nbytes for t in left.values()) == sorted(t.nbytes for t in dense.values())


def test_quantized_checkpoints_are_placed(dense, tmp_path):
    config = moe_ops.Int8WeightConfig()
    want = moe_ops.quantize(build("qwen3_moe").cpu(), config)
    want.save_pretrained(tmp_path)
    with torch.device("cpu"):
        got = moe_ops.hf.load_placed(AutoModelForCausalLM, tmp_path, dense)
    assert len(experts_of(got)) == 2
    for name, t in want.state_dict().items():
        assert torch.equal(got.state_dict()[name].cpu(), t)
    with pytest.raises(ValueError, match="quantization must be None for a checkpoint that is"):
        moe_ops.hf.load_placed(AutoModelForCausalLM, tmp_path, dense, quantization=config)


def test_bad_options_of_load_placed(tmp_path):
    build("qwen3_moe").cpu().save_pretrained(tmp_path)
    for options, match in (
        ({"dense": "xpu"}, "load_placed: dense must be cuda or cpu, got 'xpu'"),
        ({"dense": "cpu", "device_map": "auto"}, "must not contain device_map, got 'auto'"),
        ({"dense": "cpu", "layers": "x.*"}, "got 'x.*', which matches none"),
        ({"dense": "cpu", "stream_min_tokens": 0}, "load_placed: stream_min_tokens must be None"),
    ):
        with pytest.raises(ValueError, match=match.replace("*", "[*]")):
            moe_ops.hf.load_placed(AutoModelForCausalLM, tmp_path, **options)


def test_an_error_leaves_nothing_behind(dense, monkeypatch):
    """It is the kernel's own, at the call; the next call works, with the shared experts ahead."""
    _, model = pair("deepseek_v3", dense)
    ids = tokens().to(dense)
    want = model(ids).logits
    own = type(model.model.layers[1].mlp.experts)._moe_ops_own
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError, match="in the kernel"):
        forward = failing("in the kernel")
        patch.setattr(own, "forward", forward)
        model(ids)
    torch.testing.assert_close(model(ids).logits, want)
    torch.testing.assert_close(model(ids).logits, want)
    x = torch.randn(2, 3, device=dense, requires_grad=True)
    y = _seam.run_on_cpu(_FailsInBackward.apply, x)
    with pytest.raises(ZeroDivisionError, match="in backward"):
        y.sum().backward()
    _seam.run_on_cpu(torch.sin, x).sum().backward()
    torch.testing.assert_close(x.grad, x.detach().cos())


class _FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ZeroDivisionError("in backward")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dense": "xpu"}, "dense must be cuda or cpu, got 'xpu'"),
        ({"dense": 3.5}, "dense must be cuda or cpu, got 3.5"),
        ({"dense": "cuda:7"}, "dense must be a CUDA device that torch sees, got 'cuda:7'"),
        ({"experts": "cuda"}, "experts must be cpu, got 'cuda'"),
        ({"layers": "model.layers.9.*"}, "got 'model.layers.9.*', which matches none"),
        ({"layers": [1]}, "got 1, which matches none"),
        ({"quantization": "int8"}, "quantization|config"),
        ({"stream_min_tokens": 0}, "stream_min_tokens must be None or at least 1, got 0"),
        ({"stream_min_tokens": True}, "must be None or at least 1, got True"),
        ({"stream_min_tokens": "auto"}, "must be None or at least 1, got 'auto'"),
    ],
)
def test_bad_arguments(options, match):
    model = build("qwen3_moe")
    with pytest.raises(ValueError, match=match):
        moe_ops.hf.place(model, **{"dense": "cpu", **options})
    assert not experts_of(model)


def test_bad_models(dense):
    with pytest.raises(ValueError, match="must be a loaded model"):
        moe_ops.hf.place("tiny", dense)
    with pytest.raises(ValueError, match="holds no MoE block"):
        moe_ops.hf.place(torch.nn.Linear(2, 2), dense)
    with pytest.raises(ValueError, match="got a meta tensor as model"):
        moe_ops.hf.place(build("qwen3_moe").to("meta"), dense)
    hooked = build("qwen3_moe")
    hooked.model.norm._hf_hook = object()
    with pytest.raises(ValueError, match="load it without device_map"):
        moe_ops.hf.place(hooked, dense)
