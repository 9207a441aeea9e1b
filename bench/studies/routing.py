"""Ways of routing that users ask for: balance by quantiles, gradients of all experts, experts of
one neuron, blocks that tokens pass by, and mixtures of tokens.

All are put into small language models of the same trunk, but for mixtures of tokens, which see all
of a sequence: those fill in bytes that are hidden. What is compared has the same multiplications
per token, or, where that is said, the same in the whole training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops import rotary
from moe_ops.layers import (
    PEER,
    Experts,
    MixtureOfDepths,
    MoE,
    SharedExperts,
    SoftMoE,
    TopKRouter,
    load_balancing_loss,
    update_expert_bias,
)
from moe_ops.layers.rotary import Rope
from moe_ops.layers.self_attention import causal_attention
from moe_ops.zoo.llama import Llama, LlamaBlock, LlamaConfig
from moe_ops.zoo.lm.blocks import Step
from moe_ops.zoo.lm.model import LMLoss

from .study import Experiment, Headline, Hypothesis, Job, Run, Study
from .text import heldout_batches, load_domains, train_batches
from .trainer import take_steps
from .training import (
    DrawnTraining,
    Recipe,
    mean_violation,
    setting,
    step_violation,
    thinned,
    train,
)

CONFIG = LlamaConfig(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=4, head_size=16)
H, WIDTH = CONFIG.hidden_size, CONFIG.intermediate_size
RECIPE = Recipe(steps=500, batch=9, rate=3e-3)
BALANCE = {"load_balancing": 0.01}
EARLY = 100  # steps
DOMAINS = ("reference", "code", "maths")  # which need no package
DENSE = "dense"

Make = Callable[[], Any]


class Mixed(Llama):
    """A Llama whose feed-forward parts are what `make` makes. Layers of experts of one neuron keep
    their own first weights, which are no matrices."""

    def __init__(self, config: LlamaConfig, make: Make) -> None:
        self._make = make
        super().__init__(config)

    def make_mlp(self, config: Any) -> Any:
        return self._make()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for module in self.modules():
            if isinstance(module, PEER):
                module.reset_parameters()


def routed(experts: int, top_k: int, gradient: str = "topk", **router: Any) -> MoE:
    """Experts of which a token uses as many neurons as the dense network has."""
    bank = Experts(experts, H, WIDTH // top_k)
    return MoE(TopKRouter(H, experts, top_k, **router), bank, router_gradient=gradient)


class Retrieval(SharedExperts):
    """PEER as a block knows it: a network without a router that it could note."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.peer = PEER(H, 64**2, 16, num_heads=4, query_size=32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.peer(x)
        return y


# --- blocks that most tokens pass by


class Inner(nn.Module):
    """The part that a block adds to tokens [B, C, H] that stand at positions [B, C]."""

    def __init__(self, block: LlamaBlock, rope: Rope) -> None:
        super().__init__()
        self.block, self.rope = block, rope

    def forward(self, tokens: Tensor, *, positions: Tensor) -> Tensor:
        attention: Any = self.block.attention
        cos, sin = self.rope.at(positions)
        x = self.block.attention_norm(tokens)
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (p(x).unflatten(-1, (-1, attention.head_size)) for p in parts)
        y = causal_attention(rotary(q, cos, sin), rotary(k, cos, sin), v)
        y = attention.o_proj(y.flatten(2))
        mlp: Any = self.block.mlp
        return y + mlp(self.block.mlp_norm(tokens + y))


class PassedBy(nn.Module):
    """A block of a language model in which tokens are chosen: in training by the whole sequence,
    afterwards by the predictor, which sees no later token."""

    def __init__(self, block: LlamaBlock, rope: Rope) -> None:
        super().__init__()
        self.layer = MixtureOfDepths(Inner(block, rope), H)
        self.predictor_loss: Tensor | None = None

    def forward(self, x: Tensor, step: Step, index: int) -> Tensor:
        out = self.layer(x, causal=not self.training, return_routing=True)
        self.predictor_loss = out.predictor_loss
        return out.y


