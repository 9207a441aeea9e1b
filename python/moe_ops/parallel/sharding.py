"""Sharding of experts over ranks, together with FSDP2 or DDP: meshes, weights, gradients, their
norm.

Letters: E experts, n ranks of expert parallelism (EP), each with E / n experts.

A rank of EP computes its experts for the tokens of all n ranks, so an expert's gradient there is
already a sum over these ranks. `fully_shard_moe` and `prepare_ddp` ensure that it is divided like
all others: every gradient is the mean over the ranks of data parallelism.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from moe_ops._private_torch import exclude_from_ddp, set_timeout, timeout_of
from moe_ops._sharded import is_sharded
from moe_ops.layers import Experts, MoE

from .agreement import check_agreement, weight_facts
from .banks import (
    Bank,
    ExpertSharding,
    banks_of,
    places_of,
    tensors_of,
    with_replicas,
)
from .placement import ExpertPlacement


class MoEMeshes(NamedTuple):
    """Groups of ranks as one-dimensional meshes, returned by `init_moe_meshes`.

    Attributes:
        dp: ranks with their own tokens, whose dense weights FSDP2 or DDP handles.
        ep: ranks that share the experts; neighbors, so that they are on one machine if it has
            enough ranks.
        efsdp: ranks with the same experts, over which FSDP2 shards them.
        tp: ranks of tensor parallelism, which read the same tokens.
    """

    dp: DeviceMesh
    ep: DeviceMesh
    efsdp: DeviceMesh
    tp: DeviceMesh


def init_moe_meshes(
    ep: int,
    tp: int = 1,
    *,
    device_type: str | None = None,
    timeout: timedelta | None = None,
) -> MoEMeshes:
    """Creates meshes over all ranks: dp x tp for dense weights, efsdp x ep for experts.

    dp = ranks / tp and efsdp = ranks / ep: experts need no tensor parallelism, so its ranks share
    experts too. Then either each of them passes its own tokens (its part of the sequence) to the
    experts, or ep = tp and `shard_experts(..., dispatch="shared")`.

    Args:
        ep: ranks that share the experts; must divide the number of ranks.
        tp: ranks of tensor parallelism; must divide the number of ranks.
        device_type: "cuda", "cpu"; None is "cpu" with gloo, else torch's current accelerator.
        timeout: of the collectives of all meshes; None is that of `init_process_group`, where torch
            itself would take its default of 10 or 30 minutes.

    All ranks must call this together, after `torch.distributed.init_process_group`.

    Raises:
        ValueError: a size that does not divide the number of ranks.
    """
    ranks = dist.get_world_size()
    for name, size in (("ep", ep), ("tp", tp)):
        if size < 1 or ranks % size:
            raise ValueError(f"init_moe_meshes: {name} must divide the {ranks} ranks, got {size}.")
    if device_type is None:
        device_type = "cpu"
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is not None and dist.get_backend() != "gloo":
            device_type = accelerator.type
    dense = init_device_mesh(device_type, (ranks // tp, tp), mesh_dim_names=("dp", "tp"))
    sparse = init_device_mesh(device_type, (ranks // ep, ep), mesh_dim_names=("efsdp", "ep"))
    timeout = timeout or timeout_of(dist.group.WORLD)
    if timeout is not None:
        for group in (*dense.get_all_groups(), *sparse.get_all_groups()):
            set_timeout(timeout, group)
    return MoEMeshes(dense["dp"], sparse["ep"], sparse["efsdp"], dense["tp"])


def shard_experts(
    model: nn.Module,
    ep_mesh: DeviceMesh,
    dispatch: str = "auto",
    *,
    placement: ExpertPlacement | None = None,
    **options: Any,
) -> nn.Module:
    """Shards all experts of a model over the ranks of `ep_mesh`, in place.

    Rank r of n keeps experts r E / n to (r + 1) E / n - 1 of each `Experts` and `QuantizedExperts`.
    Their tensors become DTensors, Shard(0) over `ep_mesh`, with unchanged names, shapes and numbers
    of experts, so that checkpoints do not depend on the number of ranks. Calls use a dispatcher,
    see `moe_ops.parallel.make_dispatcher`; each rank passes its own tokens.

    With a placement, rows are its P physical experts, and the gradient of an expert is the sum over
    its physical experts. Checkpoints are then written in `canonical_expert_order`.

    Every rank keeps its part of its own weights, which must be equal on all ranks (made from the
    same seed or read from the same file). No weights are sent; the ranks compare their arguments
    and, for each tensor of the model, shape, dtype and a checksum of some elements. On the meta
    device no memory is allocated: call ``shard_experts``, then ``to_empty``, then load the weights.

    Args:
        model: a model, a layer, or a module of experts.
        ep_mesh: a one-dimensional mesh.
        dispatch, options: of `make_dispatcher`, such as dispatch="shared". K is taken from the
            router of each `MoE`.
        placement: of all experts, without empty physical experts; None: contiguous, as above.
            `moe_ops.parallel.move_experts` changes it, but not the number of physical experts.

    Returns:
        `model`.

    Raises:
        ValueError: a mesh with more dimensions, a placement with empty physical experts or another
            number of ranks, no experts, a number of experts that differs from the placement or,
            without one, that n does not divide, experts that are already sharded (FSDP2 must come
            after this), options that the dispatcher does not have, or a rank whose arguments or
            weights differ from those of rank 0. The model is unchanged.
    """
    if not isinstance(ep_mesh, DeviceMesh):
        raise ValueError(
            "shard_experts: ep_mesh must be a mesh, such as init_moe_meshes(ep).ep, got "
            f"{ep_mesh!r:.80}."
        )
    if placement is not None and (
        placement.num_ranks != ep_mesh.size() or -1 in placement.physical
    ):
        raise ValueError(
            f"shard_experts: placement must have no empty place and be for {ep_mesh.size()} ranks, "
            f"got {placement}."
        )
    if ep_mesh.ndim != 1:
        raise ValueError(
            f"shard_experts: ep_mesh must have one dimension, got {tuple(ep_mesh.shape)}."
        )
    arguments = {"dispatch": repr(dispatch), "placement": str(placement)}
    arguments |= {name: repr(value) for name, value in options.items()}
    check_agreement(
        "shard_experts", lambda: {**arguments, **weight_facts(model)}, ep_mesh.get_group()
    )
    banks = dict(banks_of(model))
    if not banks:
        raise ValueError(
            f"shard_experts: model must hold a bank of experts, got {type(model).__name__} without "
            "one."
        )
    for name, bank in banks.items():
        if placement is None and bank.num_experts % ep_mesh.size():
            raise ValueError(
                f"shard_experts: the {ep_mesh.size()} ranks of ep_mesh must divide the experts of "
                f"each bank, got {bank.num_experts} in {name or 'the model'}; a placement may give "
                "some experts several places."
            )
        if placement is not None and placement.num_experts != bank.num_experts:
            raise ValueError(
                f"shard_experts: placement must be of the {bank.num_experts} experts of "
                f"{name or 'the model'}, got one of {placement.num_experts}."
            )
        if any(is_sharded(tensor) for _, tensor in tensors_of(bank)):
            raise ValueError(
                f"shard_experts: {name or 'the model'} must be whole, got a bank that is sharded."
            )
    top_k: dict[nn.Module, int] = {
        m.experts: m.router.top_k for m in model.modules() if isinstance(m, MoE)
    }
    for bank in banks.values():
        how = {"top_k": top_k.get(bank), "dispatch": dispatch, **options}
        chosen = placement or ExpertPlacement.contiguous(bank.num_experts, ep_mesh.size())
        ExpertSharding(ep_mesh, how, chosen).shard(bank)
    return model


def fully_shard_moe(
    block: nn.Module, dp_mesh: DeviceMesh, efsdp_mesh: DeviceMesh, **options: Any
) -> nn.Module:
    """Applies FSDP2 to a block with sharded experts: `fully_shard` with separate meshes for experts
    and other weights.

    Experts are sharded over `efsdp_mesh`, in addition to EP, as a separate group; everything else
    over `dp_mesh`. All gradients are means over the ranks of `dp_mesh`, also if efsdp is 1 and over
    accumulated micro-batches (`set_requires_gradient_sync`). If there are fewer experts than ranks,
    their second dimension is sharded, if its size allows.

    Example:
        shard_experts(model, meshes.ep)
        for block in model.layers:
            fully_shard_moe(block, meshes.dp, meshes.efsdp)
        fully_shard(model, mesh=meshes.dp)

    Args:
        block: a module; without sharded experts this is `fully_shard(block, mesh=dp_mesh)`.
        dp_mesh, efsdp_mesh: from `init_moe_meshes`; two-dimensional for hybrid sharding.
        options: of `fully_shard`, such as `mp_policy`. It does not cast the inputs of experts in a
            block: routing weights stay float32.

    Returns:
        `block`.

    Raises:
        ValueError: gradients reduced in float16 with an efsdp of 1, which FSDP2 divides twice; an
            efsdp_mesh with ranks of the mesh that shares the experts.
    """
    for name, bank in banks_of(block):
        if bank.sharding is None or not isinstance(bank, Experts):
            continue
        both = {*efsdp_mesh.mesh.flatten().tolist()} & {*bank.sharding.ep_mesh.mesh.tolist()}
        if len(both) > 1:
            raise ValueError(
                "fully_shard_moe: efsdp_mesh must have one rank of those that share the experts of "
                f"{name or 'the block'}, got the ranks {sorted(both)}; it comes after dp_mesh."
            )
        shards = efsdp_mesh.shape[-1]
        if shards == 1 and _reduce_dtype(bank, options) == torch.float16:
            raise ValueError(
                "fully_shard_moe: gradients must be reduced in float32 or bfloat16 where efsdp is "
                "1, got float16; give mp_policy a reduce_dtype."
            )
        local = bank.sharding.placement.per_rank
        dim = _by_second_dimension if local < shards else None
        own = dict(options)
        if bank is not block and (policy := options.get("mp_policy")) is not None:
            # The block's tokens already have param_dtype; routing weights stay in float32.
            own["mp_policy"] = dataclasses.replace(policy, cast_forward_inputs=False)
        sharded: Any = fully_shard(
            bank, mesh=efsdp_mesh, shard_placement_fn=dim and dim(shards), **own
        )
        sharded.set_gradient_divide_factor(float(dp_mesh.size()))
        if shards > 1:
            # Other factors than the number of shards are not supported by gloo, and are wrong in
            # bfloat16 in NCCL. With one shard, FSDP2 divides the sum again if it is forced.
            sharded.set_force_sum_reduction_for_comms(True)
    if not isinstance(block, Experts):
        fully_shard(block, mesh=dp_mesh, **options)
    return block


def prepare_ddp(
    model: nn.Module,
    dp_mesh: DeviceMesh | None = None,
    efsdp_mesh: DeviceMesh | None = None,
) -> nn.Module:
    """Prepares a model with sharded experts for `DistributedDataParallel`, in place.

    DDP would overwrite the experts of all ranks with those of rank 0, and average gradients of
    different experts. After this call it ignores experts, and their gradients become means like all
    others: divided by the number of ranks, and summed over the ranks of `efsdp_mesh` when each
    backward produces them.

    Args:
        model: the module to wrap in DDP.
        dp_mesh: ranks of DDP; None is the default group.
        efsdp_mesh: ranks with the same experts; None if all ranks have different ones.

    Returns:
        `model`.

    Raises:
        ValueError: no sharded experts, or ranks with the same experts and no `efsdp_mesh`.
    """
    ranks = dist.get_world_size() if dp_mesh is None else dp_mesh.size()
    replicas = 1 if efsdp_mesh is None else efsdp_mesh.size()
    names = []
    for prefix, bank in banks_of(model):
        if bank.sharding is None:
            continue
        holders = bank.sharding.ep_mesh.size() * replicas
        if holders % ranks:
            raise ValueError(
                f"prepare_ddp: efsdp_mesh must hold the {ranks // bank.sharding.ep_mesh.size()} "
                f"ranks that have the same experts, got {replicas}."
            )
        for name, tensor in tensors_of(bank):
            # DDP puts a dot before the names of its module.
            names += [f"{prefix}.{name}"] if prefix else [name, f".{name}"]
            if tensor.requires_grad:
                tensor.register_hook(_mean_over(ranks, efsdp_mesh))
    if not names:
        raise ValueError(
            f"prepare_ddp: model must hold experts of shard_experts, got {type(model).__name__} "
            "without."
        )
    exclude_from_ddp(model, names)
    return model


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    *,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Clips gradient norms like `torch.nn.utils.clip_grad_norm_`, for parameters on different
    meshes.

    The norm is that of all gradients of the whole model, equal on all ranks: plain gradients count
    once, because they are equal everywhere; DTensors count with all their parts, and replicated
    experts with their first physical expert. All ranks must call it with the same parameters.

    Args:
        parameters: parameters whose gradients are clipped in place; those without a gradient are
            ignored.
        max_norm: maximum norm after clipping.
        norm_type: p of the p-norm, may be inf.
        error_if_nonfinite: raise RuntimeError if the norm is infinite or NaN.
        foreach: see torch.

    Returns:
        The norm before clipping, a plain scalar tensor; 0 without gradients.
    """
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    groups: dict[DeviceMesh | None, list[Tensor]] = {}
    for p in given:
        if p.grad is not None:
            mesh = p.grad.device_mesh if isinstance(p.grad, DTensor) else None
            groups.setdefault(mesh, []).append(p)
    if not groups:
        return torch.tensor(0.0)
    norms = []
    repeated = {id(p): bank for bank in with_replicas for p in bank.parameters(recurse=False)}
    for members in groups.values():
        grads = [_counted_once(p, repeated.get(id(p))) for p in members]
        norm = get_total_norm(grads, norm_type, foreach=foreach)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    first = norms[0]
    total = torch.linalg.vector_norm(torch.stack([n.to(first) for n in norms]), norm_type)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(
            f"clip_grad_norm_: the norm of order {norm_type} of the gradients must be finite, got "
            f"{total.item()}."
        )
    for members in groups.values():
        clip_grads_with_norm_(members, max_norm, total, foreach=foreach)
    return total


