"""Studies and their queue: the plan is fixed, a run that is cut goes on with bitwise identical
results."""

from __future__ import annotations

import dataclasses
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from bench.studies import __main__ as command
from bench.studies import jetmoe, moduleformer, page, queue, registry, worth
from bench.studies.abstracts import ABSTRACTS
from bench.studies.deepseek import BASE as DEEPSEEK
from bench.studies.deepseek import POOLED, runs
from bench.studies.inference import power
from bench.studies.report import Claim
from bench.studies.study import (
    FIRST_SEED,
    Experiment,
    Headline,
    Hypothesis,
    Paused,
    Results,
    Run,
    Study,
)
from bench.studies.text import load_domains
from bench.studies.topp import HELD, Held
from bench.studies.training import Recipe, train

from moe_ops.zoo.topp import TopP

TEXT = ("reference", "code")


def toy(name="toy", seeds=5, bound=0.0, log=None):
    """Arm b is 1 + seed / 100 below arm a; a run of three steps, whose state is a number."""

    def made(arm):
        def perform(seed, run):
            saved = run.load()
            value = saved["value"] if saved else 0.0
            for step in range(int(value), 3):
                if log is not None:
                    log.append((arm, seed, step))
                value += 1
                run.step(step + 1, 3, lambda: {"value": value})  # noqa: B023
            loss = 2.0 if arm == "a" else 1.0 - seed / 100
            return {"rows": {arm: {"loss": loss, "only a": value if arm == "a" else None}}}

        return perform

    hypotheses = [
        Hypothesis(
            "b is lower",
            lambda r: r.gap("b", "a", "loss"),
            "nats",
            bound,
            key="lower",
            expected=-1.0,
            deviation=0.5,
            pilot="seed 0",
        ),
        Hypothesis("a is lower", lambda r: r.gap("a", "b", "loss"), "nats"),
    ]
    arms = {"a": made("a"), "b": made("b")}
    return Study(name, "small", 1, arms, seeds, 0.1, hypotheses, lambda: {"Data": "none"})


@pytest.fixture
def registered(monkeypatch):
    def use(study):
        monkeypatch.setattr(registry, "study", lambda name: study)
        return study

    return use


def work(study, tmp_path, hours=1.0, **options):
    lines = []
    folders = {"folder": tmp_path / "runs", "results": tmp_path / "results"}
    left = queue.work([study], hours=hours, jobs=1, log=lines.append, **folders, **options)
    return left, lines


def test_a_study_is_run_and_reported(registered, tmp_path):
    study = registered(toy())
    left, lines = work(study, tmp_path)
    assert left == 0 and lines[0].startswith("10 runs to do, about 1 min")
    stored = json.loads((tmp_path / "results" / "toy.json").read_text())
    assert list(stored["runs"]) == ["a", "b"] and list(stored["runs"]["a"]) == [
        str(seed) for seed in range(FIRST_SEED, FIRST_SEED + 5)
    ]
    report = study.report("toy", stored)
    differences = [-1 - s / 100 for s in range(10, 15)]
    assert report.claims[0].differences == pytest.approx(differences)
    assert [c.verdict() for c in report.claims] == ["shown", "contradicted"]
    text = report.markdown()
    assert "### small" in text and "| a | 2 ± 0 | 3 ± 0 |" in text
    # Two deviations with five seeds: 0.91 by the noncentral t, and by 40,000 draws.
    assert "seeds 10 to 14, which no pilot used" in text and "a chance of 0.91" in text
    assert "| b is lower | -1.12 (-1.14 to -1.1) nats | 5 | < 0 | shown |" in text


def test_what_is_done_is_not_done_again(registered, tmp_path):
    study = registered(toy())
    work(study, tmp_path)
    before = (tmp_path / "results" / "toy.json").read_bytes()
    left, lines = work(study, tmp_path)
    assert left == 0 and lines[0].startswith("0 runs to do")
    assert (tmp_path / "results" / "toy.json").read_bytes() == before


def test_a_changed_plan_is_refused(registered, tmp_path):
    work(registered(toy()), tmp_path)
    for changed, what in ((toy(seeds=6), "seeds"), (toy(bound=-0.5), "hypotheses")):
        with pytest.raises(ValueError, match=f"another plan of its .*{what}"):
            work(registered(changed), tmp_path)


def test_the_time_is_kept_and_pairs_are_whole_early(registered, tmp_path):
    log = []
    study = registered(toy(log=log))
    # A deadline that has passed when the first step ends.
    left, lines = work(study, tmp_path, hours=1e-12)
    assert left == 10 and len(lines) <= 2 and len(log) <= 1
    work(study, tmp_path)
    assert [entry[:2] for entry in log[-27::3]][:4] == [("b", 10), ("a", 11), ("b", 11), ("a", 12)]


