"""Cost of fp8 GEMMs in training: the demo's language model, widened, trained from one
initialization and one text with its experts' GEMMs in float32, bfloat16 and fp8
(`Experts.fp8_training`).

    python -m bench.studies.fp8_training --steps 300 --seeds 2

Everything else is under autocast to bfloat16 in the last two. The metric is bits per byte on
held-out text; the difference of two seeds shows the significance of a difference between
precisions.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

import torch

from moe_ops.demo import data
from moe_ops.demo.train import ModelConfig, TrainConfig, Trainer
from moe_ops.layers import Experts

PRECISIONS = ("float32", "bfloat16", "fp8")
# Two blocks of scales in every dimension.
MODEL = ModelConfig(num_layers=2, hidden_size=256, intermediate_size=256, context=128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    arguments = parser.parse_args()
    corpus = data.load_corpus()
    print("| products of experts | seed | bits/byte | of training, last 50 steps |")
    print("|---|---|---|---|")
    for seed in range(arguments.seeds):
        for precision in arguments.precisions:
            config = TrainConfig(
                steps=arguments.steps,
                eval_every=arguments.steps,
                seed=seed,
                threads=arguments.threads,
                model=MODEL,
            )
            heldout, training = train(config, corpus, precision)
            print(f"| {precision} | {seed} | {heldout:.4f} | {training:.4f} |", flush=True)


def train(config: TrainConfig, corpus: data.Corpus, precision: str) -> tuple[float, float]:
    trainer = Trainer(config, corpus)
    for module in trainer.model.modules():
        if isinstance(module, Experts):
            module.fp8_training = precision == "fp8"
    while not trainer.finished:
        with autocast(precision):  # A new one each time: it keeps casts of weights until it ends.
            trainer.train_step()
    return trainer.heldout_by_step()[trainer.step], float(trainer.history["loss"][-50:].mean())


@contextlib.contextmanager
def autocast(precision: str) -> Iterator[None]:
    if precision == "float32":
        yield
    else:
        with torch.autocast("cpu", torch.bfloat16):
            yield


if __name__ == "__main__":
    main()
