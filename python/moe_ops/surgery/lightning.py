"""Routing statistics in the logs of Lightning: `RoutingCallback`.

Example:
    from moe_ops.surgery.lightning import RoutingCallback

    trainer = lightning.Trainer(callbacks=[RoutingCallback()], logger=TensorBoardLogger("runs"))

Needs lightning or pytorch_lightning: ``pip install torch-moe-ops[lightning]``. For transformers'
Trainer, use `moe_ops.surgery.log_routing`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moe_ops.layers import ExpertLoadStats
from moe_ops.surgery.log_routing import count_in_training, summary
from moe_ops.surgery.routed_layers import find_routed_layers
from moe_ops.viz import plot_expert_load
from moe_ops.viz._canvas import import_matplotlib

__all__ = ["RoutingCallback"]


def _callback_class() -> Any:
    """Returns the base class of callbacks of the installed package."""
    for package in ("lightning", "pytorch_lightning"):
        if importlib.util.find_spec(package) is not None:
            module = "lightning.pytorch" if package == "lightning" else package
            return importlib.import_module(module).Callback
    raise ImportError(
        "moe_ops.surgery.lightning needs lightning, which is not installed: "
        "pip install torch-moe-ops[lightning]"
    )


if TYPE_CHECKING:
    _Callback = object
else:
    _Callback = _callback_class()


class RoutingCallback(_Callback):
    """Logs routing statistics in training, every `log_every_n_steps` of the Trainer.

    All loggers get ``moe/max_violation`` and ``moe/load_entropy`` (means over layers) and
    ``moe/dead_experts`` (the sum), see `moe_ops.layers.ExpertLoadStats`, for the tokens of all
    processes since the last entry; they are also in `trainer.callback_metrics`. At the end of every
    epoch, TensorBoard and Weights & Biases get a picture ``moe/expert_load`` of the load by layer
    and expert over the steps. Tokens of validation and of recomputation are not counted.

    Args:
        layers: shell patterns of the names of layers; None is all.
        every_layer: also log ``moe/max_violation/<name>`` and ``moe/load_entropy/<name>`` of each
            layer.
        picture: draw the picture, which needs matplotlib.

    Attributes:
        history: number of experts -> (steps, [loads [layers, experts] of each step]), lists.

    Raises:
        ValueError: at the start of a fit, for a module without a routed layer.
        MissingMatplotlibError: at the start of a fit, with `picture` and without matplotlib.
    """

    def __init__(
        self,
        *,
        layers: Sequence[str] | None = None,
        every_layer: bool = False,
        picture: bool = True,
    ) -> None:
        super().__init__()
        self.layers = layers
        self.every_layer = every_layer
        self.picture = picture
        self.stats = ExpertLoadStats()
        self.history: dict[int, tuple[list[int], list[list[list[int]]]]] = {}
        self._handles: list[Any] = []
        self._logged_step = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.stats.reset()
        self.history.clear()
        self._logged_step = trainer.global_step
        if self.picture:
            import_matplotlib()  # Raises now, not after an epoch, if it is missing.
        found = find_routed_layers(pl_module, self.layers, caller="RoutingCallback")
        self._handles = count_in_training(self.stats, found)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step  # Optimizer steps: constant during gradient accumulation.
        if step == self._logged_step or step % trainer.log_every_n_steps or not len(self.stats):
            return
        self._logged_step = step
        measured = self.stats.all_reduce().as_dict()
        self.stats.reset()
        values = summary(measured, self.every_layer)
        pl_module.log_dict(values, on_step=True, on_epoch=False, logger=False)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        for num_experts in {len(m["tokens_per_expert"]) for m in measured.values()}:
            loads = [m["tokens_per_expert"] for m in measured.values()]
            steps, rows = self.history.setdefault(num_experts, ([], []))
            steps.append(step)
            rows.append([load for load in loads if len(load) == num_experts])

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not self.picture or not trainer.is_global_zero:
            return
        for num_experts, (steps, rows) in self.history.items():
            name = "moe/expert_load"
            if len(self.history) > 1:
                name = f"{name}_of_{num_experts}_experts"
            for logger in trainer.loggers:
                _draw(logger, name, steps, rows, trainer.global_step)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _draw(logger: Any, name: str, steps: list[int], rows: list[Any], step: int) -> None:
    """Draws the picture for a logger that supports images."""
    takes_images = hasattr(logger, "log_image")  # WandbLogger and similar loggers.
    experiment = None if takes_images else logger.experiment
    if not takes_images and not hasattr(experiment, "add_figure"):  # TensorBoard's.
        return
    figure = plot_expert_load(rows, steps=steps)
    if takes_images:
        logger.log_image(name, [figure], step=step)
    else:
        experiment.add_figure(name, figure, global_step=step)  # type: ignore[union-attr]
