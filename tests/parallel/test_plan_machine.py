"""Plans of one machine: published models against numbers computed by hand, files, and the CLI."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from moe_ops.bench import rates
from moe_ops.cli.app import app
from moe_ops.parallel import plan
from moe_ops.parallel.plan.machine import GB, PROCESS, Machine, plan_machine, sizes_of
from moe_ops.parallel.plan.stored import find_stored

runner = CliRunner()

# 80 GB/s and 1.6 TFLOP/s on the CPU, 360 GB/s on the GPU, 25 GB/s between them.
CARD = Machine(12 * GB, 64 * GB, 80 * GB, 1.6e12, 50e-6, 360 * GB, 25 * GB)
GIVEN = "--bandwidth 80 --tflops 1.6 --overhead 50 --pcie 25 --gpu-bandwidth 360".split()


def invoke(*arguments: object):
    return runner.invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "120"})


@pytest.mark.parametrize(
    "name, experts, active, dense",
    [
        ("qwen3_30b", 29.0, 1.81, 1.54),
        ("gpt_oss_120b", 114.7, 3.58, 2.13),
        ("deepseek_v3", 654, 20.4, 17.1),
    ],
)
def test_weights_of_published_models(name, experts, active, dense):
    shape = plan.find_shape(name)
    sizes = sizes_of(shape, "bf16", "bf16")
    # Two bytes a weight.
    assert sizes.experts / 2e9 == pytest.approx(experts, rel=3e-3)
    assert sizes.experts / 2e9 * shape.top_k / shape.num_experts == pytest.approx(active, rel=3e-3)
    assert sizes.dense / 2e9 == pytest.approx(dense, rel=3e-3)


@pytest.mark.parametrize(
    "name, format, experts, crossover, streamed",
    [
        ("qwen3_30b", "bf16", 58.0, 1024, 1766),
        ("qwen3_30b", "int8", 29.1, 514, 3525),
        ("qwen3_30b", "int4", 16.3, 288, 6279),
        ("qwen3_30b", "mxfp4", 15.4, 272, 6649),
        ("gpt_oss_120b", "mxfp4", 60.9, 544, 1681),
        ("deepseek_v3", "int4", 367.8, 576, 278),
        ("deepseek_v3", "fp8", 654.1, 1024, 157),
    ],
)
def test_experts_and_copies(name, format, experts, crossover, streamed):
    result = plan_machine(plan.find_shape(name), CARD, format=format)
    assert result.sizes.experts / GB == pytest.approx(experts, rel=3e-3)
    assert result.crossover.value == pytest.approx(crossover, rel=5e-3)
    assert result.streamed.value == pytest.approx(streamed, rel=5e-3)


def test_decode_and_training_by_hand():
    result = plan_machine(plan.find_shape("qwen3_30b"), CARD, format="bf16", context=1)
    # 3.624 GB of experts, and 2.46 GB of others without the embedding's 0.62.
    expected = 1 / (3.624 / 80 + 2.46 / 360 + 48 * 50e-6 + 0.2e-3)
    assert result.decode.value == pytest.approx(expected, rel=2e-3)
    assert result.lora.value == pytest.approx(221, rel=3e-3)
    assert result.full.value == pytest.approx(147, rel=3e-3)
    assert result.adapters.value == 48 * 128 * 8 * (2048 + 1536 + 768 + 2048) * 16
    long = plan_machine(plan.find_shape("qwen3_30b"), CARD, format="bf16", context=4096)
    assert long.prefill.value == pytest.approx(442, rel=3e-3)
    assert long.cache == 48 * 2 * 4 * 128 * 2 * 4096
    assert long.decode.value < result.decode.value


def test_without_a_gpu_everything_is_in_ram():
    machine = Machine(0, 64 * GB, 80 * GB, 1.6e12)
    shape = plan.find_shape("qwen3_30b")
    result = plan_machine(shape, machine, format="int4", dense_format="int8")
    assert result.vram is None and result.crossover is None and result.streamed is None
    weights = result.sizes.experts + result.sizes.dense
    assert result.ram.value == weights + result.cache + PROCESS
    floats = plan_machine(shape, machine, format="int4")
    # int8 halves attention and the head; embedding, norms and routers stay.
    assert 0.5 * floats.sizes.dense < result.sizes.dense < 0.65 * floats.sizes.dense
    assert result.decode.value > floats.decode.value


def test_a_batch_reads_an_expert_once():
    shape = plan.find_shape("mixtral_8x7b")
    one, many = (plan_machine(shape, CARD, format="int4", context=1, batch=b) for b in (1, 64))
    # All 8 experts instead of 2, for 64 tokens; GEMMs then take longer than reading.
    assert 4 < many.decode.value / one.decode.value < 64


def test_experts_that_do_not_fit_move_to_the_gpu_in_part():
    result = plan_machine(plan.find_shape("gpt_oss_120b"), CARD, format="int4")
    assert not result.fits_ram and result.fits_vram
    free = CARD.vram - result.vram.value
    assert result.card_layers == int(free // result.sizes.layer) > 0
    assert result.split.value > result.decode.value
    assert result.ram.value - result.card_layers * result.sizes.layer <= CARD.ram
    done = invoke("gpt_oss_120b", "--vram", 12, "--ram", 64, "--format", "int4", *GIVEN)
    assert done.exit_code == 0, done.output
    assert "│ part │" in done.output


def test_cached_experts():
    """Slots take VRAM, and hits move their bytes from the CPU's memory to the GPU's."""
    shape = plan.find_shape("qwen3_30b")
    none = plan_machine(shape, CARD, format="bf16", context=1)
    result = plan_machine(shape, CARD, format="bf16", context=1, cached_experts=16, hit_rate=0.5)
    # An eighth of 58.0 GB of experts.
    assert (result.vram.value - none.vram.value) / GB == pytest.approx(7.25, rel=3e-3)
    assert none.cached is None and result.decode == none.decode
    # 1.812 of 3.624 GB of experts on each side, and 2.46 GB of other weights.
    expected = 1 / (1.812 / 80 + (1.812 + 2.46) / 360 + 48 * 50e-6 + 0.2e-3)
    assert result.cached.value == pytest.approx(expected, rel=2e-3)
    never = plan_machine(shape, CARD, format="bf16", context=1, cached_experts=16, hit_rate=0.0)
    assert never.cached.value == none.decode.value
    many = plan_machine(shape, CARD, format="bf16", cached_experts=128, hit_rate=1.0)
    assert not many.fits_vram
    done = invoke(
        *("qwen3_30b", "--vram", 12, "--ram", 64, *GIVEN, "--format", "int4"),
        *("--cached-experts", 16, "--hit-rate", 0.5),
    )
    assert done.exit_code == 0, done.output
    assert "decode with cached experts: 1 / (experts 0.51 GB / 80 GB/s" in done.output


@pytest.mark.parametrize(
    "machine, options, message",
    [
        (CARD, {"cached_experts": 129, "hit_rate": 0.5}, "cached_experts must be from 0 to 128"),
        (CARD, {"cached_experts": 4}, "hit_rate must be given with cached_experts"),
        (CARD, {"hit_rate": 0.5}, "hit_rate must be given with cached_experts"),
        (CARD, {"cached_experts": 4, "hit_rate": 1.5}, "hit_rate must be from 0 to 1, got 1.5"),
        (
            Machine(0, 64 * GB, 80 * GB, 1.6e12),
            {"cached_experts": 4, "hit_rate": 0.5},
            "cached_experts must be 0 without a GPU",
        ),
    ],
)
def test_caches_that_cannot_be(machine, options, message):
    with pytest.raises(ValueError, match=message):
        plan_machine(plan.find_shape("qwen3_30b"), machine, format="int4", **options)


def test_files_of_save_pretrained(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    import moe_ops
    import moe_ops.hf

    config = transformers.AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=256,
        hidden_size=128,
        moe_intermediate_size=64,
        intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "float")
    experts = 2 * 8 * 3 * 128 * 64
    stored = find_stored(tmp_path / "float")
    assert stored.experts == 2 * experts
    assert stored.embedding == 2 * 256 * 128
    assert stored.experts + stored.embedding + stored.others == sum(
        p.nbytes for p in model.parameters()
    )
    moe_ops.quantize(model, moe_ops.Int4WeightConfig())
    model.save_pretrained(tmp_path / "int4")
    small = find_stored(tmp_path / "int4")
    assert small.experts == experts * 9 // 16  # Half a byte, and four bytes per 64 weights.
    assert small.others == stored.others

    done = invoke(tmp_path / "int4", "--vram", 0, "--ram", 1, *GIVEN[:6], "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["chosen"] == "stored"
    assert result["formats"][0]["sizes"]["experts"] == small.experts
    assert result["formats"][0]["dense_format"] == "stored"

    [file] = (tmp_path / "int4").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:20])
    done = invoke(tmp_path / "int4", "--vram", 0, *GIVEN[:6])
    assert done.exit_code == 1
    assert "must be a whole safetensors file" in done.output
    assert find_stored(tmp_path) is None


def test_output_has_the_arithmetic_and_the_sources():
    done = invoke("qwen3_30b", "--vram", 12, "--ram", 64, *GIVEN, "--format", "int4")
    assert done.exit_code == 0, done.output
    assert "PCIe 25 GB/s (given)" in done.output
    assert "experts 16.31 + staging 0.03 + process 0.45 = 16.8 GB" in done.output
    assert "(128 / 8) x (0.562 bytes a weight / 2) x (1.6 TFLOP/s / 25 GB/s) = 288 tokens" in (
        done.output
    )


def test_rates_that_are_not_given_are_measured(monkeypatch):
    pretended = rates.Rates(2, 40e9, 30e9, 100e-6, 2e12, 3e11, None, None)
    monkeypatch.setattr(rates, "measure_rates", lambda: pretended)
    done = invoke("qwen3_30b", "--vram", 12, "--json")
    machine = json.loads(done.stdout)["machine"]
    assert machine["bandwidth"] == 30e9 and machine["flops"] == 2e12
    assert machine["overhead"] == pytest.approx(560e-6)
    sources = machine["sources"]
    assert sources["bandwidth"] == sources["overhead"] == "measured here"
    assert sources["pcie"] == sources["gpu_bandwidth"] == "assumed"
    assert sources["ram"] == "available here"
    done = runner.invoke(app, ["doctor", "--rates", "--json"])
    findings = {f["name"]: f["text"] for f in json.loads(done.stdout)["findings"]}
    assert findings["rates"].startswith("--bandwidth 30 --overhead 560 --tflops 2 with 2 threads")
    assert "no rates of a GPU" in findings["rates"]


def test_measured_rates_are_consistent(monkeypatch):
    monkeypatch.setattr(rates, "_SECONDS", 0.02)
    monkeypatch.setattr(rates, "_LEAST_BYTES", 32 << 20)
    monkeypatch.setattr(rates, "_last_level_cache", lambda: 0)
    found = rates.measure_rates()
    assert found.threads == torch.get_num_threads()
    # From one to a thousand GB/s, and from a GFLOP/s on.
    assert 1e9 < found.bandwidth < 1e12 and 1e9 < found.read < 1e12
    assert found.bf16_flops > 1e9 and found.fp32_flops > 1e9
    assert 0 <= found.call < 0.1
    assert ("pcie" in found.options()) is torch.cuda.is_available()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            "--vram 12 --format int3",
            "plan: format must be one of bf16, int8, fp8, int4, mxfp4, got",
        ),
        ("--vram 12 --format stored", "plan: format must be one of bf16, int8, fp8, int4, mxfp4,"),
        ("--vram 12 --dense-format mxfp4", "plan: dense_format must be one of bf16, int8, fp8,"),
        ("--vram 12 --ranks 8", "plan: --ranks must be given without --vram."),
        ("--ram 64", "plan: --ram must be given with --vram."),
        ("--overhead 9 --ranks 8", "plan: --overhead must be given with --vram."),
        ("--vram 0 --bandwidth 0 --tflops 1", "plan: bandwidth must be above 0, got 0."),
        ("--vram 8 --pcie 0 --bandwidth 1 --tflops 1", "plan: pcie must be above 0, got 0."),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, message):
    done = invoke("qwen3_30b", *arguments.split())
    assert done.exit_code == 1
    assert done.output.startswith(f"error: {message}")
    assert done.output.count("\n") == 1


def test_a_model_of_the_hub_is_its_config(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def refuse(*_: object):
        raise OSError("no network")

    done = invoke("no_such_preset", "--vram", 12, *GIVEN)
    assert done.exit_code == 1
    assert "MODEL must be a config.json" in done.output
    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    for options in (["--vram", 12, *GIVEN], ["--ranks", 8]):
        done = invoke("owner/name", *options)
        assert done.exit_code == 1
        assert "MODEL must be a config.json" in done.output and "no network." in done.output
