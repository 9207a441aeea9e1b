"""llama.cpp's own quantizer: python llama_quantize.py SOURCE TARGET TYPE [IMPORTANCE.npz]

All matrices take TYPE (q4_0 or q4_k), but the embedding and the head, which take q8_0. IMPORTANCE
holds an array for each tensor: mean squares of its inputs, an expert's behind another's.
"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp as c
import numpy as np

_FILES = {"q4_0": c.LLAMA_FTYPE_MOSTLY_Q4_0, "q4_k": c.LLAMA_FTYPE_MOSTLY_Q4_K_S}
_Q8_0 = 8


def main(source: str, target: str, kind: str, importance: str | None = None) -> None:
    options = c.llama_model_quantize_default_params()
    options.ftype, options.pure, options.nthread = _FILES[kind], True, 1
    options.output_tensor_type = options.token_embedding_type = _Q8_0
    if importance is not None:
        arrays = {k: v.astype(np.float32) for k, v in np.load(importance).items()}
        entries = (c.llama_model_imatrix_data * (len(arrays) + 1))()
        for entry, (name, values) in zip(entries, arrays.items(), strict=False):
            pointer = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.name, entry.data, entry.size = name.encode(), pointer, values.size
        options.imatrix = entries
    if c.llama_model_quantize(source.encode(), target.encode(), options) != 0:
        raise SystemExit(f"llama.cpp could not quantize {source}.")


if __name__ == "__main__":
    main(*sys.argv[1:])
