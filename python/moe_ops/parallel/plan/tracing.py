"""Simulation of one rank, for its sizes only: the real layers, dispatchers and sharding, on a group
that sends nothing, with tensors without data.

Other parts of a model are stand-ins that allocate like common kernels: attention like a fused
kernel, which saves queries, keys, values, its output and one sum per row and head; norms; dense
maps; and a loss computed on a chunk of tokens at a time.

Letters: T tokens of the rank, H hidden size, n ranks that share the experts.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from moe_ops._private_torch import (
    collective_ops,
    dispatch_mode_class,
    fake_process_group,
    fake_tensors,
)
from moe_ops.layers import ExpertsConfig, MoE, MoEConfig, RouterConfig, SharedExperts

from ..comm import begin_all_gather_rows, wait
from ..sharding import fully_shard_moe, init_moe_meshes, shard_experts
from .cluster import Cluster, Layout, ParallelJob
from .shape import Matrix, ModelShape
from .traffic import LOSS_TOKENS, Message, Rows, rows_of


@dataclass(frozen=True)
class Trace:
    """Requirements of one step of rank 0.

    Attributes:
        messages: all collectives, in order; their names are those of torch's operations.
        weights, gradients, optimizer: bytes of persistent tensors.
        peak: maximum bytes, including the optimizer's state, which exists from the second step on.
    """

    messages: list[Message]
    weights: int
    gradients: int
    optimizer: int
    peak: int


def trace_step(shape: ModelShape, cluster: Cluster, job: ParallelJob) -> Trace:
    """Traces a step of rank 0: forward, and in training backward and Adam.

    Args:
        shape: a few layers of each kind are enough, because layers of a kind are equal.
        cluster: only the number of ranks is used. job: without tensor parallelism.

    Raises:
        ValueError: incompatible sizes, tensor parallelism, a placement with redundant experts, or a
            process that already has a default group.
        ImportError: this version of torch has no fake process group.
    """
    layout = Layout.of(cluster, job)
    for name, value, wanted in (("tp", job.tp, 1), ("redundant", job.redundant, 0)):
        if value != wanted:
            raise ValueError(f"plan: {name} must be {wanted} for a trace, got {value}.")
    if job.training and layout.dense_shards == 1 != layout.dp:
        raise ValueError("plan: fsdp must be above 1 for a trace of training, got 1.")
    with _group(cluster.ranks):
        return _run(shape, layout, job)


@contextmanager
def _group(ranks: int) -> Iterator[None]:
    if dist.is_initialized():
        raise ValueError("plan: a trace must run in a process without a group, got one with one.")
    backend, store = fake_process_group()
    dist.init_process_group(backend, store=store, rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _run(shape: ModelShape, layout: Layout, job: ParallelJob) -> Trace:
    ep, dense, experts = _meshes(layout)
    dtype = getattr(torch, job.dtype)
    with torch.device("meta"):
        model = _Model(shape, job, torch.float32 if job.training else dtype)
    options: Any = {"shared_batch": job.shared_batch, "same_bits": job.same_bits}
    options |= {name: True for name in ("fp8", "fp32_combine") if getattr(job, name)}
    shard_experts(model, ep, job.dispatch, **options)
    _know_sizes(model, rows_of(shape, job))
    if job.training:
        # Inputs already have this dtype, except routing weights, which stay float32.
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        for block in model.blocks:
            fully_shard_moe(block, dense, experts, mp_policy=policy)
        for end in (model.embedding, model.head):
            fully_shard(end, mesh=dense, mp_policy=policy)
        fully_shard(model, mesh=dense, mp_policy=policy)
    fake = fake_tensors()
    with fake:
        model.to_empty(device="cpu")
        ids = torch.empty(job.tokens, dtype=torch.int64)
    recorder = _Recorder(ep)
    resident = [_local(t) for t in (*model.parameters(), *model.buffers())]
    for tensor in resident:
        recorder.hold(tensor)
    with fake, recorder, nullcontext() if job.training else torch.no_grad():
        for _ in range(2 if job.training else 1):
            recorder.messages = []
            recorder.phase = "forward"
            loss = model(ids)
            if job.training:
                recorder.phase = "backward"
                loss.backward()
            del loss
    messages, peak = recorder.messages, recorder.peak
    weights = _bytes(resident)
    if not job.training:
        return Trace(messages, weights, 0, 0, peak)
    gradients = _bytes(_local(p.grad) for p in model.parameters() if p.grad is not None)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    with fake:
        optimizer.step()
    states = [t for state in optimizer.state.values() for k, t in state.items() if k != "step"]
    moments = _bytes(_local(t) for t in states)
    return Trace(messages, weights, gradients, moments, peak + moments)


def _meshes(layout: Layout) -> tuple[DeviceMesh, DeviceMesh, DeviceMesh]:
    """Returns the EP mesh, and those over which FSDP2 shards dense weights and experts: as in
    `init_moe_meshes`, or with a leading dimension for ranks with equal shards."""
    dense_copies = layout.dp // layout.dense_shards
    copies = layout.efsdp // layout.expert_shards
    meshes = init_moe_meshes(layout.ep, device_type="cpu")
    if dense_copies == 1:
        return meshes.ep, meshes.dp, meshes.efsdp
    dense = init_device_mesh(
        "cpu", (dense_copies, layout.dense_shards), mesh_dim_names=("copies", "shards")
    )
    sparse = init_device_mesh(
        "cpu",
        (copies, layout.expert_shards, layout.ep),
        mesh_dim_names=("copies", "shards", "ep"),
    )
    return sparse["ep"], dense, sparse["copies", "shards"]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _know_sizes(model: nn.Module, rows: Rows) -> None:
    """Sets the numbers of rows in dispatchers, because without data they cannot come from the
    routing."""
    for module in model.modules():
        dispatcher: Any = getattr(module, "dispatcher", None)
        if hasattr(dispatcher, "_splits"):
            dispatcher._splits = lambda *_: (rows.sent, rows.received, rows.expert_slots)
        elif hasattr(dispatcher, "_largest"):
            dispatcher._largest = _Largest(dispatcher.group)


class _Largest:
    """Runs the collective for the largest number of tokens, and ignores its result."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __call__(self, num_tokens: int, device: torch.device) -> int:
        mine = torch.full((1,), num_tokens, dtype=torch.int64, device=device)
        wait(begin_all_gather_rows(mine, self.group))
        return num_tokens


