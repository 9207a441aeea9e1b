"""Expert weights that are page-locked where they are, for copies to a GPU."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

# Smaller tensors are not page-locked: they may share a page with other memory, and their copies are
# short.
_PIN_FROM = 1 << 20
_PORTABLE = 1  # cudaHostRegisterPortable: for all devices


class PinnedStorages(dict[int, Any]):
    """Page-locked storages by address, each of which is unlocked before it may be freed.

    Attributes:
        devices: devices of the copies from them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.devices: set[torch.device] = set()

    def pin(self, tensors: Sequence[Tensor], before: Callable[[], object]) -> None:
        """Page-locks the storages of tensors, apart from small and locked ones.

        Args:
            before: called before a storage is locked; unlocks storages that are not used anymore.

        Raises:
            RuntimeError: CUDA cannot lock a storage.
        """
        for t in tensors:
            storage = t.untyped_storage()
            address, size = storage.data_ptr(), storage.nbytes()
            if size < _PIN_FROM or address in self or t.is_pinned():
                continue
            before()
            cudart: Any = torch.cuda.cudart()
            error = cudart.cudaHostRegister(address, size, _PORTABLE)
            if int(error) != 0:
                raise RuntimeError(
                    f"place: {size} bytes of expert weights must be page-locked to be copied to "
                    f"the GPU, got error {int(error)} of cudaHostRegister; raise the system's "
                    "limit of locked memory, or call place without stream_min_tokens and "
                    "cached_experts."
                )
            self[address] = storage

    def unlock(self, kept: Collection[int] = ()) -> None:
        """Unlocks all but the addresses in `kept`, after all copies."""
        unused = [address for address in self if address not in kept]
        if unused:
            for device in self.devices:
                torch.cuda.synchronize(device)
        for address in unused:
            torch.cuda.cudart().cudaHostUnregister(address)
            del self[address]
