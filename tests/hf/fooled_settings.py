"""Attempts that set, hook, replace or train something of a model, mostly after it is optimized."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import eager_attention_forward

from .fooled import (
    Attempt,
    attentions,
    block,
    blocks,
    experts,
    last,
    layers,
    norms,
    routers,
)
from .fooled_classes import ClampedSiLU, Parts, dense, head_norms, latent_norms, linears, shared

MODEL = "qwen3_moe"


def put(parts: Parts, name: str, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Returns what sets an attribute of parts to `change` of what it was."""

    def alter(model: Any) -> None:
        found = list(parts(model))
        assert found
        for part in found:
            setattr(part, name, change(getattr(part, name)))

    return alter


def later(name: str, model: str, alter: Any, **options: Any) -> Attempt:
    return Attempt(name, model, after=alter, **options)


SETTINGS = [
    later("top-k", MODEL, put(routers, "top_k", lambda k: 1)),
    later("top-k-larger", "mixtral", put(routers, "top_k", lambda k: 4)),
    later("top-k-deepseek", "deepseek_v3", put(routers, "top_k", lambda k: 1)),
    later("norm-topk-prob", MODEL, put(routers, "norm_topk_prob", lambda b: False)),
    later("norm-topk-prob-glm", "glm4_moe", put(routers, "norm_topk_prob", lambda b: False)),
    later("routed-scaling", "deepseek_v3", put(routers, "routed_scaling_factor", lambda f: 2 * f)),
    later("routed-scaling-v2", "deepseek_v2", put(routers, "routed_scaling_factor", lambda f: 3.0)),
    later("groups", "deepseek_v3", put(routers, "topk_group", lambda g: 1)),
    later("attention-scaling", MODEL, put(attentions, "scaling", lambda s: 3 * s)),
    later("attention-scaling-latent", "deepseek_v3", put(attentions, "scaling", lambda s: 3 * s)),
    later("attention-scaling-gpt-oss", "gpt_oss", put(attentions, "scaling", lambda s: 3 * s)),
    later("attention-scaling-granite", "granitemoe", put(attentions, "scaling", lambda s: 3 * s)),
    later("norm-epsilon", MODEL, put(norms, "variance_epsilon", lambda e: 0.5)),
    later("head-norm-epsilon", MODEL, put(head_norms, "variance_epsilon", lambda e: 0.5)),
    later("latent-norm-epsilon", "deepseek_v3", put(latent_norms, "variance_epsilon", lambda e:
        0.5)),
    later("last-norm-epsilon", "olmoe", put(lambda m: [m.model.norm], "variance_epsilon",
        lambda e: 0.5)),
    later("residual-multiplier", "granitemoe", put(layers, "residual_multiplier", lambda f: 0.3)),
    later("embedding-multiplier", "granitemoe", lambda m: setattr(m.model, "embedding_multiplier",
        3.0)),
    later("experts-act-fn", "mixtral", put(experts, "act_fn", lambda f: nn.GELU())),
    later("experts-act-fn-of-one-layer", MODEL, lambda m: setattr(block(last(m)).experts, "act_fn",
        nn.ReLU())),
    later("mlp-act-fn", "deepseek_v3", put(dense, "act_fn", lambda f: nn.ReLU())),
    later("shared-act-fn", "qwen2_moe", put(shared, "act_fn", lambda f: ClampedSiLU())),
    later("act-fn-forward", "mixtral", lambda m: [setattr(e.act_fn, "forward",
        lambda x: x.relu()) for e in experts(m)]),
    later("shared-act-fn-forward", "qwen2_moe", lambda m: [setattr(s.act_fn, "forward",
        lambda x: x.relu()) for s in shared(m)]),
    later("experts-limit", "gpt_oss", put(experts, "limit", lambda x: 0.2)),
    later("experts-alpha", "gpt_oss", put(experts, "alpha", lambda x: 0.5)),
    later("head-dim-groups", "mixtral", lambda m: [(setattr(a, "sliding_window", 2)) for a in
        attentions(m)], changes=False),
    later("layer-index", MODEL, lambda m: [setattr(a, "layer_idx", 1 - a.layer_idx) for a in
        attentions(m)], changes=False),
    later("config-top-k", MODEL, lambda m: setattr(m.config, "num_experts_per_tok", 1),
        changes=False),
    later("config-layers", "deepseek_v3", lambda m: setattr(m.config, "num_hidden_layers", 1)),
    later("config-logits-scaling", "granitemoe", lambda m: setattr(m.config, "logits_scaling", 3.0),
        changes=False),
    later("config-clip-qkv", "olmoe", lambda m: setattr(m.config, "clip_qkv", 0.5)),
    later("config-rope-interleave", "deepseek_v3", lambda m: setattr(m.config, "rope_interleave",
        False)),
    later("rotary-scaling", MODEL, lambda m: setattr(m.model.rotary_emb, "attention_scaling", 1.3)),
    later("rotary-frequencies", "mixtral", lambda m: m.model.rotary_emb.inv_freq.mul_(3.0)),
    later("training-of-jitter", "mixtral", None, options={"router_jitter_noise": 0.5},
        training=True),
    later("training-of-dropout", MODEL, None, options={"attention_dropout": 0.5}, training=True),
    later("training-of-dropout-latent", "deepseek_v3", None, options={"attention_dropout": 0.5},
        training=True),
    later("training-of-phimoe", "phimoe", None, options={"input_jitter_noise": 0.5}, training=True),
]  # fmt: skip


