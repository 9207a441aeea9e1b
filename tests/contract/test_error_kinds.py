"""Errors of kernels whose kind torch does not pass on."""

import pytest
import torch

from moe_ops.ops._error_kinds import keep_kinds

BAD = "some_op: x must be [T, H], got shape [3]."


def raising(error, name="some_op"):
    def call():
        raise error

    return keep_kinds(name, call)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError(BAD), ValueError),
        (RuntimeError("std::bad_alloc"), MemoryError),
        (RuntimeError("some_op: an illegal memory access was encountered"), RuntimeError),
        (RuntimeError("other: x must be [T, H], got shape [3]."), RuntimeError),
        (torch.OutOfMemoryError("some_op: x must be smaller"), torch.OutOfMemoryError),
        (TypeError(BAD), TypeError),
        (RuntimeError("some_op_bwd: x must be [T, H], got shape [3]."), RuntimeError),
    ],
)
def test_kinds(error, kind):
    with pytest.raises(kind) as caught:
        raising(error)()
    assert type(caught.value) is kind
    assert str(caught.value) == str(error)


@pytest.mark.parametrize(
    ("variant", "kind"),
    [("some_op_accumulate", ValueError), ("some_operation", RuntimeError), ("some", RuntimeError)],
)
def test_a_variant_of_an_op(variant, kind):
    with pytest.raises(kind, match=r"^some_op: x must") as caught:
        raising(RuntimeError(BAD), variant)()
    assert type(caught.value) is kind


def test_results_pass():
    assert keep_kinds("some_op", lambda a, *, b: (a, b))(1, b=2) == (1, 2)
