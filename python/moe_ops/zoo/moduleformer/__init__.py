"""ModuleFormer: sparse attention and feed-forward modules that can be added and taken away.

Shen et al. 2023, ModuleFormer: Modularity Emerges from Mixture-of-Experts, arXiv 2306.04640.
"""

from .config import GATE_TYPES, ModuleFormerConfig
from .model import ModuleFormer, ModuleFormerBlock

__all__ = ["GATE_TYPES", "ModuleFormer", "ModuleFormerBlock", "ModuleFormerConfig"]
