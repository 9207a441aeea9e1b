"""Keys of the tensors of published ModuleFormer checkpoints."""

from __future__ import annotations

from ..lm.checkpoint import Entry, renamed
from .config import ModuleFormerConfig

# Keys of a router's tensors, by the kind of its gate.
_GATES = {
    "linear": {"weight": "w_gate.0.weight"},
    "mlp": {
        "stem.weight": "w_gate.0.weight",
        "stem.bias": "w_gate.0.bias",
        "weight": "w_gate.3.weight",
    },
    "cosine": {
        "stem.weight": "w_gate.weight",
        "weight": "expert_centroids",
        "temperature": "temperature",
    },
}
_NORM = {"weight": "weight", "bias": "bias"}


def entries(config: ModuleFormerConfig) -> list[Entry]:
    """Each tensor of the model with its keys."""
    found = [Entry("embed_tokens.weight", ("transformer.wte.weight",))]
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        q, mlp = f"{theirs}.attn.q_proj", f"{theirs}.mlpf"
        found += renamed(f"{ours}.attention_norm", f"{theirs}.ln_1", _NORM)
        found += renamed(f"{ours}.attention.router", f"{q}.gate", _GATES[config.gate])
        for name in _NORM:
            keys = tuple(f"{theirs}.attn.{p}_proj.{name}" for p in "kv")
            found.append(Entry(f"{ours}.attention.kv_proj.{name}", keys, "rows"))
        found += renamed(f"{ours}.mlp_norm", f"{theirs}.ln_2", _NORM)
        found += renamed(f"{ours}.mlp.router", f"{mlp}.gate", _GATES[config.gate])
        # Their experts are [E, inputs, outputs].
        for name, key in (
            ("attention.w_query", f"{q}.experts.weight"),
            ("attention.w_output", f"{q}.output_experts.weight"),
            ("mlp.experts.w_gate_up", f"{mlp}.experts.weight"),
            ("mlp.experts.w_down", f"{mlp}.output_experts.weight"),
        ):
            found.append(Entry(f"{ours}.{name}", (key,), "transposed"))
    found += renamed("norm", "transformer.ln_f", _NORM)
    return [*found, Entry("lm_head.weight", ("lm_head.weight",))]
