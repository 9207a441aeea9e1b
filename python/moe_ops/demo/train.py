"""Training of the demo model, step by step, with a state that can be saved after any step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import moe_ops
from moe_ops import _library
from moe_ops.demo import data
from moe_ops.demo.checkpoint import Checkpoint, CheckpointError
from moe_ops.demo.model import ModelConfig, make_model
from moe_ops.layers import count_tokens_per_expert

_NATS_TO_BITS = 1.0 / math.log(2.0)
_OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")  # What AdamW keeps.


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the final weights, besides the text and the machine."""

    steps: int = 1800
    batch_size: int = 8
    learning_rate: float = 3e-3
    final_learning_rate_fraction: float = 0.05
    warmup_fraction: float = 0.05
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    load_balancing_coef: float = 0.01
    z_loss_coef: float = 1e-3
    eval_every: int = 100
    eval_windows: int = 96
    seed: int = 0
    threads: int = 1
    model: ModelConfig = field(default_factory=ModelConfig)

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine to the final rate; a pure function of the step."""
        warmup = max(1, round(self.warmup_fraction * self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        low = self.final_learning_rate_fraction
        return self.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class StepResult:
    """What the progress line shows."""

    step: int
    bits_per_byte: float
    heldout_bits_per_byte: float | None
    max_violation: float
    seconds: float


class Trainer:
    """A training run: the model, its optimizer and its history."""

    def __init__(self, config: TrainConfig, corpus: data.Corpus) -> None:
        data.check_size(corpus, config.model.context)
        self.config = config
        self.corpus = corpus
        self.step = 0
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.model = make_model(config.model)
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        experts = (config.model.num_layers, config.model.num_experts)
        # One entry a step: bits a byte in training and, where it was measured, on held-out text.
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

    def train_step(self) -> StepResult:
        """One update on the bytes of this step; evaluates when the step asks for it."""
        started = time.perf_counter()
        config = self.config
        inputs, targets = data.training_batch(
            self.corpus.train,
            seed=config.seed,
            step=self.step,
            batch_size=config.batch_size,
            context=config.model.context,
        )
        coefficients = {
            "load_balancing": config.load_balancing_coef,
            "router_z": config.z_loss_coef,
        }
        out = self.model.loss(inputs, targets, coefficients=coefficients)
        self.optimizer.zero_grad(set_to_none=True)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(self.step)
        self.optimizer.step()
        seconds = time.perf_counter() - started

        bits = out.cross_entropy.item() * _NATS_TO_BITS
        if not math.isfinite(bits):
            raise FloatingPointError(
                f"demo: the loss of step {self.step + 1} must be finite, got {bits}"
            )
        num_experts = config.model.num_experts
        load = torch.stack(
            [count_tokens_per_expert(r.routing.topk_ids, num_experts) for r in out.routing]
        )
        self.history["loss"][self.step] = bits
        self.history["tokens_per_expert"][self.step] = load
        self.history["seconds"][self.step] = seconds
        self.step += 1
        heldout = None
        if self.step % config.eval_every == 0 or self.finished:
            heldout = self.evaluate(config.eval_windows)
            self.history["heldout"][self.step - 1] = heldout
        return StepResult(
            step=self.step,
            bits_per_byte=bits,
            heldout_bits_per_byte=heldout,
            max_violation=float(max_violation(load).mean()),
            seconds=seconds,
        )

    @torch.no_grad()
    def evaluate(self, num_windows: int) -> float:
        """Bits per byte on windows evenly spread over the held-out text."""
        context = self.config.model.context
        inputs, targets = data.heldout_windows(
            self.corpus.heldout, count=num_windows, context=context
        )
        total, size = 0.0, self.config.batch_size
        self.model.eval()
        for x, y in zip(inputs.split(size), targets.split(size), strict=True):
            total += self.model.loss(x, y, coefficients={}).cross_entropy.item() * y.numel()
        self.model.train()
        return total / targets.numel() * _NATS_TO_BITS

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and metadata from which `restore` continues bit for bit."""
        tensors = {"rng.torch": torch.get_rng_state()}
        tensors |= {f"history.{name}": values for name, values in self.history.items()}
        for name, parameter in self.model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        metadata = {
            "step": self.step,
            "config": asdict(self.config),
            "corpus_sha256": self.corpus.sha256,
            "environment": environment(),
        }
        return tensors, metadata

    @classmethod
    def restore(cls, checkpoint: Checkpoint, corpus: data.Corpus) -> Trainer:
        """The run that `checkpoint` holds.

        Raises:
            CheckpointError: it was made from another text, or its parts do not fit together.
        """
        metadata, tensors = checkpoint.metadata, checkpoint.tensors
        config = config_of(checkpoint)
        if metadata["corpus_sha256"] != corpus.sha256:
            raise CheckpointError(
                f"demo: --resume must see the text that {checkpoint.path} was trained on, got "
                f"another one from {corpus.source}; give the same --data, or --overwrite"
            )
        trainer = cls(config, corpus)
        with torch.no_grad(), _fitting(checkpoint):
            for name, parameter in trainer.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
                trainer.optimizer.state[parameter] = {
                    key: tensors[f"optimizer.{name}.{key}"].clone() for key in _OPTIMIZER_STATE
                }
            for name, values in trainer.history.items():
                values.copy_(tensors[f"history.{name}"])
            torch.set_rng_state(tensors["rng.torch"])
        trainer.step = metadata["step"]
        return trainer

    def heldout_by_step(self) -> dict[int, float]:
        return {
            index + 1: value
            for index, value in enumerate(self.history["heldout"][: self.step].tolist())
            if not math.isnan(value)
        }


def config_of(checkpoint: Checkpoint) -> TrainConfig:
    """The configuration in a checkpoint. CheckpointError if there is none that can be."""
    with _fitting(checkpoint):
        values = checkpoint.metadata["config"]
        config = TrainConfig(**{**values, "model": ModelConfig(**values["model"])})
        if not 1 <= checkpoint.metadata["step"] <= config.steps:
            raise ValueError(f"step must be from 1 to {config.steps}")
    return config


@contextlib.contextmanager
def _fitting(checkpoint: Checkpoint) -> Iterator[None]:
    try:
        yield
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"demo: {checkpoint.path} does not fit together ({str(error).splitlines()[0]}); "
            "run with --overwrite to start again"
        ) from error


def max_violation(load: torch.Tensor) -> torch.Tensor:
    """MaxVio, max load / mean load - 1, over the last dimension."""
    load = load.double()
    return load.amax(-1) / load.mean(-1).clamp_min(1e-9) - 1


def environment() -> dict[str, str]:
    """What may change the last bits of a result; compared on resume."""
    return {
        "torch": torch.__version__,
        "moe_ops": moe_ops.__version__,
        "cpu_isa": _library.cpu_isa(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
