"""torch.func's transforms and forward-mode AD of layers: right, or refused by an op of theirs."""

from __future__ import annotations

import re

import pytest
import torch
from tests.helpers.moe import build_moe, build_router
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

import moe_ops
from moe_ops import layers, quant

from .every_op import OPS
from .test_transforms import close, pytestmark, refused  # noqa: F401

H, E, K, T = 6, 4, 2, 5


class Update(torch.nn.Module):
    """The block of a MixtureOfDepths."""

    def forward(self, x: Tensor, *, positions: Tensor) -> Tensor:
        return (x * (1 + positions[..., None])).sin()


MODULES = {
    "AttentionExperts": lambda: layers.AttentionExperts(
        layers.TopKRouter(H, E, K, dtype=torch.float64), 2, 4, dtype=torch.float64
    ),
    "ExpertBatchNorm": lambda: layers.ExpertBatchNorm(E, H, dtype=torch.float64),
    "Experts": lambda: layers.Experts(E, H, 3, bias=True, dtype=torch.float64),
    "Experts.outputs, gated": lambda: layers.Experts(E, H, 3, dtype=torch.float64),
    "Experts.outputs": lambda: layers.Experts(E, H, 3, activation="relu", dtype=torch.float64),
    "GateRouter": lambda: layers.GateRouter(H, E, K, gate_size=8, dtype=torch.float64),
    "MoE": lambda: build_moe(H, 3, E, K, router="qwen2_moe", dtype=torch.float64),
    "MoE of deepseek_v3": lambda: build_moe(
        H,
        3,
        E,
        K,
        router="deepseek_v3",
        num_groups=2,
        num_topk_groups=1,
        num_shared_experts=1,
        logits_dtype=None,
        dtype=torch.float64,
    ),
    "LatentProjection": lambda: layers.MoE(
        layers.TopKRouter(H, E, K, dtype=torch.float64),
        layers.Experts(E, 4, 3, dtype=torch.float64),
        latent=layers.LatentProjection(H, 4, norm=True, dtype=torch.float64),
    ),
    "MixtureOfDepths": lambda: layers.MixtureOfDepths(
        Update(), H, capacity=0.5, predictor_size=0, dtype=torch.float64
    ),
    "PEER": lambda: layers.PEER(H, 9, 2, num_heads=2, dtype=torch.float64),
    "SoftMoE": lambda: layers.SoftMoE(
        layers.Experts(E, H, 3, dtype=torch.float64), 2, dtype=torch.float64
    ),
    "QuantizedExperts": lambda: layers.Experts(E, 64, 64),
    "QuantizedLinear": lambda: torch.nn.Linear(64, 32),
    "AddRMSNorm": lambda: layers.AddRMSNorm(H, dtype=torch.float64),
    "Router": lambda: layers.TopKRouter(H, E, K, dtype=torch.float64, logits_dtype=None),
    "SparseMixerRouter": lambda: build_router(
        H, E, K, kind="sparsemixer", dtype=torch.float64, logits_dtype=None
    ),
    "TopPRouter": lambda: layers.TopPRouter(H, E, K, dtype=torch.float64, logits_dtype=None),
    "TopKRouter": lambda: layers.TopKRouter(H, E, K, renormalize=True, dtype=torch.float64),
    "ExpertChoiceRouter": lambda: layers.ExpertChoiceRouter(H, E, K, dtype=torch.float64),
    "CapacityMixin, CapacityRouter": lambda: layers.CapacityRouter(H, E, K, dtype=torch.float64),
    "CapacityRouter": lambda: layers.CapacityRouter(
        H, E, K, eval_capacity_factor=0.5, dtype=torch.float64
    ),
    "ReLURouter": lambda: layers.ReLURouter(H, E, K, bias=True, dtype=torch.float64),
    "ZeroComputationExperts": lambda: layers.MoE(
        layers.TopKRouter(H, E + 3, K, dtype=torch.float64),
        layers.ZeroComputationExperts(
            layers.Experts(E, H, 3, dtype=torch.float64),
            num_zero=1,
            num_identity=1,
            num_constant=1,
            dtype=torch.float64,
        ),
    ),
    "SharedExperts": lambda: layers.SharedExperts(H, 3, dtype=torch.float64),
}
LOSSES = {
    "concentration_loss": lambda x: layers.concentration_loss(x),
    "drop_over_capacity": lambda x: layers.router.capacity.drop_over_capacity(
        x[:, :K], ids(), E, 2
    )[0],
    "device_balance_loss": lambda x: layers.device_balance_loss(x, ids(), 2),
    "load_balancing_loss": lambda x: layers.load_balancing_loss(x, ids()),
    "mix_outputs": lambda x: layers.mix_outputs(x.view(T, 1, H), torch.ones(T, 1, 1).to(x)),
    "mutual_information_loss": lambda x: layers.mutual_information_loss(x),
    "router_entropy_loss": lambda x: layers.router_entropy_loss(x),
    "relu_router_loss": lambda x: layers.relu_router_loss(x, 2),
    "router_z_loss": lambda x: layers.router_z_loss(x),
    "sequence_balance_loss": lambda x: layers.sequence_balance_loss(x, ids(), num_sequences=1),
    "sparsemixer": lambda x: layers.router.sparsemixer.sparsemixer(x)[0],
}
# Records, and what nothing flows through.
FLOAT32 = ("QuantizedExperts", "QuantizedLinear")
WITHOUT_GRADIENTS = {
    "HashRouter",  # Gets ids from its caller; its weights are in tests/layers.
    "KVCache",
    "L1Coefficient",
    "MoEOutput",
    "Routing",
    "RoutingRecord",
    "ExpertLoadStats",
    "ExpertsConfig",
    "MoEConfig",
    "RouterConfig",
    "count_tokens_per_expert",
    "clear_fp8_cache",
    "record_routing",
    "replay_routing",
    "update_expert_bias",
}


