"""The experiments on views and photos run from end to end, hardly trained."""

from __future__ import annotations

import json

import pytest
import torch
from bench.studies.gntmove import claims as gntmove
from bench.studies.mofme import claims as mofme
from bench.studies.study import Paused, Results, Run

from moe_ops.zoo.gntmove import GNTMoveConfig
from moe_ops.zoo.mofme import MoFMEConfig

VIEWS = gntmove.Plan(
    GNTMoveConfig(hidden_size=8, num_layers=2, num_heads=1, features=2, num_freqs=1, num_points=2),
    steps=3, scenes=1, count=4, size=8, views=2, test=3, pixels=4,
)  # fmt: skip
PHOTOS = mofme.Plan(
    MoFMEConfig(channels=2, hidden_size=8, num_layers=1, num_heads=1, head_size=4, num_experts=3),
    steps=3, batch=3, crop=8, test=3,
)  # fmt: skip


@pytest.fixture
def photos(monkeypatch):
    drawn = [torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    monkeypatch.setattr(mofme, "missing_photos", lambda: [])
    monkeypatch.setattr(mofme, "load_photos", lambda: (drawn[:2], drawn[2:]))


def checked(study, arms):
    """One seed of a study; its claims are made of it."""
    runs = {
        name: {0: json.loads(json.dumps(job(0, Run()), allow_nan=False))}
        for name, job in study.runs.items()
    }
    results = Results(runs, [0])
    assert list(results.arms()) == list(arms)
    for hypothesis in study.hypotheses:
        assert len(hypothesis.of(results)) == 1, hypothesis.statement
    assert study.setting()
    return results


def test_gntmove():
    results = checked(gntmove.study("gntmove-toy", "toy", 1, 1.0, VIEWS), gntmove.ARMS)
    assert len({results.of(arm, "PSNR")[0] for arm in gntmove.ARMS}) == len(gntmove.ARMS)
    assert results.of(gntmove.WIDE, "entropy") == []


def test_mofme(photos):
    results = checked(mofme.study("mofme-toy", "toy", 1, 1.0, PHOTOS), mofme.ARMS)
    whole, film = (results.of(arm, "expert parameters")[0] for arm in (mofme.WHOLE, mofme.FULL))
    assert film / whole < 0.28
    assert results.of(mofme.DENSE, "expert parameters") == []


@pytest.mark.parametrize(
    "job",
    [gntmove.one(gntmove.FULL, VIEWS), mofme.one(mofme.FULL, PHOTOS)],
    ids=["views", "photos"],
)
def test_a_run_goes_on_where_it_was_cut(job, tmp_path, photos):
    """With the noise of routers that it would have drawn."""
    whole = job(0, Run())
    path = tmp_path / "run.pt"
    with pytest.raises(Paused):
        job(0, Run(path, deadline=0.0))
    assert path.is_file()
    torch.manual_seed(99)
    assert job(0, Run(path)) == whole


def test_photos_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(mofme, "missing_photos", lambda: ["china"])
    with pytest.raises(FileNotFoundError, match=r"got none of china: pip install .*\[studies\]"):
        mofme.one(mofme.FULL, PHOTOS)(0, Run())
