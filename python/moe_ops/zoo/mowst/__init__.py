"""Mowst: a weak and a strong expert on a graph, mixed by the weak expert's confidence.

Example:
    model = Mowst(MowstConfig(in_size=16, num_classes=4, backbone="gcn"))
    prediction = model.predict(graph.x, graph.edge_index)

Source: Zeng et al. 2024 (Mixture of Weak & Strong Experts on Graphs, ICLR, arXiv 2311.05185).
"""

from .model import Mowst, MowstConfig, MowstOutput, dispersion, mowst_loss

__all__ = ["Mowst", "MowstConfig", "MowstOutput", "dispersion", "mowst_loss"]
