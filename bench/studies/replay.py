"""A study of routing replay in GRPO: the divergence of engine and trainer, and the return.

    python -m bench.studies.replay --json bench/notes/replay.json

A tiny Qwen3-MoE with random weights reads a repeated letter and is to write the next letter of the
alphabet; the reward is the share of correct letters. The trainer computes in float32. The engine
has its weights in bfloat16, with 8-bit experts, and its log-probabilities are those of the old
policy: nothing but clipping corrects what differs. With replay, updates take the engine's experts.
A seed draws model, samples and order, for both arms alike. Advantages are not divided by their
group's deviation: that division undoes the training of both arms where nearly all letters are
correct.

Pilot seeds give the effect on the return and its deviation between seeds. The number of other seeds
follows from them: the fewest, from 5 to 8, that show the pilot's effect with a chance of 0.8, or 8.
It is written before the first of them runs. A run goes on where it stopped, arm by arm.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_ops
import moe_ops.hf
from bench.studies.inference import detectable, interval, power, verdict
from moe_ops._files import write_json
from moe_ops.hf.routing.agreement import RoutingAgreement

ARMS = ("free", "replay")
PILOT, FIRST = range(3), 10
FEWEST, MOST, CHANCE = 5, 8, 0.8
LETTERS, PROMPT, COMPLETION, GROUP = 8, 4, 12, 8
EPOCHS, PARTS, CLIP, RATE = 2, 4, 0.2, 5e-4
SIZES = {
    "vocab_size": LETTERS,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"steps": arguments.steps, "rate": RATE, "model": SIZES}
    found: dict[str, Any] = {"settings": settings, "pilot": {}, "plan": None, "seeds": {}}
    if arguments.json.exists():
        found = json.loads(arguments.json.read_text())
        if found["settings"] != settings:
            parser.error(f"{arguments.json} is of other settings.")

    def work(part: str, seeds: Sequence[int]) -> None:
        for seed in seeds:
            done = found[part].setdefault(str(seed), {})
            for arm in ARMS:
                if arm not in done:
                    done[arm] = train(arm, seed, arguments.steps)
                    write_json(arguments.json, found)

    work("pilot", PILOT)
    if found["plan"] is None:
        found["plan"] = plan(found["pilot"])
        write_json(arguments.json, found)
    work("seeds", range(FIRST, FIRST + found["plan"]["seeds"]))
    print("\n".join(report(found)))


def train(arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Trains a model and returns means over all steps: the reward of samples ("return"), the
    divergences of engine and trainer before updates, and the share of choices that differ."""
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES)).eval()
    moe_ops.hf.enable(model)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
    prompts = torch.arange(LETTERS).repeat_interleave(GROUP)
    targets = (prompts[:, None] + 1) % LETTERS
    rewards, agreement = [], {name: RoutingAgreement() for name in ARMS}
    choices = []
    start = time.process_time()
    with moe_ops.hf.replay(model, measure=True) as replay:
        for _ in range(steps):
            tokens, old, routed = rollout(model, prompts)
            reward = (tokens[:, PROMPT:] == targets).float().mean(1)
            rewards.append(float(reward.mean()))
            groups = reward.view(-1, GROUP)
            advantage = (groups - groups.mean(1, keepdim=True)).view(-1, 1)
            replay.agreement = RoutingAgreement()
            for name in ARMS:
                give(replay, routed if name == "replay" else None)
                with torch.no_grad():
                    agreement[name].add_log_probs(old, log_probs(model, tokens))
            choices.append(replay.agreement.as_dict()["choices"])
            for _ in range(EPOCHS):
                for rows in torch.randperm(len(tokens)).chunk(PARTS):
                    give(replay, routed[rows.numpy()] if arm == "replay" else None)
                    ratio = (log_probs(model, tokens[rows]) - old[rows]).exp()
                    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
                    gain = torch.minimum(ratio * advantage[rows], clipped * advantage[rows])
                    optimizer.zero_grad()
                    (-gain.mean()).backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
    return {
        "return": fmean(rewards),
        "rewards": [round(r, 4) for r in rewards],
        "kl": {name: agreement[name].as_dict()["kl"] for name in ARMS},
        "choices": fmean(choices),
        "seconds": round(time.process_time() - start, 1),
    }


def rollout(model: Any, prompts: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Returns tokens [B, S], the engine's log-probabilities of sampled ones, and their experts."""
    engine = moe_ops.quantize(copy.deepcopy(model).bfloat16(), moe_ops.Int8WeightConfig())
    ids = prompts[:, None].repeat(1, PROMPT)
    with torch.no_grad(), moe_ops.hf.record(engine) as record:
        found = engine.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=COMPLETION,
            do_sample=True,
            top_k=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    scores = torch.stack(found.logits, 1).float().log_softmax(-1)
    sampled = found.sequences[:, PROMPT:, None]
    return found.sequences, scores.gather(2, sampled)[..., 0], record.routed_experts()


def give(replay: Any, routed: Any) -> None:
    mask = torch.ones(0 if routed is None else len(routed), PROMPT + COMPLETION).bool()
    replay.set(routed, attention_mask=mask)


def log_probs(model: Any, tokens: Tensor) -> Tensor:
    logits = model(tokens, use_cache=False).logits[:, PROMPT - 1 : -1]
    return logits.log_softmax(-1).gather(2, tokens[:, PROMPT:, None])[..., 0]


def gaps(seeds: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Returns per seed the return with replay less that without, and the divergence with replay
    less that without on the tokens of the arm without, relative to the latter."""
    returns, divergences = [], []
    for arms in seeds.values():
        returns.append(arms["replay"]["return"] - arms["free"]["return"])
        kl = arms["free"]["kl"]
        divergences.append(kl["replay"] / kl["free"] - 1)
    return returns, divergences


def plan(pilot: dict[str, Any]) -> dict[str, Any]:
    returns, divergences = gaps(pilot)
    effect, deviation = fmean(returns), stdev(returns)
    chances = {n: power(abs(effect), deviation, n) for n in range(FEWEST, MOST + 1)}
    seeds = next((n for n, chance in chances.items() if chance >= CHANCE), MOST)
    return {
        "effect": effect,
        "deviation": deviation,
        "standard_error": deviation / len(returns) ** 0.5,
        "seeds": seeds,
        "power": round(chances[seeds], 3),
        "detectable": detectable(seeds, CHANCE) * deviation,
        "kl_effect": fmean(divergences),
        "kl_power": round(power(-fmean(divergences), stdev(divergences), seeds), 3),
    }


def report(found: dict[str, Any]) -> list[str]:
    seeds = found["seeds"]
    lines = ["| | replay | without |", "|---|---|---|"]
    for name, of in (
        ("return", lambda arm: arm["return"]),
        ("KL(engine, trainer) on own tokens", lambda arm: arm["kl"][arm["name"]]),
        ("choices that differ", lambda arm: arm["choices"]),
    ):
        means = [fmean(of({**arms[a], "name": a}) for arms in seeds.values()) for a in ARMS[::-1]]
        lines.append(f"| {name} | {means[0]:.4g} | {means[1]:.4g} |")
    returns, divergences = gaps(seeds)
    for statement, values, below in (
        ("Replay lowers the divergence", divergences, True),
        ("Replay raises the return", returns, False),
    ):
        mean, low, high = interval(values)
        said = verdict(interval(values), 0.0, below=below)
        lines.append(f"{statement}: {mean:+.4f} ({low:+.4f} to {high:+.4f}), {said}.")
    return [*lines, f"{len(seeds)} seeds; plan: {json.dumps(found['plan'])}"]


if __name__ == "__main__":
    main()
