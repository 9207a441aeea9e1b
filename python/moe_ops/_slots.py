"""Order between copies into slots of a GPU's memory and the work that reads the slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


class SlotStream:
    """Stream that fills slots on a CUDA device.

    Attributes:
        stream: the stream of the copies.
        ready: one event per slot, after its last copy.
    """

    def __init__(self, device: torch.device, num_slots: int) -> None:
        self.device = device
        self.stream: Any = torch.cuda.Stream(device)
        self.ready: list[Any] = [torch.cuda.Event() for _ in range(num_slots)]
        self._used: list[Any] = [None] * num_slots

    @contextmanager
    def filling(self, slot: int) -> Iterator[None]:
        """Runs copies into a slot on the stream, after the work that reads its old contents."""
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            if self._used[slot] is not None:
                self.stream.wait_event(self._used[slot])
            yield
            self.ready[slot].record(self.stream)

    def wait_for(self, slots: Sequence[int]) -> None:
        """Makes the caller's stream wait until these slots are filled."""
        stream = torch.cuda.current_stream(self.device)
        for slot in slots:
            stream.wait_event(self.ready[slot])

    def used(self, slots: Sequence[int]) -> None:
        """Records that the work submitted so far to the caller's stream reads these slots."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        for slot in slots:
            self._used[slot] = event
