"""The demo's model, and its training step by step, resumable at any step."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from moe_ops import zoo
from moe_ops.demo import data
from moe_ops.layers import count_tokens_per_expert
from moe_ops.zoo.deepseek import DeepSeek

_NATS_TO_BITS = 1.0 / math.log(2.0)
_COEFFICIENTS = {"load_balancing": 0.01, "router_z": 1e-3}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model. `context` is the number of bytes per training sequence."""

    num_layers: int = 4
    hidden_size: int = 128
    num_heads: int = 4
    num_experts: int = 8
    top_k: int = 2
    intermediate_size: int = 128
    context: int = 256


def make_model(config: ModelConfig) -> DeepSeek:
    """Returns a DeepSeekMoE over bytes, with plain attention and softmax scores as in the first
    generation; every layer routes."""
    model: DeepSeek = zoo.create_model(
        "deepseek",
        "tiny_v1",
        vocab_size=256,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_dense_layers=0,
        num_heads=config.num_heads,
        head_size=config.hidden_size // config.num_heads,
        intermediate_size=config.intermediate_size,
        num_experts=config.num_experts,
        top_k=config.top_k,
        num_shared_experts=0,
        renormalize=True,
        device_balance_coefficient=0.0,
        num_devices=1,
        context=config.context,
        tie_embeddings=True,
        init_std=config.hidden_size**-0.5 / 2,
    )
    return model


@dataclass(frozen=True)
class TrainConfig:
    """Settings that determine the final weights, besides the text and the machine."""

    steps: int = 1800
    batch_size: int = 8
    learning_rate: float = 3e-3
    eval_every: int = 100
    eval_windows: int = 96
    seed: int = 0
    threads: int = 1
    model: ModelConfig = field(default_factory=ModelConfig)

    def learning_rate_at(self, step: int) -> float:
        """Returns the learning rate of a step: a linear warm-up, then cosine decay to a
        twentieth."""
        warmup = max(1, round(0.05 * self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


class Trainer:
    """Training run: the model, its optimizer and its history.

    Attributes:
        step: completed steps.
        history: one entry per step: "loss", bits per byte; "heldout", bits per byte of held-out
            text, NaN where not measured; "tokens_per_expert" [layers, experts]; "seconds".
    """

    def __init__(self, config: TrainConfig, corpus: data.Corpus) -> None:
        for text in (corpus.train, corpus.heldout):
            if text.numel() < config.model.context + 2:
                raise ValueError(
                    f"demo: {corpus.source} must have more bytes to train on and to hold out, got "
                    f"{text.numel()} for a context of {config.model.context}"
                )
        self.config, self.corpus, self.step = config, corpus, 0
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.model = make_model(config.model)
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": 0.1},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        experts = (config.model.num_layers, config.model.num_experts)
        self.history = {
            "loss": torch.full((config.steps,), math.nan),
            "heldout": torch.full((config.steps,), math.nan, dtype=torch.float64),
            "tokens_per_expert": torch.zeros((config.steps, *experts), dtype=torch.int32),
            "seconds": torch.zeros(config.steps),
        }

    @property
    def finished(self) -> bool:
        return self.step >= self.config.steps

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.model.context

    def train_step(self) -> None:
        """Makes one update on the bytes of this step; evaluates at regular intervals."""
        started, config = time.perf_counter(), self.config
        inputs, targets = data.training_batch(
            self.corpus.train,
            seed=config.seed,
            step=self.step,
            batch_size=config.batch_size,
            context=config.model.context,
        )
        out = self.model.loss(inputs, targets, coefficients=_COEFFICIENTS)
        self.optimizer.zero_grad(set_to_none=True)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(self.step)
        self.optimizer.step()
        bits = out.cross_entropy.item() * _NATS_TO_BITS
        if not math.isfinite(bits):
            raise FloatingPointError(
                f"demo: the loss of step {self.step + 1} must be finite, got {bits}"
            )
        experts = config.model.num_experts
        load = [count_tokens_per_expert(r.routing.topk_ids, experts) for r in out.routing]
        self.history["loss"][self.step] = bits
        self.history["tokens_per_expert"][self.step] = torch.stack(load)
        self.history["seconds"][self.step] = time.perf_counter() - started
        self.step += 1
        if self.step % config.eval_every == 0 or self.finished:
            self.history["heldout"][self.step - 1] = self.evaluate(config.eval_windows)

    @torch.no_grad()
    def evaluate(self, num_windows: int) -> float:
        """Returns bits per byte on windows evenly spread over the held-out text."""
        inputs, targets = data.heldout_windows(
            self.corpus.heldout, count=num_windows, context=self.config.model.context
        )
        total, size = 0.0, self.config.batch_size
        self.model.eval()
        for x, y in zip(inputs.split(size), targets.split(size), strict=True):
            total += self.model.loss(x, y, coefficients={}).cross_entropy.item() * y.numel()
        self.model.train()
        return total / targets.numel() * _NATS_TO_BITS

    def state(self) -> dict[str, Any]:
        """Returns the state that `restore` needs to continue with bitwise identical results."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "noise": torch.get_rng_state(),
            "history": self.history,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from the result of `state` in a run of this config and text."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["noise"])
        self.history, self.step = state["history"], int(state["step"])

    def heldout_by_step(self) -> dict[int, float]:
        values = self.history["heldout"][: self.step].tolist()
        return {i + 1: value for i, value in enumerate(values) if not math.isnan(value)}
