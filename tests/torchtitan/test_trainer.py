"""torchtitan's trainer on gloo processes: with an override, losses are those of stock experts."""

from __future__ import annotations

import pytest

pytest.importorskip("torchtitan", reason="torchtitan is not installed")
pytest.importorskip("moe_ops.torchtitan", reason="torchtitan cannot be imported")

from tests.torchtitan.train import make_assets, train

pytestmark = pytest.mark.cpu_only

MODELS = {
    "deepseek_v3": "deepseek_v3_debugmodel",
    "gpt_oss": "gpt_oss_debugmodel_flex",
    "qwen3": "qwen3_moe_debug",
}
CLASSES = {None: "GroupedExperts", "grouped_gemm": "GroupedGemmExperts", "moe_ffn": "FusedExperts"}
EP = ("--parallelism.expert_parallel_degree", "2")
DP = ("--parallelism.data_parallel_shard_degree",)
LAYOUTS = {
    "fsdp 4": (*DP, "4", *EP),
    "fsdp 2, replicated": (*DP, "2", "--parallelism.data_parallel_replicate_degree", "2", *EP),
    "fsdp 2, pipeline": (*DP, "2", "--parallelism.pipeline_parallel_degree", "2", *EP),
    "full checkpointing": (*DP, "4", *EP, "activation-checkpoint:full"),
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder)
    with pytest.MonkeyPatch.context() as context:
        context.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        context.setenv("HF_HUB_OFFLINE", "1")
        yield folder


def run(assets, model, ranks, override, *args):
    options = [
        *("--module", model, "--config", MODELS[model], "--hf_assets_path", str(assets)),
        *("--debug.seed", "1", "--training.disable_cuda_graphs", "--training.seq_len", "64"),
        *("--training.local_batch_size", "2", "--training.mixed_precision_param", "float32"),
        *("--parallelism.spmd_backend", "partial_dtensor", "--validator.freq", "1000"),
        *("--training.steps", "4"),
    ]
    if override:
        options += ["--override.imports", f"moe_ops.torchtitan.{override}"]
    losses, experts, _ = train(assets, ranks, [*options, *args], fp32=True)
    assert experts == {"GptOss" * (model == "gpt_oss") + CLASSES[override]}
    return losses


@pytest.mark.parametrize("model", MODELS)
def test_losses_are_those_of_the_stock_experts(assets, model):
    """moe_ffn adds up in another order, which three updates of the weights enlarge. It cannot
    compute gpt-oss in float32, because torchtitan's experts keep that bias in bfloat16."""
    want = run(assets, model, 2, None, *EP)
    assert len(set(want)) == 4
    for override, error in (("grouped_gemm", 1e-6), ("moe_ffn", 5e-6)):
        if (model, override) != ("gpt_oss", "moe_ffn"):
            assert run(assets, model, 2, override, *EP) == pytest.approx(want, rel=error)


def test_compiled_blocks(assets):
    """The stock experts run without torch.compile, which refuses their GEMMs in float32. Compiled
    blocks round differently outside the experts, too."""
    want = run(assets, "deepseek_v3", 2, None, *EP)
    compiled = ("--compile.enable", "--compile.backend", "aot_eager")
    for override in ("grouped_gemm", "moe_ffn"):
        got = run(assets, "deepseek_v3", 2, override, *EP, *compiled)
        assert got == pytest.approx(want, rel=5e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_four_processes(assets, layout):
    want = run(assets, "deepseek_v3", 4, None, *LAYOUTS[layout])
    assert len(set(want)) == 4
    got = run(assets, "deepseek_v3", 4, "grouped_gemm", *LAYOUTS[layout])
    assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("override", ["grouped_gemm", "moe_ffn"])
def test_checkpoints_load_with_and_without_an_override(assets, tmp_path, override):
    for saves, loads in [(None, override), (override, None)]:
        save = ("--dump_folder", str(tmp_path / str(saves)), "--checkpoint.enable")
        want = run(assets, "deepseek_v3", 2, saves, *EP, *save, "--checkpoint.interval", "2")
        load = (*save, "--checkpoint.load_only", "--checkpoint.load_step", "2")
        got = run(assets, "deepseek_v3", 2, loads, *EP, *load)
        assert got == pytest.approx(want[2:], rel=1e-6)
