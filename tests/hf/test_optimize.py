"""Whole models on kernels for inference: the same tokens, and the way back."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from tests.helpers.quantized import weight_config
from torch import nn
from transformers import AutoModelForCausalLM, TextStreamer

import moe_ops.hf
from moe_ops import memory
from moe_ops.hf.decode.fused import set_fused
from moe_ops.hf.models.known import find
from moe_ops.layers.linear import FewRowsLinear
from moe_ops.quant import QuantizedLinear
from moe_ops.quant.stored_linear import StoredLinear

from .models import MODEL_TYPES, VOCAB, build, router_is_unknown, skip_unknown_router, tokens
from .test_quantize import WIDE, logits, make, relative

# The kinds of fused modules in each model; LayerNorms and other choices stay.
FUSED = {name: {"fused norm", "fused router", "fused layer"} for name in MODEL_TYPES} | {
    "jetmoe": {"fused norm"},
    "llama4_text": {"fused norm"},
    "phimoe": set(),
    "dbrx": set(),
}
GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 12}


def padded(batch: int = 3, length: int = 9) -> dict[str, torch.Tensor]:
    """Prompts of unequal length, padded on the left."""
    ids = tokens(batch, length)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_greedy_tokens_and_the_way_back(model_type):
    model = build(model_type)
    batch, ids = padded(), tokens(1, 5)
    want, one = model.generate(**batch, **GREEDY), model.generate(ids, **GREEDY)
    exact, state = logits(model, ids), model.state_dict()
    classes = {name: type(m) for name, m in model.named_modules()}
    status = moe_ops.hf.status(model)

    report = moe_ops.hf.optimize(model)
    assert torch.equal(model.generate(**batch, **GREEDY), want)
    assert torch.equal(model.generate(ids, **GREEDY), one)
    torch.testing.assert_close(logits(model, ids), exact, rtol=2e-4, atol=2e-4)
    fused = FUSED[model_type] - ({"fused router"} if router_is_unknown(model_type) else set())
    assert {how for how in report.values() if how.startswith("fused")} == fused
    linear = {n for n, m in model.named_modules() if isinstance(m, FewRowsLinear)}
    assert linear and linear == {n for n, how in report.items() if how == "few rows"}
    assert "lm_head" in linear
    with moe_ops.hf.assert_used(model):
        logits(model, ids)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(after[k].data_ptr() == state[k].data_ptr() for k in state), "no weight is held twice"

    moe_ops.hf.restore(model)
    assert {name: type(m) for name, m in model.named_modules()} == classes
    assert moe_ops.hf.status(model) == status
    assert torch.equal(logits(model, ids), exact)
    assert list(model.state_dict()) == list(state)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize(("weights", "most"), [("int8", 0.02), ("int4", 0.2)])
def test_quantized(model_type, weights, most):
    model, ids = make(model_type), tokens()
    before = num_bytes(model)
    calls = recorded_calls(model, ids)
    group = 32 if weights == "int4" else None
    report = moe_ops.hf.optimize(model, quantization=weight_config(weights, group))
    quantized = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert "lm_head" in quantized
    assert quantized.keys() == {n for n, how in report.items() if how in ("int8", "int4 g32")}
    assert not any("router" in n.split(".") or "gate" in n.split(".") for n in quantized)
    # Each layer alone, on the inputs that it had: routing cannot flip.
    with torch.no_grad():
        for name, layer in quantized.items():
            x, want = calls[name]
            assert relative(layer(x), want) < most, name
    rest = sum(p.nbytes for p in model.parameters())
    assert num_bytes(model) - rest < (0.32 if weights == "int8" else 0.25) * (before - rest)
    assert torch.isfinite(logits(model, ids)).all()
    assert model.generate(**padded(), **GREEDY).shape == (3, 21)
    with pytest.raises(ValueError, match=r"restore: model must have its float weights"):
        moe_ops.hf.restore(model)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_saved_model_is_optimized_again(weights, tmp_path):
    def load(name):
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / name, dtype=torch.bfloat16, experts_implementation="moe_ops"
        ).eval()

    make("mixtral").save_pretrained(tmp_path / "float")
    model, ids = load("float"), tokens()
    group = 32 if weights == "int4" else None
    moe_ops.hf.optimize(model, quantization=weight_config(weights, group))
    model.save_pretrained(tmp_path / "saved")
    loaded = load("saved")
    moe_ops.hf.optimize(loaded, quantization=weight_config(weights, group))
    assert moe_ops.hf.report(loaded)["lm_head"] == {"int8": "int8", "int4": "int4 g32"}[weights]
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    other = "int4" if weights == "int8" else "int8"
    stored = load("saved")
    message = rf"None or the format of .* already, {weights}( g32)?, got {other}( g64)?; load"
    with pytest.raises(ValueError, match=message):
        moe_ops.hf.optimize(stored, quantization=weight_config(other))
    assert moe_ops.hf.optimize(stored)


def recorded_calls(model, ids):
    """Input and output of each dense layer in one pass."""
    calls = {}

    def record(name):
        # Llama 4 adds to the output of a layer in place.
        return lambda module, args, output: calls.update({name: (args[0], output.clone())})

    named = [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear]
    handles = [m.register_forward_hook(record(n)) for n, m in named]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return calls


def num_bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("model_type", ["mixtral", "jetmoe", "llama4_text", "dbrx", "deepseek_v3"])
def test_original_weights_come_back_where_they_are_kept(model_type):
    model, ids = make(model_type), tokens()
    want, names = logits(model, ids), list(model.state_dict())
    before, held = num_bytes(model), memory.memory_stats()["original weights"]
    moe_ops.hf.optimize(model, quantization=moe_ops.Int8WeightConfig(), keep_original=True)
    kept = memory.memory_stats()["original weights"] - held
    left = sum(p.nbytes for p in model.parameters())
    assert abs(kept - (before - left)) <= 0.02 * before, "reported: all that is not the model's"
    moe_ops.hf.restore(model)
    assert torch.equal(logits(model, ids), want)
    assert list(model.state_dict()) == names
    assert memory.memory_stats()["original weights"] == held
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")
    moe_ops.hf.optimize(model, quantization=moe_ops.Int8WeightConfig())


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_saved_and_loaded(tmp_path, weights):
    model, ids = make("qwen3_moe"), tokens()
    names = list(model.state_dict())
    moe_ops.hf.optimize(model, quantization=weight_config(weights, 32))
    want = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    if weights is None:
        assert list(loaded.state_dict()) == names
    torch.testing.assert_close(logits(loaded, ids), want, rtol=2e-2, atol=2e-2)
    if weights is not None:  # The file has codes; the state dict of the model has floats.
        assert list(model.state_dict())[1:5] != list(loaded.state_dict())[1:5]
        for name, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear):
                other = loaded.get_submodule(name)
                assert type(other) is StoredLinear and other.format.label == layer.format
                assert torch.equal(other.codes, layer.q) and torch.equal(other.scale, layer.scale)


def test_a_tied_head(tmp_path):
    model, ids = make("mixtral", tie_word_embeddings=True), tokens()
    model.tie_weights()
    moe_ops.hf.optimize(model, quantization=moe_ops.Int8WeightConfig())
    assert isinstance(model.lm_head, QuantizedLinear)
    assert "lm_head.weight" not in model.state_dict()
    want = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert relative(logits(loaded, ids), want) < 0.05


def test_ways_to_generate(capsys):
    plain, model = build("qwen3_moe"), build("qwen3_moe")
    moe_ops.hf.optimize(model)
    ids = tokens(1, 6)

    class Words:
        def decode(self, ids, **_):
            return " ".join(str(int(i)) for i in torch.as_tensor(ids).flatten())

    def both(**options):
        results = []
        for m in (plain, model):
            torch.manual_seed(0)
            results.append(m.generate(**{**GREEDY, "input_ids": ids, **options}))
        assert torch.equal(*results), options

    both(num_beams=3)
    both(do_sample=True, temperature=0.7, top_k=9)
    both(do_sample=True, top_p=0.8, num_return_sequences=3)
    both(repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=3)
    both(use_cache=False)
    both(cache_implementation="static")
    both(**padded(), num_beams=2)
    both(prompt_lookup_num_tokens=3)
    both(assistant_model=build("mixtral"), tokenizer=None)
    printed = []
    for m in (plain, model):
        m.generate(ids, **GREEDY, streamer=TextStreamer(Words()))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""


def test_compiled_steps():
    """The backend that only traces: what is tested is that generate compiles and agrees."""
    torch.compiler.reset()
    plain, model = (build("qwen3_moe", num_hidden_layers=1) for _ in range(2))
    options = {**GREEDY, "max_new_tokens": 4}
    want = plain.generate(**padded(), **options)
    moe_ops.hf.optimize(model, compile="eager")
    assert torch.equal(model.generate(**padded(), **options), want)
    assert hasattr(model, "_compiled_call")
    moe_ops.hf.restore(model)
    assert model.generation_config.cache_implementation is None
    assert model.generation_config.compile_config is None


class Adapter(nn.Module):
    """The module that PEFT puts around a layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, 2, bias=False)
        self.b = nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_exported_with_a_dynamic_length(weights):
    """The example has few tokens; the program takes few and many."""
    model = make("qwen3_moe").bfloat16()
    moe_ops.hf.optimize(
        model, quantization=weight_config(weights, 32 if weights == "int4" else None)
    )

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    length = {1: torch.export.Dim("length", min=2, max=512)}
    with torch.no_grad():
        program = torch.export.export(
            Logits(), (torch.ones(1, 5).long(),), dynamic_shapes=(length,)
        )
        for count in (3, 130):
            ids = torch.arange(count)[None] % VOCAB
            assert relative(program.module()(ids), Logits()(ids)) < 0.03


