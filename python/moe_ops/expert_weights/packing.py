"""Packed copies of expert weights for inference: when they are made and dropped.

Kernels read weights faster from a copy in their own order (`moe_ops.pack_experts`). Layers and
switched Hugging Face blocks make such copies automatically, and never read an outdated one:

- A copy is valid for the storage, version, shape, strides and dtype of its weights. Every call
  compares them, so in-place updates, `load_state_dict`, `.to()` and new parameters invalidate it.
- A call that needs gradients of the weights invalidates it, and so does a step of an optimizer with
  the weights: fused optimizers change weights without a new version.
- A write through `.data` or a NumPy view leaves storage and version unchanged. An exact check would
  read all weights, which a copy is meant to avoid. So `moe_ffn_packed` compares some elements of
  each expert that it uses, different ones at each call; its docstring states what this may miss
  temporarily. Call `unpack_weights` or `train()` after such a write.

Copies are stored outside the modules, in a dictionary with weak keys: they are not part of
parameters, state dicts, pickles and deep copies, and are freed with their module.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from moe_ops import _library
from moe_ops._private_torch import len_torch_dispatch_stack
from moe_ops._sharded import check_whole, has_own_experts, local_part, name_of
from moe_ops.memory import (
    BYTES_A_CALL,
    ROWS_THAT_COUNT,
    advise_huge_pages,
    available_memory,
    counted_rows,
    is_plain,
    move_when_paid,
    register_holder,
    take_turn,
)
from moe_ops.numerics import is_batch_invariant_enabled
from moe_ops.ops import moe_ffn, moe_ffn_packed, pack_experts
from moe_ops.ops.gated_act import GATED_ACTIVATIONS
from moe_ops.ops.moe_ffn_packed import packed_bytes_of

from .policy import Settings, settings_from_environment
from .registry import hooks

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Experts are packed automatically once their unchanged weights have processed this number of rows
# per expert, of the rows per call that count (`memory.counted_rows`). At that point calls would
# have saved about as much as packing costs on slow memory: experts that stop right after packing
# lose at most what they could have saved, and others gain.
ROWS_PER_EXPERT = 64 * ROWS_THAT_COUNT
# Smaller weights stay in a cache, and a copy would not pay off.
MIN_BYTES = 1 << 20
# Copies may take this fraction, 1 / 4, of the memory that is available without them.
MEMORY_SHARE = 4
_TEMPORARY_BYTES = 1 << 20


class Packable(NamedTuple):
    """Weights to pack: [E, 2I, H] (`halves`: gate, then up) or [E, I, H], and [E, H, I]."""

    w_gate_up: Tensor
    w_down: Tensor
    halves: bool


class _Copies(NamedTuple):
    key: tuple[Any, ...]
    gate_up: Tensor
    down: Tensor
    asked_for: bool  # True if `pack_weights` made them.


class _State:
    """Packing state of a module. `copies` is replaced as a whole, so readers need no lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.copies: _Copies | None = None
        self.begun: _Copies | None = None  # The first `packed` experts of these are complete.
        self.packed = 0
        self.reserved = 0  # Bytes of complete copies or copies in progress.
        self.packing = False
        self.invalidate()

    def invalidate(self) -> None:
        """Drops copies and count, by single assignments: safe with concurrent readers."""
        self.copies = self.begun = None
        if not self.packing:
            self.reserved = 0
        self.key: tuple[Any, ...] | None = None
        self.storages: tuple[StorageWeakRef, ...] = ()
        self.rows = 0

    @property
    def waits(self) -> bool:
        """True if the module may be packed automatically later."""
        return self.rows > 0 and self.copies is None

    @property
    def num_bytes(self) -> int:
        copies = self.copies or self.begun
        return 0 if copies is None else copies.gate_up.numel() + copies.down.numel()

    def begin(self, key: tuple[Any, ...], weights: Packable) -> None:
        """Starts counting for weights with this key."""
        self.invalidate()
        # A weak reference prevents reuse of a storage's address.
        self.storages = tuple(StorageWeakRef(w.untyped_storage()) for w in weights[:2])
        self.key = key


