"""LoRA of the package peft on experts.

Float experts, which peft adapts by `target_parameters=["mlp.experts.gate_up_proj", ...]`:

    model = get_peft_model(model, config)  # or PeftModel.from_pretrained
    moe_ops.hf.lora.fuse_adapters(model)

Modules, parameters and checkpoints stay peft's; the experts of a block and their adapters are
computed together, and no weight with its adapter added is made.

Quantised experts (QLoRA):

    config = moe_ops.hf.lora.on_quantized_experts(LoraConfig(target_modules=["q_proj", "experts"]))
    model = get_peft_model(model, config)

Everything else is peft's: training, `save_pretrained`, `PeftModel.from_pretrained(model, folder,
config=on_quantized_experts(LoraConfig.from_pretrained(folder)))`, `merge_and_unload`.

E experts, H hidden size, I intermediate size, r rank.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

try:
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
except ModuleNotFoundError as error:
    if error.name != "peft":
        raise
    raise ImportError(
        "moe_ops.hf.lora needs the package peft, which is not installed: pip install peft"
    ) from error

from moe_ops.hf.experts import bank_bias, bank_views, cast_like, fused_activation
from moe_ops.hf.fused import register_kind, set_fused
from moe_ops.hf.quantized import QuantizedHfExperts
from moe_ops.hf.switch import interface_of
from moe_ops.layers.expert_adapters import (
    ExpertAdapter,
    FrozenBank,
    FrozenWeight,
    activation_of_name,
    adapted_experts,
    stack_of,
    sum_of,
)
from moe_ops.quant.formats import FORMATS, quantize

_KIND = "expert_lora"
_PARTS = {"gate_up_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down"}


def on_quantized_experts(config: Any) -> Any:
    """Makes a `LoraConfig` find quantised experts among its `target_modules`, by the name of their
    module ("experts"); returns it. peft does not save that: call it for a config that is read."""
    config._register_custom_module({QuantizedHfExperts: QuantizedExpertsLora})
    return config


def fuse_adapters(model: nn.Module) -> list[str]:
    """Runs experts with adapters of peft's `target_parameters` on moe_ops, in place.

    Training and inference, several active adapters (their sum), `disable_adapter`, merging, and
    beyond peft a batch of several adapters in `eval()`, `model(ids, adapter_names=[...])` with one
    name a sequence or "__base__". Parameters, their names and what `save_pretrained` writes do not
    change, and adapters may be loaded later. Products of rank r run in the dtype of the experts.

    Left to peft: biases as targets, norms of expert outputs, one expert, sharded experts; and a
    call in which the experts are not frozen, have hooks, or hold a merged adapter.

    Args:
        model: what `get_peft_model` or `PeftModel.from_pretrained` returned, or any module with
            such blocks.

    Returns:
        Names of the experts that are computed so now.

    Raises:
        ValueError: there are none.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper) and _fits(module):
            if getattr(type(module), "_moe_ops_kind", None) != _KIND:
                set_fused(module, _KIND, None)
            if not isinstance(module.base_layer, ParamWrapper):
                found.append(f"{name}.base_layer")
    if not found:
        raise ValueError(
            f"fuse_adapters: {type(model).__name__} must have experts with adapters of "
            "target_parameters, got none that moe_ops can run."
        )
    return found


def unfuse_adapters(model: nn.Module) -> None:
    """Undoes `fuse_adapters`."""
    for module in model.modules():
        if getattr(type(module), "_moe_ops_kind", None) == _KIND:
            module.__class__ = type(module).__mro__[1]
            for name in ("_moe_ops_fused", _STACKED):
                module.__dict__.pop(name, None)


_STACKED = "_moe_ops_stacked"


def _chain(wrapper: Any) -> list[Any]:
    """A wrapper and those that it wraps: one for each parameter."""
    found = []
    while isinstance(wrapper, ParamWrapper):
        found.append(wrapper)
        wrapper = wrapper.base_layer
    return found


def _fits(wrapper: Any) -> bool:
    experts = wrapper.get_base_layer()
    return (
        interface_of(experts) is not None
        and not getattr(experts, "has_post_expert_norm", False)
        and wrapper.num_experts > 1
        and all(each.parameter_name in _PARTS for each in _chain(wrapper))
        and all(type(p) is nn.Parameter for p in experts.parameters())
    )


