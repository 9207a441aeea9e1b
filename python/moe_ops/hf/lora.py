"""peft's LoRA on experts, float or quantized, with the usual `LoraConfig`::

    import moe_ops.hf.lora

    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(target_modules=["q_proj"], target_parameters=targets)
    model = get_peft_model(model, config)  # or PeftModel.from_pretrained
    moe_ops.hf.lora.fuse_adapters(model)

Modules, parameters and checkpoints are peft's, so adapters trained on one kind of experts load on
the other. Experts and their adapters are computed together, without storing weights with added
adapters: for float experts after `fuse_adapters`, for quantized ones (QLoRA) always. Importing this
module lets peft find the weights of quantized experts.

E experts, H hidden size, I intermediate size, r rank.
"""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

try:
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTuner
except ModuleNotFoundError as error:
    if error.name != "peft":
        raise
    raise ImportError(
        "moe_ops.hf.lora needs the package peft, which is not installed: pip install peft"
    ) from error

from moe_ops.hf.decode.fused import register_kind, set_fused
from moe_ops.hf.experts.forward import bank_bias, bank_views, cast_like
from moe_ops.hf.experts.placed import is_placed, run_placed, without_moves
from moe_ops.hf.experts.quantized import QuantizedHfExperts
from moe_ops.hf.experts.switch import interface_of
from moe_ops.hf.models.gates import fused_activation
from moe_ops.layers.expert_adapters import (
    ExpertAdapter,
    FrozenBank,
    FrozenWeight,
    activation_of_name,
    adapted_experts,
    factors_of_peft,
    factors_to_peft,
    frozen_bank,
    stack_of,
    sum_of,
)
from moe_ops.quant.formats import quantize_weight

_KIND = "expert_lora"
_PARTS = {"gate_up_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down"}


def on_quantized_experts(config: Any) -> Any:
    """Replaces "experts" in the `target_modules` of a `LoraConfig` by `target_parameters`; returns
    it.

    It is a shorthand, and supports the configs of adapters with earlier names, which contain the
    module.

    Raises:
        ValueError: `target_modules` is a pattern with experts.
    """
    modules = config.target_modules
    if isinstance(modules, str):
        if "experts" in modules:
            raise ValueError(
                "on_quantized_experts: target_modules must be a list, or name experts in "
                f"target_parameters, got {modules!r}."
            )
        return config
    experts = [name for name in modules or () if name.rpartition(".")[2] == "experts"]
    if experts:
        config.target_modules = set(modules) - set(experts)
        weights = {f"{name}.{weight}" for name in experts for weight in _PARTS}
        config.target_parameters = sorted({*(config.target_parameters or ()), *weights})
    return config


def fuse_adapters(model: nn.Module) -> list[str]:
    """Runs experts with adapters of peft's `target_parameters` on moe_ops, in place.

    It supports training and inference, several active adapters (their sum), `disable_adapter`,
    merging, and, beyond peft, a batch with several adapters in `eval()`: `model(ids,
    adapter_names=[...])` with one name or "__base__" per sequence. Parameters, their names and the
    files of `save_pretrained` do not change, and adapters may be loaded later. Rank-r GEMMs run in
    the dtype of the experts.

    peft runs the rest: biases as targets, norms of expert outputs, single experts, sharded experts,
    and calls in which the experts are not frozen, have hooks, or contain a merged adapter.
    Quantized experts do not need this function.

    Args:
        model: from `get_peft_model` or `PeftModel.from_pretrained`, or any module with such blocks.

    Returns:
        Names of the experts that now run on moe_ops.

    Raises:
        ValueError: there are none.
    """
    found = []
    for name, module in model.named_modules():
        quantized = isinstance(module, QuantizedExpertsLora)
        if quantized or (isinstance(module, ParamWrapper) and _fits(module)):
            if not quantized and getattr(type(module), "_moe_ops_kind", None) != _KIND:
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
    """Returns a wrapper and the wrappers inside it, one per parameter."""
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
        call = _call(args, kwargs)
        names = call.pop("adapter_names", None)
        experts, chain = self.get_base_layer(), _chain(self)
        plain = any(each.disable_adapters or each.merged for each in chain)
        busy = "forward" in experts.__dict__ or experts._forward_hooks or experts._forward_pre_hooks
        frozen = not any(p.requires_grad for p in experts.parameters())
        if plain or busy or not frozen or len(call) != 3:
            result: Tensor = cls.forward(self, *args, **kwargs)
            return result
        return _forward(self, chain, experts, names, **call)

    return forward


