"""Counts of efficiency claims equal hand arithmetic, and the page shows the stored results."""

from __future__ import annotations

import json

import pytest
import torch
from bench.studies.efficiency import main, report
from bench.studies.efficiency.claims import CLAIMS, stored_experts_per_token
from bench.studies.efficiency.count import flops, parameters, saved_bytes
from bench.studies.efficiency.measure import interval, materialize, run, take_turns
from bench.studies.efficiency.models import (
    BothMixtralBlock,
    MixtralBlock,
    MoELayer,
    OffloadedLayer,
    WeakMixtralBlock,
)
from bench.studies.page import BEGIN, END
from torch import nn

from moe_ops import zoo
from moe_ops.zoo.llama import LlamaConfig

MILLION, BILLION = 1e6, 1e9
# FLOPs of a forward pass from sizes alone, and parameters: (claim, arm, scene) -> both.
# A: attention's projections, M: feed-forward parameters per token, S: tokens, L: blocks.


def transformer(S, L, A, M, width, head):
    """Returns 2 S (L (A + M) + head) and the scores and values of S tokens on all S."""
    return 2 * S * (L * (A + M) + head) + 4 * S * S * width * L


LLAMA = {"L": 32, "A": 4 * 4096**2, "M": 3 * 4096 * 11_008, "width": 4096, "head": 32_000 * 4096}
DEEPSEEK_MOE = 27 / 28 * (8 * 3 * 2048 * 1408 + 64 * 2048) + 1 / 28 * 3 * 2048 * 10_944
DEEPSEEK = {"L": 28, "A": 4 * 2048**2, "M": DEEPSEEK_MOE, "width": 2048, "head": 102_400 * 2048}
# Two experts of 16 heads of 128, with shared keys and values; two routers of 8 experts.
JETMOE = {
    "L": 24,
    "A": 2 * 2 * 2048 * 2048 + 2 * 2048 * 2048 + 8 * 2048,
    "M": 2 * 3 * 2048 * 5632 + 8 * 2048,
    "width": 2 * 2048,
    "head": 32_000 * 2048,
}
MOLM_ROUTERS = 2 * 1024 * 256 + 256 * (16 + 32)
MOLM = {
    "L": 24,
    "A": 2 * 2 * 1024 * 512 + 2 * 1024 * 512 + MOLM_ROUTERS,
    "M": 2 * 2 * 1024 * 2048,
    "width": 2 * 512,
    "head": 50_295 * 1024,
}
PYTHIA = {"L": 24, "A": 4 * 2048**2, "M": 2 * 2048 * 8192, "width": 2048, "head": 50_304 * 2048}
TINYLLAMA_A = 2 * 2048**2 + 2 * 2048 * 256
TINYLLAMA = {"L": 22, "A": TINYLLAMA_A, "width": 2048, "head": 32_000 * 2048}
MIXTRAL_A, MIXTRAL_EXPERT = 2 * 4096**2 + 2 * 4096 * 1024 + 8 * 4096, 3 * 4096 * 14_336
MLA = 1024 * 8 * 192 + 1024 * 576 + 512 * 8 * 256 + 8 * 128 * 1024
COE_EXPERT, COE_GATE = 3 * 1024 * 704, 63 * 1024


def coe(calls, iterations, blocks=4):
    # Queries and keys have 192 features per head, values 128.
    return transformer(
        512, blocks, MLA, calls * COE_EXPERT + iterations * COE_GATE, 8 * 160, 102_400 * 1024
    )


def bam(attention_experts, kv_experts):
    attention = (2 * attention_experts + 2 * kv_experts) * 1024**2
    ffn = 3 * 1024 * 2048 + 4 * 1024
    width = 1024 * attention_experts
    return transformer(256, 6, attention, ffn, width, 256_000 * 1024)


