"""BAM: attention and feed-forward experts from dense models that were trained apart; BTX.

Source: Zhang et al. 2024 (BAM! Just Like That, arXiv 2408.08274); Sukhbaatar et al. 2024
(Branch-Train-MiX, arXiv 2403.07816).
"""

from .model import ATTENTION, BAM, BAMBlock, BAMConfig

__all__ = ["ATTENTION", "BAM", "BAMBlock", "BAMConfig"]