def _call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of experts in their order, and adapter_names for a batch with several
    adapters, by name."""
    names = ("hidden_states", "top_k_index", "top_k_weights")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return {name: given[name] for name in names if name in given} | given


def _forward(
    wrapper: Any, chain: list[Any], experts: Any, names: list[str] | None, **call: Any
) -> Tensor:
    """Returns the output of experts with their adapters, where the experts are."""
    run = functools.partial(_run, wrapper, chain, experts, names)
    return run_placed(experts, run, **call) if is_placed(experts) else run(**call)


def _run(
    wrapper: Any,
    chain: list[Any],
    experts: Any,
    names: list[str] | None,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    adapter_ids = None
    if names is None:
        active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    else:
        active, adapter_ids = _ids_of(wrapper, names, hidden_states)
    if not active:
        result: Tensor = experts(hidden_states, top_k_index, top_k_weights)
        return result
    adapter = _cached(wrapper, chain, active, mixed=names is not None)
    bank = _bank_of(experts)
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    if bank.gate_up.scale is None:
        x = cast_like(x, bank.gate_up.weight)
    args = bank, x, top_k_weights, top_k_index, [adapter]
    y = adapted_experts(*args, adapter_ids=adapter_ids)
    return y.to(hidden_states.dtype).view(hidden_states.shape)


register_kind(_KIND, _fused_forward)


def _bank_of(experts: Any) -> FrozenBank:
    if isinstance(experts, QuantizedHfExperts):
        return frozen_bank(experts)
    (w_up, w_down), (b_up, b_down) = bank_views(experts), bank_bias(experts)
    fused = fused_activation(experts)
    if fused is not None:
        activation: Any = activation_of_name(**fused)
    else:
        activation = experts._apply_gate if getattr(experts, "has_gate", True) else experts.act_fn
    weights = FrozenWeight(w_up, b_up), FrozenWeight(w_down, b_down)
    return FrozenBank(w_up.shape[0], *weights, None, activation)


def _ids_of(layer: Any, names: list[str], x: Tensor) -> tuple[list[str], Tensor]:
    """Returns the adapters in a batch with one name per sequence, and the adapter of each of the T
    tokens; -1 for "__base__" and adapters that this layer does not have."""
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
    """Returns peft's adapter of a block."""
    factors: dict[str, Any] = {}
    for wrapper in chain:
        if name in wrapper.lora_A:
            a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
            a, b = factors_of_peft(a, b, wrapper.num_experts)
            # They differ with the patterns of a LoraConfig.
            if wrapper.scaling[name] != chain[0].scaling[name]:
                b = b * (wrapper.scaling[name] / chain[0].scaling[name])
            factors[_PARTS[wrapper.parameter_name]] = a, b
    none = None, None
    gate_up, down = factors.get("gate_up", none), factors.get("down", none)
    return ExpertAdapter(gate_up[0], gate_up[1], down[0], down[1], chain[0].scaling[name])


def _cached(wrapper: Any, chain: list[Any], names: list[str], mixed: bool) -> ExpertAdapter:
    """Returns the sum of adapters, or all adapters of a mixed batch; without gradients it is cached
    for the next call."""

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


