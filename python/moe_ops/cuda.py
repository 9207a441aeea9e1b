"""Settings of the CUDA kernels."""

from __future__ import annotations

from moe_ops import _library


def set_sm_margin(sms: int) -> None:
    """Leaves SMs free for other kernels that run concurrently with those of this package.

    GEMMs start as many blocks as the GPU has SMs, and each block processes its share of the tiles.
    If another kernel, for example an NCCL collective, occupies SMs, the blocks without an SM start
    after the first ones finish, and the GEMM takes twice as long. The margin reduces the number of
    blocks. Results are bitwise unchanged.

    It is one setting of the process, for all threads, which an op reads when it is launched: a
    captured graph keeps the value of its capture. The initial value is that of the environment
    variable ``MOE_OPS_SM_MARGIN``, otherwise 0. A build without CUDA kernels ignores it.

    Args:
        sms: number of SMs to leave free, at least 0. At least one SM is always used.

    Raises:
        ValueError: ``sms`` is negative or not an int.
    """
    if not isinstance(sms, int) or isinstance(sms, bool) or sms < 0:
        raise ValueError(f"set_sm_margin: sms must be an int of at least 0, got {sms!r}")
    _library.set_sm_margin(min(sms, 2**31 - 1))


def sm_margin() -> int:
    """Returns the number of SMs that the CUDA kernels leave free (:func:`set_sm_margin`)."""
    return _library.sm_margin()
