"""Cache of placed experts on the GPU, for calls that do not copy a whole layer there.

Each module has N slots on the GPU, one expert in each. A call computes the top-k selections of
cached experts there and all others on the CPU, and adds the two results. An expert that the CPU
computed is then copied into the least recently used slot, which serves once its copy has ended:
no call waits for a copy. A call that selects more than N experts, such as a long prompt, fills free
slots only: if it evicted experts, it would replace all of them.

Letters: E experts, T tokens, K experts per token.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_ops._seam import take_tensors
from moe_ops._slots import SlotStream
from moe_ops.hf.experts.pinned import PinnedStorages
from moe_ops.hf.experts.streamed import identity_of, tensors_of, with_tensors
from moe_ops.offload.policy import LRUPolicy

_ATTRIBUTE = "_moe_ops_cache"
_SHARED = ("x_scale",)  # Tensors without a dimension for experts.


class ExpertSlots:
    """Slots on a GPU for experts of one module.

    Attributes:
        num_slots: N.
        hits: number of (token, expert) pairs computed on the GPU.
        misses: number of (token, expert) pairs computed on the CPU, including those whose expert
            was still being copied.
        copies: number of experts copied into slots.

    Args:
        num_slots: N, at least 1.
        device_type: device type of the calls that use the slots. On the CPU, copies are plain.
    """

    def __init__(self, num_slots: int, device_type: str) -> None:
        self.num_slots, self.device_type = num_slots, device_type
        self.hits = self.misses = self.copies = 0
        self._lock = threading.RLock()
        self._memory = PinnedStorages()
        self.release()
        # The end of the process unlocks memory, too.
        weakref.finalize(self, self._memory.unlock).atexit = False

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies of a model get slots of their own.
        return ExpertSlots, (self.num_slots, self.device_type)

    @property
    def experts(self) -> list[int]:
        """Returns the experts whose slots can serve now."""
        with self._lock:
            return [expert for expert, slot in self._slot_of.items() if self._is_filled(slot)]

    def release(self) -> None:
        """Frees the slots and unlocks all memory."""
        with self._lock:
            self._memory.unlock()
            self._key: Any = None
            self._num_slots = self.num_slots
            self._tensors: list[Tensor] = []
            # Tensors with a part for each expert, of slots and of the module, and rows per expert.
            self._per_expert: list[tuple[Tensor, int]] = []
            self._sources_per_expert: list[tuple[Tensor, int]] = []
            self._stream: SlotStream | None = None
            self.clear()

    def clear(self) -> None:
        """Empties the slots, because weights may have changed."""
        with self._lock:
            self._slot_of: dict[int, int] = {}
            self._free = list(range(self._num_slots))
            self._policy = LRUPolicy()

    def find(self, module: nn.Module, topk_ids: Tensor, device: torch.device) -> Tensor:
        """Returns the slot of each selection [T, K] int64 on the CPU, -1 for those that miss."""
        num_experts = _num_experts(module)
        self._prepare(module, num_experts, device)
        valid = (topk_ids >= 0) & (topk_ids < num_experts)
        table = torch.full((num_experts + 1,), -1, device="cpu")
        for expert, slot in self._slot_of.items():
            if self._is_filled(slot):
                table[expert] = slot
        slots = table[topk_ids.masked_fill(~valid, num_experts).long()]
        num_hits = int((slots >= 0).sum())
        self.hits += num_hits
        self.misses += int(valid.sum()) - num_hits
        return slots

    def run(
        self, module: nn.Module, cls: Any, slots: Tensor, call: Callable[..., Tensor]
    ) -> Tensor:
        """Returns ``call(experts)`` for a module of class `cls` with the slots as its experts, in
        the order of the current stream."""
        experts = with_tensors(module, cls, self._tensors)
        for name in ("num_experts", "num_routed_experts"):
            if name in experts.__dict__:
                experts.__dict__[name] = self._num_slots
        read = sorted(set(slots[slots >= 0].tolist()))
        if self._stream is not None:
            self._stream.wait_for(read)
            for t in self._tensors:
                t.record_stream(torch.cuda.current_stream(t.device))
        try:
            return call(functools.partial(cls.forward, experts))
        finally:
            if self._stream is not None:
                self._stream.used(read)

    @torch.no_grad()
    def admit(self, module: nn.Module, topk_ids: Tensor) -> None:
        """Starts the copies of a call's experts that have no slot. Experts of this call, and slots
        whose copy has not ended, keep their places; a call of more experts than slots evicts none.
        The last tokens' experts come first."""
        num_experts = _num_experts(module)
        latest = dict.fromkeys(reversed(topk_ids.flatten().tolist()))
        used = [expert for expert in latest if 0 <= expert < num_experts]
        with self._lock:
            if self._key is None or self._key != _key(module):
                return  # Another thread released the slots, or weights changed meanwhile.
            self._policy.use(0, used[::-1])
            idle = {
                (0, expert)
                for expert, slot in self._slot_of.items()
                if expert not in latest and self._is_filled(slot)
            }
            if len(used) > self._num_slots:
                idle.clear()
            for expert in used:
                if expert in self._slot_of:
                    continue
                if not self._free:
                    if not idle:
                        break
                    victim = self._policy.victim(idle)
                    idle.remove(victim)
                    self._free.append(self._slot_of.pop(victim[1]))
                self._copy(expert, self._free[-1], num_experts)
                self._slot_of[expert] = self._free.pop()
                self.copies += 1

    def _copy(self, expert: int, slot: int, num_experts: int) -> None:
        targets = [_by_expert(t, self._num_slots, n) for t, n in self._per_expert]
        sources = [_by_expert(t, num_experts, n) for t, n in self._sources_per_expert]
        if self._stream is None:
            for target, source in zip(targets, sources, strict=True):
                target[slot].copy_(source[expert])
            return
        with self._stream.filling(slot):
            for target, source in zip(targets, sources, strict=True):
                target[slot].copy_(source[expert], non_blocking=True)

    def _is_filled(self, slot: int) -> bool:
        """Returns whether the last copy into a slot has ended."""
        return self._stream is None or bool(self._stream.ready[slot].query())

    def _prepare(self, module: nn.Module, num_experts: int, device: torch.device) -> None:
        """Allocates slots for these weights, empty ones if the weights are others than before."""
        if self._key is not None and self._key == _key(module):
            if self._tensors[0].device == device:
                return
        self.release()
        self._num_slots = min(self.num_slots, num_experts)
        self.clear()
        names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
        tensors = tensors_of(module)
        if device.type == "cuda":
            self._memory.devices.add(device)
            self._memory.pin(tensors, lambda: None)
        with torch.inference_mode(False), torch.no_grad():
            for name, t in zip(names, tensors, strict=True):
                if name in _SHARED or name.startswith("post_expert_norm."):
                    self._tensors.append(t.detach().to(device, copy=True))
                    continue
                # DBRX has the rows of all experts in one dimension.
                rows = t.shape[0] // num_experts if t.dim() == 2 else 1
                shape = (self._num_slots * rows, *t.shape[1:])
                empty = torch.zeros(shape, dtype=t.dtype, device=device)
                self._tensors.append(empty)
                self._per_expert.append((empty, rows))
                source = t.detach()
                if device.type == "cuda" and not source.is_pinned():
                    source = source.contiguous().pin_memory()  # Small, see `PinnedStorages`.
                self._sources_per_expert.append((source, rows))
        if device.type == "cuda":
            self._stream = SlotStream(device, self._num_slots, _copy_stream(device))
            # Their memory may have been used by the current stream before.
            self._stream.used(range(self._num_slots))
            for t in self._tensors:
                t.record_stream(self._stream.stream)
        self._key = _key(module)


