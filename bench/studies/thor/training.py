"""Training of THOR and its controls on parallel text, and their evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_ops import _files, _reading
from moe_ops._fields import check_choice
from moe_ops.zoo.thor.model import Thor, ThorConfig

from ..settings import settings_folder
from ..trainer import Group, Lesson, train_steps
from . import parallel
from .decoding import translate
from .metrics import chrf, disagreement, mean_loss, spread
from .switch import Switch, SwitchConfig
from .tokens import ByteTokens, PairTokens, Tokens, padded

# A batch is drawn from so many times as many pairs of like length, so that little is padding.
WINDOW = 6
# Fields of the config that make the systems of the comparison; "switch" is a model of its own.
ARMS: dict[str, dict[str, Any]] = {
    "thor": {},
    "random": {"passes": 1},
    "switch": {"passes": 1},
    "dense": {"num_experts": 1, "passes": 1},
    "r-drop": {"num_experts": 1},
}


@dataclass(frozen=True)
class Batches:
    """Pairs as tokens, by length.

    Attributes:
        pairs: numbers of source and target.
    """

    pairs: Sequence[tuple[list[int], list[int]]]

    @classmethod
    def of(cls, pairs: Sequence[parallel.Pair], tokens: Tokens) -> Batches:
        made = [(tokens.numbers(source), tokens.numbers(target)) for source, target in pairs]
        return cls(sorted(made, key=lambda pair: len(pair[0]) + len(pair[1])))

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Target and source [B, S] of random pairs of like length."""
        block = WINDOW * count

        def below(most: int, size: tuple[int, ...]) -> Tensor:
            return torch.randint(most, size, generator=generator, device=generator.device)

        first = int(below(len(self.pairs), ())) // block * block
        near = self.pairs[first : first + block]
        chosen = below(len(near), (count,)).tolist()
        return self._tensors([near[i] for i in chosen])

    def all(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """Every pair once, in batches of `count`."""
        return [
            self._tensors(self.pairs[i : i + count]) for i in range(0, len(self.pairs), count)
        ]  # fmt: skip

    def _tensors(self, pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        return padded([target for _, target in pairs]), padded([source for source, _ in pairs])


def lesson(
    model: Thor,
    batches: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    *,
    rate: float = 1e-3,
    warm_up: int = 100,
    weight_decay: float = 1e-4,
) -> Lesson:
    """Pairs; the published run has a rate of 1e-3, 4000 steps of warm-up, and then falls with the
    inverse square root where this falls with a cosine.

    Args:
        batches: from the generator of the run to target and source, see `Thor.loss`.
    """

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        target, source = batches(generator)
        return model.loss(target, source, generator=generator)._asdict()

    return Lesson([Group(list(model.parameters()), rate, warm_up, weight_decay)], loss)


@dataclass(frozen=True)
class Settings:
    """Settings of `train`.

    Attributes:
        arms: of `ARMS`.
        corpus, source, target, longest, pairs: of `parallel.load`; pairs for training, 0: all.
        tokens: "bytes", or the number of a vocabulary of merged pairs of bytes.
        decoder_only: 1: without an encoder, with as many blocks.
        steps, batch_size, rate: of each arm. One step of two passes costs two of one pass.
        beam, translated: of the evaluation: hypotheses, and test pairs that are translated.
    """

    arms: tuple[str, ...] = tuple(ARMS)
    corpus: str = "numbers"
    source: str = "en"
    target: str = "es"
    longest: int = 90
    pairs: int = 1000
    tokens: str = "bytes"
    decoder_only: int = 0
    hidden_size: int = 96
    num_layers: int = 2
    num_experts: int = 4
    consistency: float = 5.0
    dropout: float = 0.1
    label_smoothing: float = 0.1
    steps: int = 1000
    batch_size: int = 16
    rate: float = 2e-3
    beam: int = 4
    translated: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_choice("Settings", "arms", arm, ARMS)
        if self.tokens != "bytes" and not self.tokens.isdecimal():
            raise ValueError(f"Settings: tokens must be 'bytes' or a number, got {self.tokens!r}.")


def make_config(settings: Settings, arm: str, vocab_size: int) -> ThorConfig:
    layers = settings.num_layers
    made = SwitchConfig if arm == "switch" else ThorConfig
    return made(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        num_encoder_layers=0 if settings.decoder_only else layers,
        num_layers=2 * layers if settings.decoder_only else layers,
        num_heads=max(settings.hidden_size // 32, 1),
        intermediate_size=2 * settings.hidden_size,
        consistency=settings.consistency,
        dropout=settings.dropout,
        label_smoothing=settings.label_smoothing,
        **{"num_experts": settings.num_experts, **ARMS[arm]},
    )


def model_of(arm: str) -> type[Thor]:
    """Returns the class of an arm's model."""
    return Switch if arm == "switch" else Thor


def draws_experts(model: Thor) -> bool:
    """Returns True if the model has random experts."""
    return not isinstance(model, Switch) and model.config.num_experts > 1


def train(
    folder: Path | str,
    settings: Settings | None = None,
    *,
    text: parallel.ParallelText | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains each arm and evaluates it; writes and returns report.json.

    What is done is not done again; what was cut goes on from its checkpoint. A model's folder is
    one of `from_pretrained` of `model_of` its arm.

    Args:
        text: None: of the settings.

    Raises:
        ValueError: the folder is of other settings.
    """
    settings = settings or Settings()
    free = ("arms", "beam", "translated")
    folder, now = settings_folder(folder, settings, "models", free)
    if text is None:
        text = parallel.load(
            settings.corpus, settings.source, settings.target, longest=settings.longest,
            most=settings.pairs, seed=settings.seed,
        )  # fmt: skip
    tokens = make_tokens(settings, text, folder / "tokens.json")
    batches = Batches.of(text.train, tokens)
    report: dict[str, Any] = {"settings": now, "pairs": len(text.train), "arms": {}}
    for arm in settings.arms:
        place = folder / arm
        if (place / "config.json").exists():
            model = model_of(arm).from_pretrained(place)
        else:
            torch.manual_seed(settings.seed)
            model = model_of(arm)(make_config(settings, arm, tokens.vocab_size))
            state = folder / f"{arm}.training.pt"

            def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
                return batches.draw(settings.batch_size, generator)

            train_steps(
                "fit thor", model, *lesson(model, draw, rate=settings.rate), steps=settings.steps,
                seed=settings.seed, checkpoint=state, progress=progress,
            )  # fmt: skip
            model.save_pretrained(place)
            state.unlink()
        report["arms"][arm] = evaluate(model, text.test, tokens, settings)
    _files.write_json(folder / "report.json", report)
    return report


def make_tokens(settings: Settings, text: parallel.ParallelText, file: Path) -> Tokens:
    """Bytes, or pairs of bytes that are learned from the training text unless the file is there."""
    if settings.tokens == "bytes":
        return ByteTokens()
    try:
        content = _reading.read_bytes(file, "train", _files.MAX_JSON_BYTES)
    except FileNotFoundError:
        content = None
    if content is not None:
        with _reading.damage("train", file, "tokens that an earlier run learned"):
            return PairTokens(content.decode("utf-8"))
    made = PairTokens.learn([side for pair in text.train for side in pair], int(settings.tokens))
    _files.write_text(file, made.json)
    return made


def evaluate(
    model: Thor, pairs: Sequence[parallel.Pair], tokens: Tokens, settings: Settings
) -> dict[str, float]:
    """On held-out pairs: "loss" of the mean of experts in nats a token, and where experts are
    random that of drawn ones, its deviation over draws, and how far two draws are apart; "chrF" and
    "exact" of the first pairs' translations, and seconds of a translation."""
    model.eval()
    batches = Batches.of(pairs, tokens).all(32)
    found = {"loss": mean_loss(model, batches)}
    if draws_experts(model):
        found |= spread(model, batches, seed=settings.seed)
        found["disagreement"] = disagreement(model, batches, seed=settings.seed)
    some = pairs[: settings.translated]
    if some:
        began = time.perf_counter()
        source = padded([tokens.numbers(pair[0]) for pair in some])
        longest = 2 * max(len(tokens.numbers(pair[1])) for pair in some)
        out = translate(model, source, longest, beam=settings.beam)
        texts = [tokens.text(row) for row in out.tolist()]
        found["seconds"] = (time.perf_counter() - began) / len(some)
        wanted = [pair[1] for pair in some]
        found["chrF"] = chrf(texts, wanted)
        found["exact"] = sum(a == b for a, b in zip(texts, wanted, strict=True)) / len(some)
    return found
