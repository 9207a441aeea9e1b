"""Interactive distillation: a student tells a teacher its state, the teacher's upper layers run on
what they were told, and the student hears what came of it.

Letters: D width of a model, P width of a message.

Source: Zhao et al. 2023 (Talking Models: Distill Pre-trained Knowledge to Downstream Models via
Interactive Communication, arXiv 2310.03188). There is no published code; the losses are ours, by
the names of the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ops.zoo.lm.blocks import Step


def _speaker(in_size: int, out_size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_size, out_size), nn.GELU(), nn.Linear(out_size, out_size))


class Conversation(nn.Module):
    """Encoders E (state to message) and decoders D (message to state) of a student and a teacher,
    which share the space of messages.

    Args:
        student_size, teacher_size: widths of the states.
        message_size: P.
    """

    def __init__(self, student_size: int, teacher_size: int, message_size: int) -> None:
        super().__init__()
        self.student_encoder = _speaker(student_size, message_size)
        self.student_decoder = _speaker(message_size, student_size)
        self.teacher_encoder = _speaker(teacher_size, message_size)
        self.teacher_decoder = _speaker(message_size, teacher_size)

    def understood(
        self,
        student: Tensor,
        teacher: Tensor,
        upper: Callable[[Tensor], Tensor],
        *,
        rounds: int = 1,
        interactive: bool = True,
    ) -> Tensor:
        """Returns what the student hears: D_s(E_t(U(D_t(E_s(s))))), [..., D].

        Args:
            student: [..., D] of a lower layer of the student. teacher: the same of the teacher.
            upper: U, the teacher's layers above.
            rounds: how often; the student speaks again of what it heard.
            interactive: False: D_s(E_t(U(teacher))), the control in which the same modules carry
                the teacher's own state and the student only listens.
        """
        if not interactive:
            heard: Tensor = self.student_decoder(self.teacher_encoder(upper(teacher)))
            return heard
        for _ in range(rounds):
            told = self.teacher_decoder(self.student_encoder(student))
            student = self.student_decoder(self.teacher_encoder(upper(told)))
        return student

    def losses(
        self,
        student: Tensor,
        student_upper: Tensor,
        teacher: Tensor,
        upper: Callable[[Tensor], Tensor],
        *,
        rounds: int = 1,
        interactive: bool = True,
    ) -> dict[str, Tensor]:
        """Mean squared differences, to be added to the student's own loss.

        Args:
            student_upper: [..., D] of the student's upper layer; others see `understood`.

        Returns:
            "interact": of student_upper and what was understood. "message": of the messages of both
            about the lower layer. "state": of states and what is decoded from their own messages,
            summed over both.
        """
        heard = self.understood(student, teacher, upper, rounds=rounds, interactive=interactive)
        of_student, of_teacher = self.student_encoder(student), self.teacher_encoder(teacher)
        return {
            "interact": F.mse_loss(student_upper, heard),
            "message": F.mse_loss(of_student, of_teacher),
            "state": F.mse_loss(self.student_decoder(of_student), student)
            + F.mse_loss(self.teacher_decoder(of_teacher), teacher),
        }


def layers_of(model: Any, first: int, last: int | None = None) -> Callable[[Tensor], Tensor]:
    """Blocks `first` to `last` (excluded; None: to the end) of a language model of the zoo as a
    function of states [B, S, D]."""

    def run(x: Tensor) -> Tensor:
        rotation = None
        if model.rope is not None:
            rotation = model.rope.rotation(0, x.shape[1], x.device)
        step = Step(rotation, None, False)
        count = len(model.layers)
        for index in range(first, count if last is None else last):
            x = model.layers[index](x, step, index)
        return x

    return run


def frozen(model: nn.Module) -> nn.Module:
    """The model in `eval()` with no parameter that wants a gradient; gradients still pass through
    it to its input."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def mix(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """Sums of the losses times their weights; those that are not named have 0."""
    parts = [weights[name] * loss for name, loss in losses.items() if weights.get(name)]
    return torch.stack(parts).sum() if parts else torch.zeros(())
