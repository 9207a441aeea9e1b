"""Plans: what formulas say is what the code asks for, on up to 2048 ranks."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import pytest
import torch.distributed as dist
from typer.testing import CliRunner

from moe_ops.cli.app import app
from moe_ops.parallel import plan
from moe_ops.parallel.plan import tracing
from moe_ops.parallel.plan.shape import PRESETS
from moe_ops.parallel.plan.timing import seconds
from moe_ops.parallel.plan.traffic import split_evenly, visits
from moe_ops.parallel.registry import ranks_of_a_token

runner = CliRunner()


def few_layers(name: str) -> plan.ModelShape:
    """A preset with two layers with experts, and one without where it has such layers."""
    shape = plan.find_shape(name)
    dense = min(1, shape.num_dense_layers)
    return dataclasses.replace(shape, num_moe_layers=2, num_dense_layers=dense)


TINY = plan.ModelShape(
    name="tiny",
    hidden_size=256,
    intermediate_size=128,
    num_experts=32,
    top_k=4,
    num_moe_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=64,
    vocab_size=2048,
)


def check_trace(shape: plan.ModelShape, ranks: int, job: plan.ParallelJob) -> plan.tracing.Trace:
    """All collectives are those of the formulas, and memory is within 5 %."""
    cluster = plan.find_cluster("h100", ranks)
    traced = plan.trace_step(shape, cluster, job)
    formula = plan.traffic.model_messages(shape, plan.cluster.Layout.of(cluster, job), job)
    for phase in ("forward", "backward"):
        for own in (True, False):
            seen, wanted = (
                [
                    (m.kind, m.sent, m.received)
                    for m in messages
                    if m.phase == phase and (m.group == "ep") is own and max(m.sent, m.received)
                ]
                for messages in (traced.messages, formula)
            )
            assert sorted(seen) == sorted(wanted)
    memory = plan.memory.memory_of(shape, cluster, job, kernels=False)
    assert traced.weights == memory.experts + memory.dense
    assert traced.gradients == memory.gradients
    assert traced.optimizer == memory.optimizer
    assert abs(memory.total / traced.peak - 1) < 0.05, (memory, traced.peak)
    return traced


@pytest.mark.parametrize(
    ("model", "ep", "recompute", "ranks"),
    [
        ("deepseek_v3", 64, True, 64),
        ("deepseek_v3", 64, True, 2048),
        ("qwen3_235b", 8, False, 256),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                ("deepseek_v3", 64, True, 256),
                ("qwen3_235b", 8, False, 64),
                ("qwen3_235b", 8, False, 2048),
            )
        ),
    ],
)
def test_formulas_are_what_the_code_asks_for(model, ep, recompute, ranks):
    check_trace(few_layers(model), ranks, plan.ParallelJob(ep=ep, recompute=recompute))


@pytest.mark.parametrize(
    "options",
    [
        {"ep": 1},
        {"ep": 1, "recompute": True},
        {"ep": 2},  # gather
        {"ep": 2, "recompute": True, "fp32_combine": True},
        {"ep": 8, "dispatch": "slots", "imbalance": 1.25},
        {"ep": 8, "dispatch": "slots", "recompute": True, "fp8": True},
        {"ep": 8, "dispatch": "slots", "recompute": True, "fp32_combine": True},
        {"ep": 8, "dispatch": "tokens", "recompute": True, "imbalance": 1.25},
        {"ep": 8, "dispatch": "padded"},
        {"ep": 8, "dispatch": "padded", "recompute": True},
        {"ep": 8, "dispatch": "shared", "recompute": True},
        {"ep": 4, "fsdp": 8},
        {"ep": 8, "fsdp": 4, "recompute": True},
        {"ep": 4, "dtype": "float32", "recompute": True},
    ],
    ids=str,
)
def test_every_dispatcher_and_layout(options):
    check_trace(TINY, 16, plan.ParallelJob(**{"tokens": 1024, **options}))


@pytest.mark.parametrize("dispatch", ["auto", "slots", "padded", "gather"])
def test_inference(dispatch):
    shape = few_layers("deepseek_v3")
    job = plan.ParallelJob(ep=8, training=False, dispatch=dispatch, tokens=2048)
    traced = check_trace(shape, 8, job)
    assert traced.gradients == traced.optimizer == 0


def test_a_trace_leaves_no_group_and_wants_none():
    check_trace(TINY, 8, plan.ParallelJob(ep=4, tokens=64, training=False))
    assert not dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="a trace must run in a process without a group"):
            plan.trace_step(TINY, plan.find_cluster("h100", 8), plan.ParallelJob(ep=4))
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("deepseek_v3", 671, 37),
        ("deepseek_v2", 236, 21),
        ("kimi_k2", 1026, 32),
        ("qwen3_235b", 235, 22),
        ("qwen3_30b", 30.5, 3.3),
        ("glm_4_5", 355, 32),
        ("gpt_oss_120b", 117, 5.1),
        ("gpt_oss_20b", 21, 3.6),
        ("mixtral_8x7b", 46.7, 12.9),
        ("mixtral_8x22b", 141, 39),
        ("olmoe", 6.9, 1.3),
    ],
)
def test_presets_have_the_published_numbers_of_weights(name, total, active):
    shape = plan.find_shape(name)
    assert shape.total_weights / 1e9 == pytest.approx(total, rel=0.02)
    # Published numbers leave the embedding out, or not.
    ends = 2 * shape.vocab_size * shape.hidden_size / 1e9
    assert active - 0.6 - ends / 2 < shape.active_weights / 1e9 - ends / 2 < active + ends
    assert set(PRESETS) >= {name}


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss_20b"])
def test_numbers_of_weights_are_those_of_the_traced_model(name):
    shape = few_layers(name)
    with tracing.torch.device("meta"):
        model = tracing._Model(shape, plan.ParallelJob(ep=1), tracing.torch.float32)
    assert sum(p.numel() for p in model.parameters()) == shape.total_weights


CONFIGS = {
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "head_dim": 64,
        "vocab_size": 129280,
        "tie_word_embeddings": False,
    },
    "qwen3_235b": {
        "model_type": "qwen3_moe",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": 151936,
    },
    "mixtral_8x7b": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "gpt_oss_120b": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "experts_per_token": 4,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 201088,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_files(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    for path in (tmp_path, tmp_path / "config.json"):
        shape = plan.find_shape(path)
        assert dataclasses.replace(shape, name=name) == plan.find_shape(name)


def test_config_files_of_other_forms():
    llama4 = {
        "model_type": "llama4",
        "text_config": {
            "model_type": "llama4_text",
            "hidden_size": 5120,
            "intermediate_size": 8192,
            "intermediate_size_mlp": 16384,
            "num_local_experts": 128,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "num_hidden_layers": 48,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 202048,
        },
    }
    shape = plan.shape.shape_of(llama4)
    assert (shape.num_moe_layers, shape.num_dense_layers) == (24, 24)
    assert shape.total_weights / 1e9 == pytest.approx(400, rel=0.01)
    dbrx = {
        "model_type": "dbrx",
        "d_model": 6144,
        "n_heads": 48,
        "n_layers": 40,
        "vocab_size": 100352,
        "attn_config": {"kv_n_heads": 8},
        "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    }
    assert plan.shape.shape_of(dbrx).total_weights / 1e9 == pytest.approx(132, rel=0.01)
    qwen2 = {
        "model_type": "qwen2_moe",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 151936,
    }
    assert plan.shape.shape_of(qwen2).total_weights / 1e9 == pytest.approx(14.3, rel=0.01)


# ---------------------------------------------------------------------------------- rows and bytes


def test_ranks_that_a_token_visits():
    for n, e, k in ((8, 256, 8), (64, 256, 8), (16, 128, 8), (4, 8, 2)):
        shape = dataclasses.replace(TINY, num_experts=e, top_k=k)
        assert visits(shape, n) == pytest.approx(ranks_of_a_token(e, n, k))


@pytest.mark.parametrize("places", [2, 8, 16, 32])
def test_ranks_that_a_token_visits_with_groups(places):
    """Against drawing groups, then experts of them."""
    shape = dataclasses.replace(TINY, num_groups=8, num_topk_groups=3)
    rng, size, seen = random.Random(0), 4, 0
    draws = 4000
    for _ in range(draws):
        groups = rng.sample(range(8), 3)
        allowed = [g * size + i for g in groups for i in range(size)]
        chosen = rng.sample(allowed, shape.top_k)
        seen += len({e // (32 // places) for e in chosen})
    assert visits(shape, places) == pytest.approx(seen / draws, rel=0.02)


def test_bytes_a_token_by_hand():
    """K or D rows of H elements, times the share of other ranks, each way."""
    cluster, shape = plan.find_cluster("h100", 64), plan.find_shape("deepseek_v3")
    job = plan.ParallelJob(ep=64, dispatch="slots", tokens=4096)
    sent, received = plan.estimate_plan(shape, cluster, job).bytes_per_token("forward")
    counts = 63 * 4 * 4 / 4096
    assert sent == received == pytest.approx(2 * 8 * 63 / 64 * 7168 * 2 + counts)
    fp8 = dataclasses.replace(job, fp8=True)
    sent, _ = plan.estimate_plan(shape, cluster, fp8).bytes_per_token("forward")
    assert sent == pytest.approx(8 * 63 / 64 * (7168 * 3 + 56 * 4) + counts)
    assert split_evenly(10, 4) == [3, 3, 2, 2]


# -------------------------------------------------------------------------------------------- time


def test_time_of_collectives():
    cluster = plan.Cluster(
        64, 8, intra_bandwidth=100.0, inter_bandwidth=10.0, latency=0.0, inter_latency=0.0
    )
    wide = plan.cluster.Layout.of(cluster, plan.ParallelJob(ep=16))
    near = plan.cluster.Layout.of(cluster, plan.ParallelJob(ep=8))
    rows = plan.traffic.Message("dispatch", "forward", "ep", "all_to_all", 1500, 1500)
    assert seconds(rows, cluster, near) == pytest.approx(15.0)
    # 8 of the 15 other ranks are on the other node.
    assert seconds(rows, cluster, wide) == pytest.approx(80.0)
    gathered = rows._replace(kind="all_gather")
    assert seconds(gathered, cluster, wide) == pytest.approx(max(15.0, 800 / 8 / 10))
    assert seconds(rows._replace(sent=0, received=0), cluster, wide) == 0.0


def test_time_follows_rates_and_sizes():
    shape, job = plan.find_shape("qwen3_235b"), plan.ParallelJob(ep=16)
    base = plan.estimate_plan(shape, plan.find_cluster("h100", 64), job).time
    slow = plan.estimate_plan(shape, plan.find_cluster("h100", 64, inter_bandwidth=20e9), job).time
    assert slow.forward.dispatch > 2 * base.forward.dispatch
    assert slow.forward.compute == base.forward.compute
    products = plan.estimate_plan(shape, plan.find_cluster("h100", 64, flops=250e12), job).time
    assert products.forward.compute == pytest.approx(2 * base.forward.compute)
    again = plan.estimate_plan(
        shape, plan.find_cluster("h100", 64), dataclasses.replace(job, recompute=True)
    )
    assert again.time.backward.compute == pytest.approx(1.5 * base.backward.compute)
    # A few tokens wait for the weights of all experts.
    few = dataclasses.replace(job, tokens=64, training=False)
    read = plan.estimate_plan(shape, plan.find_cluster("h100", 64), few).time.forward.experts
    assert read == pytest.approx(8 * shape.expert_weights * 2 / 2.6e12)


# ------------------------------------------------------------------------------------------ advice


def test_advice_is_what_the_changed_plan_says():
    shape, cluster = plan.find_shape("qwen3_235b"), plan.find_cluster("h100", 64)
    tight = plan.estimate_plan(shape, cluster, plan.ParallelJob(ep=8))
    assert not tight.fits
    first = plan.suggest_changes(tight)[0]
    assert first.text.startswith("Recomputation of each block") and "which fits" in first.text
    assert first.plan.fits and first.plan.job.recompute
    fitting = plan.estimate_plan(shape, cluster, plan.ParallelJob(ep=32, recompute=True))
    texts = " ".join(a.text for a in plan.suggest_changes(fitting))
    for words in ("EP over 16 ranks", "Rows in fp8", "once to a node"):
        assert words in texts
    wide = plan.estimate_plan(
        shape, plan.find_cluster("h100", 128), plan.ParallelJob(ep=128, recompute=True)
    )
    assert any("num_groups=16, num_topk_groups=4" in a.text for a in plan.suggest_changes(wide))


def test_advice_when_nothing_fits_and_when_ranks_differ():
    shape = plan.find_shape("deepseek_v3")
    small = plan.estimate_plan(
        shape, plan.find_cluster("h100", 64), plan.ParallelJob(ep=64, recompute=True)
    )
    assert "256 ranks" in plan.suggest_changes(small)[-1].text
    uneven = plan.ParallelJob(ep=32, imbalance=1.8, training=False, tokens=8192)
    texts = [
        a.text
        for a in plan.suggest_changes(
            plan.estimate_plan(shape, plan.find_cluster("h100", 32), uneven)
        )
    ]
    assert any("1.80 times the mean" in text for text in texts)


def test_best_is_the_fastest_that_fits():
    shape, cluster = plan.find_shape("deepseek_v3"), plan.find_cluster("h100", 256)
    sizes = plan.alternatives(shape, cluster, plan.ParallelJob(ep=1, recompute=True))
    assert [p.job.ep for p in sizes] == [2**i for i in range(9)]
    best = plan.best(sizes)
    assert best.fits and best.time.step == min(p.time.step for p in sizes if p.fits)


# ----------------------------------------------------------------------------------------- command


def invoke(*arguments: object) -> tuple[int, str]:
    given = ["plan", *map(str, arguments)]
    result = runner.invoke(app, given, env={"COLUMNS": "100"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_command_prints_tables():
    code, text = invoke("qwen3-235b", "--ranks", 64, "--recompute")
    assert code == 0, text
    for word in (
        "235.1 billion",
        "Memory of a rank",
        "That fits",
        "dispatch",
        "EP sizes",
        "What to",
    ):
        assert word in text


def test_command_prints_json_and_traces(tmp_path):
    config = {**CONFIGS["qwen3_235b"], "num_hidden_layers": 1, "hidden_size": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, text = invoke(tmp_path, "--ranks", 8, "--ep", 4, "--tokens", 256, "--trace", "--json")
    assert code == 0, text
    found = json.loads(text)
    assert found["trace"]["ep"]["bytes"] == found["trace"]["ep"]["formula"] > 0
    assert found["trace"]["others"]["bytes"] == found["trace"]["others"]["formula"] > 0
    assert found["job"]["ep"] == 4 and found["memory"]["fits"]
    assert math.isfinite(found["seconds"]["step"])
    assert [entry["ep"] for entry in found["ep_sizes"]] == [1, 2, 4, 8]


@pytest.mark.parametrize("suffix", ["svg", "html"])
def test_command_draws(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plan.{suffix}"
    code, text = invoke("mixtral", "--inference", "--tokens", 64, "--out", path)
    assert code == 0, text
    drawn = path.read_text()
    assert "<svg" in drawn
    assert ("Memory of a rank" in drawn) is (suffix == "html")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nothing",), "MODEL must be a config.json"),
        (("mixtral", "--ranks", 8, "--ep", 3), "ep must divide the 8 ranks, got 3"),
        (("mixtral", "--ranks", 16, "--ep", 16), "ep must divide the 8 experts"),
        (("mixtral", "--tp", 3), "no EP size fits"),
        (("mixtral", "--ep", 2, "--fsdp", 3), "fsdp must divide the 8 ranks"),
        (("mixtral", "--cluster", "abacus"), "cluster must be one of h100"),
        (("mixtral", "--ep", 2, "--dispatch", "owl"), "dispatch must be one of auto"),
        (("mixtral", "--ep", 2, "--dispatch", "gather", "--fp8"), "fp8 must come with slots"),
        (("mixtral", "--dtype", "int3"), "dtype must be one of bfloat16"),
        (("mixtral", "--memory", "-1"), "memory must be above 0"),
        (("mixtral", "--inter", "nan"), "inter_bandwidth must be above 0"),
        (("mixtral", "--imbalance", "inf"), "imbalance must be at least 1"),
        (("mixtral", "--out", "plan.doc"), "--out must end in .svg"),
        (("mixtral", "--ep", 2, "--tp", 2, "--trace"), "tp must be 1 for a trace"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_sentence(arguments, sentence):
    code, text = invoke(*arguments)
    assert code == 1
    last = text.strip().splitlines()[-1]
    assert last.startswith("error: plan: ") and sentence in last, text


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_experts": None}, "must have num_experts"),
        ({"hidden_size": 0}, "hidden_size must be a whole number from 1"),
        ({"num_experts_per_tok": 200}, "top_k must be at most the 128 experts"),
        ({"mlp_only_layers": list(range(94))}, "must have layers with experts"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    ],
    ids=str,
)
def test_bad_config_files_are_one_sentence(change, sentence):
    with pytest.raises(ValueError, match=f"^plan: .*{sentence}"):
        plan.shape.shape_of({**CONFIGS["qwen3_235b"], **change})
