"""The experiments: they run, their arms are comparable, and what they say is computed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bench.experiments import coe, deepseek, jetmoe, moduleformer, page, topp
from bench.experiments.picture import Picture
from bench.experiments.report import Claim, Report
from bench.experiments.text import Domain, heldout_batches, load_domains, train_batches
from bench.experiments.training import Recipe, evaluate, train

from moe_ops.layers import Router
from moe_ops.zoo.deepseek import DeepSeek
from moe_ops.zoo.jetmoe import JetMoE, JetMoEConfig
from moe_ops.zoo.topp import TopP

RECIPE = Recipe(steps=3, batch=4, length=16, heldout_batches=2)


def test_domains():
    domains = load_domains()
    assert [d.name for d in domains][:2] == ["reference", "code"]
    for d in domains:
        assert len(d.train) > 300_000
        assert len(d.heldout) == pytest.approx(len(d.train) / 9, rel=0.01)


def test_pages_are_made_from_what_was_saved(tmp_path):
    pytest.importorskip("matplotlib")
    line = {"a": {"x": [1, 2], "y": [3.0, 4.0], "error": [0.1, 0.2]}}
    bars = {n: {"x": ["left", "right"], "y": [1.0, 2.0], "error": [0.1, 0.2]} for n in "ab"}
    pictures = [
        Picture("l", "Lines", "x", "y", "lines", line),
        Picture("p", "Points", "x", "y", "points", {"a": {"x": [1, 2], "y": [3, 4]}}),
        Picture("b", "Bars", "x", "y", "bars", bars),
        Picture("h", "Map", "x", "y", "heatmap", {"": {"x": ["u"], "y": ["v"], "z": [[0.5]]}}),
    ]
    claims = [Claim("a is below b", [-1.0, -1.1, -0.9], "nats")]
    report = Report("jetmoe", {"Data": "none"}, ["loss"], {"a": [(1.0,)]}, claims, pictures)
    with pytest.raises(ValueError, match="must have one line"):
        page.save(report, tmp_path / "results", tmp_path)
    (tmp_path / "jetmoe.md").write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    written = page.save(report, tmp_path / "results", tmp_path)
    assert [p.name for p in written] == [
        "jetmoe.json", "jetmoe.md", *(f"jetmoe-{n}.svg" for n in "lpbh"),
    ]  # fmt: skip
    first = {p.name: p.read_bytes() for p in written}
    text = first["jetmoe.md"].decode()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "-1 ± 0.058 nats | < 0 | shown |" in text and "![Bars](jetmoe-b.svg)" in text
    again = page.load("jetmoe", tmp_path / "results")
    page.write_page(again, tmp_path)
    assert {p.name: p.read_bytes() for p in written} == first


def test_pictures_refuse_what_cannot_be_drawn():
    data = {"a": {"x": [1], "y": [1, 2]}}
    with pytest.raises(ValueError, match="equally long, got 1 and 2"):
        Picture("n", "t", "x", "y", "lines", data)
    with pytest.raises(ValueError, match=r"kind must be one of lines, .*, got 'pie'"):
        Picture("n", "t", "x", "y", "pie", data)
    with pytest.raises(ValueError, match="must have a series, got none"):
        Picture("n", "t", "x", "y", "bars", {})


def test_saved_runs_have_pages_that_say_the_same(tmp_path):
    """What the pages show is what bench/experiments/results holds."""
    for path in sorted(page.RESULTS.glob("*.json")):
        report = page.load(path.stem)
        assert report.system == path.stem
        assert report.markdown().rstrip() in (page.PAGES / f"{path.stem}.md").read_text("utf-8")
        for picture in report.pictures:
            assert (page.PAGES / f"{path.stem}-{picture.name}.svg").is_file()
        seeds = {len(c.differences) for c in report.claims}
        assert seeds and min(seeds) >= 3, path.stem


def test_batches_depend_on_the_seed_alone():
    domains = [Domain(n, torch.arange(200, dtype=torch.uint8), torch.zeros(99)) for n in "ab"]
    a, b, c = (list(train_batches(domains, 3, 4, 16, seed)) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], c[0]) and a[0].shape == (4, 17)
    assert bool((a[0].diff(dim=1) == 1).all())
    held = heldout_batches(domains[0], 2, 3, 16)
    assert [h.shape for h in held] == [(3, 17), (3, 17)]


def test_rates():
    recipe = Recipe(steps=100, warmup=10, rate=1.0)
    assert recipe.rate_at(0) == pytest.approx(0.1) and recipe.rate_at(9) == pytest.approx(1.0)
    assert recipe.rate_at(100) == pytest.approx(0.1)
    assert recipe.rate_at(55) == pytest.approx(0.55)


def _routers(model: torch.nn.Module) -> int:
    return sum(r.weight.numel() for r in model.modules() if isinstance(r, Router))


def test_dense_has_the_active_parameters():
    sparse, plain = JetMoE(jetmoe.CONFIG), JetMoE(jetmoe.dense(jetmoe.CONFIG))
    a, b = ({**m.num_parameters(), "routers": _routers(m)} for m in (sparse, plain))
    assert b["active"] == b["total"]
    # The routers are all that the sparse one has more of.
    assert a["active"] - a["routers"] == b["active"] - b["routers"]
    with pytest.raises(ValueError, match="must be even, got 3"):
        jetmoe.dense(JetMoEConfig(num_kv_heads=1, top_k=2))


def test_evaluation_is_the_mean_over_held_out_text():
    domains = load_domains()[:2]
    trained = train(lambda: JetMoE(JetMoEConfig.tiny()), domains, RECIPE, seed=0)
    assert len(trained.curve) == 3 and trained.routing.layers == [
        f"layers.{i}.{kind}" for i in (0, 1) for kind in ("attention", "mlp")
    ]
    before = dict(trained.heldout)
    evaluate(trained, domains, RECIPE)
    assert trained.heldout == before
    tokens = torch.cat(heldout_batches(domains[1], 2, 4, 16))
    with torch.no_grad():
        expected = trained.model.loss(tokens).cross_entropy
    assert trained.heldout["code"] == pytest.approx(float(expected), rel=1e-5)


def test_jetmoe_runs():
    config = dataclasses.replace(JetMoEConfig.tiny(), num_layers=1)
    lines = []
    report = jetmoe.run(range(2), lines.append, config, RECIPE)
    assert len(lines) == 8 and list(report.arms) == [
        "JetMoE", "dense", "no balance loss", "no z-loss",
    ]  # fmt: skip
    differences = [a[0] - b[0] for a, b in zip(*list(report.arms.values())[:2], strict=True)]
    assert report.claims[0].differences == differences
    text = report.markdown()
    assert "active parameters" in text and "FLOPs a token" in text and "| dense |" in text
    assert all(c.verdict() in ("shown", "not shown at this size") for c in report.claims)


def test_deepseek_layouts_have_equal_experts():
    """Expert parameters, all and a token's, do not depend on how they are cut."""
    models = {n: DeepSeek(c) for n, c in deepseek.layouts(deepseek.BASE).items()}
    first = None
    for name, model in models.items():
        count = model.num_parameters()
        found = {kind: value - _routers(model) for kind, value in count.items()}
        first = first or found
        assert found == first, name


