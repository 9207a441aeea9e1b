"""Whole models written in the formats of other programs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moe_ops.quant.importance import Importance, collect_importance

from .gguf import write_gguf
from .packed import write_packed
from .source import load_model, open_source

FORMATS = ("gguf", "compressed-tensors", "gptq")


def export(
    source: PreTrainedModel | Path | str,
    target: Path | str,
    *,
    format: str,
    dense: str | None = None,
    calibration: Importance | Iterable[Any] | Callable[[Any], Any] | None = None,
) -> dict[str, str]:
    """Writes a model in the format of another program.

    Example::

        moe_ops.hf.export("Qwen3-30B-A3B", "q4.gguf", format="gguf:q4_k", dense="q8_0")
        moe_ops.hf.export(model, "folder", format="compressed-tensors:int4")

    Formats, where the part after the colon is the type of the weights:

    - ``gguf:f32``, ``f16``, ``bf16``, ``q8_0``, ``q4_0``, ``q4_k`` or ``mxfp4``: a file of
      llama.cpp. Norms and routers stay in float32; rows that the blocks of a type do not divide
      take q8_0 or f16; the embedding and the head take q8_0 beside dense layers of 4 bits.
      ``gguf`` alone keeps the codes of quantized weights and the types of others.
    - ``compressed-tensors:int4`` or ``int8``, and ``gptq:int4``, of which ``int4 g32``, ``int4
      g64`` and ``int4 g128`` (the default) give the size of groups: a folder for vLLM. Routers,
      embedding and head stay float.

    Weights that are quantized already keep their codes where the format has such codes; others are
    rounded to the nearest, or, with `calibration`, by the importance of their inputs. A folder of
    float weights is read and written one layer at a time.

    Args:
        source: a causal language model of transformers, quantized by moe_ops or not, or the folder
            of a checkpoint, whose tokenizer is written too.
        target: the file of a GGUF model, or a folder.
        format: see above.
        dense: the type of dense layers; None is that of experts. For compressed-tensors and GPTQ,
            "none" leaves them float.
        calibration: inputs on which the importance of weights is measured, see
            `moe_ops.quant.collect_calibration`; the model is then loaded as a whole.

    Returns:
        Name of each tensor that was written -> its type.

    Raises:
        ValueError: an unknown format, or a model or weights that it does not have.
        ImportError: the package gguf is missing.
        OSError: the target could not be written; its contents are unchanged.
    """
    kind, _, weights = format.partition(":")
    if kind not in FORMATS:
        raise ValueError(
            f"export: format must begin with one of {', '.join(FORMATS)}, got {format!r}."
        )
    opened = open_source(*_with_importance(source, calibration))
    if kind == "gguf":
        return write_gguf(opened, Path(target), weights or None, dense)
    return write_packed(opened, Path(target), kind, weights, dense)


def _with_importance(source: Any, calibration: Any) -> tuple[Any, Importance | None]:
    """Returns the source and the importance of its weights; a folder that has to be measured is
    loaded, and the source is then the model."""
    if calibration is None or isinstance(calibration, Importance):
        return source, calibration
    if not isinstance(source, PreTrainedModel):
        source = load_model(source)
    return source, collect_importance(source, calibration)
