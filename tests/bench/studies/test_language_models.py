"""The experiments: they run, their arms are comparable, and what they say is computed."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from bench.studies import coe, deepseek, jetmoe, moduleformer, page, queue, registry, topp
from bench.studies.picture import Picture
from bench.studies.report import Claim, Report
from bench.studies.study import Experiment, Run, Study
from bench.studies.text import Domain, heldout_batches, load_domains, train_batches
from bench.studies.training import Recipe, evaluate, thinned, train

from moe_ops.layers import Router
from moe_ops.zoo.deepseek import DeepSeek
from moe_ops.zoo.jetmoe import JetMoE, JetMoEConfig
from moe_ops.zoo.topp import TopP

RECIPE = Recipe(steps=3, batch=4, length=16, heldout_batches=2)
TEXT = ("reference", "code")


@pytest.fixture(autouse=True)
def no_scripture(monkeypatch):
    """Runs of studies read two domains, which every machine has."""
    for module in ("training", "moduleformer", "coe", "topp"):
        monkeypatch.setattr(f"bench.studies.{module}.load_domains.__defaults__", (TEXT,))


def report_of(study: Study, seeds=(10, 11)) -> Report:
    """Returns a report of runs of these seeds."""
    runs = {
        name: {str(seed): {**job(seed, Run()), "seconds": 1.0} for seed in seeds}
        for name, job in study.runs.items()
    }
    stored = json.loads(json.dumps({"machine": "this", "fixed": study.fixed(), "runs": runs}))
    report = study.report(study.name.split("-")[0], stored)
    assert report is not None
    num_claims = len(study.hypotheses) + len(study.later)
    assert [len(claim.differences) for claim in report.claims] == [2] * num_claims
    for picture in report.pictures:
        assert picture.series
    return report


def test_domains():
    domains = load_domains((*TEXT, "maths"))
    assert [d.name for d in domains] == ["reference", "code", "maths"]
    for d in domains:
        assert len(d.train) > 300_000
        assert len(d.heldout) == pytest.approx(len(d.train) / 9, rel=0.01)


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    line = {"a": {"x": [1, 2], "y": [3.0, 4.0], "error": [0.1, 0.2]}}
    sizes = {
        "a": {"x": ["small", "large"], "y": [-3.0, 4.0], "error": [0.1, 0.2]},
        "b": {"x": ["large"], "y": [1.0], "error": [0.1]},
    }
    bars = {n: {"x": ["left", "right"], "y": [1.0, 2.0], "error": [0.1, 0.2]} for n in "ab"}
    pictures = [
        Picture("l", "Lines", "x", "y", "lines", line),
        Picture("t", "By size", "", "y", "intervals", sizes),
        Picture("p", "Points", "x", "y", "points", {"a": {"x": [1, 2], "y": [3, 4]}}),
        Picture("b", "Bars", "x", "y", "bars", bars),
        Picture("h", "Map", "x", "y", "heatmap", {"": {"x": ["u"], "y": ["v"], "z": [[0.5]]}}),
    ]
    claims = [Claim("a is below b", [-1.0, -1.1, -0.9], "nats")]
    report = Report("jetmoe", {"Data": "none"}, ["loss"], {"a": [(1.0,)]}, claims, pictures)
    assert "| a is below b | -1 (-1.25 to -0.752) nats | 3 | < 0 | shown (3 seeds) |" in (
        report.markdown()
    )
    for picture in report.pictures:
        picture.draw(tmp_path / "first.svg")
        picture.draw(tmp_path / "second.svg")
        drawn = (tmp_path / "first.svg").read_bytes()
        assert b"</svg>" in drawn and drawn == (tmp_path / "second.svg").read_bytes()


def test_pictures_refuse_what_cannot_be_drawn():
    data = {"a": {"x": [1], "y": [1, 2]}}
    with pytest.raises(ValueError, match="equally long, got 1 and 2"):
        Picture("n", "t", "x", "y", "lines", data)
    with pytest.raises(ValueError, match=r"kind must be one of lines, .*, got 'pie'"):
        Picture("n", "t", "x", "y", "pie", data)
    with pytest.raises(ValueError, match="must have a series, got none"):
        Picture("n", "t", "x", "y", "bars", {})


def test_pictures_of_the_largest_study_that_is_done():
    studies = [
        Study("s-1", "small", 1, {}, 2, 1.0, [], dict),
        Study("s-2", "large", 2, {}, 2, 1.0, [], dict),
        Study("s-3", "not run", 3, {}, 2, 1.0, [], dict),
    ]
    found = Experiment("s", studies, [])

    def of(y: float, seeds: int, *names: str) -> Report:
        pictures = [Picture(n, n, "", "", "lines", {"": {"x": [0], "y": [y]}}) for n in names]
        return Report("s", {}, [], {}, [Claim("", [1.0] * seeds, "")], pictures)

    def titles(*reports: Report | None) -> dict[str, float]:
        return {p.title: p.series[""]["y"][0] for p in page.last_pictures(found, reports)}

    assert titles(of(1.0, 2, "a", "b"), of(2.0, 2, "a"), None) == {"a (large)": 2.0, "b": 1.0}
    assert titles(of(1.0, 2, "a"), of(2.0, 1, "a", "c"), None) == {"a (small)": 1.0, "c": 2.0}


def test_pages_say_what_the_results_say(monkeypatch):
    """The text between the marks agrees with bench/studies/results, pictures apart."""
    # Pictures of films read them.
    monkeypatch.setattr(page, "last_pictures", lambda found, reports: [])
    for system in registry.NAMES:
        found = registry.experiment(system)
        made, trends = page.body(found)
        text = (page.PAGES / f"{system}.md").read_text("utf-8")
        lines = [line for line in text.splitlines() if not line.startswith("![")]
        between = lines[lines.index(page.BEGIN) + 1 : lines.index(page.END)]
        kept = [line for line in made.splitlines() if not line.startswith("![")]
        assert [x for x in between if x] == [x for x in kept if x], system
        for picture in trends:
            assert (page.PAGES / f"{system}-{picture.name}.svg").is_file()
        for name in re.findall(r"^!\[.*\]\((.*)\)$", text, re.MULTILINE):
            assert (page.PAGES / name).is_file(), name
        row = f"| [{system}](zoo/{system}.md) | {' | '.join(page.cells(found))} |"
        assert row in page.OVERVIEW.read_text("utf-8")


def test_stored_runs_are_of_the_plans_that_there_are():
    for path in queue.RESULTS.glob("*.json"):
        store = queue.Store(registry.study(path.stem))  # Refuses another plan.
        for run, found in store.data["runs"].items():
            assert run in store.study.runs
            assert {int(seed) for seed in found} <= set(store.study.numbers)


def test_batches_depend_on_the_seed_alone():
    domains = [Domain(n, torch.arange(200, dtype=torch.uint8), torch.zeros(99)) for n in "ab"]
    a, b, c = (list(train_batches(domains, 3, 4, 16, seed)) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], c[0]) and a[0].shape == (4, 17)
    assert bool((a[0].diff(dim=1) == 1).all())
    held = heldout_batches(domains[0], 2, 3, 16)
    assert [h.shape for h in held] == [(3, 17), (3, 17)]


def test_sums_are_right():
    lines = bytes(load_domains(["maths"])[0].heldout.tolist()).decode().splitlines()[1:-1]
    assert len(lines) > 2000 and len(set(lines)) > 0.99 * len(lines)
    for line in lines[:200]:
        first, last = line.split("? ")[1].split(" #")[0].split(" ")
        for step in (first, last):
            left, right = step.split("=")
            assert eval(left) == int(right)
        assert line.endswith(f" #{last.split('=')[1]}")


def test_thinned_curves():
    assert thinned([1.0, 3.0, 5.0, 7.0, 9.0], points=2) == [2.0, 6.0]
    assert thinned([1.0, 2.0], points=50) == [1.0, 2.0]


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
    domains = load_domains()
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
    report = report_of(jetmoe.study("jetmoe-tiny", "tiny", 1, 0.1, config, RECIPE))
    assert list(report.arms) == ["JetMoE", "dense", "no balance loss", "no z-loss"]
    differences = [a[0] - b[0] for a, b in zip(*list(report.arms.values())[:2], strict=True)]
    assert report.claims[0].differences == differences
    text = report.markdown()
    assert "active parameters" in text and "FLOPs a token" in text and "| dense |" in text
    assert report.arms["dense"][0][1] is None  # It has nothing to balance.


def test_deepseek_layouts_have_equal_experts():
    """Expert parameters, all and a token's, do not depend on how they are cut."""
    models = {n: DeepSeek(c) for n, c in deepseek.layouts(deepseek.BASE).items()}
    first = None
    for name, model in models.items():
        count = model.num_parameters()
        found = {kind: value - _routers(model) for kind, value in count.items()}
        first = first or found
        assert found == first, name


