"""Settings of the CUDA kernels."""

from __future__ import annotations

from moe_ops import _library


def set_sm_margin(sms: int) -> None:
    """Leaves SMs to kernels of others that run at the same time as those of this package.

    The matrix products start as many blocks as the card has SMs, and each block works through its
    share of the tiles. Where another kernel holds SMs, a collective of NCCL for example, the blocks
    that find no SM start when the first ones are done, and the product takes twice as long. With a
    margin it starts that many blocks fewer. Results keep their bits.

    It is one setting of the process, for all threads, which an op reads when it is launched: a
    captured graph keeps the value of its capture. Its value at the start is that of the environment
    variable ``MOE_OPS_SM_MARGIN``, otherwise 0. A build without CUDA kernels ignores it.

    Args:
        sms: how many SMs to leave, at least 0. One is used in any case.

    Raises:
        ValueError: ``sms`` is negative or no int.
    """
    if not isinstance(sms, int) or isinstance(sms, bool) or sms < 0:
        raise ValueError(f"set_sm_margin: sms must be an int of at least 0, got {sms!r}")
    _library.set_sm_margin(min(sms, 2**31 - 1))


def sm_margin() -> int:
    """How many SMs the CUDA kernels leave to others (:func:`set_sm_margin`)."""
    return _library.sm_margin()
