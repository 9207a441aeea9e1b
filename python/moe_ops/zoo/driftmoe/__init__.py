"""DriftMoE: a router network over trees that learn from a stream, one example at a time.

    model = zoo.create("driftmoe", preset="moe_data", num_features=24, num_classes=10)
    found = prequential(model, STREAMS["led_a"].examples(10_000, seed=0), detector=ADWIN())

    python -m moe_ops.zoo.driftmoe --folder runs/driftmoe

A model has `predict_one`, `predict_proba_one` and `learn_one`, as classifiers of river have, and
its experts are anything that has them. Streams, trees and detectors of drift come from river (the
extra `streams`); a model of experts of your own runs without it.

Source: Aspis et al. 2025 (DriftMoE: A Mixture of Experts Approach to Handle Concept Drifts, ECML
PKDD workshops, arXiv 2507.18464).
"""

from .experts import StreamExpert, cooperative_labels, hoeffding_tree
from .model import DriftMoE, DriftMoEConfig, RunningScale, Step, StreamRouter
from .picture import draw
from .prequential import Prequential, around, kappa_m, kappa_temporal, prequential
from .streams import STREAMS, Stream, switching
from .training import ARMS, Settings, make_arm, train

__all__ = [
    "ARMS",
    "STREAMS",
    "DriftMoE",
    "DriftMoEConfig",
    "Prequential",
    "RunningScale",
    "Settings",
    "Step",
    "Stream",
    "StreamExpert",
    "StreamRouter",
    "around",
    "cooperative_labels",
    "draw",
    "hoeffding_tree",
    "kappa_m",
    "kappa_temporal",
    "make_arm",
    "prequential",
    "switching",
    "train",
]
