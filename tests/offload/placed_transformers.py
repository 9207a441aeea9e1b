"""Run as a process of its own: loads a model of transformers into its places, as int4.

    python placed_transformers.py FOLDER

It prints the growth of this process's memory: the largest while it loads, and at the end.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from limited_transformers import of_status
from transformers import AutoModelForCausalLM

import moe_ops
import moe_ops.hf
from moe_ops.memory import release_file_pages


def load(folder: Path) -> Any:
    config = moe_ops.Int4WeightConfig()
    return moe_ops.hf.load_placed(AutoModelForCausalLM, folder, "cpu", quantization=config)


def main(folder: Path) -> None:
    load(folder / "small")  # The code of libraries, and what they set up at a first use.
    Path("/proc/self/clear_refs").write_text("5")  # The peak so far is forgotten.
    before = of_status("VmRSS")
    model = load(folder)
    peak = of_status("VmHWM") - before
    release_file_pages()
    size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    print(json.dumps({"peak": peak, "final": of_status("VmRSS") - before, "bytes": size}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
