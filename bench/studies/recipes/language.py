"""Studies of the recipes that need text: small language models on bytes, a minute or two a run."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from functools import partial
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.studies.recipes import light_reasoner, prox, talking_models
from moe_ops import surgery
from moe_ops.zoo.deepseek import DeepSeek, DeepSeekConfig
from moe_ops.zoo.llama import Llama, LlamaConfig
from moe_ops.zoo.lm.model import CausalLM

from ..study import Hypothesis, Study
from ..text import Domain, heldout_batches, load_domains, problem
from ..training import Recipe, train
from .setup import Rows, ahead, steps_of, study

NATS = "nats a byte"
BYTES = 64


def heldout(model: CausalLM, domain: Domain, batches: int = 6) -> float:
    model.eval()
    return surgery.super_experts.mean_loss(model, heldout_batches(domain, batches, 16, BYTES))


def batches_of(domain: Domain, steps: int, batch: int, seed: int) -> Iterator[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.stack([domain.drawn(BYTES, draw) for _ in range(batch)])


def llama(hidden: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, num_layers=layers, num_heads=4, num_kv_heads=4, head_size=hidden // 4,
        intermediate_size=2 * hidden,
    )  # fmt: skip


# ---------------------------------------------------------------------------------- talking models

STUDENT_STEPS, MESSAGE = 500, 32
TALKS: dict[str, dict[str, Any] | None] = {
    "alone": None,
    "one way": {"interactive": False},
    "interactive": {"interactive": True},
}


def talking(seed: int) -> Rows:
    """A student of one domain, with or without a teacher of three."""
    domains = load_domains(("reference", "code", "maths"))
    own = domains[0]
    recipe = Recipe(
        steps=steps_of(700), batch=15, length=BYTES, rate=3e-3, heldout_batches=1, warmup=20
    )
    teacher: Any = talking_models.frozen(train(lambda: Llama(llama(96, 4)), domains, recipe, seed)
                                         .model)  # fmt: skip
    of_teacher = talking_models.layers_of(teacher, 0, 1)
    upper = talking_models.layers_of(teacher, 1)
    rows: Rows = {}
    for arm, how in TALKS.items():
        torch.manual_seed(seed)
        student = Llama(llama(48, 2))
        talk = talking_models.Conversation(48, 96, MESSAGE)
        parameters = [*student.parameters(), *talk.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01)
        lower, top = (talking_models.layers_of(student, i, i + 1) for i in range(2))
        student.train()
        for tokens in batches_of(own, steps_of(STUDENT_STEPS), 12, seed):
            x = tokens[:, :-1]
            state = lower(student.embed_tokens(x))
            last = top(state)
            logits = student._head(student.norm(last))
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            if how is not None:
                with torch.no_grad():
                    there = of_teacher(teacher.embed_tokens(x))
                parts = talk.losses(state, last, there, upper, **how)
                loss = loss + talking_models.mix(
                    parts, {"interact": 0.1, "message": 0.1, "state": 0.1}
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        rows[arm] = {"loss": heldout(student, own)}
    rows["teacher"] = {"loss": heldout(teacher, own)}
    return rows


TALKING = study(
    "talking", "interactive distillation", 61, 2.0, talking,
    [
        Hypothesis(
            "a student that talks with a teacher has lower loss than one that only listens, with "
            "the same modules", ahead("interactive", "one way", "loss"), NATS, key="talking",
        ),
        Hypothesis(
            "and than one that is alone", ahead("interactive", "alone", "loss"), NATS, key="alone",
        ),
    ],
    {
        "Models": "student H 48, 2 layers; teacher H 96, 4 layers, frozen; messages of "
        f"{MESSAGE}; lower state after the first layer",
        "Data": "bytes of reference (student), and of code and sums (teacher)",
        "Training": f"teacher 700 steps of 15 x {BYTES}, student {STUDENT_STEPS} of 12; "
        "weights 0.1",
    },
    seeds=5,
)  # fmt: skip


# ----------------------------------------------------------------------------------- LightReasoner

SUMS = DeepSeekConfig(
    vocab_size=128, hidden_size=64, num_layers=2, num_dense_layers=0, num_heads=4, head_size=16,
    latent=False, rope_interleaved=False, intermediate_size=64, num_experts=8, top_k=2,
    num_shared_experts=1, renormalize=True, expert_balance_coefficient=0.01,
)  # fmt: skip
TUNE_STEPS, PROBLEMS = 40, 200
WIDTH = 112


def problems(count: int, seed: int) -> list[tuple[bytes, bytes]]:
    """Questions and their worked solutions."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        text = problem(draw)
        at = max(text.rindex("? "), 0) + 2
        found.append((text[:at].encode(), text[at:].encode()))
    return found


def padded(rows: list[bytes]) -> Tensor:
    """[N, WIDTH] uint8 as integers, filled with line ends."""
    return torch.tensor([list(row[:WIDTH].ljust(WIDTH, b"\n")) for row in rows])


