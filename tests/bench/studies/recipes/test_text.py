"""LightReasoner on models of the zoo, and ProX's programs."""

from __future__ import annotations

import pytest
import torch
from bench.studies.recipes import light_reasoner, prox, talking_models

from moe_ops import surgery, zoo


def small():
    torch.manual_seed(0)
    return zoo.create_model(
        "deepseek", vocab_size=11, hidden_size=16, num_layers=2, num_dense_layers=0, num_heads=2,
        head_size=8, latent=False, intermediate_size=8, num_experts=4, top_k=2,
        num_shared_experts=0, init_std=0.3, score_func="softmax", num_groups=1,
        num_topk_groups=1, group_score="max",
    )  # fmt: skip


# ----------------------------------------------------------------------------------- LightReasoner


def test_contrastive_target():
    expert = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    amateur = torch.tensor([0.5, 0.1, 0.2, 0.2]).log()
    target = light_reasoner.contrastive_target(expert, amateur, 0.3)
    # 0.3 * 0.5 = 0.15 is the least that counts.
    ratio = torch.tensor([0.5 / 0.5, 0.3 / 0.1, 0.15 / 0.2, 0.0])
    torch.testing.assert_close(target, ratio / ratio.sum())
    kl = sum(p * (p / q).log() for p, q in zip(expert.exp(), amateur.exp(), strict=True))
    torch.testing.assert_close(light_reasoner.divergence(expert, amateur), kl)
    with pytest.raises(ValueError, match=r"in \(0, 1\], got 0"):
        light_reasoner.contrastive_target(expert, amateur, 0)


def test_lesson_of_weaker_routing():
    model = small()
    tokens = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(0))

    def weak():
        return surgery.override_routing(model, surgery.rules.rank(2), renormalize=True)

    counted = torch.ones(3, 8, dtype=torch.bool)
    counted[:, :2] = False
    lesson = light_reasoner.make_lesson(model, tokens, weak, beta=1e-3, counted=counted)
    model.eval()
    with torch.no_grad():
        strong = model(tokens)
        with weak():
            other = model(tokens)
    assert not torch.allclose(strong, other)
    kl = light_reasoner.divergence(strong, other)
    torch.testing.assert_close(lesson.divergence, kl)
    assert torch.equal(lesson.mask, (kl > 1e-3) & counted)
    assert 0 < len(lesson.targets) == int(lesson.mask.sum()) <= 18
    torch.testing.assert_close(
        lesson.targets, light_reasoner.contrastive_target(strong, other)[lesson.mask]
    )
    loss = light_reasoner.lesson_loss(model, lesson)
    log_p = model(tokens).log_softmax(-1)[lesson.mask]
    wanted = torch.nn.functional.kl_div(log_p, lesson.targets, reduction="batchmean")
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    step = torch.optim.SGD(model.parameters(), lr=0.01)
    step.step()
    assert light_reasoner.lesson_loss(model, lesson) < loss


def test_lesson_of_another_model_may_be_empty():
    model, tokens = small(), torch.zeros(1, 4, dtype=torch.long)
    lesson = light_reasoner.make_lesson(model, tokens, small().eval())
    assert not lesson.mask.any() and model.training
    loss = light_reasoner.lesson_loss(model, lesson)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_layers_of_a_language_model():
    model = small().eval()
    tokens = torch.randint(11, (2, 5))
    lower = talking_models.layers_of(model, 0, 1)(model.embed_tokens(tokens))
    top = talking_models.layers_of(model, 1)(lower)
    with torch.no_grad():
        torch.testing.assert_close(model._head(model.norm(top)), model(tokens))
    talking_models.frozen(model)
    state = lower.detach().requires_grad_()
    talking_models.layers_of(model, 1)(state).sum().backward()
    assert bool(state.grad.abs().sum() > 0)
    assert all(p.grad is None for p in model.parameters())


# -------------------------------------------------------------------------------------------- ProX

WORDS = "one two three four five six seven eight nine ten eleven twelve"
TEXT = f"menu | home | about\n{WORDS}\nsee http://x.y/z for more\n{WORDS}"


def run(*lines):
    return prox.execute(TEXT, "\n".join(lines))


def test_programs():
    removed = run("remove_lines(0, 0)", "normalize('http://x.y/z', '')")
    assert removed.text == "\n".join([WORDS, "see  for more", WORDS]) and not removed.errors
    # Numbers are of the chunk as it was.
    assert run("remove_lines(0, 0)", "remove_lines(2, 2)").text == f"{WORDS}\n{WORDS}"
    assert run("keep_all()") == prox.Refined(TEXT, 0, False)
    assert run("drop_doc()").text is None
    # Commas and quotes inside of a text are not where arguments end.
    comma = prox.execute(f"a, b\n{WORDS}", 'normalize("a, b", "it\'s")')
    assert comma.text == f"it's\n{WORDS}"


def test_fallbacks():
    one = run("remove_lines(0, 0)", "remove_lines(7, 9)")
    assert one.errors == 1 and one.text.startswith("one") and not one.kept
    two = run("remove_lines(0, 0)", "remove_lines(7, 9)", "normalize('absent', 'x')")
    assert two == prox.Refined(TEXT, 2, True)
    assert run("drop_doc()", "what", "is this").text == TEXT
    assert run("remove_lines(1, 3)").text is None  # Five words are left.
    long = "\n".join([WORDS] * 30)
    assert prox.execute(long, "remove_lines(0, 28)").text is None  # 12 of 360.
    assert prox.execute(long, "remove_lines(0, 27)").text == f"{WORDS}\n{WORDS}"


@pytest.mark.parametrize(
    "line",
    ["remove_lines(1)", "remove_lines('0', '1')", "remove_lines(True, 1)", "import os",
     "__import__('os')", "os.remove('x')", "normalize('a', other)", "keep_all(1)",
     "remove_lines(first=0, last=1)", "remove_lines(0, 1) or 2", "(" * 200, "remove_lines(-1, 0)"],
)  # fmt: skip
def test_what_is_no_operation(line):
    assert run(line).errors == 1 and run(line).text == TEXT


def test_chunks_and_refine():
    text = "\n".join(["a b c", "d e", "f", "g h i j k l m", "", "n"])
    pieces = prox.chunks(text, 5)
    assert pieces == ["a b c\nd e", "f", "g h i j k l m", "\nn"]
    assert "\n".join(pieces) == text and prox.chunks("", 5) == [""]
    assert prox.numbered("a\nb") == "[000] a\n[001] b"
    noise = "=== 12 34 ==== 99 ---- 77"
    documents = [f"{WORDS}\n{noise}\n{WORDS}", "1 2 3 4 5 6", WORDS]
    refined = prox.refine(documents, prox.document_program, prox.chunk_program)
    assert refined == [f"{WORDS}\n{WORDS}", WORDS]
    assert prox.refine(documents) == documents


def test_rules():
    text = "\n".join([
        WORDS, "Home | About | Contact | Log in", "12 :: 34 :: 56", "again", "again", "again",
        f"look at https://a.b/c ======== {WORDS}",
    ])  # fmt: skip
    program = prox.chunk_program(text)
    refined = prox.execute(text, program)
    assert refined.errors == 0 and refined.text == f"{WORDS}\nlook at   {WORDS}"
    assert prox.chunk_program(WORDS) == "keep_all()"