def test_side_by_side(registered, tmp_path, monkeypatch):
    """Several at a time give what one at a time gives; threads stand for the processes."""
    study = registered(toy())
    work(study, tmp_path)
    alone = json.loads((tmp_path / "results" / "toy.json").read_text())

    class Threads(ThreadPoolExecutor):
        def __init__(self, jobs, mp_context):
            super().__init__(jobs)

    monkeypatch.setattr(queue, "ProcessPoolExecutor", Threads)
    monkeypatch.setattr(os, "getppid", os.getpid)
    folders = {"folder": tmp_path / "runs", "results": tmp_path / "again"}
    left = queue.work([study], hours=1e-12, jobs=3, log=lambda line: None, **folders)
    assert left == 10
    left = queue.work([study], hours=1.0, jobs=3, log=lambda line: None, **folders)
    assert left == 0
    again = json.loads((tmp_path / "again" / "toy.json").read_text())
    for found in (alone, again):
        for of_run in found["runs"].values():
            for result in of_run.values():
                del result["seconds"]
    assert {run: dict(sorted(of.items())) for run, of in again["runs"].items()} == alone["runs"]


def test_two_queues_in_a_folder_are_refused(tmp_path):
    with queue.only_one(tmp_path), pytest.raises(ValueError, match="must be of one process"):
        with queue.only_one(tmp_path):
            pass
    with queue.only_one(tmp_path):
        pass


def test_a_paused_run_goes_on(tmp_path):
    log = []
    perform = toy(log=log).runs["a"]
    run = Run(tmp_path / "a.pt", deadline=0.0)
    with pytest.raises(Paused):
        perform(10, run)
    run = Run(tmp_path / "a.pt")
    assert perform(10, run)["rows"]["a"]["only a"] == 3
    assert [step for _, _, step in log] == [0, 1, 2]


def test_a_run_without_its_parent_stops(tmp_path):
    run = Run(tmp_path / "a.pt", parent=os.getpid())  # Our parent is another one.
    with pytest.raises(Paused):
        run.step(1, 2, dict)
    Run(parent=os.getppid()).step(1, 2, dict)


class Killed(BaseException):
    pass


def cut(job, seed, path, at):
    """Kills a run after `at` steps, of which each third is saved, and starts it again."""

    class Cut(Run):
        def step(self, done, total, state):
            self._saved = -1e9 if done % 3 == 0 else 1e30
            super().step(done, total, state)
            if done == at:
                raise Killed

    with pytest.raises(Killed):
        job(seed, Cut(path))
    # What the process had is gone, the states of the generators too.
    torch.manual_seed(12345)
    torch.rand(7)
    assert Run(path).load() is not None
    return job(seed, Run(path))


RECIPE = Recipe(steps=8, batch=4, length=16, heldout_batches=2, warmup=2)


