"""A check that Trainer of transformers restores all weights when it resumes a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.core_model_loading import revert_weight_conversion


class ResumeCheck(TrainerCallback):
    """A callback that stops a run whose experts Trainer has not restored, or would not.

    Trainer fills a live model with the tensors of a checkpoint that have the model's own names.
    Checkpoints of many families name their experts otherwise, for instance one tensor per expert:
    `from_pretrained` converts them, but Trainer leaves these weights of the model as they are, with
    a warning. A run is right if its model was loaded from the checkpoint that it resumes from.
    Adapters of peft are not affected.

    Example:
        model = AutoModelForCausalLM.from_pretrained("run/checkpoint-500")
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[ResumeCheck()])
        trainer.train(resume_from_checkpoint="run/checkpoint-500")
    """

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Checks the model of a run that begins or resumes.

        Raises:
            ValueError: a resumed run whose model was not loaded from the checkpoint of this step,
                or ``load_best_model_at_end=True``, in a family whose checkpoints have other names.
        """
        if args.fsdp or not isinstance(model, PreTrainedModel):
            return  # Adapters, and FSDP's checkpoints, which have the model's names.
        meta = {k: torch.empty_like(v, device="meta") for k, v in model.state_dict().items()}
        other = sorted(meta.keys() - revert_weight_conversion(model, meta).keys())
        if not other:
            return
        if args.load_best_model_at_end:
            raise ValueError(
                "ResumeCheck: load_best_model_at_end must be False, because Trainer would not load "
                f"{other[0]}, which checkpoints name otherwise. Load the folder "
                "trainer.state.best_model_checkpoint by from_pretrained instead."
            )
        step, loaded = state.global_step, model.name_or_path
        if step and (not loaded or _step_of(Path(loaded)) != step):
            raise ValueError(
                f"ResumeCheck: the model must be loaded from the checkpoint of step {step}, got "
                f"one from {loaded or 'a config'!r}. Trainer did not restore "
                f"{other[0]}, which checkpoints name otherwise. Pass a model of "
                "from_pretrained(checkpoint) to Trainer."
            )


def _step_of(folder: Path) -> int | None:
    """Returns the step of Trainer's checkpoint in a folder, None if there is none."""
    file = folder / "trainer_state.json"
    return json.loads(file.read_text())["global_step"] if file.is_file() else None