def exact(model: DeepSeek, questions: list[tuple[bytes, bytes]]) -> float:
    """Share of solutions whose answer is right, greedily; prompts of one length together."""
    by_length: dict[int, list[tuple[bytes, bytes]]] = {}
    for question in questions:
        by_length.setdefault(len(question[0]), []).append(question)
    right = 0
    for some in by_length.values():
        prompts = torch.tensor([list(q) for q, _ in some])
        said = model.generate(prompts, 28, stop_token=ord("\n"))[:, prompts.shape[1] :]
        for row, (_, solution) in zip(said.tolist(), some, strict=True):
            text = bytes(row).split(b"\n")[0]
            right += text.rpartition(b"#")[2] == solution.rpartition(b"#")[2] and b"#" in text
    return right / len(questions)


def reasoner(seed: int) -> Rows:
    """A model of sums, tuned on what it says itself, by four rules of equally many tokens."""
    torch.manual_seed(seed)
    base = DeepSeek(SUMS)
    text = problems(steps_of(8000), 1000 + seed)
    rows_of = padded([q + s for q, s in text])
    begins = torch.tensor([len(q) for q, _ in text])
    places = torch.arange(WIDTH - 1)
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(base.parameters(), lr=3e-3, weight_decay=0.1)
    steps = steps_of(2400)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min((step + 1) / 50, 1.0) * (1 - 0.9 * step / steps)
        some = torch.randint(len(text), (24,), generator=draw)
        loss = base.loss(rows_of[some]).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(base.parameters(), 1.0)
        optimizer.step()
    base.eval()
    judged = problems(PROBLEMS if steps > 10 else 4, 900_000 + seed)

    def row(model: DeepSeek) -> dict[str, float | None]:
        model.eval()
        tokens = padded([q + s for q, s in judged])
        with torch.no_grad():
            losses = F.cross_entropy(
                model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none"
            )
        answer = places >= torch.tensor([len(q) - 1 for q, _ in judged])[:, None]
        answer &= tokens[:, 1:] != ord("\n")
        return {"exact match": exact(model, judged), "loss": float(losses[answer].mean())}

    rows: Rows = {"before": row(base)}
    state = {name: t.clone() for name, t in base.state_dict().items()}

    def tuned(loss_of: Callable[[DeepSeek, Tensor, Tensor, light_reasoner.Lesson], Tensor],
              ranks: tuple[int, ...]) -> dict[str, float | None]:  # fmt: skip
        model = DeepSeek(SUMS)
        model.load_state_dict(state)
        again = torch.Generator().manual_seed(seed + 5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
        for _ in range(steps_of(TUNE_STEPS)):
            some = torch.randint(len(text), (24,), generator=again)
            tokens = rows_of[some]
            counted = (places >= begins[some, None] - 1) & (tokens[:, 1:] != ord("\n"))
            lesson = light_reasoner.make_lesson(
                base, tokens[:, :-1],
                lambda: surgery.override_routing(
                    base, surgery.rules.rank(*ranks), renormalize=True
                ),
                counted=counted,
            )  # fmt: skip
            loss = loss_of(model.train(), tokens, counted, lesson)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return row(model)

    def likelihood(mask: Callable[[Tensor, light_reasoner.Lesson], Tensor]) -> Any:
        def loss(model: DeepSeek, tokens: Tensor, counted: Tensor, lesson: Any) -> Tensor:
            chosen = mask(counted, lesson)
            logits = model(tokens[:, :-1])[chosen]
            return F.cross_entropy(logits, tokens[:, 1:][chosen], reduction="sum") / max(
                1, len(logits)
            )

        return loss

    def at_random(counted: Tensor, lesson: Any) -> Tensor:
        """Chooses at random as many of the counted tokens as the lesson has."""
        noise = torch.rand(counted.shape, generator=draw).masked_fill(~counted, 2.0).flatten()
        chosen = torch.zeros(counted.numel(), dtype=torch.bool)
        chosen[noise.argsort()[: int(lesson.mask.sum())]] = True
        return chosen.reshape(counted.shape)

    def contrast(model: DeepSeek, tokens: Tensor, counted: Tensor, lesson: Any) -> Tensor:
        return light_reasoner.lesson_loss(model, lesson)

    rows["contrast, amateur of rank 2"] = tuned(contrast, (2,))
    rows["contrast, amateur of rank 1"] = tuned(contrast, (1,))
    rows["likelihood, the same tokens"] = tuned(
        likelihood(lambda counted, lesson: lesson.mask), (2,)
    )
    rows["likelihood, tokens at random"] = tuned(likelihood(at_random), (2,))
    return rows


REASONER = study(
    "light-reasoner", "LightReasoner", 61, 2.5, reasoner,
    [
        Hypothesis(
            "contrastive tuning raises the exact match of the model it starts from",
            ahead("contrast, amateur of rank 2", "before", "exact match"), "of all", below=False,
            key="reasoner",
        ),
        Hypothesis(
            "and is better than likelihood on as many tokens at random",
            ahead("contrast, amateur of rank 2", "likelihood, tokens at random", "exact match"),
            "of all", below=False, key="tokens",
        ),
        Hypothesis(
            "and than likelihood on the same tokens",
            ahead("contrast, amateur of rank 2", "likelihood, the same tokens", "exact match"),
            "of all", below=False, key="target",
        ),
    ],
    {
        "Model": f"H {SUMS.hidden_size}, {SUMS.num_layers} layers, {SUMS.num_experts} experts of "
        f"{SUMS.intermediate_size}, {SUMS.top_k} a token, one shared; the amateur is the model "
        "with one expert, of rank 2 or 1",
        "Data": "generated sums of two steps with worked solutions; texts are the solutions",
        "Training": f"2,400 steps of 24, then {TUNE_STEPS} of 24, AdamW 2e-4, alpha 0.2, beta 0.4",
    },
    seeds=5,
)  # fmt: skip


# -------------------------------------------------------------------------------------------- ProX

BOILERPLATE = (
    "Home | About | Contact | Log in | Help", "Click here to subscribe to our newsletter!",
    "Copyright 2024. All rights reserved.", "This site uses cookies. Accept | Decline | More",
    "========================================", "1234 5678 90 :: 11/22/33 44-55-66 :: 7",
    "Share: http://example.org/share?id=99182&ref=top http://example.org/x",
)  # fmt: skip
SPOILED = 0.5
PROX_TEXT = 419_575  # Bytes: what Python 3.11's reference has.


def spoiled(text: str, draw: random.Random) -> str:
    """Behind half of the lines comes one that is no text of anybody."""
    lines = []
    for line in text.split("\n"):
        lines.append(line)
        if draw.random() < SPOILED:
            lines.append(draw.choice(BOILERPLATE))
    return "\n".join(lines)


def refining(seed: int, name: str = "reference") -> Rows:
    """Returns rows for the same number of bytes of a text as it was, spoiled, and refined."""
    (clean,) = load_domains((name,))
    text = bytes(clean.train[:PROX_TEXT].tolist()).decode("utf-8", "ignore")
    documents = prox.chunks(spoiled(text, random.Random(seed)), 400)
    rules = prox.refine(documents, prox.document_program, prox.chunk_program, words=400)
    # As a model would that writes a wrong line in every program: fallbacks are at work.
    wrong = prox.refine(
        documents, None, lambda t: prox.chunk_program(t) + "\nremove_lines(9999, 9999)", words=400
    )
    texts = {
        "as it was": text, "spoiled": "\n".join(documents), "refined": "\n".join(rules),
        "refined, an error in each program": "\n".join(wrong),
    }  # fmt: skip
    recipe = Recipe(
        steps=steps_of(500), batch=12, length=BYTES, rate=3e-3, heldout_batches=1, warmup=20
    )
    rows: Rows = {}
    for arm, found in texts.items():
        data = torch.frombuffer(bytearray(found.encode()), dtype=torch.uint8)
        domain = dataclasses.replace(clean, train=data)
        model = train(lambda: Llama(llama(64, 2)), [domain], recipe, seed).model
        kept = fmean(float(line in found) for line in text.split("\n")[::50] if line.strip())
        rows[arm] = {
            "loss": heldout(model, clean),
            "lines kept": kept,
            "boilerplate left": sum(found.count(b) for b in BOILERPLATE)
            / max(1, sum(texts["spoiled"].count(b) for b in BOILERPLATE)),
        }
    return rows


def prox_study(
    name: str, size: str, of: str, keys: tuple[str, str], perform: Callable[[int], Rows]
) -> Study:
    return study(
        name, size, 61, 1.2, perform,
        [
            Hypothesis(
                "refined text gives a lower loss on clean text than spoiled text of as many bytes",
                ahead("refined", "spoiled", "loss"), NATS, key=keys[0],
            ),
            Hypothesis(
                "and at most 0.05 more than the text before it was spoiled",
                ahead("refined", "as it was", "loss"), NATS, 0.05, key=keys[1],
            ),
        ],
        {
            "Model": "H 64, 2 layers",
            "Data": f"bytes of {of}; behind half of its lines a menu, notice, link or rule; "
            "refined by rules that write programs",
            "Training": f"500 steps of 12 x {BYTES}, the same number for each text",
        },
        seeds=5,
    )  # fmt: skip


PROX = prox_study("prox", "ProX", "Python's language reference", ("prox", "clean"), refining)
# The rules take 16 % of the reference, tables and underlines, for noise; of this text 0.1 %.
PROX_PROSE = prox_study(
    "prox-prose", "ProX, prose", "the Brown corpus, as many as the reference has",
    ("prose", "prose clean"), partial(refining, name="brown"),
)  # fmt: skip

STUDIES = (TALKING, REASONER, PROX, PROX_PROSE)
