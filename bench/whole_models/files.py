"""GGUF files of a saved model: bfloat16, and what llama.cpp's own quantizer makes of it."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from bench.whole_models.worker import SILENT

_FILE_TYPES = {"q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0"}


def main() -> None:
    folder, kinds = Path(sys.argv[1]), sys.argv[2:]
    bf16 = folder / "bf16.gguf"
    if not bf16.exists():
        import moe_ops.hf

        moe_ops.hf.export(folder, bf16, format="gguf:bf16")
    for kind in kinds:
        path = folder / f"{kind}.gguf"
        if kind in _FILE_TYPES and not path.exists():
            import llama_cpp

            llama_cpp.llama_log_set(SILENT, ctypes.c_void_p(0))
            params = llama_cpp.llama_model_quantize_default_params()
            params.ftype = getattr(llama_cpp, _FILE_TYPES[kind])
            params.pure = True
            status = llama_cpp.llama_model_quantize(str(bf16).encode(), str(path).encode(), params)
            if status != 0:
                raise SystemExit(f"llama.cpp could not quantize {bf16} to {kind}.")
