"""Norms of transformers that `add_rms_norm` computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from moe_ops.hf.models.known import add_table, find, register


@dataclass(frozen=True)
class RmsNorm:
    """RMS norm weight * x / sqrt(mean(x^2) + eps), with the mean over the last dimension.

    eps: name of the attribute with epsilon.
    scaled: name of a flag without which there is no weight.
    """

    eps: str = "variance_epsilon"
    scaled: str | None = None

    def why_not(self, norm: nn.Module) -> str | None:
        """Returns why this module does not compute the formula; None if it does."""
        parameters = {name: p for name, p in norm._parameters.items() if p is not None}
        if parameters.keys() != {"weight"} or parameters["weight"].dim() != 1:
            return "its only parameter must be a vector called weight"
        if norm._modules or self.epsilon(norm) is None:
            return f"it must have a number called {self.eps} and no submodules"
        return None

    def epsilon(self, norm: Any) -> float | None:
        """Returns the current epsilon; None if there is no weight."""
        state = norm.__dict__
        eps = state.get(self.eps)
        if self.scaled is not None and state.get(self.scaled) is not True:
            return None
        return eps if type(eps) is float else None


_T5 = RmsNorm()
add_table(
    "norm",
    {
        # Mixtral, Qwen, DeepSeek, GLM, Granite, ...: weight * (x / rms).to(x.dtype)
        "491865596a9b": _T5,
        # gpt-oss, FlexOlmo, AFMoE, Flint, DeepSeek-V4: (weight * x / rms).to(x.dtype)
        "7d9ab20ea6ce": _T5,
        # Nemotron-H, Lara: (weight.float() * x / rms).to(x.dtype)
        "e296b38744f7": _T5,
        # Llama 4, before and from transformers 5.25 on
        "3901e6860228": RmsNorm("eps"),
        "1e4751d6040f": RmsNorm(),
        # Gemma 4, Muse Spark, likewise
        "ce01b584ad5f": RmsNorm("eps", scaled="with_scale"),
        "9ed882cd9f23": RmsNorm(scaled="with_scale"),
    },
)


def epsilon_of(norm: nn.Module) -> float:
    """Returns the epsilon of a known RMS norm.

    Raises:
        Unknown: it is unknown.
    """
    eps: float = find("norm", norm).epsilon(norm)
    return eps


def register_norm(cls: type[nn.Module], eps: str = "variance_epsilon") -> None:
    """Registers a class as an RMS norm: weight * x / sqrt(mean(x^2) + eps).

    :func:`moe_ops.hf.optimize` then fuses modules of exactly this class, if they agree with the
    formula on a few inputs.

    Args:
        cls: a class of modules with one parameter, `weight` [H].
        eps: the name of the attribute with epsilon, a float.

    Raises:
        TypeError: `cls` is not a class of modules.
    """
    register("norm", cls, RmsNorm(eps))