# ------------------------------------------------------------------------------------------- hooks


def hooked(parts: Parts) -> Callable[[Any], None]:
    def hook(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            tensors = [
                1.2 * t if torch.is_tensor(t) and t.is_floating_point() else t for t in output
            ]
            return tuple(tensors)
        return 1.2 * output

    def alter(model: Any) -> None:
        found = list(parts(model))
        assert found
        for part in found:
            part.register_forward_hook(hook)

    return alter


def pre_hooked(parts: Parts) -> Callable[[Any], None]:
    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0].clamp(-0.5, 0.5), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].clamp(-0.5, 0.5)}

    def alter(model: Any) -> None:
        for part in parts(model):
            part.register_forward_pre_hook(hook, with_kwargs=True)

    return alter


PARTS: dict[str, tuple[str, Parts]] = {
    "norm": (MODEL, norms),
    "head-norm": (MODEL, head_norms),
    "latent-norm": ("deepseek_v3", latent_norms),
    "router": ("mixtral", routers),
    "experts": ("olmoe", experts),
    "act-fn": ("mixtral", lambda m: [e.act_fn for e in experts(m)]),
    "shared": ("deepseek_v3", shared),
    "shared-act-fn": ("qwen2_moe", lambda m: [s.act_fn for s in shared(m)]),
    "shared-gate": ("qwen2_moe", linears("shared_expert_gate")),
    "dense": ("glm4_moe", dense),
    "dense-act-fn": ("deepseek_v2", lambda m: [d.act_fn for d in dense(m)]),
    "attention": ("gpt_oss", attentions),
    "q-proj": ("mixtral", linears("q_proj")),
    "kv-b-proj": ("deepseek_v3", linears("kv_b_proj")),
    "o-proj": ("mixtral", linears("o_proj")),
    "down-proj": ("deepseek_v3", linears("down_proj")),
    "block": ("granitemoe", blocks),
    "layer": (MODEL, layers),
    "head": (MODEL, linears("lm_head")),
    "last-norm": ("olmoe", lambda m: [m.model.norm]),
}
HOOKS = [
    *(later(f"hook-on-{name}", model, hooked(parts)) for name, (model, parts) in PARTS.items()),
    *(later(f"pre-hook-on-{name}", model, pre_hooked(parts))
        for name, (model, parts) in PARTS.items() if name not in ("head", "act-fn", "shared-gate")),
    later("backward-hook-on-norm", MODEL, lambda m: [n.register_full_backward_hook(
        lambda *_: None) for n in norms(m)], changes=False),
]  # fmt: skip


# ---------------------------------------------------------------------------------- other modules


class Adapter(nn.Module):
    """Adds a product of two small matrices to a layer, as adapters do."""

    def __init__(self, base: nn.Module, width: int) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = nn.Linear(width, 2, bias=False), nn.Linear(2, 1, bias=False)
        nn.init.constant_(self.a.weight, 0.1)
        nn.init.constant_(self.b.weight, 0.4)

    def forward(self, x: Any) -> Any:
        return self.base(x) + self.b(self.a(x))


def adapted(name: str) -> Callable[[Any], None]:
    def alter(model: Any) -> None:
        for module in list(model.modules()):
            base = module._modules.get(name)
            if base is not None:
                module._modules[name] = Adapter(base, base.in_features)

    return alter


class Scaled(nn.Module):
    def __init__(self, factor: float = 1.3) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: Any) -> Any:
        return (self.factor * weight).clamp(max=1.2)


def parametrized(parts: Parts) -> Callable[[Any], None]:
    return lambda m: [parametrize.register_parametrization(p, "weight", Scaled(), unsafe=True)
        for p in parts(m)] and None  # fmt: skip