class Depths(Llama):
    """Every other block is passed by."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        assert self.rope is not None
        for i in range(1, config.num_layers, 2):
            self.layers[i] = PassedBy(self.layers[i], self.rope)

    def loss(self, *args: Any, **kwargs: Any) -> LMLoss:
        out = super().loss(*args, **kwargs)
        extra = [b.predictor_loss for b in self.layers if isinstance(b, PassedBy)]
        return out._replace(loss=out.loss + sum(t for t in extra if t is not None))


def multiplications(config: LlamaConfig, length: int, passed_by: int = 0) -> float:
    """Returns the multiplications of a token's forward pass, `passed_by` of the blocks with an
    eighth of the tokens."""
    width = config.num_heads * config.head_size
    dense = 4 * config.hidden_size * width + 3 * config.hidden_size * config.intermediate_size
    block = dense + width * (length + 1)  # queries with keys, and weights with values
    short = (dense + width * (length / 8 + 1)) / 8 + 66 * config.hidden_size  # and the predictor
    whole = config.num_layers - passed_by
    return whole * block + passed_by * short + config.vocab_size * config.hidden_size


# --- runs


class Bias:
    """Moves the biases after each step."""

    def __init__(self, model: nn.Module, _: Any, *, rule: str, rate: float) -> None:
        self.model, self.rule, self.rate = model, rule, rate

    def after(self, step: int, out: LMLoss) -> None:
        update_expert_bias(self.model, rule=self.rule, rate=self.rate)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def job(
    arm: str, make: Make, recipe: Recipe, *, routes: bool = False, balance: bool = False,
    prepare: Any = None,
) -> Job:  # fmt: skip
    """A language model. routes: it has routers; balance: their loss is added."""

    def perform(seed: int, run: Run) -> dict[str, Any]:
        watch = step_violation if routes else None
        losses = BALANCE if balance else {}
        there = load_domains(DOMAINS)
        trained = train(
            make, there, recipe, seed, coefficients=losses, prepare=prepare, watch=watch, run=run
        )
        row: dict[str, float | None] = {"loss": trained.loss}
        if routes:
            row["MaxVio of early steps"] = fmean(trained.watched[:EARLY])
            row["MaxVio of late steps"] = fmean(trained.watched[-EARLY:])
            row["MaxVio, held out"] = mean_violation(trained.routing)
        kept = {"curve": thinned(trained.curve), "watched": thinned(trained.watched)}
        return {"rows": {arm: row}, "heldout": trained.heldout, **kept}

    return perform


def gap(
    statement: str, a: str, b: str, key: str = "", column: str = "loss", bound: float = 0.0,
    unit: str = "nats a byte",
) -> Hypothesis:  # fmt: skip
    return Hypothesis(statement, lambda r: r.gap(a, b, column), unit, bound=bound, key=key)


def described(models: Mapping[str, Make], recipe: Recipe, **more: str) -> dict[str, str]:
    found = setting(DOMAINS, recipe)
    found["Model"] = f"Llama's, H {H}, network of {WIDTH} where it is dense; {recipe.length} bytes"
    for arm, make in models.items():
        found[arm] = f"{sum(p.numel() for p in make().parameters()):,} parameters"
    return {**found, **more}


def balance_study(recipe: Recipe = RECIPE, experts: int = 32, top_k: int = 4) -> Study:
    by_loss, sign, quantile = "balance loss", "bias by signs", "bias by quantiles"
    early, late, unit = "MaxVio of early steps", "MaxVio of late steps", ""

    def made(**router: Any) -> Make:
        options = {"score_func": "sigmoid", "renormalize": True, **router}
        return partial(Mixed, CONFIG, partial(routed, experts, top_k, **options))

    models = {
        by_loss: made(),
        sign: made(expert_bias=True),
        quantile: made(expert_bias=True, bias_bins=1000),
    }
    runs = {
        by_loss: job(by_loss, models[by_loss], recipe, routes=True, balance=True),
        sign: job(
            sign, models[sign], recipe, routes=True, prepare=partial(Bias, rule="sign", rate=1e-2)
        ),
        quantile: job(
            quantile, models[quantile], recipe, routes=True,
            prepare=partial(Bias, rule="quantile", rate=1.0),
        ),
    }  # fmt: skip
    hypotheses = [
        gap("lower early MaxVio by quantiles than by signs", quantile, sign, "early", early,
            unit=unit),
        gap("and than by a loss", quantile, by_loss, "early loss", early, unit=unit),
        gap("lower late MaxVio than by signs", quantile, sign, "", late, unit=unit),
        gap("quantiles cost no loss (0.01)", quantile, sign, "cost", bound=0.01),
    ]  # fmt: skip
    settings = partial(
        described, models, recipe,
        Experts=f"{experts}, of which a token uses {top_k}; rates 0.01 of signs, 1 of quantiles",
    )  # fmt: skip
    return Study("routing-balance", "balance", 44, runs, 5, 0.4, hypotheses, settings)


def gradient_study(recipe: Recipe = RECIPE) -> Study:
    names = {"top-2": "topk", "top-2, gradients of all": "dense"}
    models = {
        arm: partial(Mixed, CONFIG, partial(routed, 16, 2, gradient, renormalize=True))
        for arm, gradient in names.items()
    }
    runs = {a: job(a, make, recipe, routes=True, balance=True) for a, make in models.items()}
    plain, dense = names
    hypotheses = [gap("lower loss with gradients of all experts", dense, plain, "densemixer")]
    settings = partial(described, models, recipe, Experts="16, of which a token uses 2")
    return Study("routing-gradient", "DenseMixer", 44, runs, 5, 0.4, hypotheses, settings)


def peer_study(recipe: Recipe = RECIPE) -> Study:
    peer = "PEER"
    models = {
        DENSE: partial(Llama, CONFIG),
        peer: partial(Mixed, CONFIG, Retrieval),
    }
    runs = {arm: job(arm, make, recipe) for arm, make in models.items()}
    hypotheses = [gap("lower loss with PEER than with a dense network", peer, DENSE, "peer")]
    settings = partial(
        described, models, recipe,
        Experts="4096 of one neuron, 4 heads of 16, queries of 32: as many multiplications a token "
        "as the dense network has",
    )  # fmt: skip
    return Study("routing-peer", "PEER", 44, runs, 5, 0.4, hypotheses, settings)


def depths_study(recipe: Recipe = RECIPE) -> Study:
    passed = "every other block passed by"
    config = dataclasses.replace(CONFIG, num_layers=4)
    costs = [multiplications(config, recipe.length, n) for n in (0, 2)]
    longer = dataclasses.replace(recipe, steps=round(recipe.steps * costs[0] / costs[1]))
    models: dict[str, Make] = {DENSE: partial(Llama, config), passed: partial(Depths, config)}
    runs = {
        DENSE: job(DENSE, models[DENSE], recipe),
        passed: job(passed, models[passed], longer),
    }
    hypotheses = [
        gap("lower loss when most tokens pass by every other block, at equal multiplications",
            passed, DENSE, "depths")
    ]  # fmt: skip
    settings = partial(
        described, models, recipe,
        Depths=f"4 blocks, an eighth of the tokens in two of them; {longer.steps} steps there; "
        "measured with the predictor's choice",
    )  # fmt: skip
    return Study("routing-depths", "MoD", 44, runs, 5, 0.7, hypotheses, settings)


# --- hidden bytes


MASK, SHARE = 256, 0.15


class Encoder(nn.Module):
    """Two blocks of attention that sees all of a sequence, and what follows it."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.rope = Rope(CONFIG.head_size)
        self.embedding = nn.Embedding(MASK + 1, H)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.RMSNorm(H), nn.Linear(H, 3 * H, bias=False),
                           nn.Linear(H, H, bias=False), nn.RMSNorm(H), make()])
            for _ in range(CONFIG.num_layers)
        )  # fmt: skip
        self.norm = nn.RMSNorm(H)
        self.head = nn.Linear(H, MASK)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S] to logits [B, S, 256] and the sum of balance losses."""
        x = self.embedding(tokens)
        cos, sin = self.rope.rotation(0, tokens.shape[1])
        balance = x.new_zeros(())
        for first, qkv, out, second, mlp in self.blocks:
            heads = qkv(first(x)).unflatten(-1, (3, CONFIG.num_heads, CONFIG.head_size))
            q, k, v = heads.unbind(2)
            q, k = rotary(q, cos, sin), rotary(k, cos, sin)
            y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
            x = x + out(y.transpose(1, 2).flatten(2))
            y = second(x)
            if isinstance(mlp, MoE):
                routing = mlp(y, return_routing=True)
                balance = balance + load_balancing_loss(routing.router_logits, routing.topk_ids)
                y = routing.y
            else:
                y = mlp(y)
            x = x + y
        return self.head(self.norm(x)), balance


def hidden_loss(model: Encoder, tokens: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the bytes that are hidden, and the balance losses."""
    hidden = torch.rand(tokens.shape, generator=draw) < SHARE
    logits, balance = model(tokens.masked_fill(hidden, MASK))
    return F.cross_entropy(logits[hidden], tokens[hidden].long()), balance


