"""HoME and the multi-task recommenders it is compared with.

    config = HoMEConfig(cardinalities=(1000, 50), num_dense=4,
                        categories=(("like", "love"), ("finish", "skip")))
    model = build(config)                       # HoME; model="mmoe", "ple", ... for the others
    logits = model(categorical, dense)          # [T, K], one column a task

Sources: Wang et al. 2024 (HoME, arXiv 2408.05430); Ma et al. 2018 (MMoE, KDD); Tang et al. 2020
(CGC and PLE, RecSys); Li et al. 2023 (adaptive fusion of a task's own experts, arXiv 2304.04959).
"""

from .model import HoME, HoMEConfig, MultiTask, build, multitask_loss

__all__ = ["HoME", "HoMEConfig", "MultiTask", "build", "multitask_loss"]