def _fused_forward(cls: Any) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        call = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False))
        call |= kwargs
        names = call.pop("adapter_names", None)
        experts, chain = self.get_base_layer(), _chain(self)
        plain = any(each.disable_adapters or each.merged for each in chain)
        busy = "forward" in experts.__dict__ or experts._forward_hooks or experts._forward_pre_hooks
        frozen = not any(p.requires_grad for p in experts.parameters())
        if plain or busy or not frozen or len(call) != 3:
            result: Tensor = cls.forward(self, *args, **kwargs)
            return result
        hidden_states, ids, weights = (
            call["hidden_states"],
            call["top_k_index"],
            call["top_k_weights"],
        )
        adapter_ids = None
        if names is None:
            active = [name for name in self.active_adapters if name in self.lora_A]
        else:
            active, adapter_ids = _ids_of(self, names, hidden_states)
        if not active:
            result = experts(**call)
            return result
        adapter = _cached(self, chain, active, mixed=names is not None)
        bank = _bank_of(experts)
        x = cast_like(hidden_states, bank.gate_up.weight)
        y = adapted_experts(bank, x, weights, ids, [adapter], adapter_ids=adapter_ids)
        return y.to(hidden_states.dtype)

    return forward


register_kind(_KIND, _fused_forward)


def _bank_of(experts: Any) -> FrozenBank:
    (w_up, w_down), (b_up, b_down) = bank_views(experts), bank_bias(experts)
    fused = fused_activation(experts)
    if fused is not None:
        activation: Any = activation_of_name(**fused)
    else:
        activation = experts._apply_gate if getattr(experts, "has_gate", True) else experts.act_fn
    weights = FrozenWeight(w_up, b_up), FrozenWeight(w_down, b_down)
    return FrozenBank(w_up.shape[0], *weights, None, activation)


