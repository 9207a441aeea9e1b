"""Expert parallelism of transformers with the dispatchers of moe_ops.parallel.

transformers shards the experts and calls a configurable implementation around them; from 5.23 on it
has a registry of such implementations. Names registered here can be used in
``DistributedConfig(ep_implementation=...)``.

Letters: T tokens of this rank, H hidden size, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Base: Any
Interface: Any
try:
    from transformers.distributed.expert_parallel import EPImplementation as Base
    from transformers.distributed.expert_parallel import EPImplementationInterface as Interface
except ImportError:  # Before 5.23.
    Base, Interface = object, None


def register_ep_implementation(name: str, dispatch: str = "auto", **options: Any) -> None:
    """Registers a dispatcher as an implementation of transformers' expert parallelism.

    Example:
        moe_ops.hf.register_ep_implementation("fp8_rows", dispatch="tokens", fp8=True)
        DistributedConfig(fsdp_size=8, ep_size=8, ep_implementation="fp8_rows")

    Importing `moe_ops.hf` registers ``"moe_ops"`` with dispatch="auto".

    Args:
        name: a new name for `ep_implementation`.
        dispatch, options: of `moe_ops.parallel.make_dispatcher`, which is called when a model is
            loaded. "auto" is "shared" if all ranks of a group have equal tokens (ep_size equals
            tp_size), and otherwise the selection of `make_dispatcher`.

    Raises:
        ImportError: transformers is older than 5.23, where expert parallelism only needs
            experts_implementation="moe_ops".
        ValueError: the name is taken, or a placement, because transformers shards experts
            contiguously.
    """
    if Interface is None:
        raise ImportError(
            "register_ep_implementation needs transformers 5.23 or newer, got "
            f"{transformers.__version__}."
        )
    if name in Interface():
        raise ValueError(f"register_ep_implementation: name must be a new one, got {name!r}.")
    if options.get("placement") is not None:
        raise ValueError(
            "register_ep_implementation: placement must be None, as ranks keep experts in runs, "
            f"got {options['placement']!r}."
        )
    attributes = {"dispatch": dispatch, "options": options}
    Interface.register(name, type("MoeOpsEP", (MoeOpsEP,), attributes))


class MoeOpsEP(Base):
    """Runs the experts of one module of transformers through a dispatcher of `moe_ops.parallel`.

    transformers creates one per module when it shards a model, and calls it in place of the
    module's forward, while the module has the parameters of this rank. The dispatcher is also the
    module's attribute `dispatcher`, like in experts of moe_ops.
    """

    dispatch: str = "auto"
    options: Mapping[str, Any] = {}

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        # Not at the top: a torch without torch.distributed cannot import it.
        from moe_ops.parallel import make_dispatcher

        is_shared = self.dispatch == "shared" or (self.dispatch == "auto" and self.shares_batch)
        if is_shared and not self.shares_batch:
            raise ValueError(
                f'{type(self).__name__}: dispatch="shared" needs ranks with the same tokens, '
                f"ep_size = tp_size, got {ep_mesh.size()} and {tp_mesh.size()}."
            )
        self.config: Any = experts.config
        self.dispatcher: Any = make_dispatcher(
            ep_mesh,
            self.num_local_experts * ep_mesh.size(),
            top_k=getattr(self.config, "num_experts_per_tok", None),
            dispatch=self.dispatch,
            shared_batch=is_shared,
            **self.options,
        )
        experts.dispatcher = self.dispatcher
        # Ranks of tensor parallelism have equal tokens; each sends a part of them.
        self.parts = None if is_shared or tp_mesh.size() == 1 else tp_mesh

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Computes [T, H] from hidden_states [T, H], ids [T, K] of all experts, and weights [T,
        K]."""
        implementation = self.config._experts_implementation
        if implementation != "moe_ops":
            raise ValueError(
                'ep_implementation of moe_ops: experts_implementation must be "moe_ops", got '
                f"{implementation!r}."
            )
        if self.parts is None:
            return self.dispatcher(self, hidden_states, top_k_weights, top_k_index)
        x, weights, ids = (_own(t, self.parts) for t in (hidden_states, top_k_weights, top_k_index))
        y = self.dispatcher(self, x, weights, ids)
        return _all(y, hidden_states.shape[0], self.parts)

    def forward_local(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        apply_router_weight_on_input: bool = False,
        **options: Any,
    ) -> Tensor:
        """Implements `moe_ops.parallel.Bank.forward_local`; weights multiply outputs."""
        assert not apply_router_weight_on_input
        y: Tensor = self.experts_forward(x, topk_ids, topk_weights, **options)
        return y


def _own(tensor: Tensor, mesh: Any) -> Tensor:
    """Returns this rank's (possibly empty) run of rows of a tensor that all ranks of the mesh have.
    Its gradient is that of all rows, on every rank."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    same = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    part: Tensor = same.redistribute(placements=[Shard(0)]).to_local()
    return part


def _all(part: Tensor, num_rows: int, mesh: Any) -> Tensor:
    """Returns all rows on every rank, from the runs of the ranks of the mesh."""
    from torch.distributed.tensor import DTensor, Shard

    part = part.contiguous()
    shape = torch.Size((num_rows, *part.shape[1:]))
    parts = DTensor.from_local(
        part, mesh, [Shard(0)], run_check=False, shape=shape, stride=part.stride()
    )
    whole: Tensor = parts.full_tensor()
    return whole