def test_deepseek_runs():
    base = dataclasses.replace(
        deepseek.BASE, hidden_size=32, num_layers=1, num_heads=2, head_size=16
    )
    lines = []
    report = deepseek.run(range(2), lines.append, base, RECIPE, width=32)
    assert len(lines) == 10 and len(report.arms) == 5 and len(report.claims) == 5
    assert all(len(c.differences) == 2 for c in report.claims)
    assert "| balance by a bias |" in report.markdown()


def test_taking_experts_away_leaves_the_model_as_it_was():
    base = dataclasses.replace(deepseek.BASE, hidden_size=32, num_layers=2, num_heads=2)
    config = deepseek.layouts(base, 32)["31 + 1 shared, quarter width"]
    domains = load_domains()[:1]
    trained = train(lambda: DeepSeek(config), domains, RECIPE, seed=0)
    state = {name: t.clone() for name, t in trained.model.state_dict().items()}
    a = deepseek.loss_without_first_expert(trained, domains, RECIPE)
    b = deepseek.loss_without_shared_expert(trained, domains, RECIPE)
    assert len({a, b, trained.loss}) == 3
    again = dict(trained.heldout)
    evaluate(trained, domains, RECIPE)
    assert trained.heldout == again
    assert all(torch.equal(t, state[n]) for n, t in trained.model.state_dict().items())


