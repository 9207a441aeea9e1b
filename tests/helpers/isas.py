"""Instruction sets, and processes that run at one of them."""

from __future__ import annotations

import subprocess

import pytest
import torch
from tests.helpers.fresh_python import run_python

from moe_ops import _library

ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
# The instruction set whose kernels are the same functions (of amx) or the same text (of avx512),
# but for products of bfloat16 and, without VNNI, for those of 8 bits.
_TWINS = {"avx512": "avx512_bf16", "avx512_bf16": "amx"}


def needs_isa(isa: str) -> None:
    """Skips a test on a machine without the instruction set."""
    if isa not in _library.supported_isas():
        pytest.skip(f"this machine runs {', '.join(_library.supported_isas())}, not {isa}")


def has_own_kernels(isa: str, dtype: torch.dtype, eight_bits: bool = False) -> bool:
    """Returns False if calls of `dtype` run kernels of a higher instruction set of this machine.

    Args:
        eight_bits: the call multiplies integers or fp8.
    """
    if _TWINS.get(isa) not in _library.supported_isas():
        return True
    return dtype == torch.bfloat16 or (eight_bits and isa == "avx512")


def run_python_at(
    isa: str, *arguments: str, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """run_python in which moe_ops uses an instruction set of this machine."""
    needs_isa(isa)
    return run_python(*arguments, timeout=timeout, env={"MOE_OPS_CPU_ISA": isa})
