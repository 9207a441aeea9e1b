"""The experiment of T2MIR, in minutes and at length: it runs, and what it measures is right."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from bench.studies.study import Run
from bench.studies.t2mir import arms as t2mir_arms
from bench.studies.t2mir import claims as t2mir
from bench.studies.t2mir import long as t2mir_long
from bench.studies.t2mir.ablations import Ablation
from bench.studies.t2mir.envs import PointRobot
from torch import nn

SMOKE = t2mir_long.SCALES["smoke"]


def report_of(study, seeds):
    runs = {
        name: {str(seed): {**job(seed, Run()), "seconds": 1.0} for seed in seeds}
        for name, job in study.runs.items()
    }
    stored = json.loads(json.dumps({"machine": "this", "fixed": study.fixed(), "runs": runs}))
    return study.report("t2mir", stored)


@pytest.mark.parametrize(
    ("variant", "arms"), [("ad", t2mir_arms.ARMS), ("dpt", t2mir_arms.ROUTED_ARMS)]
)
def test_t2mir_runs(variant, arms):
    scale = dataclasses.replace(SMOKE, model=dataclasses.replace(SMOKE.model, variant=variant))
    study = t2mir.study("t2mir-tiny", "tiny", 1, 0.1, scale, arms=arms)
    report = report_of(study, [10, 11])
    assert list(report.arms) == [t2mir_arms.UNTRAINED, *arms]
    column = {name: i for i, name in enumerate(report.columns)}
    rotation, goal = column[t2mir_arms.ROTATION], column[t2mir_arms.GOAL]
    for arm, rows in report.arms.items():
        for row in rows:
            assert (row[rotation] is None) == (row[goal] is None) == (arm == "dense")
            assert all(x is None or math.isfinite(x) for x in row)
            assert 0 <= row[column[t2mir_arms.ROTATION_FRESH]] <= 1
            assert 0 <= row[column[t2mir_arms.GOAL_FRESH]] <= 180
    # Seeds pair: the same arm with another seed is another run, and a run is its seed's.
    again = report_of(study, [11])
    for arm, rows in again.arms.items():
        assert rows[0] == report.arms[arm][1] != report.arms[arm][0]
    by_statement = {c.statement: c.differences for c in report.claims}
    name, plain = list(arms)[-1], list(arms)[1 if variant == "ad" else 3]
    pairs = zip(report.arms[name], report.arms[plain], strict=True)
    assert by_statement[f"{name}: higher return than without"] == [
        a[column[t2mir_arms.RETURN]] - b[column[t2mir_arms.RETURN]] for a, b in pairs
    ]
    assert [p.kind for p in report.pictures] == ["points", "points", "bars", "lines"]
    keys = [h.key for h in study.hypotheses if h.key]
    assert sorted(keys) == ["dense", "return", "tells"]


def test_arms_have_equal_active_parameters():
    for scale in (t2mir_arms.SMALL, *t2mir_long.SCALES.values()):
        dense, experts = (Ablation(scale.config(moe)) for moe in ("none", "both"))
        a, total = t2mir_arms.active_parameters(dense)
        b, of_all = t2mir_arms.active_parameters(experts)
        assert a == total == sum(p.numel() for p in dense.parameters()) and b < of_all
        # But for routers and biases.
        assert a == pytest.approx(b, rel=0.06)
        assert t2mir_arms.flops_a_token(dense) == pytest.approx(
            t2mir_arms.flops_a_token(experts), rel=0.06
        )
    # Written out: a layer is 4 size^2 of attention and a network of 8 or, the last, 12.
    scale = SMOKE
    size, length = 16, 3 * 2 * scale.horizon
    by_hand = 2 * (2 * 4 + 8 + 12) * size**2 + 2 * 4 * size * (length + 1) / 2
    assert t2mir_arms.flops_a_token(Ablation(scale.config("none"))) == by_hand


def test_neighbors_tell_what_is_there():
    generator = torch.Generator().manual_seed(0)
    envs = [PointRobot.sample(400, generator=generator) for _ in range(2)]

    def seen(env, *, goal):
        hidden = env.goals if goal else torch.stack([env.angles.cos(), env.angles.sin()], -1)
        noise = torch.randn(800, 3, generator=generator)
        return torch.cat([hidden.repeat(2, 1), 0.01 * noise], dim=-1)

    rotation, error = t2mir_arms.told(*(seen(env, goal=True) for env in envs), *envs)
    assert rotation == pytest.approx(0.25, abs=0.08) and error < 25
    rotation, error = t2mir_arms.told(*(seen(env, goal=False) for env in envs), *envs)
    assert rotation == 1 and error == pytest.approx(90, abs=15)


def test_plane_keeps_the_two_widest_axes():
    env = PointRobot.sample(200, generator=torch.Generator().manual_seed(0))
    turn, _ = torch.linalg.qr(torch.randn(6, 6))
    wide = torch.randn(400, 6) * torch.tensor([5.0, 3.0, 0.1, 0.1, 0.1, 0.1])
    points = torch.tensor(t2mir_arms.plane(wide @ turn, env, count=400))
    assert points[:, :2].std(0).tolist() == pytest.approx([5, 3], rel=0.15)
    assert torch.equal(points[:, 2], torch.rad2deg(env.angles).repeat(2).round())


def test_features_are_what_the_router_reads():
    scale = SMOKE
    tasks = t2mir_arms.draw(scale, 0, "cpu")
    batch = t2mir_arms.contexts(scale, tasks.valid)
    assert len(batch.states) == 2 * scale.valid
    model = Ablation(scale.config("both"))
    found = t2mir_arms.look(model, batch)
    router = model.experts.task_router
    with torch.no_grad():
        assert torch.equal(router.represent(router.gate(found.features)), found.representation)
        expected = nn.functional.mse_loss(model(*batch[:4]).actions, batch.target)
    assert found.loss == float(expected)
    dense = t2mir_arms.look(Ablation(scale.config("none")), batch)
    assert dense.representation is None and dense.features.shape == found.features.shape


def test_the_best_validation_loss_is_kept(monkeypatch):
    """Losses that fall and rise again: what is measured are the weights of the lowest."""
    losses = iter([3.0, 1.0, 2.0])
    states = []

    def look(model, batch):
        states.append({k: t.clone() for k, t in model.state_dict().items()})
        return t2mir_arms.Seen(next(losses), torch.zeros(0), None)

    def measure(model, tasks, scale, seed):
        states.append(model.state_dict())
        return t2mir_arms.Result([], [])

    monkeypatch.setattr(t2mir_arms, "look", look)
    monkeypatch.setattr(t2mir_arms, "measure", measure)
    scale = dataclasses.replace(SMOKE, steps=6)
    tasks = t2mir_arms.draw(scale, 0, "cpu")
    result = t2mir_arms.trained(t2mir_arms.ARMS["dense"], tasks, scale, 0, "cpu", Run())
    assert result.valid == {"2": 3.0, "4": 1.0, "6": 2.0}
    assert all(torch.equal(t, states[1][k]) for k, t in states[3].items())
    assert not torch.equal(states[1]["head.weight"], states[2]["head.weight"])


def test_the_long_run_goes_on_where_it_was_cut(tmp_path, capsys, monkeypatch):
    def arguments(folder):
        return ["--scale", "smoke", "--device", "cpu", "--seeds", "1", "--folder", str(folder)]

    whole = t2mir_long.main(arguments(tmp_path / "whole"))
    look, calls = t2mir_arms.look, []

    def cut(model, batch):
        calls.append(0)
        # Untrained experts look twice, an arm at steps 2 and 4 and then twice: arm two, step 4.
        if len(calls) == 8:
            raise KeyboardInterrupt
        return look(model, batch)

    monkeypatch.setattr(t2mir_arms, "look", cut)
    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        t2mir_long.main(arguments(folder))
    stored = json.loads((folder / "t2mir-long.json").read_text("utf-8"))
    assert list(stored["runs"]) == [t2mir_arms.UNTRAINED, "dense"]
    seen = []
    monkeypatch.setattr(t2mir_arms, "look", lambda *a: seen.append(0) or look(*a))
    report = t2mir_long.main(arguments(folder))
    # Step 4 and twice at the end of arm two, and the two arms behind it whole.
    assert len(seen) == 3 + 2 * 4
    assert report.arms == whole.arms
    assert not list(folder.glob("*/*.t2mir"))
    with pytest.raises(SystemExit):
        t2mir_long.main([*arguments(folder), "--steps", "5"])
    assert "another plan of its setting" in capsys.readouterr().err
