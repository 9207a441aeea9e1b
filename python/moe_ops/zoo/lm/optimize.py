"""A language model of the zoo on kernels for inference."""

from __future__ import annotations

from moe_ops.layers.linear import replace_linears
from moe_ops.quant import WeightConfig, quantize
from moe_ops.quant.linear import quantize_linears

from .model import CausalLM

# Latent attention reads this weight itself.
_FLOAT = ("*kv_b_proj",)


def optimize(model: CausalLM, *, quantization: WeightConfig | None = None) -> dict[str, str]:
    """Puts dense layers and experts of a model on kernels for inference, in place.

    Products of up to 64 rows are read at the speed of memory; with `quantization` they and
    the experts are quantized (`moe_ops.quantize`). Routers, embeddings, norms, dense
    networks and `kv_b_proj` of latent attention stay float. That a step of decoding takes few calls
    (:func:`moe_ops.attention_decode`) needs no asking for.

    Names of parameters and the state dict stay. There is no way back from that: load the model
    again.

    Args:
        model: any of the zoo's language models.
        quantization: `moe_ops.quant.Int8WeightConfig()` or one of its kin. Layers whose rows its
            groups do not divide take the next smaller ones, and stay float if none does.

    Returns:
        Name of each dense layer -> what it is now.

    Raises:
        ValueError: what `quantize` refuses.
    """
    report = {}
    if quantization is not None:
        quantize(model, quantization)
        report = quantize_linears(model, quantization, _FLOAT)
    return report | replace_linears(model)
