"""Configs of quantization: one class for each format that `quantize` can make."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from moe_ops.weight_formats import GROUP_SIZES, WeightFormat

__all__ = ["Fp8WeightConfig", "Int4WeightConfig", "Int8WeightConfig", "WeightConfig"]


@dataclass(frozen=True)
class WeightConfig:
    """A format to quantize weights to; `Int8WeightConfig` and its kin are the classes to use."""

    @property
    def format(self) -> WeightFormat:
        raise NotImplementedError

    @property
    def label(self) -> str:
        """The name of the format: "int4 g64"."""
        return self.format.label

    def fitting(self, in_features: int) -> WeightConfig | None:
        """Returns this config, or one of smaller groups that divide a row; None without one."""
        return self if in_features % self.format.multiple == 0 else None


@dataclass(frozen=True)
class Int8WeightConfig(WeightConfig):
    """8 bits, with one float32 scale per output feature."""

    @property
    def format(self) -> WeightFormat:
        return WeightFormat("int8")


@dataclass(frozen=True)
class Int4WeightConfig(WeightConfig):
    """4 bits, with one float32 scale per group of inputs.

    Args:
        group_size: 32, 64 or 128, a divisor of the input features.

    Raises:
        ValueError: another group size.
    """

    # Divides the sizes of all published models that moe_ops.hf is tested with; 4.5 bits a weight.
    group_size: int = 64

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"Int4WeightConfig: group_size must be 32, 64 or 128, got {self.group_size!r}."
            )

    @property
    def format(self) -> WeightFormat:
        return WeightFormat("int4", self.group_size)

    def fitting(self, in_features: int) -> WeightConfig | None:
        sizes = [g for g in GROUP_SIZES if g <= self.group_size and in_features % g == 0]
        return replace(self, group_size=sizes[-1]) if sizes else None


@dataclass(frozen=True)
class Fp8WeightConfig(WeightConfig):
    """float8_e4m3fn with one float32 scale per 128 x 128 weights, as DeepSeek-V3 is published."""

    @property
    def format(self) -> WeightFormat:
        return WeightFormat("fp8")


DEFAULT = Int4WeightConfig()


def config_named(owner: str, label: str) -> WeightConfig:
    """Returns the config that makes the format of a name; raises ValueError, with the sentence of
    `owner`, where there is none."""
    known: list[WeightConfig] = [Int8WeightConfig(), Fp8WeightConfig()]
    known += [Int4WeightConfig(size) for size in GROUP_SIZES]
    for config in known:
        if config.label == label:
            return config
    names = ", ".join(sorted(config.label for config in known))
    raise ValueError(f"{owner}: format must be one of {names}, got {label!r}.")


def check_model(owner: str, model: object) -> None:
    """Rejects what is not a module, such as the name of a checkpoint."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{owner}: model must be a loaded model (AutoModelForCausalLM.from_pretrained), got "
            f"{model!r:.80}."
        )


def check_config(owner: str, config: object) -> WeightConfig:
    if not isinstance(config, WeightConfig) or type(config) is WeightConfig:
        raise ValueError(
            f"{owner}: config must be an Int8WeightConfig, an Int4WeightConfig or an "
            f"Fp8WeightConfig, got {config!r}."
        )
    return config
