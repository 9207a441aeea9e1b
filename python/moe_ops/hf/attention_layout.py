"""What attention of a decoder layer of transformers is made of, found out by what it computes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_ops.hf.cache_argument import cache_name
from moe_ops.hf.fused import call_quietly, close, norm_eps
from moe_ops.hf.probe import numbers, random_copy
from moe_ops.reference import attention_step, latent_attention_step

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class AttentionLayout(NamedTuple):
    """Grouped heads with rotary positions: q_proj, k_proj, v_proj and o_proj, and perhaps q_norm
    and k_norm.

    eps: of the norm before it.
    head_eps: of q_norm and k_norm; None without them.
    head_size: d.
    one_angle: whether cos and sin have each angle once; otherwise twice.
    partial: whether angles for fewer features rotate those alone.
    scale: of scores.
    """

    eps: float
    head_eps: float | None
    head_size: int
    one_angle: bool
    partial: bool
    scale: float


class LatentLayout(NamedTuple):
    """Latent keys and values (MLA): q_proj, or q_a_proj, q_a_layernorm and q_b_proj, and
    kv_a_proj_with_mqa, kv_a_layernorm, kv_b_proj and o_proj.

    eps: of the norm before it.
    latent_eps: of the norms in it.
    num_heads, rank, rope_size: n, r, and the features of a head that are rotated.
    bottleneck: whether queries have q_a_proj.
    interleaved, interleaved_keys: as of latent_attention_step.
    complex_angles: whether positions come as complex numbers, not as cos and sin.
    scale: of scores.
    """

    eps: float
    latent_eps: float
    num_heads: int
    rank: int
    rope_size: int
    bottleneck: bool
    interleaved: bool
    interleaved_keys: bool
    complex_angles: bool
    scale: float

    def angles(self, positions: Any) -> tuple[Tensor, Tensor] | None:
        """cos and sin of what a model gives its layers as positions."""
        if self.complex_angles:
            if not isinstance(positions, Tensor) or not positions.is_complex():
                return None
            return positions.real, positions.imag
        if not isinstance(positions, tuple) or positions[0].shape[-1] != self.rope_size:
            return None
        cos, sin = positions
        return cos, sin


def attention_layout(attention: Any, eps: float) -> AttentionLayout | LatentLayout | None:
    """What it is; None for what is neither.

    Args:
        eps: of the norm before it.
    """
    return _of_heads(attention, eps) or _of_latents(attention, eps)


def _of_heads(attention: Any, eps: float) -> AttentionLayout | None:
    parts = attention._modules
    norms = [name for name in ("q_norm", "k_norm") if name in parts]
    scale, size = getattr(attention, "scaling", None), getattr(attention, "head_dim", None)
    if (
        not _has_parts(attention, _PROJECTIONS, norms)
        or attention._parameters.keys() - {"sinks"}
        or len(norms) == 1
        or not isinstance(scale, float)
        or not isinstance(size, int)
        or size % 4
    ):
        return None
    head_eps = {norm_eps(parts[name]) for name in norms}
    if len(head_eps) > 1 or None in head_eps:
        return None
    probe = random_copy(attention)
    for one_angle in (False, True):
        layout = AttentionLayout(
            eps, next(iter(head_eps), None), size, one_angle, False, float(scale)
        )
        if _attends(probe, layout, size):
            return layout._replace(partial=_attends(probe, layout, size // 2))
    return None


def _has_parts(attention: Any, projections: Collection[str], norms: Collection[str]) -> bool:
    """Whether attention of a layer is made of these and nothing else but parameters."""
    parts = attention._modules
    return (
        "forward" not in attention.__dict__
        and parts.keys() == {*projections, *norms}
        and all(isinstance(parts[name], nn.Linear) for name in projections)
        and not attention._buffers
        and isinstance(getattr(attention, "layer_idx", None), int)
    )


def _attends(probe: Any, layout: AttentionLayout, rotary_size: int) -> bool:
    """Whether attention of two short sequences, one of them padded, is that of the op."""
    projections = {name: probe._modules[f"{name}_proj"] for name in "qkvo"}
    x = numbers(2, 3, projections["q"].weight.shape[1])
    angles = numbers(2, 3, rotary_size // 2).repeat(1, 1, 1 if layout.one_angle else 2)
    mask = _padded_mask()
    y = _call_attention(probe, x, (angles.cos(), angles.sin()), mask, None)
    if y is None:
        return False
    options: dict[str, Any] = {f"w_{name}": m.weight for name, m in projections.items()}
    options |= {f"b_{name}": m.bias for name, m in projections.items()}
    if layout.head_eps is not None:
        options |= {"q_norm": probe.q_norm.weight, "k_norm": probe.k_norm.weight}
        options["head_eps"] = layout.head_eps
    num_kv_heads = projections["k"].weight.shape[0] // layout.head_size
    kept = torch.zeros(2, 2, num_kv_heads, 3, layout.head_size)
    total = attention_step(
        x,
        cos=angles.cos(),
        sin=angles.sin(),
        keys=kept[0],
        values=kept[1],
        start=0,
        rotary_size=rotary_size,
        scale=layout.scale,
        mask=mask,
        sinks=probe._parameters.get("sinks"),
        **options,
    )
    return close(y, total - x)


def _padded_mask() -> Tensor:
    """Of two sequences of three tokens, of which the second begins with one of padding."""
    mask = torch.full((2, 1, 3, 3), -1e9).triu(1)
    mask[1, :, 1:, 0] = -1e9
    return mask


def _call_attention(
    probe: Any, x: Tensor, positions: Any, mask: Tensor, cache: Any
) -> Tensor | None:
    y = call_quietly(
        probe,
        hidden_states=x,
        position_embeddings=positions,
        attention_mask=mask,
        position_ids=None,
        **{cache_name(type(probe).forward): cache},
    )
    return y[0] if isinstance(y, tuple) and isinstance(y[0], Tensor) else None


class _Kept:
    """A cache of one call."""

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.tensors = keys, values
        return self.tensors


def _of_latents(attention: Any, eps: float) -> LatentLayout | None:
    bottleneck = "q_a_proj" in attention._modules
    query = ("q_a_proj", "q_b_proj") if bottleneck else ("q_proj",)
    projections = (*query, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    norms = ("q_a_layernorm", "kv_a_layernorm") if bottleneck else ("kv_a_layernorm",)
    names = {"num_heads": "num_heads", "rank": "kv_lora_rank", "rope_size": "qk_rope_head_dim"}
    sizes: dict[str, Any] = {ours: getattr(attention, n, None) for ours, n in names.items()}
    scale = getattr(attention, "scaling", None)
    if (
        not _has_parts(attention, projections, norms)
        or attention._parameters
        or attention.kv_b_proj.bias is not None
        or not isinstance(scale, float)
        or not all(isinstance(size, int) for size in sizes.values())
    ):
        return None
    epsilons: set[Any] = {norm_eps(attention._modules[name]) for name in norms}
    if len(epsilons) > 1 or None in epsilons:
        return None
    (latent_eps,) = epsilons
    probe = random_copy(attention)
    for complex_angles in (False, True):
        for interleaved, interleaved_keys in ((True, False), (False, False), (True, True)):
            layout = LatentLayout(
                eps=eps,
                latent_eps=latent_eps,
                **sizes,
                bottleneck=bottleneck,
                interleaved=interleaved,
                interleaved_keys=interleaved_keys,
                complex_angles=complex_angles,
                scale=scale,
            )
            if _attends_to_latents(probe, layout):
                return layout
    return None


def _attends_to_latents(probe: Any, layout: LatentLayout) -> bool:
    """The same of latent attention, and whether it keeps what the op does."""
    parts, half = probe._modules, layout.rope_size // 2
    x = numbers(2, 3, parts["kv_a_proj_with_mqa"].weight.shape[1])
    angles, mask, kept = numbers(2, 3, half), _padded_mask(), _Kept()
    if layout.complex_angles:
        positions: Any = torch.polar(torch.ones_like(angles), angles)
    else:
        positions = angles.repeat(1, 1, 2).cos(), angles.repeat(1, 1, 2).sin()
    y = _call_attention(probe, x, positions, mask, kept)
    if y is None or not hasattr(kept, "tensors"):
        return False
    own = torch.zeros(2, 1, 3, layout.rank), torch.zeros(2, 1, 3, layout.rope_size)
    operands = latent_operands(layout, {n: _operands_of(m) for n, m in parts.items()})
    total = latent_attention_step(
        x,
        cos=angles.cos(),
        sin=angles.sin(),
        latents=own[0],
        rope_keys=own[1],
        start=0,
        mask=mask,
        **operands,
    )
    same = all(close(t, o) for t, o in zip(kept.tensors, own, strict=True))
    return same and close(y, total - x)


def _operands_of(part: Any) -> Any:
    """As `dense_operands` of a projection; of a norm its weight."""
    return (part.weight, None, part.bias) if isinstance(part, nn.Linear) else part.weight


def latent_operands(layout: LatentLayout, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of latent_attention_step from the parts of an attention: of projections weight,
    scale and bias, of norms the weight."""
    found: dict[str, Any] = {
        "w_kv_b": parts["kv_b_proj"][0],
        "kv_norm": parts["kv_a_layernorm"],
        "num_heads": layout.num_heads,
        "scale": layout.scale,
        "latent_eps": layout.latent_eps,
        "interleaved": layout.interleaved,
        "interleaved_keys": layout.interleaved_keys,
    }
    names = {"kv_a": "kv_a_proj_with_mqa", "o": "o_proj", "q": "q_proj"}
    if layout.bottleneck:
        names |= {"q": "q_b_proj", "q_a": "q_a_proj"}
        found["q_norm"] = parts["q_a_layernorm"]
    for name, part in names.items():
        found[f"w_{name}"], found[f"w_{name}_scale"], found[f"b_{name}"] = parts[part]
    return found
