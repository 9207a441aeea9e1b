"""Trained language models that experiments on trained models share, each trained once.

    python -m bench.studies.subject subject fine dense --seeds 3 --minutes 60

"subject" has Mixtral's form, "fine" DeepSeek-V3's, "dense" has no experts. A model is trained on
eight kinds of text in equal shares (`bench.studies.text`), of which brown and the languages are
read from archives in the folder MOE_OPS_DATA. It is kept outside of the source tree: in --folder,
or else in the folder that MOE_OPS_CACHE names, or else in ~/.cache/moe_ops. Training that is killed
goes on when the same command is started again, with the bits of one that was not.

Every sequence begins with BOS: the state of the first position is then the same in all of them, and
what forms there in large models, sinks of attention and experts with huge outputs, can form here.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness.arguments import whole
from moe_ops._files import make_folder, write_text
from moe_ops.zoo.deepseek import DeepSeek, DeepSeekConfig

from .deepseek import balance_each_step
from .queue import Busy, machine, only_one
from .study import Paused, Run
from .text import Domain, load_domains
from .training import Recipe, Trained, mutual_information, thinned, train

BOS = 256
DOMAINS = (
    "code", "scripture", "brown", "reference", "maths", "spanish", "turkish", "russian",
)  # fmt: skip
# 12.3 MB: two sequences of each domain a step. By 8 MB experts have specialized.
RECIPE = Recipe(steps=6_000, batch=16, rate=3e-3, warmup=60, heldout_batches=16)
REPORT = "report.json"
SECONDS_BETWEEN_SAVES = 300.0
SECONDS_BETWEEN_LOOKS = 5.0


@dataclass(frozen=True)
class Subject:
    """The way a model is made; besides, the model depends on its seed and on the text."""

    config: DeepSeekConfig
    recipe: Recipe = RECIPE
    domains: tuple[str, ...] = DOMAINS

    def made(self) -> dict[str, Any]:
        """Returns the subject as JSON, without what is left at its default: a new option changes no
        model."""
        return {
            "config": _chosen(self.config),
            "recipe": _chosen(self.recipe),
            "domains": list(self.domains),
        }


def _chosen(options: Any) -> dict[str, Any]:
    values = {f.name: (getattr(options, f.name), f.default) for f in dataclasses.fields(options)}
    return {name: value for name, (value, default) in values.items() if value != default}


_TRUNK = DeepSeekConfig(
    # Of 264 ids, bytes and BOS use 257.
    vocab_size=264,
    hidden_size=128,
    num_layers=4,
    num_dense_layers=0,
    num_heads=4,
    head_size=32,
    latent=False,
    rope_interleaved=False,
    num_shared_experts=0,
    renormalize=True,
)
SUBJECTS = {
    # The balance loss is of a batch of all domains: one of a sequence would forbid experts of
    # domains.
    "subject": Subject(
        dataclasses.replace(
            _TRUNK, intermediate_size=128, num_experts=16, top_k=2, expert_balance_coefficient=0.01
        )
    ),
    "fine": Subject(
        dataclasses.replace(
            _TRUNK, intermediate_size=64, num_experts=32, top_k=4, num_shared_experts=1,
            score_func="sigmoid", expert_bias=True,
        )
    ),
    # Cut in four it is experts of the subject's width; cut in two it is what a token of it uses.
    "dense": Subject(
        dataclasses.replace(_TRUNK, num_dense_layers=4, dense_intermediate_size=512)
    ),
}  # fmt: skip


def default_folder() -> Path:
    """Returns the folder where models are kept if nothing else is said."""
    cache = os.environ.get("MOE_OPS_CACHE")
    return (Path(cache) if cache else Path.home() / ".cache" / "moe_ops") / "subject"


def domains_of(subject: Subject) -> list[Domain]:
    """Its text; sequences begin with BOS, those of maths with a problem behind it."""
    return [
        dataclasses.replace(domain, first=BOS, lines=domain.name == "maths")
        for domain in load_domains(subject.domains)
    ]


def load(
    name: str = "subject",
    seed: int = 0,
    *,
    folder: Path | str | None = None,
    steps: int | None = None,
    minutes: float = float("inf"),
    tell: Callable[[str], None] = print,
) -> DeepSeek:
    """A trained model, in eval mode; trains it where the folder does not have it.

    Args:
        name: of `SUBJECTS`.
        folder: None: `default_folder`.
        steps: of training, instead of those of the recipe; such a model is kept beside the other.
        minutes: of training at most, or of waiting for another process that trains it.
        tell: called with lines about the progress.

    Raises:
        ValueError: no such model, or one in the folder that was made otherwise.
        ImportError, FileNotFoundError: it must be trained, and a text is missing.
        Paused: the time was over; the next call goes on from there.
    """
    place, subject = find(name, seed, folder, steps)
    end, waiting = time.monotonic() + 60 * minutes, False
    while not (place / REPORT).is_file():
        try:
            with only_one(place):
                if not (place / REPORT).is_file():
                    _train(subject, place, seed, end, tell)
        except Busy:
            if not waiting:
                tell(f"{place.name}: another process trains it")
            if time.monotonic() >= end:
                raise Paused from None
            waiting = True
            time.sleep(SECONDS_BETWEEN_LOOKS)
    report = read_report(place)
    if report["made"] != subject.made():
        raise ValueError(
            f"load: {place} must hold a model of the present config, recipe and domains, got one "
            "that was made otherwise; remove it, or give another folder."
        )
    return DeepSeek.from_pretrained(place).eval()


def find(
    name: str, seed: int, folder: Path | str | None = None, steps: int | None = None
) -> tuple[Path, Subject]:
    """The folder of a model, whether it is there or not, and how it is made."""
    if name not in SUBJECTS:
        raise ValueError(f"load: name must be one of {', '.join(SUBJECTS)}, got {name!r}.")
    subject = SUBJECTS[name]
    place = f"{name}-{seed}"
    if steps is not None:
        subject = dataclasses.replace(
            subject, recipe=dataclasses.replace(subject.recipe, steps=steps)
        )
        place += f"-{steps}"
    return Path(folder) / place if folder is not None else default_folder() / place, subject


def read_report(place: Path) -> dict[str, Any]:
    """Returns what was measured of the model in a folder of `find`."""
    found: dict[str, Any] = json.loads((place / REPORT).read_text("utf-8"))
    return found


def _train(
    subject: Subject, place: Path, seed: int, deadline: float, tell: Callable[[str], None]
) -> None:
    domains = domains_of(subject)
    text = {d.name: {"train": len(d.train), "heldout": len(d.heldout)} for d in domains}
    # A checkpoint is of one model and one text: after a change of either nothing goes on from it.
    key = hashlib.sha256(json.dumps(subject.made()).encode())
    for domain in domains:
        key.update(domain.train.numpy())
        key.update(domain.heldout.numpy())

    def say(share: float, left: float) -> None:
        tell(f"{place.name}: {share:.0%}, about {left / 60:.0f} min left")

    make_folder(place)
    state = place / f"training.{key.hexdigest()[:12]}.pt"
    run = Run(state, deadline, say, every=SECONDS_BETWEEN_SAVES)
    tell(f"{place.name}: {subject.recipe}")
    with _own_state():
        trained = train(
            lambda: DeepSeek(subject.config),
            domains,
            subject.recipe,
            seed,
            prepare=_prepare,
            run=run,
        )
    trained.model.save_pretrained(place)
    report = {
        "made": subject.made(),
        "seed": seed,
        "text": {"bytes": text, "made and text": key.hexdigest()},
        "machine": machine(),
        "seconds": round(run.seconds, 1),
        "parameters": trained.model.num_parameters(),
        **measured(trained),
    }
    # Last: with it the model is there.
    write_text(place / REPORT, json.dumps(report, indent=1) + "\n")
    for path in place.glob("training.*.pt"):
        path.unlink()


@contextlib.contextmanager
def _own_state() -> Iterator[None]:
    """One thread, for sums depend on their number; the caller's generator stays as it is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


