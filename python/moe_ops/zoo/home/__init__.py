"""HoME: a multi-task recommender with experts per task, per category of tasks, and shared by all.

Example:
    config = HoMEConfig(cardinalities=(1000, 50), num_dense=4,
                        categories=(("like", "love"), ("finish", "skip")))
    logits = HoME(config)(categorical, dense)  # [T, K], one column per task

Source: Wang et al. 2024 (HoME, arXiv 2408.05430).
"""

from .model import HoME, HoMEConfig, multitask_loss

__all__ = ["HoME", "HoMEConfig", "multitask_loss"]
