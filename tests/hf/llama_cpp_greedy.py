"""Prints what llama.cpp generates from GGUF files, as JSON: for each file the tokens after IDS.

    python llama_cpp_greedy.py STEPS IDS FILE...

The interpreter is that of MOE_OPS_LLAMA_PYTHON, where the package llama-cpp-python is; without it,
that of the tests.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any


@cache
def interpreter() -> str | None:
    """Returns an interpreter that has llama_cpp, or None."""
    python = os.environ.get("MOE_OPS_LLAMA_PYTHON", sys.executable)
    code = "import importlib.util as u; raise SystemExit(u.find_spec('llama_cpp') is None)"
    return python if subprocess.run([python, "-c", code]).returncode == 0 else None


def generate(files: list[Path], ids: list[int], steps: int) -> dict[str, list[int]]:
    """Returns the greedy tokens of each file by its name."""
    python = interpreter()
    assert python is not None
    command = [python, __file__, str(steps), json.dumps(ids), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(steps: int, ids: list[int], files: list[str]) -> None:
    import llama_cpp as c
    import numpy as np

    @ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    def silent(level: int, text: bytes, data: Any) -> None:
        pass

    c.llama_log_set(silent, ctypes.c_void_p(0))
    found = {}
    for file in files:
        model = c.llama_model_load_from_file(file.encode(), c.llama_model_default_params())
        if not model:
            raise SystemExit(f"llama.cpp cannot load {file}")
        options = c.llama_context_default_params()
        options.n_ctx, options.n_threads, options.n_threads_batch = 64, 1, 1
        context = c.llama_init_from_model(model, options)
        size = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
        new, said = list(ids), []
        for _ in range(steps):
            tokens = (c.llama_token * len(new))(*new)
            if c.llama_decode(context, c.llama_batch_get_one(tokens, len(new))) != 0:
                raise SystemExit(f"llama.cpp cannot run {file}")
            logits = np.ctypeslib.as_array(c.llama_get_logits_ith(context, -1), (size,))
            new = [int(logits.argmax())]
            said += new
        found[Path(file).name] = said
        c.llama_free(context)
        c.llama_model_free(model)
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:])
