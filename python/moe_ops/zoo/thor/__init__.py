"""THOR: transformers whose experts are selected at random and trained to agree.

Example:
    model = zoo.create_model("thor")                       # an encoder and a decoder
    out = model.loss(target, source)                 # two passes with other experts each

Source: Zuo et al. 2022 (Taming Sparsely Activated Transformer with Stochastic Experts, arXiv
2110.04260); the dense control is Liang et al. 2021 (R-Drop, arXiv 2106.14448).
"""

from .layers import RandomExperts
from .model import Thor, ThorConfig, symmetric_kl

__all__ = ["RandomExperts", "Thor", "ThorConfig", "symmetric_kl"]
