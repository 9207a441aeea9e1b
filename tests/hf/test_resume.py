"""A Trainer run that is killed and resumed: losses are those of the run that was not."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import moe_ops
from moe_ops.hf.resume import ResumeCheck

from . import families

pytest.importorskip("accelerate")
pytestmark = pytest.mark.cpu_only
IDS = torch.randint(1, 60, (32, 12), generator=torch.Generator().manual_seed(1))
ROWS = [{"input_ids": row, "labels": row} for row in IDS]


class Kill(TrainerCallback):
    """Ends the process's work in the middle of step 4, after the checkpoint of step 3."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def trainer_of(model, folder, *callbacks, **options):
    arguments = TrainingArguments(
        str(folder),
        max_steps=6,
        save_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    return Trainer(
        model, arguments, train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=list(callbacks)
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def build(family, kind="full"):
    model = families.build(family, hidden_size=32, moe_intermediate_size=32)
    model.set_experts_implementation("moe_ops")
    if kind == "full":
        return model
    peft = pytest.importorskip("peft")
    from moe_ops.hf import lora

    if kind == "int4":
        moe_ops.quantize(model, moe_ops.Int4WeightConfig(group_size=32))
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=experts)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(model, config)
    lora.fuse_adapters(tuned)
    return tuned


def whole_and_killed(family, kind, folder):
    """Returns the losses of a whole run, and the checkpoint of one that was killed."""
    whole = trainer_of(build(family, kind), folder / "whole", ResumeCheck())
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer_of(build(family, kind), folder / "killed", Kill()).train()
    return losses(whole), folder / "killed" / "checkpoint-3"


def resumed(model, checkpoint, *callbacks):
    trainer = trainer_of(model, checkpoint.parent, *callbacks)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return losses(trainer)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("gpt_oss", "full"), ("qwen3_moe", "lora"), ("qwen3_moe", "int4")],
)
def test_resumes_on_a_new_model(family, kind, tmp_path):
    whole, checkpoint = whole_and_killed(family, kind, tmp_path)
    assert resumed(build(family, kind), checkpoint, ResumeCheck()) == whole


def test_experts_with_other_names_in_checkpoints(tmp_path):
    whole, checkpoint = whole_and_killed("qwen3_moe", "full", tmp_path)
    for moved in (False, True):  # The check reads the step, not the name of the folder.
        if moved:
            checkpoint = checkpoint.rename(tmp_path / "moved")
        model = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="moe_ops")
        assert resumed(model, checkpoint, ResumeCheck()) == whole

    # Without the check Trainer goes on with other experts.
    assert resumed(build("qwen3_moe"), checkpoint)[3:] != whole[3:]
    message = r"loaded from the checkpoint of step 3, got one from .* restore .*experts\."
    with pytest.raises(ValueError, match=message):
        resumed(build("qwen3_moe"), checkpoint, ResumeCheck())


@pytest.mark.parametrize("larger", [False, True])
def test_the_best_model_of_a_run(larger, tmp_path):
    """Trainer loads it by the names of the files, too: experts stay those of the last step."""
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3}
    options |= {"metric_for_best_model": "loss", "greater_is_better": larger}
    trainer = trainer_of(build("qwen3_moe"), tmp_path, ResumeCheck(), **options)
    with pytest.raises(ValueError, match="load_best_model_at_end must be False"):
        trainer.train()

    trainer = trainer_of(build("qwen3_moe"), tmp_path, **options)
    trainer.train()
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    wrong = {n for n, v in trainer.model.state_dict().items() if not torch.equal(v, best[n])}
    step = trainer.state.best_global_step
    assert bool(wrong) == (step == 3) and all(".experts." in name for name in wrong)
