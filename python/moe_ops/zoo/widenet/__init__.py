"""WideNet: one block of attention and experts, used at every depth with norms of that depth.

    model = zoo.create("widenet")                          # a language model
    model = zoo.create("widenet", preset="tiny_vision")    # a classifier of images
    model = zoo.create("widenet", sharing="shared_norms")  # the controls: as ALBERT, and
    model = zoo.create("widenet", sharing="none")          # a block of each depth

Source: Xue et al. 2022 (Go Wider Instead of Deeper, arXiv 2107.11817).
"""

from .config import WideNetConfig
from .layers import NoisyRouter
from .model import WideNetLM, WideNetViT, build

__all__ = ["NoisyRouter", "WideNetConfig", "WideNetLM", "WideNetViT", "build"]
