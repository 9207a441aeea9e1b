"""A language model of the zoo on kernels for inference."""

from __future__ import annotations

from moe_ops.layers.linear import replace_linears
from moe_ops.quant import quantize_experts

from .model import CausalLM

_FORMATS = (None, "int8", "int4")
# Latent attention reads this weight itself.
_FLOAT = ("kv_b_proj",)


def optimize(
    model: CausalLM, weights: str | None = None, *, group_size: int | None = None
) -> dict[str, str]:
    """Puts dense layers and experts of a model on kernels for inference, in place.

    Products of up to 64 rows are read at the speed of memory; with `weights` they and the experts
    are stored in 8 or 4 bits (`moe_ops.quantize_experts`). Routers, embeddings, norms, dense
    networks and `kv_b_proj` of latent attention stay float. That a step of decoding takes few calls
    (:func:`moe_ops.attention_decode`) needs no asking for.

    Names of parameters and the state dict stay. There is no way back from `weights`: load the model
    again.

    Args:
        model: any of the zoo's language models.
        weights: None, "int8" (a scale an output feature) or "int4" (a scale for `group_size`
            inputs).
        group_size: of int4: 32, 64 or 128; None is 64. Layers whose rows it does not divide take
            the next smaller one, and stay float if none does.

    Returns:
        Name of each dense layer -> what it is now.

    Raises:
        ValueError: unknown `weights`, and what `quantize_experts` refuses.
    """
    if weights not in _FORMATS:
        raise ValueError(f"optimize: weights must be None, 'int8' or 'int4', got {weights!r}.")
    if weights is not None:
        quantize_experts(model, weights, group_size=group_size)
    return replace_linears(model, weights, group_size, _FLOAT)
