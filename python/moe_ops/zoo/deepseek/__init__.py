"""DeepSeekMoE: many small experts, shared experts, and three ways to balance the load.

V1: Dai et al. 2024, arXiv 2401.06066. V2: DeepSeek-AI 2024, arXiv 2405.04434. V3: DeepSeek-AI 2024,
arXiv 2412.19437, with the balancing of Wang et al. 2024, arXiv 2408.15664. Multi-token prediction
is not included.
"""

from .config import DeepSeekConfig
from .model import DeepSeek

__all__ = ["DeepSeek", "DeepSeekConfig"]
