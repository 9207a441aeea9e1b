"""The stream of rows of the HoME experiment: rates, rows that are not repeated, runs that go on."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bench.studies.home import stream as home_stream
from bench.studies.home.arms import parameters
from bench.studies.home.models import build
from bench.studies.home.stream import Stream, Teacher
from bench.studies.study import Run

TINY = Stream(
    rates=(0.5, 0.1, 0.05), num_dense=20, num_ids=2, cardinality=7, steps=8, batch=32, test=500
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(home_stream, "CALIBRATION", 20_000)


def test_rows_have_the_rates_and_the_seed_decides():
    teacher = Teacher(TINY, 3)
    rows = teacher.rows(20_000, torch.Generator().manual_seed(0))
    expected = torch.tensor(TINY.rates).repeat(2)
    torch.testing.assert_close(rows.labels.mean(0), expected, atol=0.02, rtol=0)
    again = Teacher(TINY, 3).rows(20_000, torch.Generator().manual_seed(0))
    assert torch.equal(rows.labels, again.labels) and torch.equal(rows.dense, again.dense)
    other = Teacher(TINY, 4).rows(20_000, torch.Generator().manual_seed(0))
    assert not torch.equal(rows.labels, other.labels)


def test_categories_read_one_wave_with_opposite_signs():
    still = dataclasses.replace(TINY, num_ids=0)
    teacher = Teacher(still, 3)
    teacher.weights = torch.zeros_like(teacher.weights)
    teacher.bias = torch.zeros_like(teacher.bias)
    x = torch.zeros(1, still.num_dense)
    crest = teacher.directions[:, 0] * torch.pi / 4
    logits = teacher._logits(x + crest, torch.zeros(1, 0, dtype=torch.long))
    expected = torch.tensor([[2.0] * 3 + [-2.0] * 3])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_arms_have_equal_parameters():
    for stream in (home_stream.SMALL, home_stream.RARE):
        sizes = {arm: parameters(build(config)) for arm, config in stream.arms().items()}
        compared = [sizes[arm] for arm in ("MMoE*", "PLE*", "HoME*")]
        assert max(compared) < 1.05 * min(compared)


def test_a_run_that_is_cut_has_the_same_bits(tmp_path):
    job = home_stream.one("HoME*", TINY)
    whole = job(10, Run())

    class Cut(Run):
        def step(self, done, total, state):
            self._saved = -1e9
            super().step(done, total, state)
            if done == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job(10, Cut(tmp_path / "run.pt"))
    assert job(10, Run(tmp_path / "run.pt")) == whole
    row = whole["rows"]["HoME*"]
    assert 0 < row["AUC, rare tasks"] < 1 and row["AUC"] != row["AUC, a quarter of the rows"]