@pytest.mark.parametrize("quantize", [False, True])
def test_adapters_on_top_are_trained(quantize):
    plain, model = build("mixtral"), build("mixtral")
    moe_ops.hf.optimize(model)
    if quantize:
        for layer in model.model.layers:
            layer.self_attn.q_proj = QuantizedLinear(
                layer.self_attn.q_proj, moe_ops.Int8WeightConfig()
            )
    grads = []
    for m in (plain, model):
        torch.manual_seed(0)
        m.requires_grad_(False)
        for layer in m.model.layers:
            layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
        m(tokens(), labels=tokens()).loss.backward()
        adapters = [layer.self_attn.q_proj for layer in m.model.layers]
        grads.append(torch.cat([a.b.weight.grad.flatten() for a in adapters]))
    assert relative(grads[1], grads[0]) < (0.05 if quantize else 1e-4)
    with pytest.raises(ValueError, match=r"restore: model must have the modules .* adapters"):
        moe_ops.hf.restore(model)


def test_gradients_are_those_of_before():
    ids = tokens()
    plain, model = build("deepseek_v3"), build("deepseek_v3")
    moe_ops.hf.optimize(model)
    for m in (plain, model):
        m(ids, labels=ids).loss.backward()
    theirs = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        assert relative(p.grad, theirs[name].grad) < 1e-3, name