def test_deepseek_runs(monkeypatch):
    monkeypatch.setattr(deepseek, "MIXTURE_BATCHES", 2)
    base = dataclasses.replace(
        deepseek.BASE, hidden_size=32, num_layers=1, num_heads=2, head_size=16
    )
    made = ("deepseek-tiny", "tiny", 1, 0.1, RECIPE, 5)
    report = report_of(deepseek.layout_study(*made, {}, base, 32))
    assert len(report.arms) == 3 and len(report.claims) == 4
    report = report_of(deepseek.balance_study(*made, pooled=True, pilots={}, base=base, width=32))
    assert list(report.arms)[2] == deepseek.POOLED
    column = report.columns.index("MaxVio, training text")
    ratio = [
        a[column] / b[column]
        for a, b in zip(report.arms["balance by a loss"], report.arms[deepseek.POOLED], strict=True)
    ]
    assert report.claims[0].differences == ratio


def test_taking_experts_away_leaves_the_model_as_it_was():
    base = dataclasses.replace(deepseek.BASE, hidden_size=32, num_layers=2, num_heads=2)
    config = deepseek.layouts(base, 32)[deepseek.FINE]
    domains = load_domains()[:1]
    trained = train(lambda: DeepSeek(config), domains, RECIPE, seed=0)
    state = {name: t.clone() for name, t in trained.model.state_dict().items()}
    a = deepseek.loss_without_routed_expert(trained, domains, RECIPE, first=True)
    b = deepseek.loss_without_routed_expert(trained, domains, RECIPE, first=False)
    c = deepseek.loss_without_shared_expert(trained, domains, RECIPE)
    assert len({a, b, c, trained.loss}) == 4
    again = dict(trained.heldout)
    evaluate(trained, domains, RECIPE)
    assert trained.heldout == again
    assert all(torch.equal(t, state[n]) for n, t in trained.model.state_dict().items())


