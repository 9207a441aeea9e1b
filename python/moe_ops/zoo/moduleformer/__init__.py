"""ModuleFormer: sparse attention and feed-forward modules that can be added and taken away.

Shen et al. 2023, ModuleFormer: Modularity Emerges from Mixture-of-Experts, arXiv 2306.04640.
"""

from .config import ModuleFormerConfig
from .model import ModuleFormer

__all__ = ["ModuleFormer", "ModuleFormerConfig"]
