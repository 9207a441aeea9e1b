"""Self-contrast decoding (SCMoE): word problems solved with and without a weaker pass."""

from __future__ import annotations

import dataclasses
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_ops.surgery import SelfContrastLogitsProcessor, override_routing
from moe_ops.surgery.rules import rank
from moe_ops.zoo.deepseek import DeepSeek, DeepSeekConfig

from .compare import Series, series
from .picture import Picture
from .study import Experiment, Headline, Hypothesis, Job, Results, Run, Study
from .subject import SUBJECTS
from .text import problem
from .training import Recipe, thinned, train_drawn

# Numbers of the problems, and the bytes that hold a question and a solution of such.
LARGEST = (20, 12, 5)
QUESTION, SOLUTION = 68, 24
# A solution is kept for the test by its checksum: one in so many.
KEPT = 8
RECIPE = Recipe(steps=1600, batch=16, length=QUESTION + SOLUTION, rate=3e-3, warmup=60)
TESTED, TOGETHER = 600, 200
# What the published code contrasts with in Mixtral, and a weak pass that still works.
WEAK = {"rank 2": 2, "first expert": 1}
BETAS = {"rank 2": (0.1, 0.3, 0.5), "first expert": (0.1, 0.5, 0.9)}
GREEDY, ALL = "greedy", "all arms of a seed"
SOLVED, DIVERGENCE = "solved", "KL of the strong pass from it"


def arm(weak: str, beta: float) -> str:
    return f"{weak}, beta {beta:g}"


def alone(weak: str) -> str:
    return f"{weak} alone"


@dataclass(frozen=True)
class Problems:
    """Questions [N, QUESTION], ends aligned, and their solutions [N, SOLUTION] with a newline and
    more of them behind; `counted`, bool like the solutions, is True up to the first newline."""

    questions: Tensor
    solutions: Tensor
    counted: Tensor

    @classmethod
    def drawn(cls, count: int, seed: int, *, test: bool) -> Problems:
        """So many problems; solutions of the test are none of the training's."""
        draw = random.Random(f"{seed} {test}")
        pairs: list[tuple[str, str]] = []
        while len(pairs) < count:
            question, solution = problem(draw, LARGEST).split("? ")
            if (zlib.crc32(solution.encode()) % KEPT == 0) == test:
                pairs.append((question + "? ", solution + "\n"))
        questions = _bytes([question.rjust(QUESTION) for question, _ in pairs])
        solutions = _bytes([solution.ljust(SOLUTION, "\n") for _, solution in pairs])
        lengths = torch.tensor([len(solution) for _, solution in pairs])
        return cls(questions, solutions, torch.arange(SOLUTION) < lengths[:, None])

    def batches(self, size: int) -> list[Problems]:
        parts = zip(*(t.split(size) for t in dataclasses.astuple(self)), strict=True)
        return [Problems(*part) for part in parts]


def _bytes(lines: Sequence[str]) -> Tensor:
    return torch.tensor([list(line.encode()) for line in lines])


def loss_on(model: DeepSeek, problems: Problems, rows: Tensor) -> Tensor:
    """Returns the loss of the bytes of solutions alone."""
    tokens = torch.cat([problems.questions[rows], problems.solutions[rows]], 1)
    counted = torch.zeros_like(tokens, dtype=torch.bool)
    # The mask is of the byte before the one that is predicted.
    counted[:, QUESTION - 1 : -1] = problems.counted[rows]
    return model.loss(tokens, token_mask=counted).loss


def solved(
    model: DeepSeek,
    problems: Problems,
    processor: Callable[[], SelfContrastLogitsProcessor | None] = lambda: None,
) -> float:
    """Share of the problems whose answer is right, the number behind the last "#"."""
    right = 0
    for part in problems.batches(TOGETHER):
        made = model.generate(
            part.questions, SOLUTION, stop_token=ord("\n"), logits_processor=processor()
        )[:, QUESTION:]
        pairs = zip(made.tolist(), part.solutions.tolist(), strict=True)
        right += sum(_answer(ours) == _answer(theirs) for ours, theirs in pairs)
    return right / len(problems.questions)


def _answer(line: Sequence[int]) -> str | None:
    # A model may make bytes, and ids beyond them, that are no text.
    text = "".join(map(chr, line)).partition("\n")[0]
    return text.rpartition("#")[2] if "#" in text else None


@torch.no_grad()
def divergence(model: DeepSeek, problems: Problems, weak: int) -> float:
    """Nats of the strong pass's next byte from that of a weak pass, mean over bytes of the right
    solutions."""
    total = 0.0
    for part in problems.batches(TOGETHER):
        tokens = torch.cat([part.questions, part.solutions], 1)[:, :-1]
        strong = model(tokens, last=SOLUTION).log_softmax(-1)
        with override_routing(model, rank(weak), renormalize=True):
            other = model(tokens, last=SOLUTION).log_softmax(-1)
        kl = (strong.exp() * (strong - other)).sum(-1)
        total += float(kl[part.counted].sum())
    return total / int(problems.counted.sum())


def whole(config: DeepSeekConfig) -> Job:
    """All arms of a seed: they share the model and its problems."""

    def perform(seed: int, run: Run) -> dict[str, Any]:
        train = Problems.drawn(RECIPE.steps * RECIPE.batch, seed, test=False)
        test = Problems.drawn(TESTED, seed, test=True)
        torch.manual_seed(seed)
        model = DeepSeek(config)

        def loss(draw: torch.Generator) -> Tensor:
            rows = torch.randint(len(train.questions), (RECIPE.batch,), generator=draw)
            return loss_on(model, train, rows)

        curve = train_drawn(model, loss, RECIPE, seed, run.part("model"))
        rows: dict[str, dict[str, float | None]] = {
            GREEDY: {SOLVED: solved(model, test), DIVERGENCE: None}
        }
        for weak, number in WEAK.items():
            for beta in BETAS[weak]:
                share = solved(
                    model,
                    test,
                    lambda n=number, b=beta: SelfContrastLogitsProcessor(model, rank(n), beta=b),
                )
                rows[arm(weak, beta)] = {SOLVED: share, DIVERGENCE: None}
            apart = divergence(model, test, number)
            with override_routing(model, rank(number), renormalize=True):
                rows[alone(weak)] = {SOLVED: solved(model, test), DIVERGENCE: apart}
        return {"rows": rows, "curve": thinned(curve)}

    return perform