@functools.cache
def _copy_stream(device: torch.device) -> Any:
    """Returns the stream of all copies into slots of a device."""
    return torch.cuda.Stream(device)


def _num_experts(module: Any) -> int:
    """Returns E; identity experts, which have no weights, do not count."""
    number: int = getattr(module, "num_routed_experts", None) or module.num_experts
    return number


def _by_expert(t: Tensor, num_experts: int, rows: int) -> Tensor:
    return t if rows == 1 else t.view(num_experts, rows, *t.shape[1:])


def _key(module: nn.Module) -> tuple[Any, ...]:
    return tuple(map(identity_of, tensors_of(module)))


def set_cached(modules: Sequence[nn.Module], device_type: str, num_slots: int | None) -> None:
    """Gives each of these placed modules slots for experts; removes them for None."""
    for module in modules:
        old = module.__dict__.pop(_ATTRIBUTE, None)
        if old is not None:
            old.release()
        if num_slots is not None:
            module.__dict__[_ATTRIBUTE] = ExpertSlots(num_slots, device_type)


def cache_of(module: nn.Module) -> ExpertSlots | None:
    """Returns the slots of a placed module; None if it has none."""
    return module.__dict__.get(_ATTRIBUTE)


def serves(module: nn.Module, x: Tensor) -> bool:
    """Returns whether a call with tokens x uses the cache. Calls with gradients do not; those that
    may precede a change of the weights empty it."""
    cache = cache_of(module)
    if cache is None:
        return False
    trains = any(p.requires_grad for p in module.parameters())
    if trains and (module.training or torch.is_grad_enabled()):
        cache.clear()
        return False
    takes = x.device.type == cache.device_type and not torch.is_grad_enabled()
    return takes and _is_on_moe_ops(module)