_banks: weakref.WeakKeyDictionary[nn.Module, _State] = weakref.WeakKeyDictionary()
_lock = threading.Lock()  # Guards _banks and reservations.


def expert_ffn(
    bank: nn.Module,
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "swiglu",
    interleaved: bool = False,
    **rest: Any,
) -> Tensor:
    """Computes moe_ffn with the weights of `bank`, from packed copies if it has or now makes them.

    Compiled and exported graphs contain moe_ffn: they outlive checks made during tracing.
    """
    kwargs: dict[str, Any] = {
        "b_gate_up": b_gate_up,
        "b_down": b_down,
        "activation": activation,
        "interleaved": interleaved,
        **rest,
    }
    copies = None
    # Small weights are neither packed nor moved, unless somebody asks for it.
    small = w_gate_up.nbytes + w_down.nbytes < MIN_BYTES and bank not in _banks
    if not (torch.compiler.is_compiling() or (small and _settings.policy != "always")):
        halves = _has_halves(activation, interleaved)
        others = (x, topk_weights, b_gate_up, b_down)
        copies = _copies_for(bank, Packable(w_gate_up, w_down, halves), others, topk_ids)
        if copies is None and not _is_traced():
            move_when_paid(bank, topk_ids.numel(), w_gate_up, w_down)
    if copies is None:
        return moe_ffn(x, w_gate_up, w_down, topk_weights, topk_ids, **kwargs)
    stale = _library.stale_panels()
    y = moe_ffn_packed(
        x, w_gate_up, w_down, copies.gate_up, copies.down, topk_weights, topk_ids, **kwargs
    )
    # The stale copy may belong to a concurrent call of other experts, which is harmless.
    if _library.stale_panels() != stale:
        invalidate(bank)
    return y


def invalidate(module: nn.Module) -> None:
    """Drops the copies of one module."""
    state = _banks.get(module)
    if state is not None:
        state.invalidate()


def invalidate_if_changed(module: nn.Module) -> None:
    """Drops the copies of one module if its weights are not the packed ones."""
    state = _banks.get(module)
    if state is not None and state.copies is not None:
        weights = packable_weights(module)
        if weights is None or not _plain(weights) or _key(weights) != state.key:
            state.invalidate()


# ---------------------------------------------------------------------------------- inside


def _copies_for(
    bank: nn.Module, weights: Packable, others: tuple[Tensor | None, ...], topk_ids: Tensor
) -> _Copies | None:
    state = _banks.get(bank)
    settings = _settings
    if state is None and (settings.policy == "off" or bank.training):
        return None
    if torch.is_grad_enabled():
        if weights.w_gate_up.requires_grad or weights.w_down.requires_grad:
            if state is not None:
                state.invalidate()
            return None
        if any(t is not None and t.requires_grad for t in others):
            return None
    if _is_traced() or _autocast_casts(weights.w_down):
        return None
    key = _key(weights) if _plain(weights) else None
    if key is None:
        if state is not None:
            state.invalidate()
        return None
    if state is not None and (copies := state.copies) is not None and copies.key == key:
        # GEMMs round differently with packed weights. With automatic copies, made after some use, a
        # token's result would depend bitwise on earlier calls.
        if copies.asked_for or settings.policy == "always" or not is_batch_invariant_enabled():
            return copies
        return None
    if settings.policy == "off" or bank.training:
        if state is not None and state.key != key:
            state.invalidate()
        return None
    if state is None:
        state = _state_of(bank)
    with state.lock:
        if state.packing:
            return None
        if state.key != key:
            state.begin(key, weights)
        due = _is_due(state, weights, settings)
        state.rows += counted_rows(topk_ids.numel(), weights.w_down.shape[0])
        if not due:
            return None
        at_once = settings.policy == "always"
        if not (at_once or take_turn(sum(s.waits for s in list(_banks.values())))):
            return None
        if state.begun is None and not _reserve(state, weights, settings):
            return None
        state.packing = True
    return _pack(state, key, weights, asked_for=False, most=None if at_once else BYTES_A_CALL)


