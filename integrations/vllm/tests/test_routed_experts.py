"""The experts that the engine reports for each token, against transformers' routers, and their
replay in a trainer."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from integrations.vllm.tests.engine import run
from integrations.vllm.tests.test_models import TOLERANCE
from tests.hf.published_checkpoints import SIZES
from transformers import AutoConfig, AutoModelForCausalLM

import moe_ops.hf

pytest.importorskip("vllm")

from moe_ops_vllm.routed_experts import Worker

CLASSES = {
    "worker_cls": "moe_ops_vllm.routed_experts.Worker",
    "scheduler_cls": "moe_ops_vllm.routed_experts.Scheduler",
}
LAYERS, DENSE, K = 3, 1, 2


def build(experts: int):
    """A model whose layer 1 has no experts."""
    torch.manual_seed(0)
    sizes = SIZES | {
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 256,
        "num_key_value_heads": 4,
    }
    kind = {"num_experts": experts, "num_experts_per_tok": K, "moe_intermediate_size": 64}
    config = AutoConfig.for_model("qwen3_moe", mlp_only_layers=[DENSE], **sizes, **kind)
    return AutoModelForCausalLM.from_config(config).eval()


def check(model, prompt: list[int], completion) -> None:
    """Every row must be the experts of transformers' router, whose order is free, except where the
    last chosen logit and the next one are closer than rounding."""
    tokens = torch.tensor([prompt + completion["tokens"][:-1]])
    rows = torch.tensor(completion["experts"]["rows"])
    assert rows.shape == (tokens.shape[1], LAYERS, K)
    assert not rows[:, DENSE].any()
    with torch.no_grad():
        logits = model(tokens, output_router_logits=True).router_logits
    layers = [layer for layer in range(LAYERS) if layer != DENSE]
    for layer, scores in zip(layers, logits, strict=True):
        best = scores.topk(K + 1)
        apart = best.values[:, K - 1] - best.values[:, K] > 1e-4
        assert apart.float().mean() > 0.9
        got, want = (ids.sort(-1).values for ids in (rows[:, layer], best.indices[:, :K]))
        assert torch.equal(got[apart], want[apart])


@pytest.mark.parametrize(
    ("experts", "mode", "engine"),
    [
        # 24 blocks of 32 tokens: some of the 16 requests are preempted, and computed again.
        (8, "eager", {"num_gpu_blocks_override": 24, "max_num_batched_tokens": 64}),
        (8, "compiled", {}),
        (260, "eager", {}),
    ],
)
def test_every_token_of_every_layer(tmp_path, experts, mode, engine):
    """Prompts share cached prefixes and are longer than a step; each has two samples."""
    model = build(experts)
    model.save_pretrained(tmp_path / "model")
    shared = torch.randint(3, 60, (40,)).tolist()
    sizes = (1, 70, 30, 9, 100, 2, 44, 33)
    prompts = [shared + torch.randint(3, 60, (n,)).tolist() for n in sizes]
    options = {"dtype": "float32", "max_model_len": 256, "block_size": 32}
    result, _ = run(
        tmp_path / "model",
        tmp_path,
        [prompts, prompts[::-1]],
        aborted=prompts[:4],
        engine=options | CLASSES | engine | {"enforce_eager": mode == "eager"},
        sampling={"n": 2, "temperature": 1, "max_tokens": 40},
    )
    assert (result["preemptions"] > 0) == ("num_gpu_blocks_override" in engine)
    assert result["held"] <= 2 * len(prompts)  # Those of the last step, until the next one.
    for batch, results in zip([prompts, prompts[::-1]], result["batches"], strict=True):
        for prompt, completions in zip(batch, results, strict=True):
            assert len(completions) == 2
            for completion in completions:
                assert completion["experts"]["dtype"] == ("uint8" if experts <= 256 else "uint16")
                check(model, prompt, completion)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "start", "side"),
    [("float32", 1e-4, 0, "left"), ("bfloat16", TOLERANCE, 7, "right")],
)
def test_arrays_are_replayed_as_they_come(tmp_path, dtype, tolerance, start, side):
    """A trainer in float32 takes the engine's experts for all tokens but the last, and gives the
    sampled tokens the engine's log-probabilities."""
    model = build(8)
    model.save_pretrained(tmp_path / "model")
    prompts = [torch.randint(3, 60, (n,)).tolist() for n in (9, 30, 17, 8)]
    result, _ = run(
        tmp_path / "model",
        tmp_path,
        [prompts],
        engine={"dtype": dtype, "enforce_eager": True} | CLASSES,
        sampling={"temperature": 1, "max_tokens": 20, "routed_experts_prompt_start": start},
    )
    answers = [completions[0] for completions in result["batches"][0]]
    sequences = [p + a["tokens"] for p, a in zip(prompts, answers, strict=True)]
    arrays = [np.array(a["experts"]["rows"], a["experts"]["dtype"]) for a in answers]
    sequences = [torch.tensor(s) for s in sequences]
    pad = torch.nn.utils.rnn.pad_sequence
    tokens = pad(sequences, batch_first=True, padding_side=side)
    mask = pad([torch.ones_like(s) for s in sequences], batch_first=True, padding_side=side)

    trainer = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    moe_ops.hf.enable(trainer)
    inputs = {"input_ids": tokens, "attention_mask": mask}
    with (
        moe_ops.hf.record(trainer) as record,
        moe_ops.hf.replay(trainer, arrays, attention_mask=mask, start=start),
    ):
        logits = trainer(**inputs).logits
    log_probs = logits.log_softmax(-1)
    layers = [layer for layer in range(LAYERS) if layer != DENSE]
    taken = record.routed_experts(mask)
    for row, prompt, answer, array in zip(range(4), prompts, answers, arrays, strict=True):
        assert len(array) == len(prompt) + len(answer["tokens"]) - 1 - start
        found = taken[row][start : start + len(array), layers]
        assert np.array_equal(found, array[:, layers])
        of_sequence = log_probs[row][mask[row].bool()][len(prompt) - 1 : -1]
        for step, token, scores in zip(
            answer["logprobs"], answer["tokens"], of_sequence, strict=True
        ):
            assert abs(step[str(token)] - scores[token].item()) <= tolerance


def configuration(**changes):
    settings = {"prefix": True, "moe": True, "pipeline": 1, **CLASSES, **changes}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            worker_cls=settings["worker_cls"], pipeline_parallel_size=settings["pipeline"]
        ),
        scheduler_config=SimpleNamespace(scheduler_cls=settings["scheduler_cls"]),
        model_config=SimpleNamespace(is_moe=settings["moe"], model="dense"),
        cache_config=SimpleNamespace(enable_prefix_caching=settings["prefix"]),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler_cls": None}, "scheduler_cls='moe_ops_vllm.routed_experts.Sch.*', got None"),
        ({"worker_cls": "other.Worker"}, "worker_cls='moe_ops_vllm.routed_experts.Worker', got"),
        ({"moe": False}, "a model with experts, got dense"),
        ({"prefix": False}, "prefix caching"),
        ({"pipeline": 2}, "pipeline_parallel_size=1"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Worker(configuration(**changes))