class QuantizedExpertsLora(ParamWrapper):
    """peft's layer around one weight of a `QuantizedHfExperts`, or around such a layer of another
    weight. Names and shapes of parameters are those for float experts; their dtype is float32."""

    def get_param(self) -> Tensor:
        """Returns a tensor from which peft reads sizes, dtype and device."""
        return _stand_in(self.get_base_layer(), self.parameter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the experts, like `experts_forward`; hidden_states may be [..., H]. adapter_names is
        peft's argument for a batch with several adapters."""
        call = _call(args, kwargs)
        names = call.pop("adapter_names", None)
        experts, chain = self.get_base_layer(), _chain(self)
        if self.disable_adapters or any(each.merged for each in chain):
            result: Tensor = experts(**call)
            return result
        return _forward(self, chain, experts, names, **call)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the weight, which is quantized again with new scales: the result is not
        bitwise identical, and merging cannot be undone.

        Raises:
            ValueError: a read-only format; merge into the float model instead.
        """
        experts: Any = self.get_base_layer()
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [n for n in names if n in self.lora_A and n not in self.merged_adapters]
        for how in experts.formats.values():
            if not how.has_kernels:
                raise ValueError(
                    f"merge: experts must be of int8 or int4 as quantize makes them, got "
                    f"{how.label}; merge the adapter into the float model."
                )
        if names:
            warnings.warn(
                "merge: quantized weights are rounded once more, which changes outputs by about as "
                "much as quantizing did.",
                stacklevel=2,
            )
        for name in names:
            layers: Any = self.lora_A[name], self.lora_B[name]
            a, b = factors_of_peft(layers[0].weight, layers[1].weight, experts.num_experts)
            for expert in range(experts.num_experts):
                delta = b[expert].float() @ a[expert].float() * self.scaling[name]
                self._add(experts, expert, delta, safe_merge)
        self.merged_adapters.extend(names)

    def _add(self, experts: Any, expert: int, delta: Tensor, safe_merge: bool) -> None:
        name = f"w_{_PARTS[self.parameter_name]}"
        if name == "w_gate_up" and experts.x_scale is not None:
            delta = delta / experts.x_scale
        weight = experts.weight_of(name, expert) + delta
        if safe_merge and not bool(weight.isfinite().all()):
            raise ValueError("merge: adapters must be finite, got infinities or NaNs.")
        how = experts.formats[name]
        q, scale = quantize_weight(weight, how.label)
        getattr(experts, name)[expert].copy_(q)
        getattr(experts, f"{name}_scale")[expert].copy_(scale)

    def unmerge(self) -> None:
        """Raises NotImplementedError: merging has rounded the quantized weights."""
        raise NotImplementedError(
            "unmerge: quantized experts do not keep what they were before merge; load the model "
            "and the adapter again."
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        # Earlier names: lora_A.gate_up [E, r, H], lora_A.down [E, r, I], lora_B [E, out, r].
        for depth, wrapper in enumerate(_chain(self)):
            part = _PARTS[wrapper.parameter_name]
            pattern = re.compile(rf"{re.escape(prefix)}lora_A\.((.+)\.)?{part}$")
            for match in [m for m in map(pattern.match, list(state_dict)) if m]:
                # peft inserts the adapter's name into known keys; it has just added this adapter.
                name = match[2] or list(self.lora_A)[-1]
                old = [match[0], f"{prefix}lora_B.{match[1] or ''}{part}"]
                if old[1] not in state_dict:
                    continue
                factors = factors_to_peft(*map(state_dict.pop, old))
                for side, factor in zip("AB", factors, strict=True):
                    new = f"{prefix}{'base_layer.' * depth}lora_{side}.{name}.weight"
                    state_dict[new] = factor
        super()._load_from_state_dict(state_dict, prefix, *others)


def _stand_in(experts: Any, name: str) -> Tensor:
    """Returns a tensor with the shape [E, out, in], dtype and device that a weight of quantized
    experts has as peft's target. It takes no memory, and its values are meaningless."""
    width, size = experts.w_gate_up.shape[1], experts.hidden_size
    shape = (size, experts.intermediate_size) if name == "down_proj" else (width, size)
    empty = torch.zeros((), dtype=torch.float32, device=experts.w_down.device)
    return empty.expand(experts.num_experts, *shape)


@contextlib.contextmanager
def _with_parameters(banks: list[Any]) -> Iterator[None]:
    """Gives quantized experts, temporarily, the parameters that peft looks for."""
    names = {bank: ("gate_up_proj" if bank.gated else "up_proj", "down_proj") for bank in banks}
    try:
        for bank in banks:
            for name in names[bank]:
                bank._parameters[name] = nn.Parameter(_stand_in(bank, name), requires_grad=False)
        yield
    finally:
        for bank in banks:
            for name in names[bank]:
                bank._parameters.pop(name, None)


def _check(config: Any, bank: Any) -> None:
    if bank.sharding is not None:
        raise ValueError(
            "LoraConfig: quantized experts must all be in this process, got a sharded bank."
        )
    refused = [name for name in ("use_dora", "lora_bias", "lora_dropout") if getattr(config, name)]
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        refused.append(f"init_lora_weights={config.init_lora_weights!r}")
    if refused:
        raise ValueError(
            "LoraConfig: for quantized experts it must have neither DoRA, bias, dropout nor an "
            f"initialization that reads weights, got {refused[0]}."
        )


def _set_classes(model: nn.Module, before: type, after: type) -> None:
    layers: list[Any] = [module for module in model.modules() if type(module) is before]
    for layer in layers:
        if isinstance(layer.get_base_layer(), QuantizedHfExperts):
            layer.__class__ = after


def _find_quantized_experts(original: Any) -> Any:
    """Wraps peft's function that puts layers around `target_parameters`, to support quantized
    experts."""

    @functools.wraps(original)
    def inject_parameters(
        self: Any, peft_config: Any, model: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        banks = [m for m in model.modules() if isinstance(m, QuantizedHfExperts)]
        for bank in banks:
            _check(peft_config, bank)
        # peft recognizes the layers of earlier adapters by their class name.
        _set_classes(model, QuantizedExpertsLora, ParamWrapper)
        try:
            with _with_parameters(banks):
                found = original(self, peft_config, model, *args, **kwargs)
        finally:
            _set_classes(model, ParamWrapper, QuantizedExpertsLora)
        return found

    return inject_parameters


def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
    """Keeps adapters of placed experts on the CPU, where their GEMMs run."""
    if is_placed(self.get_base_layer()):
        fn = without_moves(fn)
    return super(ParamWrapper, self)._apply(fn, recurse)


ParamWrapper._apply = _apply  # type: ignore[method-assign]

# peft looks for targets among parameters and has no hook there; quantized experts have no
# parameters.
if not hasattr(BaseTuner._inject_parameters, "__wrapped__"):
    inject = _find_quantized_experts(BaseTuner._inject_parameters)
    BaseTuner._inject_parameters = inject  # type: ignore[method-assign]