def _ids_of(layer: Any, names: list[str], x: Tensor) -> tuple[list[str], Tensor]:
    """The adapters in a batch with a name for each sequence, and the one of each of the T tokens;
    -1 for those of "__base__" and of adapters that this layer has not."""
    tokens = x.numel() // x.shape[-1]
    if tokens % len(names):
        raise ValueError(
            f"adapter_names: there must be one for each sequence, got {len(names)} for {tokens} "
            "tokens."
        )
    active = [name for name in dict.fromkeys(names) if name in layer.lora_A]
    numbers = [active.index(name) if name in active else -1 for name in names]
    ids = torch.tensor(numbers, dtype=torch.int32, device=x.device)
    return active, ids.repeat_interleave(tokens // len(names))


def _adapter_of(chain: list[Any], name: str) -> ExpertAdapter:
    """peft's adapter of a block: lora_A.weight [E * r, in] and lora_B.weight [out, r * E]."""
    factors: dict[str, Any] = {}
    for wrapper in chain:
        if name in wrapper.lora_A:
            a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
            a = a.view(wrapper.num_experts, -1, a.shape[1])
            b = b.view(b.shape[0], -1, wrapper.num_experts).permute(2, 0, 1).contiguous()
            if wrapper.scaling[name] != chain[0].scaling[name]:  # The patterns of a LoraConfig.
                b = b * (wrapper.scaling[name] / chain[0].scaling[name])
            factors[_PARTS[wrapper.parameter_name]] = a, b
    none = None, None
    gate_up, down = factors.get("gate_up", none), factors.get("down", none)
    return ExpertAdapter(gate_up[0], gate_up[1], down[0], down[1], chain[0].scaling[name])


def _cached(wrapper: Any, chain: list[Any], names: list[str], mixed: bool) -> ExpertAdapter:
    """The sum of adapters, or of a mixed batch all of them; without gradients it is kept for the
    next call."""

    def make() -> ExpertAdapter:
        adapters = [_adapter_of(chain, name) for name in names]
        return stack_of(adapters) if mixed else sum_of(adapters)

    if torch.is_grad_enabled():
        return make()
    parts = [f[n].weight for w in chain for f in (w.lora_A, w.lora_B) for n in names if n in f]
    scalings = [w.scaling.get(n) for w in chain for n in names]
    versions = [0 if p.is_inference() else p._version for p in parts]
    key = mixed, names, scalings, [p.data_ptr() for p in parts], [p.dtype for p in parts], versions
    kept = wrapper.__dict__.get(_STACKED)
    if kept is None or kept[0] != key:
        kept = wrapper.__dict__[_STACKED] = key, make()
    return kept[1]


class _Factors(nn.Module):
    """One factor of the two weights."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(gate_up)
        self.down = nn.Parameter(down)


class QuantizedExpertsLora(nn.Module, LoraLayer):
    """peft's layer around a `QuantizedHfExperts`: r rows and columns for each expert and weight.

    Parameters, an adapter at a time: lora_A gate_up [E, r, H] and down [E, r, I], uniform as
    peft's; lora_B gate_up [E, 2I, r] and down [E, H, r], zeros.
    """

    # Of LoraLayer: dictionaries by the name of an adapter, and what peft keeps of them.
    r: Any
    lora_alpha: Any
    lora_dropout: Any
    lora_A: Any
    lora_B: Any
    scaling: Any
    use_rslora: Any
    use_dora: Any
    lora_bias: Any
    base_layer: Any
    active_adapters: Any
    merged_adapters: Any
    set_adapter: Any
    get_base_layer: Any

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        experts: Any = module
        return experts.hidden_size, experts.hidden_size

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any
    ) -> None:
        """Adds an adapter; peft calls it."""
        experts: Any = self.get_base_layer()
        refused = [
            name for name in ("use_dora", "lora_bias", "lora_dropout") if getattr(config, name)
        ]
        if not isinstance(config.init_lora_weights, bool):
            refused.append(f"init_lora_weights={config.init_lora_weights!r}")
        if r <= 0 or refused:
            what = f"r = {r}" if r <= 0 else refused[0]
            raise ValueError(
                "LoraConfig: for quantised experts it must have r of at least 1 and neither DoRA, "
                f"bias, dropout nor another initialisation, got {what}."
            )
        if experts.sharding is not None:
            raise ValueError(
                "LoraConfig: quantised experts must all be in this process, got a sharded bank."
            )
        E, H, I = experts.num_experts, experts.hidden_size, experts.intermediate_size
        width = experts.w_gate_up.shape[1]
        # float32, as peft trains its adapters; products run in that.
        where: dict[str, Any] = {"device": experts.w_down.device, "dtype": torch.float32}
        a = [torch.empty(E, r, size, **where) for size in (H, I)]
        b = [torch.zeros(E, size, r, **where) for size in (width, H)]
        for t in (*a, *(() if config.init_lora_weights else b)):
            nn.init.kaiming_uniform_(t.view(-1, t.shape[-1]), a=math.sqrt(5))
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.lora_dropout[adapter_name] = nn.Identity()
        self.lora_A[adapter_name] = _Factors(*a)
        self.lora_B[adapter_name] = _Factors(*b)
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = self.lora_bias[adapter_name] = False
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _adapters(self, names: Any) -> list[ExpertAdapter]:
        found = []
        for name in names:
            if name in self.lora_A:
                a: Any = self.lora_A[name]
                b: Any = self.lora_B[name]
                factors = (a.gate_up, b.gate_up, a.down, b.down)
                found.append(ExpertAdapter(*factors, scaling=self.scaling[name]))
        return found

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        adapter_names: list[str] | None = None,
    ) -> Tensor:
        """As `experts_forward`; hidden_states may be [..., H]. adapter_names is peft's, for a batch
        of several adapters."""
        experts: Any = self.get_base_layer()
        adapters, ids = [], None
        if not self.disable_adapters and not self.merged:
            names = self.active_adapters
            if adapter_names is not None:
                names, ids = _ids_of(self, adapter_names, hidden_states)
            adapters = self._adapters(names)
        if not adapters:
            y: Tensor = self.base_layer(hidden_states, top_k_index, top_k_weights)
            return y
        if ids is not None:
            adapters = [stack_of(adapters)]
        x = hidden_states.reshape(-1, experts.hidden_size)
        y = adapted_experts(experts, x, top_k_weights, top_k_index, adapters, adapter_ids=ids)
        return y.view(hidden_states.shape)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the weights, which are rounded anew to their format: to scales of their
        own, so the result is not the same to the last bit, and cannot be undone.

        Raises:
            ValueError: a format that is read and not made; merge into the float model instead.
        """
        experts: Any = self.get_base_layer()
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [n for n in names if n in self.lora_A and n not in self.merged_adapters]
        for how in experts.formats.values():
            if not how.has_kernels or how.name not in FORMATS:
                raise ValueError(
                    f"merge: experts must be of int8 or int4 as quantize_experts makes them, got "
                    f"{how.label}; merge the adapter into the float model."
                )
        if names:
            warnings.warn(
                "merge: quantised weights are rounded once more, which changes outputs by about as "
                "much as quantising did.",
                stacklevel=2,
            )
        for adapter in self._adapters(names):
            for expert in range(experts.num_experts):
                self._merge_expert(experts, adapter, expert, safe_merge)
        self.merged_adapters.extend(names)

    def _merge_expert(self, experts: Any, adapter: Any, expert: int, safe_merge: bool) -> None:
        for part in ("gate_up", "down"):
            name = f"w_{part}"
            a, b = (getattr(adapter, f"{f}_{part}")[expert].float() for f in ("a", "b"))
            delta = b @ a * adapter.scaling
            if part == "gate_up" and experts.x_scale is not None:
                delta = delta / experts.x_scale
            weight = experts.weight_of(name, expert) + delta
            if safe_merge and not bool(weight.isfinite().all()):
                raise ValueError("merge: adapters must be finite, got infinities or NaNs.")
            how = experts.formats[name]
            q, scale = quantize(weight, how.name, how.group_size)
            getattr(experts, name)[expert].copy_(q)
            getattr(experts, f"{name}_scale")[expert].copy_(scale)

    def unmerge(self) -> None:
        """Not for quantised weights, which merging has rounded."""
        raise NotImplementedError(
            "unmerge: quantised experts do not keep what they were before merge; load the model "
            "and the adapter again."
        )

    def __repr__(self) -> str:
        return "lora." + super().__repr__()
