"""Dispatchers by name, and their automatic selection.

Letters: E experts, K slots per token, n ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from .dispatch import AllGatherDispatcher, LocalDispatcher, ReplicatedDispatcher
from .exchange import AllToAllDispatcher, DedupAllToAllDispatcher, PaddedAllToAllDispatcher
from .placement import ExpertPlacement

Factory = Callable[..., Any]
_factories: dict[str, Factory] = {
    "gather": AllGatherDispatcher,
    "local": LocalDispatcher,
    "padded": PaddedAllToAllDispatcher,
    "shared": ReplicatedDispatcher,
    "slots": AllToAllDispatcher,
    "tokens": DedupAllToAllDispatcher,
}


def register_dispatcher(name: str, factory: Factory) -> None:
    """Registers a dispatcher under a name for `make_dispatcher`, for example one for a custom
    communication engine.

    Args:
        name: a new name, not "auto".
        factory: ``(group, placement, **options)`` -> an object with the interface of `Dispatcher`.

    Raises:
        ValueError: the name is taken.
    """
    if name == "auto" or name in _factories:
        raise ValueError(f"register_dispatcher: name must be a new one, got {name!r}.")
    _factories[name] = factory


def ranks_of_a_token(num_experts: int, num_ranks: int, top_k: int) -> float:
    """Returns the mean number of ranks that a token visits if all sets of K experts are equally
    likely: n (1 - C(E - E/n, K) / C(E, K))."""
    absent, local = 1.0, num_experts / num_ranks
    for k in range(top_k):
        absent *= max(num_experts - local - k, 0.0) / (num_experts - k)
    return num_ranks * (1.0 - absent)


def make_dispatcher(
    group: ProcessGroup | DeviceMesh | None,
    num_experts: int,
    *,
    top_k: int | None = None,
    dispatch: str = "auto",
    placement: ExpertPlacement | None = None,
    shared_batch: bool = False,
    same_bits: bool = False,
    **options: Any,
) -> Any:
    """Returns a dispatcher for E experts on the ranks of a group.

    Args:
        group: the ranks: a process group, a one-dimensional mesh, or None for a single process.
        num_experts: E.
        top_k: K, if known.
        dispatch: the name of a dispatcher, or "auto" for the first that applies: "local" on one
            rank; "shared" with `shared_batch`; "slots" with `same_bits`; "gather" for n <= K / 2,
            where all-to-all would send about as much; "slots" if a token's experts are on at least
            0.9 K ranks on average; "tokens".
        placement: the experts of each rank; None is `ExpertPlacement.contiguous`.
        shared_batch: all ranks have the same tokens.
        same_bits: results must be bitwise identical to those of one process (float32 and float64).
        options: arguments of the dispatcher.

    Raises:
        ValueError: an unknown name, K above E, experts that do not fit the ranks, or options that
            the dispatcher does not have.
    """
    num_ranks = 1 if group is None else group.size()
    if placement is None:
        placement = ExpertPlacement.contiguous(num_experts, num_ranks)
    if placement.num_experts != num_experts:
        raise ValueError(
            f"make_dispatcher: placement must be of {num_experts} experts, got "
            f"{placement.num_experts}."
        )
    if top_k is not None and not 1 <= top_k <= num_experts:
        raise ValueError(
            f"make_dispatcher: top_k must be between 1 and {num_experts}, got {top_k}."
        )
    if dispatch == "auto":
        dispatch = _best(num_ranks, num_experts, top_k, shared_batch, same_bits)
    if dispatch not in _factories:
        known = ", ".join(sorted(("auto", *_factories)))
        raise ValueError(f"make_dispatcher: dispatch must be one of {known}, got {dispatch!r}.")
    factory = _factories[dispatch]
    parameters = inspect.signature(factory).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not takes_all and (unknown := sorted(options.keys() - parameters.keys())):
        has = ", ".join(sorted(parameters.keys() - {"group", "placement"})) or "none"
        raise ValueError(
            f"make_dispatcher: options must be those of {dispatch!r} ({has}), got {unknown[0]}."
        )
    return factory(group, placement=placement, **options)


def _best(
    num_ranks: int, num_experts: int, top_k: int | None, shared_batch: bool, same_bits: bool
) -> str:
    if num_ranks == 1:
        return "local"
    if shared_batch:
        return "shared"
    if same_bits:
        return "slots"
    if top_k is None:
        return "tokens"
    if 2 * num_ranks <= top_k:
        return "gather"
    visits = ranks_of_a_token(num_experts, num_ranks, top_k)
    return "slots" if visits >= 0.9 * top_k else "tokens"