@pytest.mark.parametrize("arm", ["JetMoE", "dense"])
def test_training_that_is_killed_has_the_same_bits(arm, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.studies.training.load_domains.__defaults__", (TEXT,))
    config = dataclasses.replace(jetmoe.CONFIG, hidden_size=32, num_layers=1, vocab_size=256)
    job = jetmoe.runs(config, RECIPE)[arm]
    whole = job(11, Run())
    assert cut(job, 11, tmp_path / "run.pt", at=5) == whole
    assert cut(job, 11, tmp_path / "last.pt", at=8) == whole


def test_controllers_that_are_killed_have_the_same_bits(tmp_path, monkeypatch):
    """The counts of a pooled bias are in no state dict of the model, p of top-p neither."""
    monkeypatch.setattr("bench.studies.training.load_domains.__defaults__", (TEXT,))
    monkeypatch.setattr("bench.studies.deepseek.POOLED_STEPS", 4)
    monkeypatch.setattr("bench.studies.deepseek.MIXTURE_BATCHES", 2)
    base = dataclasses.replace(DEEPSEEK, hidden_size=32, num_layers=1, num_heads=2)
    job = runs(base, RECIPE, 32, [POOLED])[POOLED]
    assert cut(job, 11, tmp_path / "pooled.pt", at=5) == job(11, Run())

    config = dataclasses.replace(HELD, hidden_size=32, intermediate_size=16, num_layers=1)

    def held(seed, run):
        trained = train(
            lambda: TopP(config),
            load_domains(TEXT),
            RECIPE,
            seed,
            prepare=lambda model, optimizer: Held(model, 1.5),
            run=run,
        )
        router = next(m for m in trained.model.modules() if hasattr(m, "top_p"))
        return trained.curve, trained.heldout, router.top_p

    whole = held(11, Run())
    assert whole[2] != config.top_p
    assert cut(held, 11, tmp_path / "held.pt", at=7) == whole


def test_parts_that_are_done_are_not_repeated(tmp_path, monkeypatch):
    """ModuleFormer's run is several trainings: killed in the fourth, it goes on in the fourth."""
    monkeypatch.setattr("bench.studies.moduleformer.load_domains.__defaults__", (TEXT,))
    base = dataclasses.replace(
        moduleformer.BASE, hidden_size=32, num_layers=1, attention_size=16, intermediate_size=16
    )
    recipe = dataclasses.replace(RECIPE, steps=4)
    job = moduleformer.whole(base, recipe)
    steps = []

    class Counted(Run):
        def step(self, done, total, state):
            super().step(done, total, state)
            steps.append(self.checkpoint.name)
            if len(steps) == stop:
                raise Killed

        def part(self, name):
            made = super().part(name)
            return Counted(**{f.name: getattr(made, f.name) for f in dataclasses.fields(made)})

    stop = 11  # 4 + 4 + 2, and the first of 2.
    with pytest.raises(Killed):
        job(11, Counted(tmp_path / "run.pt"))
    assert steps[-1] == "run.plainly-tuned.pt" and steps.count("run.load_balancing.pt") == 4
    steps.clear()
    run = Counted(tmp_path / "run.pt")
    assert job(11, run) == job(11, Run())
    assert steps[0] == "run.plainly-tuned.pt" and len(steps) == 2 + 4 + 2 * 2
    assert run.spent > 0
    run.clear()
    assert not list(tmp_path.iterdir())


def test_every_study_is_planned():
    """Names, seeds and headlines fit; what pilots expect has a power."""
    names = [study.name for study in registry.studies()]
    assert len(set(names)) == len(names)
    for system in registry.NAMES:
        found = registry.experiment(system)
        keys = set().union(*(study.keys for study in found.studies))
        asked = {claim.key for claim in ABSTRACTS.get(system, ()) if claim.key}
        headlines = {headline.key for headline in found.headlines}
        assert headlines <= keys and keys == headlines | asked, system
        assert {headline.kind for headline in found.headlines} <= set(page.KINDS)
        for study in found.studies:
            assert study.name.startswith(f"{system}-") and study.seeds >= 5
            assert registry.study(study.name) is study
            by_key = [h.key for h in study.hypotheses if h.key]
            assert len(set(by_key)) == len(by_key), study.name
    with pytest.raises(ValueError, match=r"system must be one of jetmoe, .*, got 'other'"):
        registry.experiment("other")
    with pytest.raises(ValueError, match=r"name must be one of coe-500, .*, got 'coe-1'"):
        registry.study("coe-1")


def test_what_studies_promise():
    """By the pilot in the plan."""
    study = toy()
    assert worth.decisions(study) == {"lower": pytest.approx(power(1.0, 0.5, 5), abs=1e-3)}
    plain = dataclasses.replace(study.hypotheses[0], expected=None, deviation=None)
    study = dataclasses.replace(study, hypotheses=[plain, study.hypotheses[1]])
    assert worth.decisions(study) == {"lower": None}
    assert worth.said({"lower": None}) == "1 headlines, nothing known"
    assert worth.said({"a": 0.5, "b": 1.0, "c": None}) == (
        "decides 1.5 of 2 headlines by what is known, 1 of which nothing is known"
    )


def test_what_is_not_shown_is_explained():
    """With the distance from the bound, and the one that the seeds would find."""
    headline = Headline(
        "lower", "b is lower", "1 nat", "quality", not_shown="they vary", shown="it is made so"
    )
    found = Experiment("toy", (toy(),), (headline,))
    wide = Claim("b is lower", [-1.0, 1.0, -2.0, 1.0, 0.5], "nats")
    # A deviation of 1.342, and 1.68 deviations to be found by five seeds.
    assert page.why(headline, found, wide) == (
        "they vary; the mean is 0.1 on the claimed side of the bound, and 5 seeds with this spread "
        "find 2.3 four times in five"
    )
    assert page.why(headline, found, Claim("", [-1.0, -1.1, -0.9], "")) == "it is made so"
    assert page.why(headline, found, Claim("", [1.0, 1.1, 0.9], "")) == ""


def test_studies_that_differ_are_all_in_the_overview(tmp_path):
    """The larger one decides; both verdicts are given, as long as both are whole."""
    studies = toy("toy-small"), toy("toy-large", bound=-2.0)
    headline = Headline("lower", "b is lower", "1 nat", "quality", contradicted="two nats are much")
    found = Experiment("toy", studies, (headline,))
    for study in studies:
        store = queue.Store(study, tmp_path)
        for run, seed in store.missing():
            store.add(run, seed, {**study.runs[run](seed, Run()), "seconds": 1.0})
        if study is studies[0]:
            assert list(page.cells(found, tmp_path)) == ["–", "● b is lower", "–", "–"]
    assert list(page.cells(found, tmp_path))[1] == "✕ b is lower (● ✕ by study)"
    assert list(page.states(found, tmp_path)) == ["contradicted"]
    assert "| **contradicted** | two nats are much |" in page.body(found, tmp_path)[0]


def test_results_pair_by_seed():
    runs = {
        "a": {s: {"rows": {"a": {"x": float(s), "y": 1.0}}, "note": s} for s in (10, 11)},
        "b": {s: {"rows": {"b": {"x": 2.0 * s, "y": None}}} for s in (10, 11)},
    }
    results = Results(runs, [10, 11])
    assert results.gap("b", "a", "x") == [10.0, 11.0]
    assert results.gap("a", "a", "x", "y") == [9.0, 10.0]
    assert results.every("a", "note") == [10, 11]
    with pytest.raises(ValueError, match="shorter"):
        results.gap("a", "b", "y")


def test_the_command(registered, monkeypatch, tmp_path, capsys):
    study = registered(toy())
    headline = Headline("lower", "b is lower", "1 nat", "quality", shown="it is made so")
    found = Experiment("toy", (study,), (headline,))
    monkeypatch.setattr(registry, "NAMES", ("toy",))
    monkeypatch.setattr(registry, "experiment", lambda system: found)
    monkeypatch.setattr(registry, "studies", lambda systems=(): [study])
    results, pages = tmp_path / "results", tmp_path / "zoo"
    monkeypatch.setattr(queue.Store.__init__, "__defaults__", (results,))
    monkeypatch.setattr(
        queue.work, "__kwdefaults__", {**queue.work.__kwdefaults__, "results": results}
    )
    monkeypatch.setattr(page.write, "__defaults__", (results, pages, tmp_path / "zoo.md"))
    pages.mkdir()
    arguments = ["toy", "--jobs", "1", "--folder", str(tmp_path / "runs")]
    with pytest.raises(SystemExit, match=r"toy\.md must have one line <!-- experiment -->"):
        command.main(arguments)
    for path in (pages / "toy.md", tmp_path / "zoo.md"):
        path.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    assert command.main([*arguments, "--list"]) == 0
    # Two deviations from the bound: 0.91, and less than 0.001 on the other side.
    listed = "toy: 10 of 10 runs, 0 min left; decides 0.9 of 1 headlines by what is known"
    assert listed in capsys.readouterr().out
    assert command.main(["--pages"]) == 0
    text = (pages / "toy.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "<summary>Numbers: small (study <code>toy</code>)</summary>" in text
    measured = "● -1.12 (-1.14 to -1.1) nats, < 0?, n 5"
    assert f"| b is lower | 1 nat | {measured} | **shown** | it is made so |" in text
    overview = (tmp_path / "zoo.md").read_text()
    assert "The studies declared 2 hypotheses before their runs. " in overview
    assert "1 headlines stand in the tables: 1 shown. " in overview
    assert "| [toy](zoo/toy.md) | – | ● b is lower | – | – |" in overview
    assert command.main(["--again", "toy", "b", "12"]) == 0
    assert "the stored numbers" in capsys.readouterr().out
    # A part of a study decides nothing.
    path = results / "toy.json"
    whole = path.read_text()
    stored = json.loads(whole)
    del stored["runs"]["b"]["14"]
    path.write_text(json.dumps(stored))
    promise = "by a pilot, small: shown with a chance of 0.91, contradicted with one of 0.00"
    assert f"n 4 | open | {promise} |" in page.body(found, results)[0]
    assert list(page.states(found, results)) == [page.NOT_RUN]
    assert list(page.cells(found, results))[1] == "– b is lower"
    path.write_text(whole)
    path.write_text(path.read_text().replace('"loss": 0.88', '"loss": 0.87'))
    assert command.main(["--again", "toy", "b", "12"]) == 1
    with pytest.raises(SystemExit, match="must have the run and the seed"):
        command.main(["--again", "toy", "c", "12"])
    with pytest.raises(SystemExit):
        command.main(["--hours", "0"])