# What pilots found: one model of each form, 1,000 problems; the mean, and its standard error over
# problems. The spread over seeds is not known from them; it is taken to be three times the latter.
PILOTS = {
    "routed": {
        "rank 2": {0.1: (-0.027, 0.008), 0.3: (-0.073, 0.011), 0.5: (-0.103, 0.013)},
        "first expert": {0.1: (0.001, 0.003), 0.5: (-0.015, 0.006), 0.9: (-0.033, 0.008)},
    },
    "shared": {
        "rank 2": {0.1: (-0.001, 0.008), 0.3: (-0.028, 0.012), 0.5: (-0.053, 0.013)},
        "first expert": {0.1: (-0.003, 0.004), 0.5: (-0.024, 0.009), 0.9: (-0.054, 0.012)},
    },
}
# The second expert alone, in the same pilots.
ALONE = {"routed": (0.0, 0.001), "shared": (0.004, 0.002)}
PILOT = "a pilot of one model, whose spread is a guess"
KEYS = {
    ("rank 2", 0.5): "contrast", ("rank 2", 0.1): "mild", ("first expert", 0.5): "first",
}  # fmt: skip
STATEMENTS = {
    "rank 2": "contrast with the second expert raises exact match",
    "first expert": "contrast with the first expert alone raises exact match",
}


def study(form: str, size: str, rank_: int, num_shared: int) -> Study:
    config = dataclasses.replace(
        SUBJECTS["subject"].config, num_experts=8, num_shared_experts=num_shared
    )

    def gain(weak: str, beta: float) -> Callable[[Results], list[float]]:
        return lambda r: r.gap(arm(weak, beta), GREEDY, SOLVED)

    hypotheses = [
        Hypothesis(
            f"{STATEMENTS[weak]}, beta {beta:g}", gain(weak, beta), "of all problems",
            below=False, key=KEYS.get((weak, beta), ""), expected=mean, deviation=3 * error,
            pilot=PILOT,
        )
        for weak, found in PILOTS[form].items()
        for beta, (mean, error) in found.items()
    ]  # fmt: skip
    hypotheses.append(
        Hypothesis(
            "the second expert alone solves at most one in twenty",
            lambda r: r.of(alone("rank 2"), SOLVED), "of all problems", 0.05, key="noise",
            expected=ALONE[form][0], deviation=3 * ALONE[form][1], pilot=PILOT,
        )
    )  # fmt: skip

    def made() -> dict[str, str]:
        return {
            "Model": (
                f"the zoo's deepseek, H {config.hidden_size}, {config.num_layers} layers, "
                f"{config.num_experts} experts of {config.intermediate_size}, {config.top_k} a "
                f"token, {config.num_shared_experts} shared; a model a seed"
            ),
            "Data": (
                f"word problems of two steps, numbers up to {', '.join(map(str, LARGEST))}; no "
                "solution of the test is among those of the training"
            ),
            "Training": f"{RECIPE}; the loss is of solutions alone",
            "Arms": f"{TESTED} problems a seed, the likeliest byte of each step; alpha 0.1; the "
            "weak pass is one expert, its weight made 1, and the shared one",
            "Columns": f"{SOLVED}: share of right answers; {DIVERGENCE}, in nats a byte",
        }

    return Study(f"scmoe-{form}", size, rank_, {ALL: whole(config)}, 5, 3.7, hypotheses, made,
                 pictures)  # fmt: skip


def pictures(results: Results) -> list[Picture]:
    """Returns a picture of what contrast gains, by how much the weak pass counts."""
    lines: Series = {}
    for weak, betas in BETAS.items():
        gaps = [results.gap(arm(weak, beta), GREEDY, SOLVED) for beta in betas]
        lines[weak] = series(list(betas), [list(row) for row in zip(*gaps, strict=True)])
    return [
        Picture(
            "gain", "Exact match against greedy search", "beta", "of all problems", "lines", lines
        )
    ]


UNTESTABLE = (
    "alone, the second expert of so small a model solves 0 to 1 % of the problems, so what is "
    "subtracted is noise; a model whose second expert solves a part of them would test it"
)
CLOSE = (
    "the first expert alone is 0.05 nats from the two together: there is little to contrast with"
)
EXPERIMENT = Experiment(
    "scmoe",
    (
        study("routed", "8 experts", 37, 0),
        study("shared", "8 experts, 1 shared", 38, 1),
    ),
    (
        Headline(
            "contrast", "self-contrast raises exact match",
            "61.8 to 66.9 % of GSM8K, Mixtral", "quality", untestable=UNTESTABLE,
        ),
        Headline(
            "mild", "and with a beta of 0.1", "several values of beta", "quality",
            untestable=UNTESTABLE,
        ),
        Headline(
            "first", "and against the first expert alone", "not the form for Mixtral", "quality",
            contradicted=CLOSE, not_shown=CLOSE,
        ),
        Headline(
            "noise", "the second expert alone solves next to nothing", "not reported",
            "mechanism", shown="a token's second expert is trained beside its first, never alone",
        ),
    ),
)  # fmt: skip
