"""LoRA of the package peft on quantised experts: QLoRA.

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
    from peft.tuners.lora.layer import LoraLayer
except ModuleNotFoundError as error:
    if error.name != "peft":
        raise
    raise ImportError(
        "moe_ops.hf.lora needs the package peft, which is not installed: pip install peft"
    ) from error

from moe_ops.hf.quantized import QuantizedHfExperts
from moe_ops.layers.expert_adapters import ExpertAdapter, adapted_experts
from moe_ops.quant.formats import FORMATS, quantize


def on_quantized_experts(config: Any) -> Any:
    """Makes a `LoraConfig` find quantised experts among its `target_modules`, by the name of their
    module ("experts"); returns it. peft does not save that: call it for a config that is read."""
    config._register_custom_module({QuantizedHfExperts: QuantizedExpertsLora})
    return config


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
                found.append(ExpertAdapter(*factors, self.scaling[name]))
        return found

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As `experts_forward`; hidden_states may be [..., H]."""
        experts: Any = self.get_base_layer()
        adapters = (
            [] if self.disable_adapters or self.merged else self._adapters(self.active_adapters)
        )
        if not adapters:
            y: Tensor = self.base_layer(hidden_states, top_k_index, top_k_weights)
            return y
        x = hidden_states.reshape(-1, experts.hidden_size)
        y = adapted_experts(experts, x, top_k_weights, top_k_index, adapters)
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