# ------------------------------------------------------------------------------------------ inside


def _counted_once(p: Tensor, bank: Bank | None) -> Tensor:
    """Returns the gradient of a parameter, with 0 in the rows of replicas other than the first."""
    grad = p.grad
    if bank is None or not isinstance(grad, DTensor):
        assert grad is not None
        return grad
    first = set(bank.sharding.placement.first_places)
    again = [row for row, place in enumerate(places_of(bank, grad)) if place not in first]
    local = grad.to_local().clone()
    local[again] = 0
    return DTensor.from_local(
        local,
        grad.device_mesh,
        grad.placements,
        run_check=False,
        shape=grad.shape,
        stride=grad.stride(),
    )


def _by_second_dimension(shards: int) -> Callable[[nn.Parameter], Shard | None]:
    """Returns a placement function: `Shard(1)` if `shards` divides dimension 1, else FSDP's
    default."""
    return lambda p: Shard(1) if p.shape[1] % shards == 0 else None


def _reduce_dtype(bank: Experts, options: dict[str, Any]) -> torch.dtype:
    policy = options.get("mp_policy")
    chosen = policy and (policy.reduce_dtype or policy.param_dtype)
    return chosen or bank.w_down.dtype


def _mean_over(ranks: int, replicas: DeviceMesh | None) -> Callable[[Tensor], Tensor]:
    def hook(grad: Tensor) -> Tensor:
        assert isinstance(grad, DTensor)
        local = grad.to_local() / ranks
        if replicas is not None and replicas.size() > 1:
            dist.all_reduce(local, group=replicas.get_group())
        return DTensor.from_local(local, grad.device_mesh, grad.placements, run_check=False)

    return hook
