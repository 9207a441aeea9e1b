"""surgery.log_routing: what a Trainer logs of the routers."""

from __future__ import annotations

import pytest
import torch
from tests.hf import models
from torch import nn

pytest.importorskip("accelerate")

from transformers import Trainer, TrainingArguments

import moe_ops.hf  # noqa: F401
from moe_ops import surgery
from moe_ops.layers import ExpertLoadStats


@pytest.mark.parametrize("checkpointing", [None, True, False])  # None, reentrant or not
def test_trainer_logs_routing(tmp_path, checkpointing):
    model = models.build("mixtral")
    seen = ExpertLoadStats()

    def count(module: nn.Module, args: object, output: tuple[torch.Tensor, ...]) -> None:
        if module.training and torch._C._current_graph_task_id() == -1:
            seen.update(output[2], model.config.num_local_experts, layer=module)

    routers = [m for n, m in model.named_modules() if n.endswith("mlp.gate")]
    assert len(routers) == 2
    for router in routers:
        router.register_forward_hook(count)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(1, models.VOCAB, (12, 10))]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=4,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        per_device_train_batch_size=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=checkpointing is not None,
        gradient_checkpointing_kwargs={"use_reentrant": bool(checkpointing)},
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    stats = surgery.log_routing(trainer, every_layer=True)
    entries: list[dict[str, float]] = []
    expected: list[list[float]] = []
    log = trainer.log

    def take(logs: dict[str, float], *args: object) -> None:
        if "loss" in logs:
            expected.append([seen.max_violation(router) for router in routers])
            seen.reset()
        log(logs, *args)

    trainer.log = take
    trainer.train()
    entries = [e for e in trainer.state.log_history if "loss" in e]
    assert len(entries) == len(expected) == 2
    for entry, wanted in zip(entries, expected, strict=True):
        assert entry["moe/max_violation"] == pytest.approx(sum(wanted) / 2)
        per_layer = [v for k, v in entry.items() if k.startswith("moe/max_violation/")]
        assert per_layer == pytest.approx(wanted)
        assert entry["moe/dead_experts"] >= 0 and entry["moe/load_entropy"] > 0
    assert not any("moe/load_entropy" in e for e in trainer.state.log_history if "loss" not in e)
    assert len(stats) == 0


def test_refuses_a_dense_model():
    class Dense:
        model = nn.Linear(2, 2)

    with pytest.raises(ValueError, match="log_routing"):
        surgery.log_routing(Dense())
