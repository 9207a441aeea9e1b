"""GNT-MOVE: novel view synthesis for scenes outside the training set, by transformers with view
experts.

Example:
    model = zoo.create_model("gntmove")                        # ffn="dense": GNT
    colors = model(Views(images, cameras), target, pixels).colors

Source: Cong et al. 2023 (Enhancing NeRF akin to Enhancing LLMs: Generalizable NeRF Transformer with
Mixture-of-View-Experts, ICCV, arXiv 2308.11793); Varma et al. 2023 (GNT, ICLR, arXiv 2207.13298).
"""

from .cameras import Cameras
from .layers import ViewExperts, ViewRouter
from .model import GNTMove, GNTMoveConfig, Views

__all__ = [
    "Cameras",
    "GNTMove",
    "GNTMoveConfig",
    "ViewExperts",
    "ViewRouter",
    "Views",
]
