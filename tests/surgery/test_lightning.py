"""surgery.lightning.RoutingCallback: what a Lightning Trainer logs of the routers."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from moe_ops import layers

lightning = pytest.importorskip("lightning.pytorch", reason="needs lightning (the extra lightning)")

from lightning.pytorch.loggers.logger import Logger  # noqa: E402

from moe_ops.surgery.lightning import RoutingCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Of Lightning, about its own settings.
H, E, K, BATCH = 8, 4, 2, 3


class Model(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.first = layers.MoE.build(H, 6, E, K)
        self.second = layers.MoE.build(H, 6, E, K)
        self.seen: list[list[Tensor]] = []

    def training_step(self, batch: tuple[Tensor], index: int) -> Tensor:
        first = self.first(batch[0], return_routing=True)
        second = self.second(first.y, return_routing=True)
        self.seen.append([first.topk_ids, second.topk_ids])
        return second.y.square().mean()

    def validation_step(self, batch: tuple[Tensor], index: int) -> None:
        self.second(self.first(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


class Recorder(Logger):
    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[int, dict[str, float]]] = []
        self.images: list[tuple[str, int]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "moe/dead_experts" in metrics:
            self.entries.append((step, metrics))

    def log_hyperparams(self, *args: object) -> None:
        pass

    def log_image(self, key: str, images: list[object], step: int) -> None:
        assert len(images) == 1 and images[0].axes
        self.images.append((key, step))


def fit(model: Model, folder, *callbacks: RoutingCallback, **options):
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(4 * BATCH, H)), batch_size=BATCH
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(model, data, data)
    return trainer


def test_logs_and_draws(tmp_path):
    model, recorder = Model(), Recorder()
    callback = RoutingCallback(every_layer=True)
    trainer = fit(model, tmp_path, callback, logger=recorder, log_every_n_steps=2)
    assert [step for step, _ in recorder.entries] == [2, 4]
    for (_, entry), calls in zip(recorder.entries, (model.seen[:2], model.seen[2:]), strict=True):
        stats = layers.ExpertLoadStats()
        for call in calls:
            for name, ids in zip(("first", "second"), call, strict=True):
                stats.update(ids, E, layer=name)
        violations = {name: stats.max_violation(name) for name in ("first", "second")}
        assert entry["moe/max_violation"] == pytest.approx(sum(violations.values()) / 2)
        for name, violation in violations.items():
            assert entry[f"moe/max_violation/{name}"] == pytest.approx(violation)
            assert entry[f"moe/load_entropy/{name}"] == pytest.approx(stats.load_entropy(name))
        assert entry["moe/dead_experts"] == sum(len(stats.dead_experts(n)) for n in violations)
    assert trainer.callback_metrics["moe/max_violation"] == pytest.approx(
        entry["moe/max_violation"]
    )
    assert recorder.images == [("moe/expert_load", 4)]
    steps, loads = callback.history[E]
    assert steps == [2, 4] and torch.tensor(loads).sum((1, 2)).tolist() == [2 * BATCH * 2 * K] * 2
    assert not any(m._forward_hooks for m in model.modules())


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    fit(Model(), tmp_path, RoutingCallback(), logger=logger, log_every_n_steps=1)
    events = EventAccumulator(logger.log_dir, {"images": 0, "scalars": 0})
    events.Reload()
    assert len(events.Scalars("moe/load_entropy")) == 4
    assert len(events.Images("moe/expert_load")) == 1


def test_refuses_a_dense_model():
    trainer = SimpleNamespace(global_step=0)
    with pytest.raises(ValueError, match=r"^RoutingCallback: model must hold a routed layer"):
        RoutingCallback().on_fit_start(trainer, nn.Linear(2, 2))


def test_names_the_package_that_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "moe_ops.surgery.lightning")
    with pytest.raises(ImportError, match=r"needs lightning.*torch-moe-ops\[lightning\]"):
        import moe_ops.surgery.lightning  # noqa: F401
