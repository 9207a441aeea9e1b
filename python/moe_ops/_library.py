"""Functions of the native library called at run time: build facts, instruction sets, settings and
memory of the process.

Importing this module loads the library, which registers ``torch.ops.moe_ops``. The functions are
plain C functions (csrc/python/library.cpp), called through ctypes, so that one library serves every
Python version. Fast functions hold the GIL; during the others, other Python threads run.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_NAME = {"win32": "moe_ops.dll", "darwin": "libmoe_ops.dylib"}.get(sys.platform, "libmoe_ops.so")
PATH = Path(__file__).with_name(_NAME)

if not PATH.exists():
    raise FileNotFoundError(_NAME)
torch.ops.load_library(str(PATH))
_quick, _slow = ctypes.PyDLL(str(PATH)), ctypes.CDLL(str(PATH))


def _function(library: ctypes.CDLL, name: str, result: Any, *parameters: Any) -> Any:
    function = getattr(library, f"moe_ops_{name}")
    function.restype = result
    function.argtypes = parameters
    return function


def _text(library: ctypes.CDLL, name: str, *parameters: Any) -> Callable[..., str | None]:
    function = _function(library, name, ctypes.c_char_p, *parameters)

    def call(*values: Any) -> str | None:
        found = function(*values)
        return None if found is None else found.decode()

    return call


def _plain_text(name: str) -> Callable[[], str]:
    function = _function(_quick, name, ctypes.c_char_p)
    return lambda: function().decode()


# ---- build facts

version = _plain_text("version")
_build_info = _plain_text("build_info")


def build_info() -> dict[str, str]:
    """Returns the build facts by name, such as ``cuda``: ``"off"``, or the toolkit and runtime."""
    return dict(line.split("\t", 1) for line in _build_info().split("\n"))


# ---- instruction sets of the CPU

cpu_isa = _plain_text("cpu_isa")
detected_isa = _plain_text("detected_isa")
isa_warning = _plain_text("isa_warning")  # "" if there is none
_supported_isas = _plain_text("supported_isas")
_failing_kernel = _text(_slow, "failing_kernel", ctypes.c_int)


def supported_isas() -> list[str]:
    """Returns the instruction sets that this machine and this build support, lowest first."""
    return _supported_isas().split()


def failing_kernel(isa: str) -> str | None:
    """Returns None, or the kernel of a supported instruction set that fails its self-test."""
    if isa not in supported_isas():
        raise ValueError(f"failing_kernel: isa must be supported here, got {isa}.")
    return _failing_kernel(supported_isas().index(isa))


_openmp_cores: Callable[[], int] | None = getattr(_quick, "omp_get_num_procs", None)


def num_usable_cores() -> int | None:
    """Returns the number of cores that OpenMP may use, or None if the runtime does not say.

    With OMP_PROC_BIND, the affinity of the main thread is one core, whatever the process may use.
    """
    return None if _openmp_cores is None else _openmp_cores()


_EachRate = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_double)
_measure_limits = _function(
    _slow, "measure_limits", None, ctypes.c_size_t, ctypes.c_double, _EachRate
)


def measure_limits(num_bytes: int, seconds: float) -> dict[str, list[float]]:
    """Measures the rates of one core in each pass: ``fp32_flops``, ``bf16_flops``, ``read_bytes``.

    Args:
        num_bytes: size of the buffer that is read.
        seconds: time for each of the three.
    """
    rates: dict[str, list[float]] = {"fp32_flops": [], "bf16_flops": [], "read_bytes": []}
    each = _EachRate(lambda what, rate: rates[what.decode()].append(rate))
    _measure_limits(num_bytes, seconds, each)
    return rates


# ---- settings of the process

batch_invariant: Callable[[], bool] = _function(_quick, "batch_invariant", ctypes.c_bool)
set_batch_invariant: Callable[[bool], None] = _function(
    _quick, "set_batch_invariant", None, ctypes.c_bool
)

# ---- memory

stale_panels: Callable[[], int] = _function(_quick, "stale_panels", ctypes.c_int64)
cached_bytes: Callable[[], int] = _function(_quick, "cached_bytes", ctypes.c_size_t)
cache_limit: Callable[[], int] = _function(_quick, "cache_limit", ctypes.c_size_t)
release_cached: Callable[[], None] = _function(_slow, "release_cached", None)
poison_scratch: Callable[[int], None] = _function(_quick, "poison_scratch", None, ctypes.c_size_t)
use_huge_pages: Callable[[int, int], int] = _function(  # arguments: address, number of bytes
    _slow, "use_huge_pages", ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t
)
_packed_expert_bytes: Callable[[bytes, int, int, bool], int] = _function(
    _quick,
    "packed_expert_bytes",
    ctypes.c_int64,
    *(ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_bool),
)


def packed_expert_bytes(dtype: str, out_features: int, in_features: int, halves: bool) -> int:
    """Returns the bytes of one expert in the CPU format of ``pack_experts``."""
    size = _packed_expert_bytes(dtype.encode(), out_features, in_features, halves)
    if size < 0:
        raise ValueError(f"packed_expert_bytes: dtype must be a float type, got {dtype}.")
    return size


# ---- CUDA: a build without its kernels has no margin, stream, device or kernels

sm_margin: Callable[[], int] = _function(_quick, "sm_margin", ctypes.c_int)
set_sm_margin: Callable[[int], None] = _function(_quick, "set_sm_margin", None, ctypes.c_int)
# None, or the reason for which it cannot be made current
bind_device = _text(_slow, "bind_device", ctypes.c_int)
_stream_source = _text(_slow, "stream_source", ctypes.POINTER(ctypes.c_bool))
_EachKernel = ctypes.CFUNCTYPE(
    None,
    *(ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64),
)
_cuda_kernels = _function(_slow, "cuda_kernels", None, _EachKernel)


def stream_source() -> tuple[str, bool] | None:
    """Returns the library queried for torch's current stream, and whether it answers; None if torch
    has not loaded such a library."""
    answers = ctypes.c_bool()
    library = _stream_source(answers)
    return None if library is None else (library, answers.value)


def cuda_kernels() -> list[tuple[str, str | None, int, int, int, int]]:
    """Returns, for every kernel on the current device: name, error or None, compute capability of
    its machine code and of the PTX, registers, spilled bytes per thread."""
    kernels: list[tuple[str, str | None, int, int, int, int]] = []

    def each(name: bytes, error: bytes | None, *numbers: int) -> None:
        code, ptx, registers, spilled = numbers
        said = None if error is None else error.decode()
        kernels.append((name.decode(), said, code, ptx, registers, spilled))

    _cuda_kernels(_EachKernel(each))
    return kernels