def test_a_routed_expert_that_is_taken_away_has_one_in_its_place():
    """Each token keeps as many experts; the one with the largest weight is gone."""
    base = dataclasses.replace(deepseek.BASE, hidden_size=32, num_layers=1, num_heads=2)
    model = DeepSeek(deepseek.layouts(base, 32)[deepseek.FINE])
    router = next(m for m in model.modules() if isinstance(m, Router))
    x = torch.randn(40, 32)
    with torch.no_grad():
        before = router(x)
        with deepseek.one_more_expert(model):
            more = router(x)
    assert router.top_k == before.topk_ids.shape[1] == more.topk_ids.shape[1] - 1
    order = more.topk_weights.argsort(dim=-1, descending=True, stable=True)
    ranked = more.topk_ids.gather(1, order)
    expected = before.topk_ids.gather(1, before.topk_weights.argsort(-1, descending=True))
    assert torch.equal(ranked[:, :-1], expected)


def test_coe_runs():
    arms = coe.arms_of(coe.BASE)
    per_token = {c.num_iterations * c.top_k for c in arms.values()}
    assert per_token == {4}  # Routed experts per token, in all arms.
    base = dataclasses.replace(
        coe.BASE, hidden_size=32, num_layers=1, kv_rank=16, intermediate_size=16
    )
    plan = coe.EXPERIMENT.studies[0].hypotheses
    study = coe.text_study("coe-tiny", "tiny", 1, 0.1, coe.arms_of(base), RECIPE, plan, TEXT)
    report = report_of(study)
    assert len(report.arms) == 5 and len(report.claims) == 4
    expected = [
        a[0] - b[0]
        for a, b in zip(report.arms[coe.PUBLISHED_TWO], report.arms[coe.PUBLISHED_ONE], strict=True)
    ]
    assert report.claims[1].differences == expected
    assert "6 expert calls a token" in report.markdown()


