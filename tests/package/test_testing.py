"""The tools of the tests: a check that cannot fail would make every test above it worthless."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.ffn import moe_ffn_magnitude
from tests.helpers.logits import decided_logits
from tests.helpers.routing import EMPTY_ROUTINGS, ROUTINGS, Routing

from moe_ops.testing import (
    DTYPES,
    VIEWS,
    acc_dtype,
    as_strided_copy,
    assert_close_by_norm,
    assert_identical,
    eps,
    poisoned,
    seed_from,
    short,
)


def product(dtype, n=16, k=33):
    a, b = torch.randn(n, k).to(dtype), torch.randn(k, n).to(dtype)
    wide, magnitude = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    return (a.to(acc_dtype(dtype)) @ b.to(acc_dtype(dtype))).to(dtype), wide, magnitude


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_bound_accepts_a_good_product(dtype):
    actual, expected, magnitude = product(dtype)
    assert_close_by_norm(actual, expected, magnitude, sum_length=33)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_bound_refuses_one_element_off_by_a_few_ulps(dtype):
    actual, expected, magnitude = product(dtype)
    step = 40 if dtype in (torch.float64, torch.float32) else 1.5
    actual[3, 5] += step * eps(dtype) * max(actual[3, 5].abs().item(), magnitude[3, 5].item())
    with pytest.raises(AssertionError, match=r"out of bound; worst at \(3, 5\)"):
        assert_close_by_norm(actual, expected, magnitude, sum_length=33)


def test_bound_refuses_a_half_precision_sum():
    actual, expected, magnitude = product(torch.float32)
    with pytest.raises(AssertionError, match="out of bound"):
        assert_close_by_norm(actual.half().float(), expected, magnitude, sum_length=33)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_norm_refuses_what_every_element_may_be(dtype):
    """All errors at their largest and of one sign: no rounding does that."""
    expected = torch.rand(32, 32, dtype=torch.float64) + 1
    actual = (expected * (1 + 12 * eps(dtype))).to(dtype)
    with pytest.raises(AssertionError, match="norm"):
        assert_close_by_norm(actual, expected, expected, sum_length=1, steps=40, step_dtype=dtype)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("there", ["actual", "expected"])
def test_bound_wants_special_values_in_place(there, value):
    actual, expected, magnitude = product(torch.float32)
    (actual if there == "actual" else expected)[2, 7] = value
    with pytest.raises(AssertionError, match=r"wrong places, first at \(2, 7\)"):
        assert_close_by_norm(actual, expected, magnitude, sum_length=33)


def test_bound_of_zero_is_zero():
    expected = torch.zeros(4, 4, dtype=torch.float64)
    actual = torch.zeros(4, 4)
    assert_close_by_norm(actual, expected, expected)
    actual[1, 1] = 1e-30
    with pytest.raises(AssertionError, match="out of bound"):
        assert_close_by_norm(actual, expected, expected)


def test_identical_sees_the_dtype_the_shape_and_one_bit():
    ones = torch.ones(3)
    with pytest.raises(AssertionError):
        assert_identical(ones.double(), ones)
    with pytest.raises(AssertionError):
        assert_identical(ones[:2], ones)
    with pytest.raises(AssertionError, match=r"1 of 3 differ, first at \(1,\)"):
        assert_identical(ones.index_add(0, torch.tensor([1]), torch.tensor([1e-7])), ones)


@pytest.mark.parametrize("view", [v for v in (*VIEWS, "step2_last") if v != "expanded"])
@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 5), (0, 3), (5,)], ids=str)
def test_views_hold_the_same_values(shape, view):
    t = torch.randn(shape)
    assert_identical(as_strided_copy(t, view), t)


def test_views_have_the_layout_they_say():
    t = torch.randn(4, 6)
    assert as_strided_copy(t, "transposed").stride() == (1, 4)
    assert as_strided_copy(t, "offset").storage_offset() == 1
    assert as_strided_copy(t, "offset").data_ptr() % 16 != 0
    assert as_strided_copy(t, "step2").stride() == (12, 1)
    assert as_strided_copy(t, "step2_last").stride() == (12, 2)
    assert as_strided_copy(t, "expanded").stride() == (0, 1)


@pytest.mark.parametrize("size", [7, 1000, 100_000])
def test_poison_shows_in_uninitialized_memory(size):
    with poisoned():
        assert bool(torch.empty(size).isnan().all())
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("routing", ROUTINGS + EMPTY_ROUTINGS, ids=str)
def test_routings_are_what_they_say(routing):
    ids = routing.ids()
    assert ids.shape == (routing.num_tokens, routing.top_k)
    assert ids.dtype == routing.id_dtype
    valid = (ids >= 0) & (ids < routing.num_experts)
    if routing.kind in ("uniform", "skewed", "one_expert", "last_only", "repeated"):
        assert bool(valid.all())
    if routing.kind in ("dropped", "out_of_range") and routing.num_slots > 20:
        assert 0 < int(valid.sum()) < routing.num_slots
    if routing.kind == "all_dropped":
        assert not valid.any()


def test_decided_logits_gives_up_on_a_coin_toss():
    toss = iter(torch.arange(10_000))
    with pytest.raises(AssertionError, match="stable"):
        decided_logits(lambda: torch.zeros(1), lambda logits, factor: next(toss))


def test_seed_depends_on_the_name_alone():
    assert seed_from("tests/a.py::test_b[c]") == seed_from("tests/a.py::test_b[c]")
    assert seed_from("tests/a.py::test_b[c]") != seed_from("tests/a.py::test_b[d]")


def test_magnitude_bounds_the_ffn():
    from tests.helpers.ffn import ffn_operands

    from moe_ops import reference
    from moe_ops.testing import absolute, widened

    call = ffn_operands(Routing(20, 4, 2, "dropped"), 9, 12, torch.float32, bias=True)
    value = reference.moe_ffn(**widened(call))
    assert bool((value.abs() <= moe_ffn_magnitude(**absolute(call))).all())