def fill_in(arm: str, make: Make, recipe: Recipe) -> Job:
    def perform(seed: int, run: Run) -> dict[str, Any]:
        torch.manual_seed(seed)
        model, there = Encoder(make), load_domains(DOMAINS)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.rate, betas=(0.9, 0.95),
            weight_decay=recipe.weight_decay,
        )  # fmt: skip
        draw = torch.Generator().manual_seed(seed)
        training = DrawnTraining(run, model, optimizer, draw, {"curve": []})
        batches = train_batches(there, recipe.steps, recipe.batch, recipe.length, seed)
        left = islice(batches, training.done, None)

        def loss(step: int) -> dict[str, Tensor]:
            missed, balance = hidden_loss(model, next(left)[:, :-1], draw)
            return {"loss": missed + BALANCE["load_balancing"] * balance, "missed": missed}

        def after(step: int, parts: Mapping[str, Tensor]) -> None:
            training.found["curve"].append(parts["missed"].item())
            training.done += 1
            run.step(training.done, recipe.steps, training.state)

        take_steps(
            optimizer,
            loss,
            range(training.done, recipe.steps),
            rate=recipe.rate_at,
            clip=(list(model.parameters()), recipe.clip),
            after=after,
        )
        model.eval()
        draw.manual_seed(0)
        found = {}
        with torch.no_grad():
            for domain in there:
                parts = heldout_batches(domain, recipe.heldout_batches, recipe.batch, recipe.length)
                found[domain.name] = fmean(
                    hidden_loss(model, t[:, :-1], draw)[0].item() for t in parts
                )
        row = {"loss": fmean(found.values())}
        curve = thinned(training.found["curve"])
        return {"rows": {arm: row}, "heldout": found, "curve": curve}

    return perform