# ------------------------------------------------------------------------------------- the recorder


class _Recorder(dispatch_mode_class()):  # type: ignore[misc]
    """Dispatch mode that counts the bytes of live tensors and of collectives."""

    def __init__(self, ep: DeviceMesh) -> None:
        super().__init__()
        self.ep, self.name = ep.size(), ep.get_group().group_name
        self.messages: list[Message] = []
        self.phase = "forward"
        self.now = self.peak = 0
        self.sizes: dict[int, tuple[Any, int]] = {}  # Live storages: a reference, and bytes.
        self._drawn: Any = None

    def __enter__(self) -> Any:
        self._resize = torch.UntypedStorage.resize_
        recorder, resize = self, self._resize

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            recorder._count(storage)
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default and args[0].untyped_storage() is self._drawn:
            return 0  # The number by which recomputation finds its first pass.
        if func is collective_ops().wait_tensor.default:
            return args[0]  # Matches the behavior with data.
        out = func(*args, **(kwargs or {}))
        if func is aten.randint.default:
            self._drawn = out.untyped_storage()
        self._log(func, args)
        # For a DTensor, this rank's part. Tensors inside DTensor operations, some of the global
        # shape that only describe the result, are not seen here.
        for tensor in _tensors(out):
            self.hold(_local(tensor))
        return out

    def hold(self, tensor: Tensor) -> None:
        self._count(tensor.untyped_storage())

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        known = self.sizes.get(key)
        if known is None:

            def release(_: Any) -> None:
                self.now -= self.sizes.pop(key)[1]

            self.sizes[key] = (weakref.ref(storage, release), size)
            self.now += size
        else:
            self.sizes[key] = (known[0], size)
            self.now += size - known[1]
        self.peak = max(self.peak, self.now)

    def _log(self, func: Any, args: Any) -> None:
        """Records the bytes of a collective, counted like in `Message`. Dispatchers use collectives
        for compiled code, FSDP2 the others."""
        name = func.overloadpacket.__name__
        kind = _KINDS.get(name)
        if kind is None:
            if func.namespace in ("c10d", "_c10d_functional") and name != "wait_tensor":
                raise NotImplementedError(f"plan: a trace must know its collectives, got {name}.")
            return
        sent = received = 0
        if kind == "all_to_all":
            row = _bytes([args[0][:1]]) if args[0].shape[0] else 0
            received, sent = ((sum(splits) - splits[0]) * row for splits in args[1:3])
        elif func.namespace == "c10d" and kind != "all_reduce":
            sent = received = abs(_bytes([args[0]]) - _bytes([args[1]]))
        else:
            size = _bytes(args[0] if isinstance(args[0], list) else [args[0]])
            n = self.ep
            if func.namespace == "c10d":
                n = dist.ProcessGroup.unbox(args[1]).size()
            factor = {"all_gather": n * (n - 1), "reduce_scatter": n - 1, "all_reduce": 2 * (n - 1)}
            sent = received = size * factor[kind] // n
        group = "ep" if args[-1] == self.name else "fsdp"
        self.messages.append(Message(name, self.phase, group, kind, sent, received))


