"""Runs torchtitan's trainer on CPU processes with the options of its command line."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import socket
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

WORDS = 500


def make_assets(folder: Path) -> None:
    """Writes a tokenizer of WORDS words and a data set where torchtitan looks for its own."""
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", *map(str, range(WORDS))])}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<s>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    data = folder / "tests" / "assets" / "c4_test" / "data.json"
    data.parent.mkdir(parents=True)
    texts = (" ".join(str(random.randrange(WORDS)) for _ in range(100)) for _ in range(500))
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts))


def rank_main(
    rank: int, ranks: int, port: int, folder: str, args: list[str], fp32: bool, result: Any
) -> None:
    os.chdir(folder)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    import tests.torchtitan.cpu  # noqa: F401  # before torchtitan
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.config import ConfigManager

    if fp32:  # Experts convert their inputs and weights by this method.
        tensor: Any = torch.Tensor
        tensor.bfloat16 = tensor.float

    losses: list[float] = []
    times: list[float] = []
    log = MetricsProcessor.log

    def record(self: Any, step: int, loss: float, *rest: Any, **options: Any) -> None:
        losses.append(loss)
        times.append(time.perf_counter())
        log(self, step, loss, *rest, **options)

    MetricsProcessor.log = record
    config: Any = ConfigManager().parse_args(args)
    config.override.imports.append("tests.torchtitan.cpu.causal")
    trainer = config.build()
    modules = [m for part in trainer.model_parts for m in part.modules()]
    for module in modules:
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other.
    trainer.train()
    trainer.close()
    experts = {type(m).__qualname__ for m in modules if type(m).__qualname__.endswith("Experts")}
    seconds = [b - a for a, b in itertools.pairwise(times)]
    # Other stages of a pipeline have no loss.
    losses = losses if getattr(trainer, "pp_has_last_stage", True) else []
    result.send((losses, experts - {"RoutedExperts"}, seconds))
    torch.distributed.destroy_process_group()


def train(
    folder: Path, ranks: int, args: list[str], *, fp32: bool
) -> tuple[list[float], set[str], list[float]]:
    """Returns the losses, the classes of the experts and the seconds per step of one rank.

    With fp32, experts compute in float32 where torchtitan converts to bfloat16.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "tests.torchtitan.cpu", "torchtitan.trainer"])
    receiver, sender = context.Pipe(duplex=False)
    rest = (ranks, port, str(folder), args, fp32, sender)
    processes = [context.Process(target=rank_main, args=(r, *rest)) for r in range(ranks)]
    for process in processes:
        process.start()
    sender.close()
    try:
        results = []
        while len(results) < ranks:
            results.append(receiver.recv())  # EOFError: a rank failed, and the others ended.
    finally:
        for process in processes:
            process.join(60)
            process.kill()
    results = [found for found in results if found[0]]
    losses = {tuple(losses) for losses, *_ in results}
    assert len(losses) == 1, f"ranks report different losses: {losses}"
    return results[-1]