def _prepare(model: DeepSeek, optimizer: torch.optim.Optimizer) -> None:
    if model.config.expert_bias:
        balance_each_step(model, optimizer)


def measured(trained: Trained) -> dict[str, Any]:
    """Losses by domain, and by layer what the experts tell about the domain and MaxVio."""
    routing = trained.routing
    parts = trained.of_domain.values()
    information = {
        str(layer): mutual_information(
            torch.stack([part.tokens_per_expert(layer) for part in parts]).double()
        )
        for layer in routing.layers
    }
    return {
        "heldout": trained.heldout,
        "information": information,
        "MaxVio": {str(layer): routing.max_violation(layer) for layer in routing.layers},
        "curve": thinned(trained.curve),
    }


def described(name: str, report: dict[str, Any]) -> str:
    """A report in lines."""

    def row(values: dict[str, float]) -> str:
        return ", ".join(f"{key} {value:.2f}" for key, value in values.items())

    lines = [
        f"{name}: {report['parameters']['active']:,} active parameters of "
        f"{report['parameters']['total']:,}, {report['seconds'] / 60:.0f} minutes",
        f"  held-out nats a byte: {row(report['heldout'])}",
    ]
    if report["information"]:
        lines += [
            f"  nats that experts tell about the domain: {row(report['information'])}",
            f"  MaxVio: {row(report['MaxVio'])}",
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.studies.subject", description=__doc__.splitlines()[0]
    )
    parser.add_argument("names", nargs="*", default=["subject"], metavar="NAME")
    parser.add_argument("--seed", type=whole(0, 10**6), help="this one alone")
    parser.add_argument("--seeds", type=whole(1, 1000), default=1, help="so many, from 0 on (1)")
    parser.add_argument("--steps", type=whole(1, 10**7), help="instead of the recipe's")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of all, at most")
    parser.add_argument("--folder", type=Path, help=f"of the models ({default_folder()})")
    options = parser.parse_args(arguments)
    seeds = range(options.seeds) if options.seed is None else [options.seed]
    end = time.monotonic() + 60 * options.minutes
    for seed in seeds:
        for name in options.names:
            try:
                place, _ = find(name, seed, options.folder, options.steps)
                load(
                    name,
                    seed,
                    folder=options.folder,
                    steps=options.steps,
                    minutes=(end - time.monotonic()) / 60,
                    tell=lambda line: print(line, flush=True),
                )
                print(described(str(place), read_report(place)), flush=True)
            except Paused:
                print("the time is over: start the same command again", flush=True)
                return 0
            except (ImportError, ValueError, OSError) as error:
                sys.exit(f"{parser.prog}: {error}")
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
