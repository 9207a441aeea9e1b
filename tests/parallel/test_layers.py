"""MoE layers with a dispatcher: shared experts, checkpointing, compilation."""

from __future__ import annotations

import copy
import functools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from tests.helpers.moe import build_moe
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from moe_ops.layers import Experts, MoE
from moe_ops.parallel import AllToAllDispatcher, dispatch, make_dispatcher
from moe_ops.testing import assert_identical

pytestmark = pytest.mark.cpu_only

T, H, I, E, K = 10, 16, 8, 8, 2
NAMES = ("gather", "slots", "tokens")


def layer(name: str | None, dtype: torch.dtype = torch.float64, **options: Any) -> MoE:
    """Returns the same layer in every process, its experts shared out if there is a dispatcher."""
    torch.manual_seed(3)
    moe = build_moe(H, I, E, K, num_shared_experts=1, shared_expert_gate=True, **options).to(dtype)
    if name is not None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
        for key, weight in list(moe.experts.named_parameters()):
            part = distribute_tensor(weight.detach(), mesh, [Shard(0)])
            setattr(moe.experts, key, nn.Parameter(part))
        moe.experts.dispatcher = make_dispatcher(mesh, E, dispatch=name)
    return moe


def tokens(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Tokens of all ranks, and the gradient of their outputs."""
    generator = torch.Generator().manual_seed(5)
    x, grad = (torch.randn(4 * T, H, generator=generator).to(dtype) for _ in range(2))
    return x, grad


def block(rank: int) -> slice:
    return slice(rank * T, rank * T + T)


def gradients(moe: nn.Module) -> dict[str, Tensor]:
    """Returns the gradients of the local experts, and of everything else the sum over the ranks."""
    found = {}
    for name, p in moe.named_parameters():
        grad = p.grad
        if hasattr(grad, "to_local"):
            grad = grad.to_local()
        elif dist.is_initialized():
            grad = grad.clone()
            dist.all_reduce(grad)
        found[name] = grad
    return found


def step(rank: int, name: str, options: dict[str, Any]) -> tuple[Tensor, Tensor, dict]:
    moe = layer(name, **options)
    x, grad = (t[block(rank)].clone() for t in tokens())
    y = moe(x.requires_grad_())
    y.backward(grad)
    return y.detach(), x.grad, gradients(moe)


@pytest.mark.parametrize(
    "options", [{}, {"activation": "swiglu_oai", "bias": True}], ids=["", "oai"]
)
@pytest.mark.parametrize("name", NAMES)
def test_layer(processes, name, options):
    found = processes.run(step, name, options)
    moe = layer(None, **options)
    x, grad = tokens()
    y = moe(x.requires_grad_())
    y.backward(grad)
    torch.testing.assert_close(torch.cat([f[0] for f in found]), y.detach())
    torch.testing.assert_close(torch.cat([f[1] for f in found]), x.grad)
    for key, want in gradients(moe).items():
        parts = [f[2][key] for f in found]
        got = torch.cat(parts) if key.startswith("experts.") else parts[0]
        torch.testing.assert_close(got, want, msg=lambda m, key=key: f"{key}: {m}")


COLLECTIVES = ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor")


class Log(TorchDispatchMode):
    """Names of collectives, of shared experts' products, and of the experts' op, as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith(("_c10d_functional::", "moe_ops::moe_ffn", "aten::mm")):
            self.names.append(name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def order_of_events(rank: int, name: str) -> tuple[list[str], list[str]]:
    moe = layer(name, torch.float32)
    x, grad = (t[block(rank)] for t in tokens(torch.float32))
    ids, weights = moe.router(x)[2], torch.rand(T, K, requires_grad=True)
    with Log() as forward:
        y = moe(x.clone().requires_grad_(), topk_ids=ids, topk_weights=weights)
    with Log() as backward:
        y.backward(grad)
    return forward.names, backward.names


@pytest.mark.parametrize("name", NAMES)
def test_shared_experts_run_while_rows_are_on_their_way(processes, name):
    carrier = "all_gather_into_tensor" if name == "gather" else "all_to_all_single"
    back = "reduce_scatter_tensor" if name == "gather" else "all_to_all_single"
    for forward, backward in processes.run(order_of_events, name):
        # The rows' collective is the first after the last wait before shared experts.
        first, ffn = forward.index("mm"), forward.index("moe_ffn_fwd")
        begun = forward[:first].count(carrier) - forward[:first].count("wait_tensor")
        assert begun > 0, forward
        assert forward[first:ffn].count("wait_tensor") == begun, forward
        # And the gradients of the rows are on their way during the shared experts' backward.
        last = len(backward) - backward[::-1].index("mm")
        bwd = next(i for i, event in enumerate(backward) if event.startswith("moe_ffn_bwd"))
        assert bwd < last, backward
        begun = backward[bwd:last].count(back) - backward[bwd:last].count("wait_tensor")
        assert begun > 0 and backward[last:].count("wait_tensor") >= begun, backward


# Forward and backward. Gradients of gathered rows and weights are summed one by one.
NUM_COLLECTIVES = {"slots": (3, 2), "tokens": (3, 2), "padded": (2, 2), "gather": (3, 3)}


@pytest.mark.parametrize("name", NUM_COLLECTIVES)
def test_number_of_collectives(processes, name):
    for events in processes.run(order_of_events, name):
        counts = tuple(sum(event in COLLECTIVES for event in phase) for phase in events)
        assert counts == NUM_COLLECTIVES[name], events


def test_overlap_without_a_dispatcher():
    experts = Experts(E, H, I)
    calls = []
    args = torch.randn(T, H), torch.rand(T, K), torch.randint(E, (T, K))
    y = experts(*args, overlap=lambda: calls.append(1))
    assert calls == [1]
    assert_identical(y, experts(*args))


# -------------------------------------------------------------------------------- recomputation


class Unsteady(nn.Module):
    """Adds noise that no generator of torch knows about: another value on every call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(self.calls))


def recompute(
    rank: int, name: str, reentrant: bool, freeze: bool, noise: bool
) -> tuple[int, int, list[Tensor], Tensor, Tensor]:
    """Counts exchanges of a forward and of its backward, the ids that were seen, and gradients."""
    torch.manual_seed(0)
    moe = layer(name, torch.float32, freeze_routing_in_recompute=freeze)
    seen: list[Tensor] = []
    moe.experts.register_forward_pre_hook(lambda _, args: seen.append(args[2].clone()))
    block_of = nn.Sequential(Unsteady() if noise else nn.Identity(), moe)
    x, grad = (t[block(rank)].clone() for t in tokens(torch.float32))
    x.requires_grad_()
    asked: list[int] = []
    ask = dispatch.Dispatcher._sizes_of

    def counted(self: Any, ids: Tensor, exchange: Any) -> Any:
        return ask(self, ids, lambda: (asked.append(1), exchange())[1])

    with mock.patch.object(dispatch.Dispatcher, "_sizes_of", counted):
        y = checkpoint(block_of, x, use_reentrant=reentrant)
        forward = len(asked)
        y.backward(grad)
    grads = gradients(moe)
    return forward, len(asked) - forward, seen, x.grad, grads["experts.w_down"]


@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
@pytest.mark.parametrize("name", NAMES)
def test_recomputation_asks_for_no_counts(processes, name, reentrant):
    """With attention that is not repeatable before it, near ties would fall otherwise."""
    for forward, backward, seen, _, _ in processes.run(recompute, name, reentrant, True, True):
        assert (forward, backward) == (1, 0)
        assert_identical(seen[0], seen[1])


@pytest.mark.parametrize("name", NAMES)
def test_recomputation_gives_the_same_gradients(processes, name):
    for freeze in (True, False):
        plain = processes.run(step_of_fp32, name, freeze)
        for rank, found in enumerate(processes.run(recompute, name, False, freeze, False)):
            forward, backward, _, dx, dw = found
            assert (forward, backward) == (1, 0 if freeze else 1)
            assert_identical(dx, plain[rank][0])
            assert_identical(dw, plain[rank][1])


def step_of_fp32(rank: int, name: str, freeze: bool) -> tuple[Tensor, Tensor]:
    moe = layer(name, torch.float32, freeze_routing_in_recompute=freeze)
    x, grad = (t[block(rank)].clone() for t in tokens(torch.float32))
    moe(x.requires_grad_()).backward(grad)
    return x.grad, gradients(moe)["experts.w_down"]


def selective(rank: int, name: str) -> tuple[Tensor, Tensor]:
    """A step in which recomputation takes the results of collectives from the first pass."""
    moe = layer(name, torch.float32, freeze_routing_in_recompute=True)
    x, grad = (t[block(rank)].clone() for t in tokens(torch.float32))
    kept = [
        getattr(torch.ops._c10d_functional, op).default
        for op in ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor")
    ]
    contexts = functools.partial(create_selective_checkpoint_contexts, kept)
    y = checkpoint(moe, x.requires_grad_(), use_reentrant=False, context_fn=contexts)
    y.backward(grad)
    return x.grad, gradients(moe)["experts.w_down"]


@pytest.mark.parametrize("name", NAMES)
def test_selective_checkpointing_keeps_collectives(processes, name):
    plain = processes.run(step_of_fp32, name, True)
    for found, expected in zip(processes.run(selective, name), plain, strict=True):
        for got, want in zip(found, expected, strict=True):
            assert_identical(got, want)


def micro_batches(rank: int) -> None:
    """Two passes in flight whose numbers of rows are kept apart."""
    moe, plain = (layer("tokens", torch.float32, freeze_routing_in_recompute=True) for _ in "ab")
    xs = [t[block(rank)].clone().requires_grad_() for t in tokens(torch.float32)]
    ys = [checkpoint(moe, x, use_reentrant=False) for x in xs]
    for y in ys:
        y.sum().backward()
    for x in xs:
        again = x.detach().clone().requires_grad_()
        plain(again).sum().backward()
        assert_identical(x.grad, again.grad)
    for key, grad in gradients(plain).items():
        torch.testing.assert_close(gradients(moe)[key], grad)


def test_micro_batches_in_flight(processes):
    processes.run(micro_batches)


# ---------------------------------------------------------------------------------- compilation


def compiled(rank: int, name: str, options: dict[str, Any], backend: str) -> None:
    """A layer as one graph; another routing goes through the same code."""
    torch._dynamo.reset()
    moe = layer(None, torch.float32)
    share = E // dist.get_world_size()
    local = slice(rank * share, (rank + 1) * share)
    for key in ("w_gate_up", "w_down"):
        weight = getattr(moe.experts, key).detach()[local]
        setattr(moe.experts, key, nn.Parameter(weight.clone()))
    moe.experts.dispatcher = make_dispatcher(dist.group.WORLD, E, dispatch=name, **options)
    frames = []

    def counting(graph, inputs):
        frames.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    fast = torch.compile(moe, fullgraph=True, backend=counting)
    x, grad = (t[block(rank)].clone() for t in tokens(torch.float32))
    ids = torch.randint(E, (T, K), generator=torch.Generator().manual_seed(rank))
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        for some in (ids, ids.flip(0) // 2, torch.where(ids == 1, -1, ids)):
            weights = torch.rand(T, K, generator=torch.Generator().manual_seed(1))
            results = []
            for run in (moe, fast):
                moe.zero_grad()
                a, w = x.clone().requires_grad_(), weights.clone().requires_grad_()
                y = run(a, topk_ids=some, topk_weights=w)
                y.backward(grad)
                mine = {k: p.grad.clone() for k, p in moe.named_parameters() if p.grad is not None}
                results.append({"y": y.detach(), "x": a.grad, "w": w.grad, **mine})
            for key, value in results[0].items():
                torch.testing.assert_close(results[1][key], value, msg=lambda m, k=key: f"{k}: {m}")
    assert len(frames) == 1


FULL = pytest.param("inductor", marks=pytest.mark.full)


@pytest.mark.parametrize("backend", ["aot_eager", FULL])
@pytest.mark.parametrize("name", ["gather", "padded", "shared", "slots", "tokens"])
def test_compile(processes, name, backend):
    for options in [{}, {"num_tokens": T}] if name == "gather" else [{}]:
        processes.run(compiled, name, options, backend, world=2)


def copies(rank: int) -> None:
    moe = layer("slots", torch.float32)
    twin = copy.deepcopy(moe.experts.dispatcher)
    assert type(twin) is AllToAllDispatcher and twin.group is moe.experts.dispatcher.group
    assert twin._sizes is not moe.experts.dispatcher._sizes
    assert f"dispatcher=AllToAllDispatcher(rank {rank} of 4, 2 of 8 experts)" in repr(moe)


def test_copies_and_repr(processes):
    processes.run(copies)