def test_half_precision():
    plain, ids = build("qwen2_moe", dtype=torch.bfloat16), tokens()
    model = build("qwen2_moe", dtype=torch.bfloat16)
    moe_ops.hf.optimize(model)
    assert relative(logits(model, ids), logits(plain, ids)) < 0.05
    assert logits(model, ids).dtype == torch.bfloat16


def test_copies_and_pickles():
    model, ids = build("mixtral"), tokens()
    moe_ops.hf.optimize(model)
    want = logits(model, ids)
    assert torch.equal(logits(copy.deepcopy(model), ids), want)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False), ids), want)


@pytest.mark.parametrize("change", [{}, {"norm_topk_prob": False}], ids=["", "raw"])
@pytest.mark.parametrize("model_type", [m for m in MODEL_TYPES if "fused router" in FUSED[m]])
def test_router_of_a_wide_model(model_type, change):
    """The check that tells formulas apart must do so where sums are over thousands of features."""
    skip_unknown_router(model_type)
    torch.manual_seed(0)
    model = build(model_type, hidden_size=2048, **change)
    routers = [m for m in model.modules() if hasattr(m, "top_k") and hasattr(m, "weight")]
    router = routers[-1]
    x = torch.randn(40, 2048)
    with torch.no_grad():
        router.weight.normal_(0.0, 2048**-0.5)
        logits, weights, ids = router(x)
        set_fused(router, "router", find("router", router))
        got_logits, got_weights, got_ids = router(x)
    torch.testing.assert_close(got_logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got_weights.sum(1), weights.sum(1), rtol=1e-4, atol=1e-5)
    expected = torch.zeros_like(logits).scatter(1, ids.long(), weights)
    actual = torch.zeros_like(logits).scatter(1, got_ids.long(), got_weights)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_bad_arguments():
    model = build("mixtral")
    with pytest.raises(ValueError, match=r"optimize: config must be an Int8WeightConfig, .*'int8'"):
        moe_ops.hf.optimize(model, quantization="int8")


