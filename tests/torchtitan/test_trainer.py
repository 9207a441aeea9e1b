"""torchtitan's trainer on gloo processes: with an override, losses are those of stock experts."""

from __future__ import annotations

import pytest

pytest.importorskip("torchtitan", reason="torchtitan is not installed")
pytest.importorskip("moe_ops.torchtitan", reason="torchtitan cannot be imported")

from tests.torchtitan.train import make_assets, train

pytestmark = pytest.mark.cpu_only

MODELS = {
    "deepseek_v3": "deepseek_v3_debugmodel",
    "qwen3": "qwen3_moe_debug",
}
CLASSES = {None: "GroupedExperts", "grouped_gemm": "GroupedGemmExperts", "moe_ffn": "FusedExperts"}
EP = ("--parallelism.expert_parallel_degree", "2")


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
    assert experts == {CLASSES[override]}
    return losses


@pytest.mark.parametrize("model", ["deepseek_v3", "qwen3"])
def test_losses_are_those_of_the_stock_experts(assets, model):
    """moe_ffn adds up in another order, which three updates of the weights enlarge."""
    want = run(assets, model, 2, None, *EP)
    assert len(set(want)) == 4
    for override, error in (("grouped_gemm", 1e-6), ("moe_ffn", 5e-6)):
        assert run(assets, model, 2, override, *EP) == pytest.approx(want, rel=error)


@pytest.mark.parametrize("override", ["grouped_gemm", "moe_ffn"])
def test_checkpoints_load_with_and_without_an_override(assets, tmp_path, override):
    for saves, loads in [(None, override), (override, None)]:
        save = ("--dump_folder", str(tmp_path / str(saves)), "--checkpoint.enable")
        want = run(assets, "deepseek_v3", 2, saves, *EP, *save, "--checkpoint.interval", "2")
        load = (*save, "--checkpoint.load_only", "--checkpoint.load_step", "2")
        got = run(assets, "deepseek_v3", 2, loads, *EP, *load)
        assert got == pytest.approx(want[2:], rel=1e-6)
