"""The demo: text, training, the experts of each byte, a sample."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from moe_ops import _files, _reading, viz
from moe_ops._state import read_state, write_state
from moe_ops.demo import data
from moe_ops.demo.train import ModelConfig, TrainConfig, Trainer

_SMOKE = TrainConfig(
    steps=12, batch_size=4, eval_every=5, eval_windows=8,
    model=ModelConfig(2, 32, num_heads=2, num_experts=4, intermediate_size=32, context=64),
)  # fmt: skip
_SAVING = 0.05  # Fraction of the time that checkpoints may take.


@dataclass(frozen=True)
class DemoOptions:
    """Options of ``moe-ops demo``; None is the default."""

    out: Path = Path("moe_demo")
    data: Path | None = None
    steps: int | None = None
    resume: bool = False
    overwrite: bool = False
    seed: int = 0
    threads: int | None = None
    smoke: bool = False


def run_demo(options: DemoOptions, console: Console) -> dict[str, Any]:
    """Runs the demo and returns the contents of ``summary.json``.

    Raises:
        ValueError: the folder contains an unfinished run or one with other options, or a damaged
            file.
        OSError: a file cannot be read or written.
    """
    before, base = torch.get_num_threads(), _SMOKE if options.smoke else TrainConfig()
    config = dataclasses.replace(
        base,
        seed=options.seed,
        steps=options.steps or base.steps,
        threads=options.threads or before,
    )
    out = _files.make_folder(options.out)
    try:
        trainer = Trainer(config, data.load_corpus(options.data))
        _train(trainer, options, console)
        trainer.model.save_pretrained(out / "model")
        sample = trainer.model.generate(
            torch.tensor([list(b"import os\n\n\ndef ")]), 40 if options.smoke else 320,
            temperature=0.8, top_p=0.95, generator=torch.Generator().manual_seed(config.seed),
        )  # fmt: skip
        summary = {
            "data": None if options.data is None else str(options.data.resolve()),
            "config": dataclasses.asdict(config),
            "parameters": trainer.model.num_parameters(),
            "heldout_bits_per_byte": trainer.evaluate(8 if options.smoke else 512),
            "sample": bytes(sample[0].tolist()).decode("utf-8", "replace"),
            "bits_per_byte": trainer.history["loss"].tolist(),
            "heldout_by_step": trainer.heldout_by_step(),
            "tokens_per_expert": trainer.history["tokens_per_expert"].tolist(),
        }
        _files.write_json(out / "summary.json", summary)
        console.print(summary["sample"], markup=False)
        console.print(f"Held-out text: {summary['heldout_bits_per_byte']:.3f} bits/byte.")
        for file in (*_draw(trainer, out, console), out / "model", out / "summary.json"):
            console.print(str(file), markup=False, soft_wrap=True)
        (out / "checkpoint.pt").unlink(missing_ok=True)
        return summary
    finally:
        torch.set_num_threads(before)


def _train(trainer: Trainer, options: DemoOptions, console: Console) -> None:
    """Trains to the end, from the checkpoint with --resume, and saves it periodically."""
    path, config = options.out / "checkpoint.pt", trainer.config
    about = json.dumps({"config": dataclasses.asdict(config), "text": trainer.corpus.sha256})
    if options.resume:
        state = read_state(path)
        if state.get("about") != about:
            raise ValueError(f"demo: --resume needs the options and the text of the run in {path}")
        with _reading.damage("demo", path, "of a run of this version; start with --overwrite"):
            trainer.restore(state)
        console.print(f"Continuing after step {trainer.step} of {config.steps}.")
    elif path.exists() and not options.overwrite:
        raise ValueError(
            f"demo: {options.out} holds an unfinished run; continue it with --resume, throw it "
            "away with --overwrite, or choose another --out"
        )
    due = 0.0
    with Progress(console=console) as bar:
        task = bar.add_task("", total=config.steps, completed=trainer.step)
        while not trainer.finished:
            trainer.train_step()
            if (began := time.monotonic()) >= due or trainer.finished:
                write_state(path, {**trainer.state(), "about": about})
                due = time.monotonic() + (time.monotonic() - began) * (1 / _SAVING - 1)
            loss = f"{float(trainer.history['loss'][trainer.step - 1]):.3f}"
            if (held := trainer.heldout_by_step().get(trainer.step)) is not None:
                told = f"step {trainer.step:>5}  training {loss}  held-out {held:.3f} bits/byte"
                bar.console.print(told)
            bar.update(task, completed=trainer.step, description=f"{loss} bits/byte")


@torch.no_grad()
def _draw(trainer: Trainer, out: Path, console: Console) -> list[Path]:
    """Draws the expert of each byte of held-out text, and the load of experts over training."""
    try:
        viz._canvas.import_matplotlib()
    except viz._canvas.MissingMatplotlibError as error:
        console.print(f"No pictures: {error}", markup=False, soft_wrap=True)
        return []
    sizes, files = trainer.config.model, [out / "expert_load.png", out / "token_experts.png"]
    text = data.heldout_windows(trainer.corpus.heldout, count=1, context=sizes.context)[0]
    routing = trainer.model.eval()(text, return_routing=True).routing
    viz.plot_expert_load(
        trainer.history["tokens_per_expert"], title="Expert load over training", path=files[0]
    )
    viz.plot_token_experts(
        bytes(text[0].tolist()).decode("latin-1"),
        torch.stack([called.routing.topk_ids for called in routing]),
        num_experts=sizes.num_experts,
        columns=72,
        title="Which expert takes which byte (held-out text)",
        path=files[1],
    )
    return files
