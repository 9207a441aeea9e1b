"""AdaMoE: a feed-forward network made sparse, whose router chooses by one number and weighs by
another, in the action expert of a vision-language-action model.

    policy = zoo.create("adamoe", ffn="dense")          # train it, then
    sparse = policy.made_sparse("additive", num_experts=4)

Source: Shen et al. 2025 (Expertise need not monopolize: Action-Specialized Mixture of Experts for
Vision-Language-Action Learning, arXiv 2510.14300); Black et al. 2024 (pi0, arXiv 2410.24164).
"""

from .layers import AdaMoE, ScaledRouter, adamoe_balance_loss
from .model import ActionTransformer, AdaMoEConfig

__all__ = ["ActionTransformer", "AdaMoE", "AdaMoEConfig", "ScaledRouter", "adamoe_balance_loss"]