_KINDS = {
    "all_to_all_single": "all_to_all",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_reduce": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


# ---------------------------------------------------------------------------------------- the model


class _Model(nn.Module):
    def __init__(self, shape: ModelShape, job: ParallelJob, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size, dtype=dtype)
        sparse = [False] * shape.num_dense_layers + [True] * shape.num_moe_layers
        self.blocks = nn.ModuleList(_Block(shape, job, dtype, experts) for experts in sparse)
        self.head = _Head(shape, dtype)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x, ids)
        return y


class _Head(nn.Module):
    """The last norm and the output projection, with the mean loss in training."""

    def __init__(self, shape: ModelShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape.hidden_size, bias=False, dtype=dtype)
        self.output = _linear(Matrix(shape.vocab_size, shape.hidden_size), dtype)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        x = self.norm(x)
        if not torch.is_grad_enabled():
            y: Tensor = self.output(x[-1:])
            return y
        losses = [
            checkpoint(self._loss, part, target, use_reentrant=False)
            for part, target in zip(x.split(LOSS_TOKENS), targets.split(LOSS_TOKENS), strict=True)
        ]
        return torch.stack(losses).sum()

    def _loss(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.output(x).float(), targets, reduction="sum")


class _Block(nn.Module):
    def __init__(
        self, shape: ModelShape, job: ParallelJob, dtype: torch.dtype, experts: bool
    ) -> None:
        super().__init__()
        h = shape.hidden_size
        self.recompute = job.training and job.recompute
        self.norm = nn.LayerNorm(h, bias=False, dtype=dtype)
        self.attention = _Attention(shape, dtype)
        self.ffn_norm = nn.LayerNorm(h, bias=False, dtype=dtype)
        activation = "swiglu" if shape.gated else "gelu"
        if not experts:
            self.ffn: nn.Module = SharedExperts(
                h, shape.dense_intermediate_size, activation=activation, dtype=dtype
            )
            return
        router = RouterConfig(
            num_groups=shape.num_groups,
            num_topk_groups=shape.num_topk_groups,
            logits_dtype=torch.float32 if shape.float32_router else None,
        )
        config = MoEConfig(
            h,
            shape.intermediate_size,
            shape.num_experts,
            shape.top_k,
            router=router,
            experts=ExpertsConfig(activation=activation, bias=shape.bias),
            shared_intermediate_size=shape.shared_intermediate_size,
            freeze_routing_in_recompute=self.recompute,
        )
        self.ffn = MoE.from_config(config, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not self.recompute:
            return self._run(x)
        y: Tensor = checkpoint(self._run, x, use_reentrant=False)
        return y

    def _run(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        y: Tensor = x + self.ffn(self.ffn_norm(x))
        return y


class _Attention(nn.Module):
    def __init__(self, shape: ModelShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        self.maps = nn.ModuleList(_linear(m, dtype) for m in shape.attention()[2:])

    def forward(self, x: Tensor) -> Tensor:
        s, t = self.shape, x.shape[0]
        *maps, output = self.maps
        if s.kv_rank:
            *to_q, to_latent, to_kv = maps
            q = x
            for m in to_q:
                q = m(q)
            latent, rotary = to_latent(x).split([s.kv_rank, s.rope_size], 1)
            kv = to_kv(latent).view(t, s.num_heads, -1)
            unrotated, v = kv.split([s.head_size - s.rope_size, s.v_size], 2)
            shared = rotary.unsqueeze(1).expand(t, s.num_heads, s.rope_size)
            k = torch.cat([unrotated, shared], 2)
        else:
            q = maps[0](x)
            k, v = maps[1](x).view(t, 2, s.num_kv_heads, s.head_size).unbind(1)
        y: Tensor = output(_Flash.apply(q.view(t, s.num_heads, s.head_size), k, v).flatten(1))
        return y


class _Flash(torch.autograd.Function):
    """Autograd function with the allocations of a fused attention kernel."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens, heads = q.shape[:2]
        y = q.new_empty(tokens, heads, v.shape[2])
        sums = q.new_empty(heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, y, sums)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.new_empty(t.shape) for t in ctx.saved_tensors[:3])


def _linear(matrix: Matrix, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(matrix.columns, matrix.rows, bias=False, dtype=dtype)
