"""THOR: experts that are drawn and taught to agree, against a router and against R-Drop."""

from __future__ import annotations

from typing import Any

import torch

from bench.studies.thor import parallel
from bench.studies.thor.decoding import translate
from bench.studies.thor.metrics import chrf, disagreement, mean_loss, spread
from bench.studies.thor.tokens import PairTokens, padded
from bench.studies.thor.training import (
    ARMS,
    Batches,
    Settings,
    draws_experts,
    make_config,
    model_of,
)

from ..study import Experiment, Headline, Hypothesis, Job, Run, Study
from ..training import Recipe, thinned, train_drawn

SOURCE, TARGET, LONGEST, PAIRS = "en", "es", 90, 800
VOCABULARY = 1000
SIZES = Settings(hidden_size=96, num_layers=2, num_experts=4)
RECIPE = Recipe(steps=1500, batch=16, length=LONGEST, rate=2e-3, warmup=60, weight_decay=1e-4)
# Draws of experts that a loss is the mean of, and that a deviation is of.
DRAWS = 8
LOSS, MEAN, DEVIATION, APART = "loss", "loss, mean of experts", "deviation", "KL of two draws"


def trained(arm: str, recipe: Recipe) -> Job:
    """An arm: held-out loss with drawn experts, as published, and with the mean of all."""

    def perform(seed: int, run: Run) -> dict[str, Any]:
        text = parallel.load("quran", SOURCE, TARGET, longest=LONGEST, most=PAIRS, seed=seed)
        tokens = PairTokens.learn([side for pair in text.train for side in pair], VOCABULARY)
        batches = Batches.of(text.train, tokens)
        torch.manual_seed(seed)
        model = model_of(arm)(make_config(SIZES, arm, tokens.vocab_size))

        def loss(draw: torch.Generator) -> torch.Tensor:
            target, source = batches.draw(recipe.batch, draw)
            return model.loss(target, source, generator=draw).loss

        curve = train_drawn(model, loss, recipe, seed, run)
        heldout = text.valid + text.test
        judged = Batches.of(heldout, tokens).all(32)
        mean = mean_loss(model, judged)
        row: dict[str, Any] = {LOSS: mean, MEAN: mean, DEVIATION: None, APART: None}
        if draws_experts(model):
            found = spread(model, judged, draws=DRAWS, seed=seed)
            row.update({LOSS: found["drawn loss"], DEVIATION: found["deviation"]})
            row[APART] = disagreement(model, judged, seed=seed)
        source = padded([tokens.numbers(pair[0]) for pair in text.test])
        made = [tokens.text(line) for line in translate(model, source, LONGEST).tolist()]
        row["chrF"] = chrf(made, [pair[1] for pair in text.test])
        return {"rows": {arm: row}, "curve": thinned(curve)}

    return perform


def study(name: str, size: str, rank: int, minutes: float, recipe: Recipe) -> Study:
    def against(other: str, column: str = LOSS) -> Any:
        return lambda r: r.gap("thor", other, column)

    nats = "nats a token"
    hypotheses = [
        Hypothesis("THOR's loss is below that of Switch", against("switch"), nats, key="switch"),
        Hypothesis(
            "and below that of random experts without consistency", against("random"), nats,
            key="random",
        ),
        Hypothesis(
            "and below that of R-Drop, a dense model with the same loss", against("r-drop"), nats,
            key="r-drop",
        ),
        Hypothesis("and below that of the dense model", against("dense"), nats),
        Hypothesis(
            "random experts lose no more than 0.02 to a router",
            lambda r: r.gap("random", "switch", LOSS), nats, bound=0.02, key="router",
        ),
        Hypothesis(
            "consistency lowers the deviation of the loss over draws of experts",
            against("random", DEVIATION), nats, key="draws",
        ),
        Hypothesis(
            "and the divergence of two draws", against("random", APART), nats,
        ),
        Hypothesis(
            "the mean of THOR's experts has lower loss than drawn ones",
            lambda r: r.gap("thor", "thor", MEAN, LOSS), nats, key="mean",
        ),
    ]  # fmt: skip

    def made() -> dict[str, str]:
        config = make_config(SIZES, "thor", VOCABULARY)
        return {
            "Data": f"verses of quran-json, {SOURCE} to {TARGET}, of at most {LONGEST} bytes, "
            f"{PAIRS} pairs; byte pairs, a vocabulary of {VOCABULARY}",
            "Model": f"{config.num_encoder_layers} + {config.num_layers} layers, H "
            f"{config.hidden_size}, networks of {config.intermediate_size}, the first layer of "
            f"each side with {config.num_experts} experts; dropout {config.dropout:g}, label "
            f"smoothing {config.label_smoothing:g}, alpha {config.consistency:g}",
            "Training": f"{recipe.steps} steps of {recipe.batch} pairs, AdamW, rate "
            f"{recipe.rate:g} (warm-up {recipe.warmup}, cosine to a tenth); a step of THOR and of "
            "R-Drop has two passes",
            "Measured": f"{LOSS}: held-out pairs, of drawn experts the mean over {DRAWS} draws of "
            "one a layer",
        }

    runs = {arm: trained(arm, recipe) for arm in ARMS}
    chrf = Hypothesis(
        "THOR translates better than Switch, by chrF", lambda r: r.gap("thor", "switch", "chrF"),
        "chrF", below=False, key="chrF",
    )  # fmt: skip
    return Study(name, size, rank, runs, 5, minutes, hypotheses, made, later=[chrf])


EXPERIMENT = Experiment(
    "thor",
    (study("thor-verses", "800 verses", 36, 1.3, RECIPE),),
    (
        Headline(
            "switch", "lower loss than Switch", "2 BLEU more in multilingual translation",
            "quality",
            shown="two passes that must agree keep 800 pairs, seen 30 times, from being learned by "
            "heart; translations are not better (chrF)",
        ),
        Headline(
            "random", "and than random experts without consistency", "figures not checked",
            "quality", shown="the same",
        ),
        Headline(
            "r-drop", "and than R-Drop, which has no experts", "not compared", "quality",
            contradicted="consistency helps the dense model as well, and each of THOR's experts "
            "sees a quarter of the text",
        ),
        Headline(
            "router", "random experts lose at most 0.02 nats to a router",
            "gates are no better than random routing", "mechanism",
            shown="to draw experts is a kind of dropout, and dropout is what so little text needs",
        ),
        Headline(
            "draws", "consistency makes draws of experts alike", "experts predict consistently",
            "mechanism", shown="it is what the loss minimises",
        ),
        Headline(
            "mean", "the mean of experts is better than drawn ones", "figures not checked",
            "mechanism", shown="by 0.005 nats, for experts that agree have little to average",
        ),
    ),
)  # fmt: skip
