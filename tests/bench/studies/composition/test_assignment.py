"""The MILP against all assignments, and what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from bench.studies.composition.assignment import assign

pytest.importorskip("scipy")


def brute_force(scores, counts, sizes, budget, mean_budget, required):
    """The best total score of all M^C assignments, None where none keeps the budgets."""
    best = None
    shares = [c / sum(counts) for c in counts]
    for models in itertools.product(range(len(sizes)), repeat=len(counts)):
        kept = {*models, *required}
        if budget is not None and sum(sizes[m] for m in kept) > budget:
            continue
        used = sum(share * sizes[m] for share, m in zip(shares, models, strict=True))
        if mean_budget is not None and used > mean_budget:
            continue
        value = sum(n * scores[c][m] for c, (n, m) in enumerate(zip(counts, models, strict=True)))
        best = value if best is None else max(best, value)
    return best


@pytest.mark.parametrize("seed", range(12))
def test_milp_is_the_best_of_all_assignments(seed):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(4, 5, generator=g, dtype=torch.float64)
    counts = torch.randint(0, 9, (4,), generator=g) + (torch.arange(4) == 0)
    # Odd hundredths, and budgets between them: no sum of sizes is on the edge.
    sizes = (torch.randint(10, 100, (5,), generator=g) + 0.25).tolist()
    required = (seed % 5,) if seed % 2 else ()
    for budget, mean_budget in (
        (None, None),
        (150, None),
        (None, 41.01),
        (200, 50.01),
        (90, 30.01),
    ):
        case = (scores.tolist(), counts.tolist(), sizes, budget, mean_budget, required)
        wanted = brute_force(*case)
        if wanted is None:
            with pytest.raises(ValueError, match="must leave an assignment"):
                assign(
                    scores, counts, sizes, budget=budget, mean_budget=mean_budget, required=required
                )
            continue
        found = assign(
            scores, counts, sizes, budget=budget, mean_budget=mean_budget, required=required
        )
        assert found.value == pytest.approx(wanted, abs=1e-9)
        assert set(found.kept) == {*found.models.tolist(), *required}
        if budget is not None:
            assert sum(sizes[m] for m in found.kept) <= budget


def test_sizes_of_billions_and_small_differences():
    scores = torch.tensor([[0.500, 0.501], [0.500, 0.501]])
    sizes = [7_600_000_000, 72_700_000_000]
    both = assign(scores, torch.tensor([1000.0, 1.0]), sizes, mean_budget=10_000_000_000)
    assert both.models.tolist() == [0, 1]
    assert assign(scores, torch.ones(2), sizes).models.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scores": torch.ones(2)}, r"scores must be finite \[C, M\]"),
        ({"scores": torch.full((2, 2), torch.nan)}, "scores must be finite"),
        ({"counts": torch.tensor([-1.0, 1.0])}, "counts must be"),
        ({"counts": torch.zeros(2)}, "not all 0"),
        ({"sizes": [1.0, 0.0]}, "sizes must be 2 above 0"),
        ({"required": (2,)}, r"required must be in \[0, 2\)"),
        ({"budget": 0.0}, "must be above 0"),
        ({"budget": 0.5}, "must leave an assignment"),
    ],
)
def test_bad_arguments(change, words):
    case = {"scores": torch.ones(2, 2), "counts": torch.ones(2), "sizes": [1.0, 2.0], **change}
    with pytest.raises(ValueError, match=words):
        assign(**case)
