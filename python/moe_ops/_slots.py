"""Order between copies into slots of a GPU's memory and the work that reads the slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


class SlotStream:
    """Stream that fills slots on a CUDA device.

    Attributes:
        stream: the stream of the copies; by default a new one.
        ready: one event per slot, after its last copy.
    """

    def __init__(self, device: torch.device, num_slots: int, stream: Any = None) -> None:
        self.device = device
        self.stream: Any = torch.cuda.Stream(device) if stream is None else stream
        self.ready: list[Any] = [torch.cuda.Event() for _ in range(num_slots)]
        # For each slot, the last event of each stream that reads it.
        self._used: list[dict[Any, Any]] = [{} for _ in range(num_slots)]

    @contextmanager
    def filling(self, slot: int) -> Iterator[None]:
        """Runs copies into a slot on the stream, after the work that reads its old contents."""
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            for event in self._used[slot].values():
                self.stream.wait_event(event)
            self._used[slot].clear()
            yield
            self.ready[slot].record(self.stream)

    def wait_for(self, slots: Sequence[int]) -> None:
        """Makes the caller's stream wait until these slots are filled."""
        stream = torch.cuda.current_stream(self.device)
        for slot in slots:
            stream.wait_event(self.ready[slot])

    def used(self, slots: Sequence[int]) -> None:
        """Records that the work submitted so far to the caller's stream reads these slots."""
        event, stream = torch.cuda.Event(), torch.cuda.current_stream(self.device)
        event.record(stream)
        for slot in slots:
            self._used[slot][stream] = event