def trained(parts: Parts, name: str = "weight") -> Callable[[Any], None]:
    """Returns what changes a parameter in place."""

    def alter(model: Any) -> None:
        for part in parts(model):
            with torch.no_grad():
                getattr(part, name).mul_(1.3).add_(0.05)

    return alter


def new_parameter(parts: Parts, name: str, value: Callable[[Any], Any]) -> Callable[[Any], None]:
    def alter(model: Any) -> None:
        for part in parts(model):
            part.register_parameter(name, nn.Parameter(value(part)))

    return alter


def _bias(part: Any) -> Any:
    return torch.linspace(-1, 1, part.weight.shape[0])


def exchanged(name: str, make: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    """Returns what puts other modules in place of those of a name."""

    def alter(model: Any) -> None:
        for module in list(model.modules()):
            if module._modules.get(name) is not None:
                module._modules[name] = make(module._modules[name])

    return alter


def _layer_norm(norm: Any) -> nn.Module:
    return nn.LayerNorm(norm.weight.shape[0])


MODULES = [
    later("adapter-on-q-proj", MODEL, adapted("q_proj")),
    later("adapter-on-o-proj", "mixtral", adapted("o_proj")),
    later("adapter-on-kv-b-proj", "deepseek_v3", adapted("kv_b_proj")),
    later("adapter-on-down-proj", "deepseek_v2", adapted("down_proj")),
    later("adapter-on-shared-gate", "qwen2_moe", adapted("shared_expert_gate")),
    later("adapter-on-head", MODEL, adapted("lm_head")),
    Attempt("adapter-before", MODEL, before=adapted("k_proj")),
    later("parametrized-norm", MODEL, parametrized(norms)),
    Attempt("parametrized-norm-before", "mixtral", before=parametrized(norms)),
    later("parametrized-head-norm", MODEL, parametrized(head_norms)),
    later("parametrized-q-proj", "mixtral", parametrized(linears("q_proj"))),
    Attempt("parametrized-o-proj-before", MODEL, before=parametrized(linears("o_proj"))),
    later("parametrized-router", "mixtral", parametrized(routers)),
    later("parametrized-head", "olmoe", parametrized(linears("lm_head"))),
    later("weight-norm-on-q-proj", "mixtral", lambda m: [(parametrizations.weight_norm(p),
        p.parametrizations.weight.original0.data.mul_(1.5)) for p in linears("q_proj")(m)]),
    later("spectral-norm-on-k-proj", "mixtral", lambda m: [parametrizations.spectral_norm(p)
        for p in linears("k_proj")(m)]),
    later("bias-on-gate", MODEL, new_parameter(routers, "bias", _bias), changes=False),
    later("bias-on-q-proj", MODEL, new_parameter(linears("q_proj"), "bias", _bias)),
    later("bias-on-down-proj", "deepseek_v3", new_parameter(linears("down_proj"), "bias", _bias)),
    later("bias-on-head", "mixtral", new_parameter(linears("lm_head"), "bias", _bias)),
    later("norm-trained", MODEL, trained(norms)),
    later("head-norm-trained", MODEL, trained(head_norms)),
    later("router-trained", "mixtral", trained(routers)),
    later("router-correction-trained", "deepseek_v3",
        lambda m: [r.e_score_correction_bias.copy_(torch.linspace(2, -2, 8)) for r in routers(m)]),
    later("experts-trained", "olmoe", trained(experts, "gate_up_proj")),
    later("experts-bias-trained", "gpt_oss", trained(experts, "down_proj_bias")),
    later("q-proj-trained", "qwen2_moe", trained(linears("q_proj"))),
    later("q-bias-trained", "qwen2_moe", trained(linears("q_proj"), "bias")),
    later("sinks-trained", "gpt_oss", trained(attentions, "sinks")),
    later("kv-b-proj-trained", "deepseek_v2", trained(linears("kv_b_proj"))),
    later("new-norm-parameter", MODEL, new_parameter(norms, "weight", lambda n: n.weight.flip(0) **
        2)),
    later("new-q-proj-data", "mixtral", lambda m: [setattr(p.weight, "data", p.weight.data.flip(0))
        for p in linears("q_proj")(m)]),
    later("layer-norm-in-place", MODEL, exchanged("input_layernorm", _layer_norm)),
    later("no-head-norm", MODEL, exchanged("q_norm", lambda n: nn.Identity())),
    later("no-router-norm", "glm4_moe", exchanged("post_attention_layernorm", lambda n:
        nn.Identity())),
    later("dense-in-place-of-experts", MODEL, lambda m: setattr(last(m), "mlp", nn.Sequential(
        nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 32))) or _fill(last(m).mlp)),
    later("layers-exchanged", MODEL, lambda m: setattr(m.model, "layers", nn.ModuleList(
        list(m.model.layers)[::-1])) or _renumber(m)),
    later("layer-twice", "mixtral", lambda m: setattr(m.model, "layers", nn.ModuleList(
        [m.model.layers[0], copy.deepcopy(m.model.layers[0])])) or _renumber(m)),
    later("shared-router", "mixtral", lambda m: setattr(block(last(m)), "gate", routers(m)[0])),
    later("forward-of-norm", MODEL, lambda m: [setattr(n, "forward", lambda x: x.clamp(-1, 1))
        for n in norms(m)]),
    later("method-of-router", "mixtral", lambda m: [setattr(r, "forward", types.MethodType(
        _first_experts, r)) for r in routers(m)]),
    later("forward-of-attention", "olmoe", lambda m: [setattr(a, "forward", _wrap(a.forward))
        for a in attentions(m)]),
    later("forward-of-experts", MODEL, lambda m: [setattr(e, "forward", _wrap(e.forward))
        for e in experts(m)]),
    later("forward-of-block", "granitemoe", lambda m: [setattr(b, "forward", _wrap(b.forward))
        for b in blocks(m)]),
    later("forward-of-linear", "mixtral", lambda m: [setattr(p, "forward", _wrap(p.forward))
        for p in linears("v_proj")(m)]),
    later("forward-of-layer", MODEL, lambda m: [setattr(x, "forward", _wrap(x.forward))
        for x in layers(m)]),
    Attempt("forward-of-norm-before", MODEL, before=lambda m: [setattr(n, "forward",
        _wrap(n.forward)) for n in norms(m)]),
    Attempt("forward-of-head-norm-before", MODEL, before=lambda m: [setattr(n, "forward",
        _wrap(n.forward)) for n in head_norms(m)]),
    Attempt("forward-of-router-before", "mixtral", before=lambda m: [setattr(r, "forward",
        types.MethodType(_first_experts, r)) for r in routers(m)]),
    Attempt("forward-of-linear-before", "mixtral", before=lambda m: [setattr(p, "forward",
        _wrap(p.forward)) for p in linears("k_proj")(m)]),
    Attempt("forward-of-experts-before", "olmoe", before=lambda m: [setattr(e, "forward",
        _wrap(e.forward)) for e in experts(m)]),
    Attempt("forward-of-mlp-before", "deepseek_v3", before=lambda m: [setattr(d, "forward",
        _wrap(d.forward)) for d in dense(m) + shared(m)]),
    Attempt("forward-of-attention-before", "deepseek_v3", before=lambda m: [setattr(a, "forward",
        _wrap(a.forward)) for a in attentions(m)]),
]  # fmt: skip


