"""GNT-MOVE: novel views of scenes that were not trained on, by transformers with experts of views.

    model = zoo.create("gntmove")                        # ffn="dense": GNT
    image = model.render(Views(images, cameras), target)

    python -m moe_ops.zoo.gntmove --folder runs/gntmove

Source: Cong et al. 2023 (Enhancing NeRF akin to Enhancing LLMs: Generalizable NeRF Transformer with
Mixture-of-View-Experts, ICCV, arXiv 2308.11793); Varma et al. 2023 (GNT, ICLR, arXiv 2207.13298).
"""

from .._images import psnr, ssim
from .cameras import Cameras, look_at, project, rays
from .layers import ViewExperts, ViewRouted, ViewRouter, consistency_loss, neighbours
from .model import GNTMove, GNTMoveConfig, Rendered, RenderLoss, Views
from .scenes import MATERIALS, Scenes, draw_cameras, draw_scenes, photograph, see
from .training import Batch, Unseen, draw_batch, draw_unseen, evaluate, fit, routing_of

__all__ = [
    "MATERIALS",
    "Batch",
    "Cameras",
    "GNTMove",
    "GNTMoveConfig",
    "RenderLoss",
    "Rendered",
    "Scenes",
    "Unseen",
    "ViewExperts",
    "ViewRouted",
    "ViewRouter",
    "Views",
    "consistency_loss",
    "draw_batch",
    "draw_cameras",
    "draw_scenes",
    "draw_unseen",
    "evaluate",
    "fit",
    "look_at",
    "neighbours",
    "photograph",
    "project",
    "psnr",
    "rays",
    "routing_of",
    "see",
    "ssim",
]
