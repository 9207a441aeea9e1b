"""The language model of the demo: a DeepSeekMoE of the zoo, over bytes."""

from __future__ import annotations

from dataclasses import dataclass

from moe_ops import zoo
from moe_ops.zoo.deepseek import DeepSeek

VOCABULARY = 256


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model. `context` bytes are read at once in training."""

    num_layers: int = 4
    hidden_size: int = 128
    num_heads: int = 4
    num_experts: int = 8
    top_k: int = 2
    intermediate_size: int = 128
    context: int = 256


def make_model(config: ModelConfig) -> DeepSeek:
    """Plain attention and softmax scores, as the first generation has them; every layer routes."""
    model: DeepSeek = zoo.create_model(
        "deepseek",
        "tiny_v1",
        vocab_size=VOCABULARY,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_dense_layers=0,
        num_heads=config.num_heads,
        head_size=config.hidden_size // config.num_heads,
        intermediate_size=config.intermediate_size,
        num_experts=config.num_experts,
        top_k=config.top_k,
        num_shared_experts=0,
        renormalize=True,
        device_balance_coefficient=0.0,
        num_devices=1,
        context=config.context,
        tie_embeddings=True,
        init_std=config.hidden_size**-0.5 / 2,
    )
    return model