def ids() -> Tensor:
    return torch.arange(T)[:, None] % E + torch.arange(K)


def module_of(name: str):
    module = MODULES[name]().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if name == "QuantizedExperts":
        return moe_ops.quantize(module, moe_ops.Int4WeightConfig())
    return quant.QuantizedLinear(module) if name == "QuantizedLinear" else module


def run(name: str, module, x: Tensor) -> Tensor:
    if name in LOSSES:
        return LOSSES[name](x)
    weights = torch.full((T, K), 0.5, dtype=x.dtype)
    if name.startswith("Experts.outputs"):
        return module.outputs(x)
    if name in ("Experts", "QuantizedExperts"):
        return module(x, weights, ids() % E)
    if name == "ExpertBatchNorm":
        return module(x[:, None].expand(T, E, H))
    if name == "AddRMSNorm":
        return module(x, x * 0.5)[0]
    if name == "AttentionExperts":
        return module(x[None])
    y = module(x)
    return y.topk_weights if isinstance(y, layers.Routing) else y


def input_of(name: str) -> Tensor:
    return torch.randn(T, 64) if name in FLOAT32 else torch.randn(T, H).double()


@pytest.mark.parametrize("name", [*MODULES, *LOSSES])
def test_layer_in_forward_mode(name):
    """Finite differences in fp64 have about half of its digits."""
    module = module_of(name) if name in MODULES else None
    x = input_of(name)
    v = torch.randn_like(x)
    refusals = 0
    for mode in ("jvp", "dual"):
        try:
            if mode == "jvp":
                _, change = jvp(lambda t: run(name, module, t), (x,), (v,))
            else:
                with forward_ad.dual_level():
                    y = run(name, module, forward_ad.make_dual(x, v))
                    change = forward_ad.unpack_dual(y).tangent
            step = 1e-6
            wanted = run(name, module, x + step * v) - run(name, module, x - step * v)
            torch.testing.assert_close(change, wanted / (2 * step), rtol=1e-6, atol=1e-6)
        except NotImplementedError as error:
            refusals += 1
            (op,) = re.findall(r"^(\w+): forward-mode AD is not implemented; .*\.$", str(error))
            assert op in OPS
    assert refusals in (0, 2), "one way is refused and the other is not"


@pytest.mark.parametrize("name", [n for n in [*MODULES, *LOSSES] if n not in FLOAT32])
def test_layer_grad(name):
    module = module_of(name) if name in MODULES else torch.nn.Identity()
    x = input_of(name)
    parameters = dict(module.named_parameters())

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, t: Tensor) -> Tensor:
            return run(name, module, t).square().sum()

    wrapped = Wrapped()
    parameters = {f"module.{n}": p.detach() for n, p in module.named_parameters()}
    got = grad(lambda p, t: functional_call(wrapped, p, (t,)), (0, 1))(parameters, x)
    leaf = x.clone().requires_grad_()
    wanted = torch.autograd.grad(
        wrapped(leaf), [*module.parameters(), leaf], allow_unused=True, materialize_grads=True
    )
    close([*got[0].values(), got[1]], list(wanted))
    per_sample = vmap(grad(lambda t: wrapped(t)))(torch.stack([x, x * 0.5]))
    close(per_sample[1], grad(lambda t: wrapped(t))(x * 0.5))


def test_adapters_have_no_transforms():
    module = layers.ExpertLoRA(layers.Experts(E, H, 3), 2)
    x = torch.randn(T, H)
    with refused("adapted_experts", "nor are torch.func's transforms"):
        grad(lambda t: run("Experts", module, t).sum())(x)
    with forward_ad.dual_level(), refused("adapted_experts"):
        run("Experts", module, forward_ad.make_dual(x, x))


def test_fp8_experts_have_no_transforms():
    module = layers.Experts(E, H, 3, fp8_training=True)
    x = torch.randn(T, H)
    with refused("fp8_ffn", "torch.func's transforms are not implemented"):
        grad(lambda t: run("Experts", module, t).sum())(x)
    with forward_ad.dual_level(), refused("fp8_ffn"):
        run("Experts", module, forward_ad.make_dual(x, x))


def test_every_layer_is_here():
    covered = {n.partition(",")[0].partition(".")[0].partition(" ")[0] for n in MODULES}
    # Tested here though other modules have them.
    elsewhere = {"QuantizedExperts", "QuantizedLinear", "drop_over_capacity", "fp8_ffn"}
    elsewhere |= {"sparsemixer"}
    covered |= {"ExpertLoRA", "fp8_ffn"}
    assert covered | set(LOSSES) | WITHOUT_GRADIENTS == set(layers.__all__) | elsewhere
