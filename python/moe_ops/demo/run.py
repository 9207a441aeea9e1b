"""The demo from beginning to end: text, training, pictures, a sample, Hugging Face, a summary."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from moe_ops import _files
from moe_ops._arguments import MAX_STEPS
from moe_ops.demo import data
from moe_ops.demo.checkpoint import Checkpoint, Checkpointer, CheckpointError
from moe_ops.demo.model import ModelConfig
from moe_ops.demo.routing import RoutingSample, inspect_routing
from moe_ops.demo.train import TrainConfig, Trainer, config_of, environment, max_violation

_SMOKE = TrainConfig(
    steps=12,
    batch_size=4,
    eval_every=5,
    eval_windows=8,
    model=ModelConfig(
        num_layers=2, hidden_size=32, num_heads=2, num_experts=4, intermediate_size=32, context=64
    ),
)
_CALIBRATION_STEPS = 6
_FINAL_WINDOWS = 512


@dataclass(frozen=True)
class DemoOptions:
    """The options of ``moe-ops demo``; None means the default or what the checkpoint says."""

    out: Path = Path("moe_demo")
    data: Path | None = None
    steps: int | None = None
    minutes: float | None = None
    resume: bool = False
    overwrite: bool = False
    seed: int | None = None
    threads: int | None = None
    hf: bool = True
    smoke: bool = False


def run_demo(options: DemoOptions, console: Console) -> dict[str, Any]:
    """Run the demo; returns what it writes to ``summary.json``.

    KeyboardInterrupt, once, comes after a checkpoint of the step that it met.

    Raises:
        ValueError: options that contradict each other or the checkpoint, with a sentence.
        CheckpointError: a checkpoint that is missing or damaged, with a sentence.
        OSError: what cannot be read or written, with a sentence.
    """
    if options.resume and options.overwrite:
        raise ValueError("demo: --resume and --overwrite exclude each other")
    if options.steps is not None and options.minutes is not None:
        raise ValueError("demo: --steps and --minutes exclude each other")
    _files.make_folder(options.out)
    started = time.perf_counter()
    threads_before = torch.get_num_threads()
    with _locked(options.out):
        try:
            return _run(options, console, started)
        finally:
            torch.set_num_threads(threads_before)


def _run(options: DemoOptions, console: Console, started: float) -> dict[str, Any]:
    checkpointer = Checkpointer(options.out)
    checkpoint = _load_checkpoint(options, checkpointer, console)
    data_path = options.data
    if checkpoint is not None and data_path is None and checkpoint.metadata["data"] is not None:
        data_path = Path(checkpoint.metadata["data"])

    _heading(console, "Text")
    corpus = data.load_corpus(data_path)
    if checkpoint is None:
        trainer = Trainer(_choose_config(options, corpus, console), corpus)
    else:
        trainer = Trainer.restore(checkpoint, corpus)
    config = trainer.config
    entropies = data.entropies(corpus)
    _print_corpus(console, corpus, entropies)

    _heading(console, "Training")
    if checkpoint is not None:
        _print_resumed(console, checkpoint, trainer)
    _print_model(console, trainer)
    overhead = _train(trainer, checkpointer, data_path, console, entropies)
    trainer.model.save_pretrained(options.out / "model")
    heldout = trainer.evaluate(8 if options.smoke else _FINAL_WINDOWS)
    final = f"Held-out files, final: [bold]{heldout:.3f} bits/byte[/]"
    console.print(f"{final}; {_shown(entropies, 'entropy ')}.")

    _heading(console, "What the experts do")
    sample = inspect_routing(trainer.model, config.model, corpus.heldout)
    _print_routing(console, sample)
    files = _draw(options.out, trainer, entropies, sample, heldout, console)

    _heading(console, "A sample")
    prompt = b"import os\n\n\ndef " if data_path is None else sample.text[:32]
    generated = trainer.model.generate(
        torch.tensor([list(prompt)]),
        40 if options.smoke else 320,
        temperature=0.8,
        top_p=0.95,
        generator=torch.Generator().manual_seed(config.seed),
    )
    shown = bytes(generated[0].tolist()).decode("utf-8", errors="replace")
    console.print(Text(shown[: len(prompt)], style="bold"), Text(shown[len(prompt) :]), sep="")

    _heading(console, "Hugging Face models")
    hf_results = _compare_hugging_face(options, console)

    seconds, steps = trainer.history["seconds"][: trainer.step], trainer.step
    lately = trainer.history["tokens_per_expert"][steps - max(1, steps // 10) : steps]
    summary = {
        "corpus": {
            name: f"{len(value)} bytes" if isinstance(value, torch.Tensor) else value
            for name, value in vars(corpus).items()
        },
        "entropy_bits_per_byte": entropies,
        "config": dataclasses.asdict(config),
        "parameters": trainer.model.num_parameters(),
        "environment": environment(),
        "training": {
            "steps": steps,
            "tokens": steps * trainer.tokens_per_step,
            "seconds": float(seconds.sum()),
            "tokens_per_second": trainer.tokens_per_step / float(seconds.median()),
            "checkpoint_share_of_time": overhead,
            "final_bits_per_byte": float(trainer.history["loss"][steps - 1]),
            "heldout_by_step": {str(k): v for k, v in trainer.heldout_by_step().items()},
            "max_violation_by_layer": max_violation(lately.sum(0)).tolist(),
        },
        "heldout_bits_per_byte": heldout,
        "information_bits_by_layer": sample.information,
        "favourite_bytes": sample.favourites,
        "sample": shown,
        "hugging_face": hf_results,
        "seconds": time.perf_counter() - started,
    }
    path = options.out / "summary.json"
    _files.write_json(path, summary)
    _heading(console, "Done")
    _print_summary(console, summary, [*files, options.out / "model", path])
    return summary


# --- before training


def _load_checkpoint(
    options: DemoOptions, checkpointer: Checkpointer, console: Console
) -> Checkpoint | None:
    if options.resume:
        checkpoint = checkpointer.load()
        saved = config_of(checkpoint)
        if checkpoint.note:
            console.print(f"[yellow]{escape(checkpoint.note)}[/]", soft_wrap=True)
        if options.minutes is not None:
            raise ValueError(
                "demo: --minutes cannot change a run that has started: it is set for "
                f"{saved.steps} steps"
            )
        for name in ("steps", "seed", "threads"):
            wanted, there = getattr(options, name), getattr(saved, name)
            if wanted is not None and wanted != there:
                raise ValueError(
                    f"demo: --{name} must be {there} as in the run that --resume continues, "
                    f"got {wanted}"
                )
        return checkpoint
    if checkpointer.exists() and not options.overwrite:
        try:
            checkpoint = checkpointer.load()
            step, steps = checkpoint.metadata["step"], config_of(checkpoint).steps
            where = f"at step {step}" if step < steps else ""
        except CheckpointError:
            where = "that cannot be read"
        if where:
            raise CheckpointError(
                f"demo: {options.out} holds an unfinished run {where}; "
                "continue it with --resume, throw it away with --overwrite, or choose another --out"
            )
    checkpointer.remove()
    return None


def _choose_config(options: DemoOptions, corpus: data.Corpus, console: Console) -> TrainConfig:
    config = dataclasses.replace(
        _SMOKE if options.smoke else TrainConfig(),
        seed=options.seed or 0,
        threads=options.threads or torch.get_num_threads(),
    )
    if options.minutes is not None:
        probe = Trainer(dataclasses.replace(config, steps=_CALIBRATION_STEPS + 1), corpus)
        seconds = [probe.train_step().seconds for _ in range(_CALIBRATION_STEPS)]
        # The first step warms up; evaluations and checkpoints take about a tenth.
        per_step = statistics.median(seconds[1:]) * 1.1
        steps = min(max(10, round(60 * options.minutes / per_step)), MAX_STEPS)
        console.print(f"{steps} steps will take about {options.minutes:g} minutes here.")
        return dataclasses.replace(config, steps=steps)
    return dataclasses.replace(config, steps=options.steps or config.steps)


# --- training


def _train(
    trainer: Trainer,
    checkpointer: Checkpointer,
    data_path: Path | None,
    console: Console,
    entropies: dict[str, float],
) -> float:
    """Train to the end with a checkpoint whenever one is due; the checkpoints' share of the time.

    KeyboardInterrupt comes after a step and its checkpoint, at the second Ctrl-C at once.
    """
    if trainer.finished:
        console.print("Training is already finished.")
        return 0.0
    progress = Progress(
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=console,
    )
    recent: list[float] = []
    heldout, saving = "–", 0.0
    started = time.perf_counter()
    with _stop_after_step() as stop, progress:
        task = progress.add_task("", total=trainer.config.steps, completed=trainer.step)
        while not trainer.finished:
            result = trainer.train_step()
            if trainer.finished or stop.is_set() or checkpointer.due:
                before = time.perf_counter()
                tensors, metadata = trainer.state()
                metadata["data"] = None if data_path is None else str(data_path.resolve())
                checkpointer.save(tensors, metadata)
                saving += time.perf_counter() - before
            if stop.is_set():
                raise KeyboardInterrupt
            recent = [*recent[-19:], result.seconds]
            speed = trainer.tokens_per_step / statistics.median(recent)
            if (value := result.heldout_bits_per_byte) is not None:
                heldout = f"{value:.3f}"
                beaten = " and ".join(name for name in entropies if value < entropies[name])
                progress.console.print(
                    f"step {result.step:>5}  training {result.bits_per_byte:.3f}  "
                    f"held-out {heldout} bits/byte  {speed:,.0f} tokens/s  "
                    f"MaxVio {result.max_violation:.2f}"
                    + (f"  [green]below {beaten} entropy[/]" if beaten else ""),
                    style="dim",
                )
            told = (
                f"{result.bits_per_byte:.3f} bits/byte held-out {heldout} {speed:,.0f} tokens/s "
                f"MaxVio {result.max_violation:.2f}"
            )
            progress.update(task, completed=result.step, description=told)
    return saving / (time.perf_counter() - started)


# --- after training


def _draw(
    out: Path,
    trainer: Trainer,
    entropies: dict[str, float],
    sample: RoutingSample,
    heldout: float,
    console: Console,
) -> list[Path]:
    from moe_ops import viz

    try:
        viz._canvas.import_matplotlib()
    except viz._canvas.MissingMatplotlibError as error:
        console.print(f"[yellow]No pictures: {escape(str(error))}[/]", soft_wrap=True)
        return []
    steps, model = trainer.step, trainer.config.model
    files = [out / "loss.png", out / "expert_load.png", out / "token_experts.png"]
    viz.plot_loss(
        trainer.history["loss"][:steps].tolist(),
        # The last point is the final measurement, on more of the text than those on the way.
        trainer.heldout_by_step() | {steps: heldout},
        baselines={f"{name} entropy": value for name, value in entropies.items()},
        title=f"Byte-level language model, {model.num_layers} layers, "
        f"{model.num_experts} experts, {model.top_k} a token",
        path=files[0],
    )
    viz.plot_expert_load(
        trainer.history["tokens_per_expert"][:steps],
        title=f"Expert load over training ({trainer.tokens_per_step * model.top_k:,} slots a step)",
        path=files[1],
    )
    viz.plot_token_experts(
        sample.text.decode("latin-1"),
        sample.topk_ids,
        num_experts=model.num_experts,
        columns=72,
        title="Which expert takes which byte (held-out text)",
        path=files[2],
    )
    return files


def _compare_hugging_face(options: DemoOptions, console: Console) -> list[dict[str, Any]] | None:
    if not options.hf:
        console.print("Left out (--no-hf).")
        return None
    from moe_ops.demo import hf_compare

    if (missing := hf_compare.missing()) is not None:
        console.print(f"Left out: {missing}.", markup=False, soft_wrap=True)
        return None
    results = hf_compare.compare(
        smoke=options.smoke,
        budget_s=0.1 if options.smoke else 4.0,
        log=lambda name: console.print(f"  {name} …", style="dim"),
    )
    hf_compare.print_comparison(console, results)
    return results


# --- printing


def _heading(console: Console, text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}", align="left", style="dim")


def _shown(entropies: dict[str, float], word: str = "") -> str:
    return ", ".join(f"{name} {word}{value:.3f}" for name, value in entropies.items())


def _print_corpus(console: Console, corpus: data.Corpus, entropies: dict[str, float]) -> None:
    console.print(escape(corpus.source), soft_wrap=True)
    console.print(
        f"{corpus.train.numel() / 1e6:.2f} MB to train on ({corpus.num_train_files} files), "
        f"{corpus.heldout.numel() / 1e6:.2f} MB held out ({corpus.num_heldout_files} files)."
    )
    console.print(
        "Cross-entropy of the held-out bytes under counts of the training bytes (plus 0.01 each), "
        f"bigram given the byte before: [bold]{_shown(entropies)}[/] bits/byte."
    )


def _print_model(console: Console, trainer: Trainer) -> None:
    config, parameters = trainer.config, trainer.model.num_parameters()
    model = config.model
    console.print(
        f"DeepSeekMoE of the zoo, {model.num_layers} layers of width {model.hidden_size}, "
        f"{model.num_experts} experts of width {model.intermediate_size}, {model.top_k} a token: "
        f"{parameters['total'] / 1e6:.2f} M parameters, {parameters['active'] / 1e6:.2f} M active. "
        f"{config.steps} steps of {config.batch_size}×{model.context} bytes, "
        f"seed {config.seed}, {config.threads} threads, fp32. A checkpoint about every second: "
        "kill it when you like, --resume continues with the same bits."
    )


def _print_resumed(console: Console, checkpoint: Checkpoint, trainer: Trainer) -> None:
    console.print(f"Continuing after step {trainer.step} of {trainer.config.steps}.")
    then, now = checkpoint.metadata["environment"], environment()
    changed = [f"{k} was {then.get(k)}, is {v}" for k, v in now.items() if then.get(k) != v]
    if changed:
        console.print(
            f"[yellow]The last bits may differ from an uninterrupted run: "
            f"{escape('; '.join(changed))}.[/]",
            soft_wrap=True,
        )


def _print_routing(console: Console, sample: RoutingSample) -> None:
    table = Table(title="First choices on held-out text", title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("what the expert says about the byte")
    table.add_column("bytes each expert takes most beyond their share", overflow="fold")
    layers = zip(sample.information, sample.favourites, strict=True)
    for layer, (information, favourites) in enumerate(layers):
        table.add_row(
            str(layer),
            f"{information:.2f} of {sample.max_information:.2f} bits",
            escape("  ".join(f"{e}:{text}" for e, text in enumerate(favourites))),
            end_section=True,
        )
    console.print(table)


def _print_summary(console: Console, summary: dict[str, Any], files: list[Path]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    training = summary["training"]
    table.add_row("held-out", f"[bold]{summary['heldout_bits_per_byte']:.3f} bits/byte[/]")
    table.add_row("to beat", f"{_shown(summary['entropy_bits_per_byte'])} bits/byte")
    table.add_row(
        "training",
        f"{training['steps']} steps, {training['tokens'] / 1e6:.2f} M bytes in "
        f"{training['seconds']:.0f} s, {training['tokens_per_second']:,.0f} tokens/s, "
        f"checkpoints {training['checkpoint_share_of_time']:.1%} of the time",
    )
    violations = ", ".join(f"{value:.2f}" for value in training["max_violation_by_layer"])
    table.add_row("balance", f"MaxVio by layer over the last tenth: {violations}")
    for result in summary["hugging_face"] or []:
        verdict = "[green]same within rounding[/]" if result["passed"] else "[red]DIFFERS[/]"
        forward, both = result["forward"]["speedup"], result["forward_backward"]["speedup"]
        table.add_row(
            result["model"],
            f"{verdict}; {forward['eager']:.2f}× eager and {forward['grouped_mm']:.2f}× grouped_mm "
            f"forward, {both['eager']:.2f}× and {both['grouped_mm']:.2f}× with backward",
        )
    table.add_row("time", f"{summary['seconds']:.0f} s in all")
    table.add_row("files", escape("  ".join(str(file) for file in files)))
    console.print(table)


# --- a folder of its own, and Ctrl-C


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two runs in one folder would overwrite each other's checkpoints."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = folder / ".lock"
    with contextlib.ExitStack() as stack:
        with _files.sentence(path):
            file = stack.enter_context(open(path, "w"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(
                f"demo: another run is writing to {folder}; choose another --out"
            ) from error
        yield


@contextlib.contextmanager
def _stop_after_step() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one interrupts as usual."""
    stop = threading.Event()
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield stop  # Only the main thread may change handlers, or Ctrl-C is ignored anyway.
        return

    def ask(*_: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, usual)
