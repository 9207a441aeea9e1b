"""Every dispatcher against one process: outputs, gradients of tokens, routing weights, experts."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.helpers.threads import run_on_threads
from tests.parallel.case import Case, OpBank, Results, check_close, join, one_process, run_rank
from torch import Tensor

from moe_ops import batch_invariant, ops, quantize_fp8
from moe_ops.parallel import DedupAllToAllDispatcher, ExpertPlacement, make_dispatcher
from moe_ops.parallel.comm import set_check_splits
from moe_ops.quant.fp8 import quantize_fp8_blocks
from moe_ops.reference.quantize_fp8 import dequantize_rows
from moe_ops.testing import assert_identical, short

pytestmark = pytest.mark.cpu_only

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
    return ids % (e - e // 4)


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
    "no experts": Case(ids=none, nan_weights="dropped"),
    "nan weights": Case(nan_weights="some"),
    "weights on input": Case(options={"apply_router_weight_on_input": True}),
    "biases": Case(bias=True),
    "experts that do not divide": Case(num_experts=7),
    "shuffled": Case(shuffled=True),
    "replicas": Case(replicas=4),
}


def run_cases(rank: int, name: str, options: dict[str, Any], case_names: list[str]) -> list[Any]:
    """Every case in every dtype, on the ranks of one process group."""
    found = []
    for case_name in case_names:
        case = CASES[case_name]
        dispatcher = make_dispatcher(
            dist.group.WORLD, case.num_experts, dispatch=name, placement=case.placement, **options
        )
        for dtype in DTYPES:
            call = case.operands(case_name, dtype)
            with batch_invariant():
                found.append(run_rank(dispatcher, rank, case, call, same_tokens=name == "shared"))
    return found


@pytest.fixture(scope="session")
def results(processes):
    """(dispatcher, case, dtype) -> what the four ranks gave, joined."""

    @cache
    def run(name: str) -> list[list[Results]]:
        args = name.partition("-")[0], DISPATCHERS[name], list(CASES)
        return processes.run(run_cases, *args)

    def get(name: str, case_name: str, dtype: torch.dtype) -> Results:
        index = list(CASES).index(case_name) * len(DTYPES) + DTYPES.index(dtype)
        ranks = [found[index] for found in run(name)]
        return join(CASES[case_name], ranks, same_tokens=name == "shared")

    return get


def same_bits(name: str, case: Case, dtype: torch.dtype) -> set[str]:
    """Returns what a dispatcher leaves as one process makes it, to the bit, in the batch-invariant
    mode.

    Outside of it, sizes decide which kernel multiplies, and those of a rank are others. In bfloat16
    kernels round between products. moe_ffn of narrow experts in float32 does not round an expert's
    output, which `Slots` sends.
    """
    on_input = bool(case.options)
    if dtype == torch.bfloat16:
        return set()
    if name == "slots":
        return {"y"} if dtype == torch.float64 and not case.replicas else set()
    same = {"w_gate_up", "w_down"} if not case.replicas else set()
    return same if on_input else same | {"topk_weights"}


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("case_name", CASES)
@pytest.mark.parametrize("name", DISPATCHERS)
def test_as_one_process(results, name, case_name, dtype):
    case = CASES[case_name]
    got = results(name, case_name, dtype)
    call = case.operands(case_name, dtype)
    check_close(case, call, got)
    with batch_invariant():
        one = one_process(call)
    for what in same_bits(name, case, dtype):
        assert_identical(got[what], one[what], what)


# What was measured over dispatchers, shapes and ranks: of the difference from one process, its norm
# beside that of the result. 0 is bitwise identical results.
FIGURES = {
    ("slots", torch.float32): (0.0, 4e-7, 3e-7, 5e-7),
    ("tokens", torch.float32): (8e-8, 5e-8, 0.0, 3e-7),
    ("gather", torch.float32): (8e-8, 1e-7, 0.0, 3e-7),
    ("slots", torch.bfloat16): (5e-3, 7e-3, 5e-3, 6e-3),
    ("tokens", torch.bfloat16): (5e-3, 7e-3, 5e-3, 6e-3),
    ("gather", torch.bfloat16): (5e-3, 7e-3, 5e-3, 6e-3),
}
WIDE = Case(tokens=(40,) * 4, num_experts=16, top_k=4, hidden_size=64, intermediate_size=32)


def run_wide(rank: int, name: str, dtype: torch.dtype) -> list[Results]:
    dispatcher = make_dispatcher(dist.group.WORLD, WIDE.num_experts, dispatch=name)
    call = WIDE.operands("wide", dtype)
    return [run_rank(dispatcher, rank, WIDE, call) for _ in range(2)]


@pytest.mark.parametrize(
    ("name", "dtype"), FIGURES, ids=lambda v: v if type(v) is str else short(v)
)
def test_difference_from_one_process(processes, name, dtype):
    ranks = processes.run(run_wide, name, dtype)
    one = one_process(WIDE.operands("wide", dtype))
    got, again = (join(WIDE, [found[i] for found in ranks]) for i in range(2))
    y, dx, dw, d_weights = FIGURES[name, dtype]
    for what, figure in {"y": y, "x": dx, "topk_weights": dw, "w_gate_up": d_weights}.items():
        assert_identical(got[what], again[what], f"{what}, repeated")
        difference = (got[what].double() - one[what].double()).norm() / one[what].double().norm()
        assert difference <= figure, f"{what}: {difference:.2e}"


# ---------------------------------------------------------------------------------- other groups


def run_in_pairs(rank: int, name: str) -> Results:
    """Two groups of two ranks at once, each with experts and tokens of its own."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    case = PAIRS[rank // 2]
    dispatcher = make_dispatcher(pairs[rank // 2], case.num_experts, dispatch=name)
    call = case.operands(f"pair {rank // 2}", torch.float32)
    return run_rank(dispatcher, rank % 2, case, call, same_tokens=name == "shared")


PAIRS = (Case(tokens=(9, 4), num_experts=6), Case(tokens=(3, 12), num_experts=4))


@pytest.mark.parametrize("name", ["gather", "shared", "slots", "tokens"])
def test_groups_of_two(processes, name):
    found = processes.run(run_in_pairs, name)
    for i, case in enumerate(PAIRS):
        got = join(case, found[2 * i : 2 * i + 2], same_tokens=name == "shared")
        check_close(case, case.operands(f"pair {i}", torch.float32), got)


def run_on_thread(rank: int, name: str, case: Case) -> Results:
    dispatcher = make_dispatcher(dist.group.WORLD, case.num_experts, dispatch=name)
    call = case.operands("wide group", torch.float32)
    return run_rank(dispatcher, rank, case, call, same_tokens=name == "shared")


@pytest.mark.parametrize("num_ranks", [16, 64])
@pytest.mark.parametrize("name", ["gather", "padded", "shared", "slots", "tokens"])
def test_many_ranks(name, num_ranks):
    tokens = (4,) * num_ranks if name == "padded" else (3, 0, 5, 8) * (num_ranks // 4)
    case = Case(tokens=tokens, num_experts=2 * num_ranks, top_k=6)
    found = run_on_threads(run_on_thread, num_ranks, name, case)
    got = join(case, found, same_tokens=name == "shared")
    check_close(case, case.operands("wide group", torch.float32), got)


def test_one_process_alone():
    case = Case(tokens=(12,), shuffled=True)
    dispatcher = make_dispatcher(None, 8, top_k=3, placement=case.placement)
    call = case.operands("alone", torch.float32)
    got = join(case, [run_rank(dispatcher, 0, case, call)])
    check_close(case, call, got)
    assert repr(dispatcher) == "LocalDispatcher(rank 0 of 1, 8 of 8 experts)"


# ------------------------------------------------------------------------------------- options


def run_padded(rank: int, capacity: int) -> tuple[Results, int]:
    case = CASES["all tokens on one rank"]
    dispatcher = make_dispatcher(dist.group.WORLD, 8, dispatch="padded", capacity=capacity)
    call = case.operands("padded", torch.float32)
    result = run_rank(dispatcher, rank, case, call)
    return result, int(dispatcher.num_dropped)


@pytest.mark.parametrize("capacity", [12, 7, 1])
def test_padded_drops_the_last_tokens(processes, capacity):
    """All go to one rank, so of each rank's 12 tokens the first ones find room."""
    case = CASES["all tokens on one rank"]
    found = processes.run(run_padded, capacity)
    assert [dropped for _, dropped in found] == [12 - capacity] * 4
    call = case.operands("padded", torch.float32)
    for rank in range(4):
        call["topk_ids"][case.block(rank)][capacity:] = -1
    check_close(case, call, join(case, [result for result, _ in found]))


def run_fp8(rank: int, name: str) -> Results:
    dispatcher = make_dispatcher(dist.group.WORLD, 8, dispatch=name, fp8=True)
    return run_rank(
        dispatcher, rank, CASES["uneven"], CASES["uneven"].operands("fp8", torch.float32)
    )


@pytest.mark.parametrize("name", ["slots", "tokens"])
def test_rows_that_travel_as_fp8(processes, name):
    """Ranks compute what one process makes of rounded tokens."""
    case = CASES["uneven"]
    got = join(case, processes.run(run_fp8, name))
    call = case.operands("fp8", torch.float32)
    call["x"] = dequantize_rows(*quantize_fp8(call["x"]))
    check_close(case, call, got)


class OpBankFp8(OpBank):
    """moe_ffn_fp8 with the weights of one rank, as `Experts` with precision "fp8" calls it."""

    takes_fp8 = True

    def forward_local(self, x: Tensor, w: Tensor, ids: Tensor, **options: Any) -> Tensor:
        assert x.dtype == torch.float8_e4m3fn
        weights = [t for n in ("w_gate_up", "w_down") for t in quantize_fp8_blocks(self.weights[n])]
        return ops.moe_ffn_fp8(x, *weights, w, ids, **options)


def run_codes(rank: int, name: str) -> Results:
    case = CODES
    dispatcher = make_dispatcher(dist.group.WORLD, 8, dispatch=name, fp8=True)
    call = case.operands("codes", torch.bfloat16)
    block, local = case.block(rank), list(case.placement.local(rank))
    bank = OpBankFp8({n: call[n][local] for n in ("w_gate_up", "w_down")})
    with torch.no_grad(), batch_invariant():
        args = (call[n][block] for n in ("x", "topk_weights", "topk_ids"))
        return {"y": dispatcher(bank, *args)}


CODES = Case(tokens=(5, 17, 0, 9), top_k=1, hidden_size=200)


@pytest.mark.parametrize("name", ["slots", "tokens"])
def test_codes_reach_the_bank_as_they_are(processes, name):
    """Ranks compute the bits of one process from bfloat16 rows, which would be rounded once more
    between."""
    call = CODES.operands("codes", torch.bfloat16)
    weights = [t for n in ("w_gate_up", "w_down") for t in quantize_fp8_blocks(call[n])]
    with batch_invariant():
        routing = call["topk_weights"], call["topk_ids"]
        if name == "slots":  # Weights are applied to what comes back.
            y = ops.moe_ffn_fp8(call["x"], *weights, torch.ones_like(routing[0]), routing[1])
            y = (y.float() * routing[0]).bfloat16()
        else:
            y = ops.moe_ffn_fp8(call["x"], *weights, *routing)
    assert_identical(join(CODES, processes.run(run_codes, name))["y"], y)


def run_fp32_combine(rank: int, name: str, exact: bool) -> Results:
    dispatcher = make_dispatcher(dist.group.WORLD, 16, dispatch=name, fp32_combine=exact)
    call = WIDE.operands("wide", torch.bfloat16)
    return run_rank(dispatcher, rank, WIDE, call, same_tokens=name == "shared")


@pytest.mark.parametrize("name", ["gather", "padded", "shared", "slots", "tokens"])
def test_fp32_combine_rounds_once(processes, name):
    """Then hardly an element of bfloat16 differs from one process; half of them do without."""
    call = WIDE.operands("wide", torch.bfloat16)
    one, different = one_process(call), []
    for exact in (False, True):
        found = processes.run(run_fp32_combine, name, exact)
        got = join(WIDE, found, same_tokens=name == "shared")
        check_close(WIDE, call, got)
        assert {t.dtype for n, t in got.items() if n != "topk_weights"} == {torch.bfloat16}
        different.append(float((got["y"] != one["y"]).double().mean()))
    assert different[1] < 0.01 < 0.1 < different[0], different


def run_without_gradients(rank: int, name: str) -> list[Tensor]:
    case = CASES["uneven"]
    call = case.operands("inference", torch.float32)
    dispatcher = make_dispatcher(dist.group.WORLD, 8, dispatch=name)
    block, local = case.block(rank), list(case.placement.local(rank))
    bank = OpBank({n: call[n][local] for n in ("w_gate_up", "w_down")})
    args = [call[n][block] for n in ("x", "topk_weights", "topk_ids")]
    found = []
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found.append(dispatcher(bank, *args).clone())
    received = []

    class Recording(OpBank):
        def forward_local(self, x: Tensor, w: Tensor, ids: Tensor, **options: Any) -> Tensor:
            received.append(w.dtype)
            return super().forward_local(x, w, ids, **options)

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found.append(dispatcher(Recording(bank.weights), *args))
    assert received == [torch.float32]  # Routing weights are not rounded.
    return found


@pytest.mark.parametrize("name", ["gather", "slots", "tokens"])
def test_without_gradients(processes, name):
    case = CASES["uneven"]
    found = processes.run(run_without_gradients, name)
    no_grad, inference, autocast = (torch.cat([f[i] for f in found]) for i in range(3))
    call = case.operands("inference", torch.float32)
    check_close(case, call, {"y": no_grad})
    assert_identical(no_grad, inference)
    assert autocast.dtype == torch.bfloat16
    call = {n: v.bfloat16() if v.dtype == torch.float32 else v for n, v in call.items()}
    check_close(case, call, {"y": autocast})


def run_with_other_sizes(rank: int) -> str:
    """Rank 3 believes in another number of experts."""
    dispatcher = make_dispatcher(dist.group.WORLD, 12 if rank == 3 else 8, dispatch="slots")
    case = CASES["even"]
    call = case.operands("other sizes", torch.float32)
    set_check_splits(True)
    try:
        run_rank(dispatcher, rank, case, call)
    except ValueError as error:
        return str(error)
    finally:
        set_check_splits(False)
    return ""


def test_another_number_of_experts_is_one_sentence(processes):
    for message in processes.run(run_with_other_sizes):
        assert message.startswith("exchange_counts: rows of so many elements")
        assert message.endswith("got [3, 4] on rank 3.")


def run_with_too_many(rank: int) -> str:
    dispatcher = make_dispatcher(dist.group.WORLD, 8, dispatch="gather", num_tokens=11)
    try:
        run_rank(dispatcher, rank, CASES["even"], CASES["even"].operands("many", torch.float32))
    except ValueError as error:
        return str(error)
    return ""


def test_gather_of_too_many_tokens(processes):
    for message in processes.run(run_with_too_many):
        assert message == "AllGatherDispatcher: x must have at most num_tokens = 11 tokens, got 12."


def test_placement_of_another_group(bad_input):
    with bad_input("DedupAllToAllDispatcher", "placement", "2"):
        DedupAllToAllDispatcher(None, ExpertPlacement.contiguous(8, 2))


# ---------------------------------------------------------------------- memory for backward

MANY = Case(tokens=(64,) * 4, num_experts=32, top_k=8, hidden_size=64, intermediate_size=48)


def run_saved(rank: int, name: str) -> int:
    """Returns the bytes of the tensors that a call saves for backward, besides its operands."""
    call = MANY.operands("saved", torch.bfloat16)
    local, block = list(MANY.placement.local(rank)), MANY.block(rank)
    weights = {n: call[n][local].requires_grad_() for n in ("w_gate_up", "w_down")}
    x, w = (call[n][block].clone().requires_grad_() for n in ("x", "topk_weights"))
    ids = call["topk_ids"][block].clone()
    storages: dict[int, tuple[int, Tensor]] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t
        return t

    dispatcher = make_dispatcher(dist.group.WORLD, MANY.num_experts, dispatch=name)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = dispatcher(OpBank(weights), x, w, ids)
    y.sum().backward()
    for operand in (x, w, ids, *weights.values()):
        storages.pop(operand.untyped_storage().data_ptr(), None)
    return sum(size for size, _ in storages.values())


def test_tokens_saves_memory_for_the_slots_of_a_rank(processes):
    slots, tokens = (sum(processes.run(run_saved, name)) for name in ("slots", "tokens"))
    num_slots = 4 * 64 * 8
    rows = num_slots * (64 + 2 * 48) * 2  # Inputs of the experts and their pre-activations.
    assert rows <= tokens <= slots <= 1.5 * rows + num_slots * 64