def soft_study(recipe: Recipe = RECIPE, experts: int = 8) -> Study:
    top, soft = "top-1 of 8", "Soft MoE"
    slots = recipe.length // experts
    makes: dict[str, Make] = {
        DENSE: partial(SharedExperts, H, WIDTH),
        top: partial(routed, experts, 1),
        soft: lambda: SoftMoE(Experts(experts, H, WIDTH), slots_per_expert=slots),
    }
    runs = {arm: fill_in(arm, make, recipe) for arm, make in makes.items()}
    hypotheses = [
        gap("lower loss with mixtures of tokens than with top-1", soft, top, "soft"),
        gap("and than with a dense network", soft, DENSE, "soft dense"),
    ]
    models = {arm: partial(Encoder, make) for arm, make in makes.items()}
    settings = partial(
        described, models, recipe,
        Task=f"an encoder fills in {SHARE:.0%} of the bytes, which are hidden; {experts} experts, "
        f"as many rows of them as tokens ({slots} slots an expert and sequence)",
    )  # fmt: skip
    return Study("routing-soft", "Soft MoE", 44, runs, 5, 0.4, hypotheses, settings)


def headlines() -> Sequence[Headline]:
    said: list[tuple[str, str, str, str]] = [
        ("early", "balance by quantiles lowers early MaxVio below that of signs",
         "balanced within a few steps (Kimi)", "mechanism"),
        ("early loss", "and below that of a balance loss", "not compared", "mechanism"),
        ("cost", "at no loss (0.01)", "no cost", "cost"),
        ("densemixer", "gradients of all experts lower the loss",
         "better fine-tuning (DenseMixer)", "quality"),
        ("peer", "PEER has lower loss than a dense network of as many multiplications",
         "lower perplexity at equal FLOPs", "quality"),
        ("depths", "mixture of depths has lower loss at equal multiplications",
         "1.5 % lower at equal FLOPs", "quality"),
        ("soft", "Soft MoE has lower loss than top-1", "ahead of top-k on images", "quality"),
        ("soft dense", "and than a dense network", "ahead of dense on images", "quality"),
    ]  # fmt: skip
    return [Headline(*each) for each in said]


STUDIES = (balance_study, gradient_study, peer_study, depths_study, soft_study)
EXPERIMENT = Experiment("routing", [study() for study in STUDIES], headlines())