def test_coe_runs():
    arms = coe.arms_of(coe.BASE)
    per_token = {c.num_iterations * c.top_k for c in arms.values()}
    assert per_token == {4}  # Routed experts a token, in all arms.
    base = dataclasses.replace(
        coe.BASE, hidden_size=32, num_layers=1, kv_rank=16, intermediate_size=16
    )
    lines = []
    report = coe.run(range(2), lines.append, base, RECIPE)
    assert len(lines) == 10 and len(report.arms) == 5 and len(report.claims) == 4
    rows = report.arms
    expected = [
        a[0] - b[0]
        for a, b in zip(
            rows["two iterations, published residual"],
            rows["one iteration, published residual"],
            strict=True,
        )
    ]
    assert report.claims[1].differences == expected
    assert "6 expert calls a token" in report.markdown()


def test_topp_runs():
    base = dataclasses.replace(topp.BASE, hidden_size=32, num_layers=2, intermediate_size=16)
    same = [
        {name: p.shape for name, p in model.named_parameters()}
        for model in (DeepSeek(topp.top_two(base)), TopP(base))
    ]
    assert same[0] == same[1]
    lines = []
    report = topp.run(range(2), lines.append, base, RECIPE)
    assert len(lines) == 6 and len(report.claims) == 4
    assert [row[1] for row in report.arms["top-2"]] == [2.0, 2.0]
    assert [row[1] for row in report.arms["top-p"]] == report.claims[0].differences


def test_rank_correlation():
    a = torch.tensor([1.0, 2.0, 2.0, 5.0])  # Ranks 1, 2.5, 2.5, 4.
    assert topp.rank_correlation(a, a.exp()) == pytest.approx(1)
    assert topp.rank_correlation(a, -a) == pytest.approx(-1)
    b = torch.tensor([1.0, 3.0, 2.0, 4.0])  # Ranks 1, 3, 2, 4.
    expected = torch.corrcoef(torch.tensor([[1, 2.5, 2.5, 4], [1, 3, 2, 4]]))[0, 1]
    assert topp.rank_correlation(a, b) == pytest.approx(float(expected), rel=1e-6)


def test_moduleformer_runs():
    base = dataclasses.replace(
        moduleformer.BASE, hidden_size=32, num_layers=1, attention_size=16, intermediate_size=16
    )
    lines = []
    report = moduleformer.run(range(2), lines.append, base, RECIPE)
    assert len(lines) == 12 and len(report.arms) == 6 and len(report.claims) == 4
    for row in report.arms["concentrated"]:
        assert 0 <= row[2] <= 1
    assert all(row[3] is not None for row in report.arms["all parameters"])
    assert "| added experts |" in report.markdown()


def test_information():
    """Experts that know the domain tell its entropy; experts that do not tell nothing."""

    class Fixed:
        def __init__(self, rows):
            self.rows = iter(rows)

        def expert_frequencies(self, batches):
            return {"a": torch.tensor(next(self.rows))}

    domains = load_domains()[:2]
    told = moduleformer.layer_information(Fixed([[2.0, 0.0], [0.0, 2.0]]), domains, RECIPE)
    assert told == {"a": pytest.approx(0.6931, abs=1e-4)}
    nothing = moduleformer.layer_information(Fixed([[1.5, 0.5], [1.5, 0.5]]), domains, RECIPE)
    assert nothing == {"a": pytest.approx(0, abs=1e-7)}


def test_allowed_share():
    cuts = [(0.0, 0.0), (0.2, 0.009), (0.3, 0.02), (0.5, -0.001), (0.6, 0.5)]
    assert moduleformer.allowed_share(cuts) == 0.5
    assert moduleformer.allowed_share([(0.4, 0.2)]) == 0