@pytest.mark.parametrize(
    "call",
    [
        moe_ops.hf.enable,
        moe_ops.hf.optimize,
        lambda name: moe_ops.quantize(name, moe_ops.Int4WeightConfig()),
    ],
)
def test_a_name_is_no_model(call):
    with pytest.raises(ValueError, match=r"must be a loaded model .*, got 'Qwen/Qwen3'\."):
        call("Qwen/Qwen3")


def test_out_of_turn():
    model = build("mixtral")
    with pytest.raises(ValueError, match=r"restore: model must be optimized, got Mixtral"):
        moe_ops.hf.restore(model)
    moe_ops.hf.optimize(model)
    with pytest.raises(ValueError, match=r"must not be optimized already; call restore first"):
        moe_ops.hf.optimize(model)
    with pytest.raises(ValueError, match=r"one that generates to compile its steps, got ModuleL"):
        moe_ops.hf.optimize(build("mixtral").model.layers, compile=True)


def test_restore_keeps_what_use_has_changed():
    """Frequencies that a long prompt has changed, and a parameter that somebody has replaced."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}
    plain, model = (build("qwen3_moe", rope_parameters=rope) for _ in range(2))
    moe_ops.hf.optimize(model)
    for m in (plain, model):
        for ids in (tokens(1, 70), tokens(1, 5)):
            logits(m, ids)
        m.model.norm.weight = nn.Parameter(m.model.norm.weight * 2)
    moe_ops.hf.restore(model)
    assert torch.equal(logits(model, tokens(1, 9)), logits(plain, tokens(1, 9)))


def test_threads_take_turns():
    """Any order of calls leaves a model that was optimized once, or not at all."""
    model, ids = build("mixtral"), tokens(1, 5)
    want, classes = logits(model, ids), {n: type(m) for n, m in model.named_modules()}
    for _ in range(3):
        gate, said = threading.Barrier(4), []

        def run(gate=gate, said=said):
            gate.wait()
            try:
                moe_ops.hf.optimize(model)
                said.append("done")
            except ValueError as error:
                said.append(str(error))

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert said.count("done") == 1 and all(
            "optimized already" in s for s in said if s != "done"
        )
        moe_ops.hf.restore(model)
        assert {n: type(m) for n, m in model.named_modules()} == classes
        assert torch.equal(logits(model, ids), want)


def test_one_block():
    layer = build("mixtral").model.layers[0]
    report = moe_ops.hf.optimize(layer, quantization=moe_ops.Int8WeightConfig())
    assert report["self_attn.q_proj"] == "int8" and report["mlp.gate"] == "fused router"


def test_sizes_that_no_group_divides():
    model = build("mixtral", **WIDE["mixtral"])
    model.model.layers[0].self_attn.q_proj = nn.Linear(40, 32)
    report = moe_ops.hf.optimize(model, quantization=moe_ops.Int4WeightConfig(32))
    assert report["model.layers.0.self_attn.q_proj"] == "few rows"
    assert report["model.layers.1.self_attn.q_proj"] == "int4 g32"
    assert VOCAB == model.lm_head.out_features
