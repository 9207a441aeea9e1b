"""Readers behind `from_pretrained` of transformers: checkpoints of other methods, of moe_ops, and
GGUF files. The config is read before the damage, as transformers reads it without moe_ops."""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from .readers import SENTENCES, Reader

METHODS = {
    "gptq": ("mixtral", True),
    "awq": ("qwen3_moe", True),
    "compressed-tensors": ("qwen3_moe", False),
    "fp8": ("qwen3_moe", False),
    "mxfp4": ("gpt_oss", False),
}
SIZES = {"num_hidden_layers": 1, "hidden_size": 128, "vocab_size": 16}


def _config(folder: Path, **options: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, **options)


@contextlib.contextmanager
def _quiet() -> Any:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def _state(model: Any) -> dict[str, Any]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def _make(method: str) -> Any:
    def make(folder: Path) -> Any:
        from tests.hf.published_checkpoints import write

        kind, zeros = METHODS[method]
        with _quiet():
            write(folder, kind, method, zeros)
        return _config(folder)

    return make


def _read(folder: Path, config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    import moe_ops.hf  # noqa: F401

    with _quiet():
        torch.manual_seed(0)
        return _state(
            AutoModelForCausalLM.from_pretrained(
                folder,
                config=copy.deepcopy(config),
                experts_implementation="moe_ops",
                dtype=torch.float32,
            )
        )


def _read_with_config(folder: Path, _: Any) -> Any:
    """The quantization_config is what is damaged; what else config.json holds is transformers'."""
    config = _config(folder / "whole")
    values = json.loads((folder / "quantization.json").read_bytes())
    config.quantization_config = values
    if not isinstance(values, dict):
        raise ValueError("quantization.json: transformers takes it for no quantized checkpoint.")
    return _read(folder / "whole", config)


def _make_with_config(folder: Path) -> None:
    _make("gptq")(folder / "whole")
    config = json.loads((folder / "whole" / "config.json").read_text())
    (folder / "quantization.json").write_text(json.dumps(config["quantization_config"]))


def _make_own(folder: Path) -> Any:
    from tests.hf.published_checkpoints import build

    import moe_ops

    with _quiet():
        model = build("qwen3_moe")
        moe_ops.quantize(model, moe_ops.Int4WeightConfig())
        model.save_pretrained(folder)
    return _config(folder)


def _make_gguf(folder: Path) -> Any:
    import gguf
    from tests.hf.gguf_file import write_gguf

    write_gguf(gguf, folder / "model.gguf")
    with _quiet():
        return _config(folder, gguf_file="model.gguf")


def _read_gguf(folder: Path, config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    import moe_ops.hf  # noqa: F401

    with _quiet():
        torch.manual_seed(0)
        return _state(
            AutoModelForCausalLM.from_pretrained(
                folder,
                config=copy.deepcopy(config),
                gguf_file="model.gguf",
                experts_implementation="moe_ops",
                dtype=torch.float32,
            )
        )


def _make_header(folder: Path) -> None:
    _make_gguf(folder)


def _read_header(folder: Path, _: Any) -> Any:
    from moe_ops.hf.checkpoints.gguf_header import check_gguf

    return check_gguf(folder / "model.gguf")


def _make_cli(folder: Path) -> None:
    _make_own(folder)


def _read_cli(folder: Path, _: Any) -> Any:
    import moe_ops.hf  # noqa: F401
    from moe_ops.cli import checkpoints

    with _quiet():
        torch.manual_seed(0)
        return _state(checkpoints.load_model("quantize", folder))


_NEEDS = ("transformers", "safetensors")
READERS = [
    *(
        Reader(method, _make(method), _read, "model.safetensors", needs=_NEEDS, above=True)
        for method in METHODS
    ),
    Reader(
        "quantization_config", _make_with_config, _read_with_config, "quantization.json",
        needs=_NEEDS, above=True, json_only=True,
    ),
    Reader("int4 of moe_ops", _make_own, _read, "model.safetensors", needs=_NEEDS, above=True),
    Reader("gguf", _make_gguf, _read_gguf, needs=("transformers", "gguf"), above=True),
    Reader("gguf header", _make_header, _read_header, needs=("transformers", "gguf")),
    Reader("commands", _make_cli, _read_cli, errors=SENTENCES, needs=_NEEDS),
]  # fmt: skip