BY_HAND = {
    ("jetmoe", "JetMoE-8B", "4,096 tokens"): transformer(4096, **JETMOE),
    ("jetmoe", "Llama 2 7B", "prompt"): transformer(256, **LLAMA),
    ("moduleformer", "MoLM-350M-4B", "prompt"): transformer(512, **MOLM),
    ("moduleformer", "Pythia-1.4B", "prompt"): transformer(512, **PYTHIA),
    ("deepseek", "DeepSeekMoE 16B", "4,096 tokens"): transformer(4096, **DEEPSEEK),
    ("factorllm", "dense", "prompt"): transformer(256, M=3 * 2048 * 5632, **TINYLLAMA),
    ("factorllm", "1 of 4 slices", "prompt"): transformer(256, M=3 * 2048 * 1408, **TINYLLAMA),
    ("scmoe", "two passes", "1 token"): 2
    * (32 * (2 * MIXTRAL_A + 3 * MIXTRAL_EXPERT) + 2 * 32_000 * 4096),
    ("coe-compute", "CoE-2(4/64)", "512 tokens"): coe(2 * 5, 2),
    ("coe-compute", "MoE(8/64)", "512 tokens"): coe(9, 1),
    ("coe-width", "MoE(24/64)", "512 tokens"): coe(25, 1),
    ("bam", "own keys and values", "prompt"): bam(4, 4),
    ("bam", "shared keys and values", "prompt"): bam(4, 1),
    ("bam", "BTX", "prompt"): bam(1, 1),
    # 197 places, 12 attentions of 4 H^2 and 12 networks of 8 H^2, the patches and the classifier.
    ("widenet", "ViT-B", "1 image"): transformer(197, 12, 4 * 768**2, 8 * 768**2, 768, 0)
    + 2 * 196 * 768 * 768
    + 2 * 768 * 1000,
    ("uncurl", "64 experts", "prompt"): 2 * 256 * 12 * (2 * 1024 * 4096 + 64 * 1024),
}
PARAMETERS_BY_HAND = {
    ("jetmoe", "JetMoE-8B"): 24 * (8 * 2 * 2048**2 + 2 * 2048**2 + 8 * 3 * 2048 * 5632)
    + 32_000 * 2048,
    ("deepseek", "DeepSeekMoE 16B"): 28 * 4 * 2048**2
    + 27 * 66 * 3 * 2048 * 1408
    + 3 * 2048 * 10_944
    + 2 * 102_400 * 2048,
    ("coe-experts", "CoE-2(4/48)"): 4 * (MLA + 48 * COE_EXPERT) + 2 * 102_400 * 1024,
    ("coe-layers", "MoE(8/64), 8 blocks"): 8 * (MLA + 64 * COE_EXPERT) + 2 * 102_400 * 1024,
    # The paper's 776 million.
    ("bam", "own keys and values"): 776 * MILLION,
    ("expertflow", "in memory"): 12 * 128 * 2 * 768 * 3072
    + 32_128 * 768
    + 36 * 4 * 768**2
    + 12 * 2 * 768 * 3072,
    ("widenet", "ViT-B"): 86.6 * MILLION,
    ("uncurl", "32 experts"): 12 * 32 * 2 * 1024 * 4096,
    ("mofme-16", "FFN experts"): 2 * 16 * 8 * 384**2 + 6 * MILLION,
}
STORED = main.read()


def built(name):
    with torch.device("meta"):
        return CLAIMS[name].build()


@pytest.mark.parametrize("key", BY_HAND, ids="-".join)
def test_flops_are_those_of_the_sizes(key):
    name, arm_name, scene = key
    claim = CLAIMS[name]
    arm, lead = claim.arms[arm_name], {**claim.scenes, **claim.counted_scenes}[scene]
    modules = built(name)
    found = sum(n * flops(modules[run], lead) for n, run in arm.counted or arm.runs)
    assert found == pytest.approx(BY_HAND[key], rel=0.02)
    if name in STORED["claims"]:
        assert STORED["claims"][name]["counted"][arm_name]["flops"][scene] == pytest.approx(
            found, rel=1e-6
        )


@pytest.mark.parametrize("key", PARAMETERS_BY_HAND, ids="-".join)
def test_parameters_are_those_of_the_sizes(key):
    arm, modules = CLAIMS[key[0]].arms[key[1]], built(key[0])
    found = sum(n * parameters(modules[name]) for n, name in arm.holds or arm.runs)
    assert found == pytest.approx(PARAMETERS_BY_HAND[key], rel=0.02)


