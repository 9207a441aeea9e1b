"""One baseline in a process of its own: answers a line of JSON for each line that it is given.

    python -m bench.whole_models.worker BASELINE FOLDER THREADS TOKENS

TOKENS are those of all sequences of a command together, at most: llama.cpp wants to know.
Commands: {"do": "logits", "ids": [..]}; {"do": "prefill", "ids": [..]};
{"do": "decode", "ids": [[..]..], "steps": n}; {"do": "memory"}. Times are seconds.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol

HF = {
    "eager": {},
    "grouped_mm": {},
    "moe_ops": {"weights": None},
    "moe_ops int8": {"weights": "int8"},
    "moe_ops int4": {"weights": "int4"},
    "moe_ops compiled": {"weights": None, "compile": True},
    "moe_ops int8 compiled": {"weights": "int8", "compile": True},
    "moe_ops int4 compiled": {"weights": "int4", "compile": True},
}
LLAMA = {"llama.cpp bf16": "bf16", "llama.cpp q8_0": "q8_0", "llama.cpp q4_0": "q4_0"}
SEQUENCES = 16  # At a time.


class Baseline(Protocol):
    def logits(self, ids: list[int]) -> list[float]:
        """Returns the logits of the token after `ids`."""
        ...

    def prefill(self, ids: list[int]) -> float: ...

    def decode(self, ids: list[list[int]], steps: int) -> float:
        """Seconds of `steps` greedy steps after prompts of one length, the prompts not counted."""
        ...


class Transformers:
    def __init__(self, baseline: str, folder: Path, threads: int, num_tokens: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        options: dict[str, Any] = dict(HF[baseline])
        ours = baseline.startswith("moe_ops")
        if ours:
            import moe_ops.hf
        experts = "moe_ops" if ours else baseline
        weights = options.get("weights")
        self.torch = torch
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder / weights if weights else folder,
            dtype=torch.bfloat16,
            experts_implementation=experts,
        ).eval()
        if ours:
            from tests.helpers.quantized import weight_config

            options["quantization"] = weight_config(options.pop("weights", None))
            moe_ops.hf.optimize(self.model, **options)
            moe_ops.memory.release_file_pages()

    def logits(self, ids: list[int]) -> list[float]:
        last: list[float] = self._forward(ids).float().tolist()
        return last

    def prefill(self, ids: list[int]) -> float:
        started = time.perf_counter()
        self._forward(ids)
        return time.perf_counter() - started

    def _forward(self, ids: list[int]) -> Any:
        with self.torch.no_grad():
            return self.model(self.torch.tensor([ids]), logits_to_keep=1).logits[0, -1]

    def decode(self, ids: list[list[int]], steps: int) -> float:
        times: list[float] = []

        def mark(*_: Any, **__: Any) -> Any:
            times.append(time.perf_counter())
            return self.torch.zeros(len(ids), dtype=self.torch.bool)

        self.model.generate(
            self.torch.tensor(ids),
            attention_mask=self.torch.ones(len(ids), len(ids[0]), dtype=self.torch.long),
            max_new_tokens=steps + 1,
            min_new_tokens=steps + 1,
            do_sample=False,
            stopping_criteria=[mark],
        )
        return times[-1] - times[0]


class LlamaCpp:
    """Through the C functions: several sequences in a batch are beyond the Python class."""

    def __init__(self, baseline: str, folder: Path, threads: int, num_tokens: int) -> None:
        import llama_cpp

        self.c = c = llama_cpp
        c.llama_backend_init()
        c.llama_log_set(SILENT, ctypes.c_void_p(0))
        path = folder / f"{LLAMA[baseline]}.gguf"
        self.model = c.llama_model_load_from_file(
            str(path).encode(), c.llama_model_default_params()
        )
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}.")
        params = c.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = num_tokens, num_tokens, 512
        params.n_seq_max, params.kv_unified = SEQUENCES, True
        params.n_threads = params.n_threads_batch = threads
        self.context = c.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp cannot make a context for {path}.")
        self.vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))
        self.batch = c.llama_batch_init(num_tokens, 0, SEQUENCES)

    def logits(self, ids: list[int]) -> list[float]:
        self._start([ids])
        last = self.c.llama_get_logits_ith(self.context, len(ids) - 1)
        return [last[i] for i in range(self.vocab)]

    def prefill(self, ids: list[int]) -> float:
        started = time.perf_counter()
        self._start([ids])
        self.c.llama_get_logits_ith(self.context, len(ids) - 1)
        return time.perf_counter() - started

    def decode(self, ids: list[list[int]], steps: int) -> float:
        import numpy as np

        rows = self._start(ids)
        length = len(ids[0])
        started = time.perf_counter()
        for step in range(steps):
            tokens = []
            for row in rows:
                values = self.c.llama_get_logits_ith(self.context, row)
                tokens.append(int(np.ctypeslib.as_array(values, (self.vocab,)).argmax()))
            rows = self._run([(t, length + step, s, True) for s, t in enumerate(tokens)])
        return time.perf_counter() - started

    def _start(self, ids: list[list[int]]) -> list[int]:
        """Forgets everything and reads prompts; the rows of their last tokens."""
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        entries = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(ids)
            for position, token in enumerate(prompt)
        ]
        return self._run(entries)

    def _run(self, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = wanted
        status = self.c.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}.")
        return [i for i, entry in enumerate(entries) if entry[3]]


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def SILENT(level: int, text: bytes, data: Any) -> None:
    pass


def memory() -> dict[str, int]:
    """Bytes in memory now that are the process's own and that are of mapped files, and the peak."""
    fields = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in ("RssAnon", "RssFile", "VmHWM"):
            fields[key] = int(value.split()[0]) * 1024
    return fields


def main() -> None:
    baseline, folder, threads, num_tokens = sys.argv[1:]
    kind = Transformers if baseline in HF else LlamaCpp
    it: Baseline = kind(baseline, Path(folder), int(threads), int(num_tokens))
    for line in sys.stdin:
        command = json.loads(line)
        answer: Any
        match command["do"]:
            case "logits":
                answer = it.logits(command["ids"])
            case "prefill":
                answer = it.prefill(command["ids"])
            case "decode":
                answer = it.decode(command["ids"], command["steps"])
            case _:
                answer = memory()
        print("answer", json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