def _is_due(state: _State, weights: Packable, settings: Settings) -> bool:
    if settings.policy == "always":
        return True
    return (
        state.rows >= ROWS_PER_EXPERT * weights.w_down.shape[0]
        and sum(w.numel() * w.element_size() for w in weights[:2]) >= MIN_BYTES
        and not torch.are_deterministic_algorithms_enabled()
        and not is_batch_invariant_enabled()
    )


def _pack(
    state: _State,
    key: tuple[Any, ...],
    weights: Packable,
    *,
    asked_for: bool,
    most: int | None = None,
) -> _Copies | None:
    """Packs without holding the lock: other threads use the weights meanwhile.

    Args:
        most: maximum bytes to pack in this call. The rest is left to later calls, and None is
            returned.
    """
    begun, first = state.begun, state.packed
    num_experts = weights.w_down.shape[0]
    end = num_experts
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            if begun is None:
                first = 0
                begun = _Copies(
                    key,
                    _new_copy(weights.w_gate_up, weights.halves),
                    _new_copy(weights.w_down, False),
                    asked_for,
                )
            if most is not None:
                an_expert = max(1, _needed(weights) // num_experts)
                end = min(num_experts, first + max(1, most // an_expert))
            _pack_experts(begun.gate_up, weights.w_gate_up, weights.halves, first, end)
            _pack_experts(begun.down, weights.w_down, False, first, end)
    except (MemoryError, RuntimeError):  # Out of memory. Automatic copies are optional.
        begun = None
        if asked_for:
            raise
    finally:
        copies = None
        with state.lock:
            state.packing = False
            # The weights may have changed, or the copies been invalidated, in the meantime.
            if begun is None or state.key != key or _key(weights) != key:
                state.invalidate()
            elif end < num_experts:
                state.begun, state.packed = begun, end
            else:
                state.copies = copies = begun
                state.begun = None
    return copies


def _new_copy(w: Tensor, halves: bool) -> Tensor:
    copy = torch.empty(packed_bytes_of(w, halves), dtype=torch.uint8)
    advise_huge_pages(copy)
    return copy


def _pack_experts(copy: Tensor, w: Tensor, halves: bool, first: int, end: int) -> None:
    """Writes the experts first .. end - 1 into a copy of all, a few at a time to stay in cache."""
    size = copy.numel() // w.shape[0]
    step = max(1, _TEMPORARY_BYTES // max(size, 1))
    for e in range(first, end, step):
        stop = min(e + step, end)
        copy[e * size : stop * size] = pack_experts(w[e:stop], halves=halves)


def pack_now(bank: nn.Module, weights: Packable) -> None:
    state, key = _state_of(bank), _key(weights)
    assert key is not None
    with state.lock:
        if (copies := state.copies) is not None and copies.key == key:
            state.copies = copies._replace(asked_for=True)
            return
        state.begin(key, weights)
        state.reserved = _needed(weights)
        state.packing = True
    if _pack(state, key, weights, asked_for=True) is None:
        raise RuntimeError(
            f"pack_weights: weights of {type(bank).__name__} must not change while they are packed."
        )


def _needed(weights: Packable) -> int:
    return packed_bytes_of(weights.w_gate_up, weights.halves) + packed_bytes_of(
        weights.w_down, False
    )


def _reserve(state: _State, weights: Packable, settings: Settings) -> bool:
    needed = _needed(weights)
    with _lock:
        others = sum(s.reserved for s in list(_banks.values()))
        limit = settings.max_bytes
        if limit is None and settings.policy != "always":
            limit = budget(others)
        if limit is not None and others + needed > limit:
            state.rows = 0  # Tried again after as much use.
            return False
        state.reserved = needed
        return True


def _plain(weights: Packable) -> bool:
    """Returns whether the weights are dense CPU tensors in a dtype that moe_ffn supports."""
    w_gate_up, w_down, _ = weights
    return (
        is_plain(w_gate_up)
        and is_plain(w_down)
        and w_gate_up.dim() == w_down.dim() == 3
        and w_gate_up.dtype == w_down.dtype
        and w_down.dtype in _FLOATS
    )


def _key(weights: Packable) -> tuple[Any, ...] | None:
    """Returns a key that identifies these weights and changes when they do."""
    if weights.w_gate_up.is_inference() or weights.w_down.is_inference():
        return None  # They have no version counter.
    return weights.halves, _identity(weights.w_gate_up), _identity(weights.w_down)


def _identity(w: Tensor) -> tuple[Any, ...]:
    return (
        w.untyped_storage()._cdata,
        w.data_ptr(),
        w._version,
        w.dtype,
        w.shape,
        w.stride(),
    )


def _is_traced() -> bool:
    """Returns whether the call is being recorded or interpreted: a copy would become a constant."""
    return torch.jit.is_tracing() or len_torch_dispatch_stack() > 0


def _autocast_casts(w: Tensor) -> bool:
    return (
        torch.is_autocast_enabled("cpu")
        and w.dtype != torch.float64
        and w.dtype != torch.get_autocast_dtype("cpu")
    )


def check_can_pack(prefix: str, bank: nn.Module, weights: Packable) -> None:
    for name, w in zip(weights._fields, weights[:2], strict=False):
        what = name_of(bank, w, prefix) or name
        check_whole("pack_weights", what, w, "copies need whole weights, run it without")
        if w.is_inference():
            raise ValueError(
                f"pack_weights: {name} must be made outside inference mode, whose tensors do not "
                "count their versions, got an inference tensor."
            )
    if not _plain(weights):
        what = ", ".join(f"{type(w).__name__} {w.dtype} on {w.device}" for w in weights[:2])
        where = f" of {prefix}" if prefix else ""
        raise ValueError(
            f"pack_weights: expert weights{where} must be plain tensors of one float type on the "
            f"CPU, got {what}."
        )


def packable_weights(module: nn.Module) -> Packable | None:
    """Returns the weights that a call of `module` passes to `expert_ffn`; None if it does not call
    it."""
    for hook in hooks():
        if not hook.reads_packed(module):
            continue
        try:
            weights = hook.weights(module)
        except ValueError:  # moe_ffn cannot run them.
            continue
        if weights is None or len(weights.gate_up) > 1:
            continue
        if has_own_experts(module, weights.down):
            weights = weights.local()
        (w_gate_up,), w_down = weights.gate_up, weights.down
        if w_gate_up.dtype == w_down.dtype:
            between = weights.activation
            halves = _has_halves(between["activation"], between.get("interleaved", False))
            return Packable(w_gate_up, w_down, halves)
    return None


def _has_halves(activation: str, interleaved: bool) -> bool:
    return activation in GATED_ACTIVATIONS and not interleaved


def _state_of(bank: nn.Module) -> _State:
    with _lock:
        state = _banks.get(bank)
        if state is None:
            _watch_optimizers()
            state = _banks[bank] = _State()
        return state


def states(model: nn.Module | None = None) -> list[_State]:
    """Returns the states of the modules of `model`, or of all modules if it is None."""
    with _lock:
        if model is None:
            return list(_banks.values())
        return [_banks[module] for module in model.modules() if module in _banks]


_optimizer_hook: Any = None


def _watch_optimizers() -> None:
    global _optimizer_hook
    if _optimizer_hook is None:
        _optimizer_hook = register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    watched = [s for s in states() if s.storages]
    if not watched:
        return
    params = (p.detach() for group in optimizer.param_groups for p in group["params"])
    stepped = {p.untyped_storage()._cdata for p in map(local_part, params) if type(p) is Tensor}
    for state in watched:
        if any(s.cdata in stepped for s in state.storages):
            state.invalidate()


register_holder("packed weights", lambda: sum(s.num_bytes for s in states()))


def current_settings() -> Settings:
    return _settings


def apply_settings(settings: Settings) -> None:
    """Sets the policy of the process; "off" drops automatic copies."""
    global _settings
    _settings = settings
    if settings.policy == "off":
        for state in states():
            copies = state.copies or state.begun
            if copies is not None and not copies.asked_for:
                state.invalidate()


def budget(copies: int) -> int:
    """Returns the default byte limit of copies, for the current bytes of copies."""
    return (available_memory() + copies) // MEMORY_SHARE


_settings = settings_from_environment()