@pytest.mark.parametrize(
    "name, preset, claim, arm",
    [
        ("jetmoe", "jetmoe_8b", "jetmoe", "JetMoE-8B"),
        ("moduleformer", "molm_350m_4b", "moduleformer", "MoLM-350M-4B"),
        ("coe", "c2k4", "coe-compute", "CoE-2(4/64)"),
    ],
)
def test_parts_are_the_whole_model(name, preset, claim, arm):
    """Blocks times their number, head and embedding have the model's parameters, but for norms."""
    with torch.device("meta"):
        whole = zoo.create_model(name, preset)
    found, modules = CLAIMS[claim].arms[arm], built(claim)
    parts = sum(n * parameters(modules[part]) for n, part in found.holds or found.runs)
    assert parts == pytest.approx(parameters(whole), rel=1e-3)


def test_top_p_counts_the_experts_in_use():
    arm, k = CLAIMS["topp"].arms["top-p"], stored_experts_per_token()
    assert 1 < k < 2
    modules = built("topp")
    found = sum(n * flops(modules[name], (1, 256)) for n, name in arm.counted)
    M = k * 3 * 1024 * 2816 + 16 * 1024
    assert found == pytest.approx(
        transformer(256, 24, 4 * 1024**2, M, 1024, 32_000 * 1024), rel=0.02
    )


def test_saved_bytes_are_those_of_a_linear_map():
    with torch.device("meta"):
        layer = nn.Linear(8, 4, bias=False)
    layer.features, layer.rows = (8,), 1
    assert saved_bytes(layer, (3,)) == 3 * 8 * 4  # Only the input, in fp32


def test_weak_pass_runs_the_second_expert():
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=32)
    strong = MixtralBlock(config).double()
    x = torch.randn(1, 1, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.cat([strong(x), WeakMixtralBlock(strong)(x)])
        both = BothMixtralBlock(strong)(torch.cat([x, x]))
    torch.testing.assert_close(both, expected)
    assert not torch.equal(both[0], both[1])


def test_offloaded_layer_has_the_hit_rate():
    torch.manual_seed(0)
    layer = MoELayer(16, 8, 8, "relu").eval()
    offloaded = OffloadedLayer(layer, 4, 0.75, None)
    with torch.no_grad():
        for _ in range(2000):
            offloaded(torch.randn(1, 1, 8))
    assert offloaded.cache.stats.hit_rate == pytest.approx(0.75, abs=0.04)
    offloaded.cache.close()


def test_interval_is_of_order_statistics():
    # Of 9 values, the second and the eighth: 1 - 2 * (1 + 9) / 512 = 0.961.
    assert interval(range(9)) == (4, 1, 7)
    assert interval(range(6)) == (2.5, 0, 5)
    with pytest.raises(ValueError, match="at least 6"):
        interval(range(5))


def test_modules_take_turns():
    claim = CLAIMS["uncurl"]
    small = {}
    with torch.device("meta"):
        for name in built("uncurl"):
            small[name] = MoELayer(4, 8, 8, "gelu").bfloat16()
    materialize(small, training=False)
    rounds = take_turns(claim, small, (1, 2), 0.0)
    assert len(rounds) == 9
    assert all(set(row) == set(small) and min(row.values()) > 0 for row in rounds)


def test_training_leaves_no_gradients():
    with torch.device("meta"):
        layer = MoELayer(4, 8, 8, "gelu")
    materialize({"layer": layer}, training=True)
    assert all(p.requires_grad for p in layer.parameters())
    run(layer, torch.randn(1, 2, 8), training=True)
    assert all(p.grad is None for p in layer.parameters())


def test_page_shows_the_stored_results():
    text = report.PAGE.read_text()
    assert text.split(BEGIN)[1].split(END)[0].strip() == report.body(STORED)


def test_picture_is_drawn_from_the_stored_results(tmp_path):
    pytest.importorskip("matplotlib")
    report.draw(STORED, tmp_path / report.PICTURE.name)
    assert (tmp_path / report.PICTURE.name).read_text() == report.PICTURE.read_text()


def test_differences_are_explained():
    for claim, found, arm in report.arms(STORED["claims"]):
        assert claim.why.endswith("."), claim.name
        assert set(found["counted"]) == set(claim.arms)
        for of in found["measured"].values():
            middle, low, high = of["ratio"][arm]
            assert low <= middle <= high


def test_stored_results_are_json():
    assert json.loads(main.RESULT.read_text())["machine"]["cpu"]
