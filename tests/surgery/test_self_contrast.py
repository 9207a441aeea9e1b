"""SCMoE: contrasted logits, and generation with two caches."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from moe_ops import zoo
from moe_ops.surgery import SelfContrastLogitsProcessor, override_routing
from moe_ops.surgery.rules import rank, top_k
from moe_ops.surgery.self_contrast import contrast

HF = bool(importlib.util.find_spec("transformers"))
NUM = 8


def ours():
    torch.manual_seed(0)
    return zoo.create_model("deepseek", num_layers=3, renormalize=True, init_std=0.2).eval()


def theirs(model_type: str):
    if not HF:
        pytest.skip("Needs transformers.")
    from tests.hf.models import build

    return build(model_type, "grouped_mm")


MODELS = ("zoo", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")


@pytest.fixture(params=MODELS)
def model(request):
    return ours() if request.param == "zoo" else theirs(request.param)


def prompt(batch: int = 2) -> torch.Tensor:
    return torch.randint(1, 60, (batch, 5), generator=torch.Generator().manual_seed(1))


def generate(model, tokens: torch.Tensor, processor=None, **options) -> torch.Tensor:
    if hasattr(model, "new_cache"):
        return model.generate(tokens, NUM, logits_processor=processor)
    options["logits_processor"] = [] if processor is None else [processor]
    return model.generate(tokens, max_new_tokens=NUM, do_sample=False, **options)


def logits_of(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(tokens)
    return (out if isinstance(out, torch.Tensor) else out.logits)[:, -1]


def test_contrast_by_hand():
    strong = torch.tensor([[2.0, 1.0, -0.5, -4.0]])
    weak = torch.tensor([[1.0, 3.0, -1.0, 2.0]])
    got = contrast(strong, weak, alpha=0.1, beta=0.5)  # log(0.1) = -2.3: two are left, and a third
    assert got.tolist() == [[2.5, 0.0, -math.inf, -math.inf]]
    got = contrast(strong, weak, alpha=0.05, beta=2.0)
    assert got.tolist() == [[4.0, -3.0, 0.5, -math.inf]]
    assert contrast(strong.bfloat16(), weak).dtype == torch.float32
    for options in ({"alpha": 0.0}, {"alpha": 1.1}, {"beta": -0.1}, {"beta": math.nan}):
        with pytest.raises(ValueError, match="must be"):
            contrast(strong, weak, **options)
        with pytest.raises(ValueError, match="must be"):
            SelfContrastLogitsProcessor(torch.nn.Identity(), **options)


def test_beta_0_and_alpha_1_are_greedy(model):
    tokens = prompt()
    want = generate(model, tokens)
    assert torch.equal(generate(model, tokens, SelfContrastLogitsProcessor(model, beta=0.0)), want)
    assert torch.equal(
        generate(model, tokens, SelfContrastLogitsProcessor(model, alpha=1.0, beta=5.0)), want
    )


def test_cached_is_uncached(model):
    """Generation with two caches against both passes over all tokens at every step; and again,
    with the processor that has been used."""
    tokens = prompt()
    processor = SelfContrastLogitsProcessor(model, rank(2), alpha=0.01, beta=3.0)
    want = tokens
    for _ in range(NUM):
        strong = logits_of(model, want)
        with override_routing(model, rank(2), renormalize=True):
            weak = logits_of(model, want)
        new = contrast(strong, weak, alpha=0.01, beta=3.0).argmax(-1, keepdim=True)
        want = torch.cat((want, new), 1)
    assert not torch.equal(want, generate(model, tokens))  # It makes a difference.
    for _ in range(2):
        assert torch.equal(generate(model, tokens, processor), want)
    other = tokens.flip(1)
    assert torch.equal(
        generate(model, other, processor), generate(model, other, SelfContrastLogitsProcessor(
            model, rank(2), alpha=0.01, beta=3.0))
    )  # fmt: skip


@pytest.mark.parametrize("rule", [rank(1), top_k(1)])
def test_rank_1_of_1_is_a_top_1_model(rule):
    model = ours()
    as_top_1 = zoo.create_model("deepseek", num_layers=3, renormalize=True, init_std=0.2, top_k=1)
    as_top_1.load_state_dict(model.state_dict())
    tokens = prompt()
    processor = SelfContrastLogitsProcessor(model, rule)
    for length in (3, 4, 5):
        got = processor.weak_logits(tokens[:, :length])
        torch.testing.assert_close(got, logits_of(as_top_1.eval(), tokens[:, :length]))


def test_prompts_padded_on_the_left():
    model = theirs("qwen3_moe")
    short, long = prompt(1)[:, :3], prompt(1)
    rows = torch.cat((torch.nn.functional.pad(short, (2, 0)), long))
    mask = (rows != 0).long()
    processor = SelfContrastLogitsProcessor(model, alpha=0.01, beta=3.0, attention_mask=mask)
    got = generate(model, rows, processor, attention_mask=mask)
    for row, alone in zip(got, (short, long), strict=True):
        want = generate(model, alone, SelfContrastLogitsProcessor(model, alpha=0.01, beta=3.0))
        assert torch.equal(row[-NUM:], want[0, -NUM:])


def test_drawing_keeps_to_considered_tokens():
    model = ours()
    tokens = prompt()
    drawn = model.generate(
        tokens,
        NUM,
        temperature=5.0,
        generator=torch.Generator().manual_seed(0),
        logits_processor=SelfContrastLogitsProcessor(model, alpha=0.5),
    )
    for step in range(NUM):
        length = tokens.shape[1] + step
        strong = logits_of(model, drawn[:, :length]).softmax(-1)
        chosen = strong.gather(1, drawn[:, length : length + 1])
        assert bool((chosen >= 0.5 * (1 - 1e-4) * strong.amax(-1, keepdim=True)).all())
