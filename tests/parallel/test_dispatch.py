from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.parallel.case import (
    Case,
    Results,
    check_close,
    expected,
    join,
    one_process,
    run_rank,
)
from torch import Tensor

from moe_ops.parallel import choose
from moe_ops.testing import assert_identical, short

pytestmark = [pytest.mark.xdist_group("parallel"), pytest.mark.cpu_only]

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
DISPATCHERS: dict[str, dict[str, Any]] = {
    "gather": {},
    "gather-fixed": {"num_tokens": 20},
    "padded": {"capacity": 20},
    "shared": {},
    "slots": {},
    "tokens": {},
}


def on_rank_1(ids: Tensor, e: int) -> Tensor:
    share = e // 4
    return share + ids % share


def not_on_the_last(ids: Tensor, e: int) -> Tensor:
    return ids % (e - -(-e // 4))


def some_dropped(ids: Tensor, e: int) -> Tensor:
    ids = ids.clone()
    ids[::3, 0] = -1
    ids[1::4, 1] = e + 2
    ids[2] = -1
    return ids


def none(ids: Tensor, e: int) -> Tensor:
    return ids * 0 - 1


CASES = {
    "even": Case(),
    "uneven": Case(tokens=(5, 17, 1, 9)),
    "no tokens on two ranks": Case(tokens=(0, 14, 3, 0)),
    "no tokens at all": Case(tokens=(0, 0, 0, 0)),
    "one expert a token": Case(top_k=1),
    "all experts": Case(top_k=8),
    "all tokens on one rank": Case(ids=on_rank_1, top_k=2),
    "none on the last rank": Case(ids=not_on_the_last, top_k=2),
    "dropped slots": Case(ids=some_dropped, nan_weights="dropped"),
    "no experts": Case(ids=none),
    "nan weights": Case(nan_weights="some"),
    "weights on input": Case(options={"apply_router_weight_on_input": True}),
    "biases": Case(bias=True),
    "experts that do not divide": Case(num_experts=7),
    "shuffled": Case(shuffled=True),
    "replicas": Case(replicas=4),
}


def run_cases(rank: int, name: str, options: dict[str, Any]) -> list[Results]:
    """Every case in every dtype, on the ranks of one process group."""
    found = []
    same_tokens = name == "shared"
    for case_name, case in CASES.items():
        dispatcher = choose(
            dist.group.WORLD, case.num_experts, dispatch=name, placement=case.placement, **options
        )
        for dtype in DTYPES:
            call = case.operands(case_name, dtype)
            found.append(run_rank(dispatcher, rank, case, call, same_tokens=same_tokens))
    return found


@pytest.fixture(scope="session")
def results(processes):
    """(dispatcher, case, dtype) -> what the four ranks gave, joined."""

    @lru_cache(maxsize=None)
    def run(name: str) -> list[list[Results]]:
        return processes.run(run_cases, name.partition("-")[0], DISPATCHERS[name])

    def get(name: str, case_name: str, dtype: torch.dtype) -> Results:
        index = list(CASES).index(case_name) * len(DTYPES) + DTYPES.index(dtype)
        ranks = [found[index] for found in run(name)]
        return join(CASES[case_name], ranks, same_tokens=name == "shared")

    return get


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("case_name", CASES)
@pytest.mark.parametrize("name", DISPATCHERS)
def test_as_one_process(results, name, case_name, dtype):
    case = CASES[case_name]
    got = results(name, case_name, dtype)
    want, bound = expected(case_name, lambda_of(case_name), dtype)
    check_close(case, got, want, bound, dtype)


@lru_cache(maxsize=None)
def lambda_of(case_name: str):
    return lambda: CASES[case_name]