def _fill(module: nn.Module) -> None:
    for p in module.parameters():
        nn.init.constant_(p, 0.1)


def _renumber(model: Any) -> None:
    for index, attention in enumerate(attentions(model)):
        attention.layer_idx = index


def _wrap(forward: Any) -> Any:
    def other(*args: Any, **kwargs: Any) -> Any:
        y = forward(*args, **kwargs)
        return (1.2 * y[0], *y[1:]) if isinstance(y, tuple) else 1.2 * y

    return other


def _first_experts(self: Any, x: Any) -> Any:
    rows = x.reshape(-1, x.shape[-1])
    ids = torch.arange(self.top_k).expand(len(rows), -1)
    return rows @ self.weight.T, torch.full(ids.shape, 0.4), ids


# ------------------------------------------------------------------------------ attention functions


def _softer(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **kwargs: Any
):
    return eager_attention_forward(module, query, key, value, mask, scaling=0.3 * scaling, **kwargs)


def _register(name: str) -> Callable[[Any], None]:
    def alter(model: Any) -> None:
        ALL_ATTENTION_FUNCTIONS.register("fooled", _softer)
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        ALL_MASK_ATTENTION_FUNCTIONS.register("fooled", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        if name == "method":
            model.set_attn_implementation("fooled")
        else:
            model.config._attn_implementation = "fooled"

    return alter


FUNCTIONS = [
    *(Attempt(f"attention-function-by-{how}-{model}", model, **{when: _register(how)})
        for how in ("method", "config") for when in ("before",)
        for model in (MODEL, "deepseek_v3")),
    *(Attempt(f"attention-function-by-{how}-later-{model}", model, after=_register(how))
        for how in ("method", "config") for model in (MODEL, "mixtral", "deepseek_v3")),
]  # fmt: skip

ATTEMPTS = [*SETTINGS, *HOOKS, *MODULES, *FUNCTIONS]