def test_look_ups_are_learned_and_resumed(tmp_path):
    task = coe.LookUps(
        symbols=4, tables=2, hidden_size=32, intermediate_size=16, steps=24, batch=32
    )
    found = coe.look_up("two layers, one iteration of 4", task)(10, Run())
    assert len(found["looks"]) == task.looks and found["looks"][-1] < found["looks"][0]
    study = coe.look_up_study("coe-tiny", "tiny", 1, 0.1, task)
    report = report_of(study, seeds=(10, 11))
    assert list(report.arms) == list(coe.CHAINS)

    class Cut(Run):
        def step(self, done, total, state):
            self._saved = -1e9
            super().step(done, total, state)
            if done == 13:
                raise KeyboardInterrupt

    arm = "two of 2, one gate"
    with pytest.raises(KeyboardInterrupt):
        study.runs[arm](10, Cut(tmp_path / "run.pt"))
    assert study.runs[arm](10, Run(tmp_path / "run.pt")) == study.runs[arm](10, Run())


def test_topp_runs():
    base = dataclasses.replace(topp.BASE, hidden_size=32, num_layers=2, intermediate_size=16)
    same = [
        {name: p.shape for name, p in model.named_parameters()}
        for model in (DeepSeek(topp.top_two(base)), TopP(base))
    ]
    assert same[0] == same[1]
    made = ("topp-tiny", "tiny", 1, 0.1, base, RECIPE)
    report = report_of(topp.study(*made, domains=TEXT))
    column = report.columns.index(topp.EXPERTS)
    assert [row[column] for row in report.arms["top-2"]] == [2.0, 2.0]
    assert [row[column] for row in report.arms["top-p"]] == report.claims[0].differences
    report = report_of(topp.study(*made, domains=TEXT, target=1.5, fewer=1.6))
    assert list(report.arms) == ["top-2", "top-p"]
    assert "moved so that 1.5 experts are used" in report.markdown()


def test_rank_correlation():
    a = torch.tensor([1.0, 2.0, 2.0, 5.0])  # Ranks 1, 2.5, 2.5, 4.
    assert topp.rank_correlation(a, a.exp()) == pytest.approx(1)
    assert topp.rank_correlation(a, -a) == pytest.approx(-1)
    assert topp.rank_correlation(a, torch.ones(4)) == 0
    b = torch.tensor([1.0, 3.0, 2.0, 4.0])  # Ranks 1, 3, 2, 4.
    expected = torch.corrcoef(torch.tensor([[1, 2.5, 2.5, 4], [1, 3, 2, 4]]))[0, 1]
    assert topp.rank_correlation(a, b) == pytest.approx(float(expected), rel=1e-6)


def test_moduleformer_runs():
    base = dataclasses.replace(
        moduleformer.BASE, hidden_size=32, num_layers=1, attention_size=16, intermediate_size=16
    )
    report = report_of(moduleformer.study("moduleformer-tiny", "tiny", 1, 0.1, base, RECIPE))
    assert len(report.arms) == 6 and len(report.claims) == 4
    columns = list(report.columns)
    for row in report.arms["concentrated"]:
        assert 0 <= row[columns.index("pruned")] <= 1
    assert all(r[columns.index("forgotten")] is not None for r in report.arms["all parameters"])
    assert "| added experts |" in report.markdown()


def test_information(monkeypatch):
    """Experts that know the domain tell its entropy; experts that do not tell nothing."""

    def fixed(rows):
        given = iter(rows)
        monkeypatch.setattr(
            moduleformer,
            "expert_frequencies",
            lambda model, batches: {"a": torch.tensor(next(given))},
        )

    domains = load_domains()[:2]
    fixed([[2.0, 0.0], [0.0, 2.0]])
    told = moduleformer.layer_information(None, domains, RECIPE)
    assert told == {"a": pytest.approx(0.6931, abs=1e-4)}
    fixed([[1.5, 0.5], [1.5, 0.5]])
    nothing = moduleformer.layer_information(None, domains, RECIPE)
    assert nothing == {"a": pytest.approx(0, abs=1e-7)}


def test_allowed_share():
    cuts = [(0.0, 0.0), (0.2, 0.009), (0.3, 0.02), (0.5, -0.001), (0.6, 0.5)]
    assert moduleformer.allowed_share(cuts) == 0.5
    assert moduleformer.allowed_share([(0.4, 0.2)]) == 0