def _is_on_moe_ops(module: Any) -> bool:
    """Returns whether the module's forward accepts empty slots; that of transformers may not."""
    own = type(module)._moe_ops_own
    if getattr(own, "quantized_bank", False) or hasattr(own, "replaces"):
        return True
    config = getattr(module, "config", None)
    return getattr(config, "_experts_implementation", None) == "moe_ops"


@torch.compiler.disable
def run_cached(
    run_on_cpu: Callable[..., Tensor],
    module: nn.Module,
    cls: Any,
    run: Callable[..., Tensor],
    *args: Any,
    meanwhile: Callable[[], object] | None = None,
    **kwargs: Any,
) -> Tensor:
    """Returns ``run(*args, **kwargs)`` like `moe_ops._seam.run_on_cpu`; cached experts are computed
    where the tensors are."""
    cache = cache_of(module)
    assert cache is not None
    tensors, rest = take_tensors(args, kwargs)
    # The only integers of a call are the ids of its experts.
    where = next(i for i, t in enumerate(tensors) if not t.is_floating_point())
    device = tensors[0].device
    on_device: list[Tensor] = []
    topk_ids = tensors[where]

    def on_cpu(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal topk_ids
        copies, _ = take_tensors(args, kwargs)
        topk_ids = copies[where]
        with cache._lock:
            slots = cache.find(module, topk_ids, device)
            is_hit = slots >= 0
            if not is_hit.any():
                return run(*args, **kwargs)
            slot_ids = slots.to(topk_ids.dtype)
            if device.type == "cuda":
                slot_ids = slot_ids.pin_memory().to(device, non_blocking=True)
            given = [slot_ids if i == where else t for i, t in enumerate(tensors)]
            on_device.append(cache.run(module, cls, slots, lambda f: rest.run(f, given)))
        if is_hit.all():
            return copies[0].new_empty(0)
        copies[where] = topk_ids.masked_fill(is_hit, -1)
        return rest.run(run, copies)

    y = run_on_cpu(on_cpu, *args, meanwhile=meanwhile, **kwargs)
    if on_device:
        y = on_device[0] if y.numel() == 0 else y + on_device[0]
    cache.admit(module, topk_ids)
    return y
