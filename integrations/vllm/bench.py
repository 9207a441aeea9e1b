"""Throughput of vLLM's CPU engine with and without the plugin, in turns.

    python bench.py MODEL [MODEL ...] [--streams 1 4 8 16] [--rounds 3] [--mode compiled]

Each contender is a process with one engine: "stock" runs the first model with MOE_OPS_VLLM=0, and
"moe_ops" runs each model with the plugin. In each round every contender generates once for every
number of streams, while the others wait. The first model should be the float one that the others
were quantized from. Prompts are random token ids, so a tokenizer is not needed.

Output: tokens per second (prompts included in the time, not in the count) and their ratio to
stock, as medians over rounds; seconds of a prefill of 16 prompts; seconds from the start of a
process to its first token, and its resident memory then.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

PREFILL = 0  # in the place of a number of streams: 16 prompts, one token each


class Contender:
    """An engine in a process of its own."""

    def __init__(self, name: str, model: str, plugin: bool, options: argparse.Namespace) -> None:
        self.name = name
        environment = os.environ | {
            "MOE_OPS_VLLM": str(int(plugin)),
            "OMP_NUM_THREADS": str(options.threads),
            "OMP_WAIT_POLICY": "passive",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        command = [sys.executable, __file__, model, "--worker", "--mode", options.mode]
        command += ["--prompt", str(options.prompt), "--output", str(options.output)]
        started = time.perf_counter()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.generate(1)
        self.start = time.perf_counter() - started
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        self.memory = next(int(row.split()[1]) for row in status.splitlines() if "VmRSS" in row)

    def generate(self, streams: int) -> float:
        """Returns the seconds of one batch."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(streams, file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("SECONDS "):
                return float(line.split()[1])
        raise RuntimeError(f"{self.name} ended.")

    def close(self) -> None:
        self._process.communicate()


def work(options: argparse.Namespace) -> None:
    """Serves the numbers of streams that arrive on stdin."""
    import torch
    from vllm import LLM, SamplingParams

    engine = LLM(
        options.models[0],
        skip_tokenizer_init=True,
        enforce_eager=options.mode == "eager",
        dtype="bfloat16",
        max_model_len=options.prompt + options.output,
        max_num_seqs=16,
        enable_prefix_caching=False,
    )
    size = engine.llm_engine.model_config.get_vocab_size()
    for line in sys.stdin:
        streams = int(line)
        ids = torch.randint(3, size, (streams or 16, options.prompt)).tolist()
        sampling = SamplingParams(
            temperature=0,
            max_tokens=1 if streams == PREFILL else options.output,
            ignore_eos=True,
            detokenize=False,
        )
        started = time.perf_counter()
        engine.generate([{"prompt_token_ids": row} for row in ids], sampling, use_tqdm=False)
        print("SECONDS", time.perf_counter() - started, flush=True)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    contenders = [Contender("stock", options.models[0], False, options)]
    contenders += [Contender(Path(m).name, m, True, options) for m in options.models]
    cells = [PREFILL, *options.streams]
    seconds: dict[tuple[str, int], list[float]] = {}
    for turn in range(options.rounds + 1):
        for streams in cells:
            for contender in contenders:
                spent = contender.generate(streams)
                if turn:  # The first round warms up.
                    seconds.setdefault((contender.name, streams), []).append(spent)
    for contender in contenders:
        contender.close()
    return [
        {
            "engine": c.name,
            "start_s": c.start,
            "memory_mib": c.memory / 1024,
            "prefill_s": median(seconds[c.name, PREFILL]),
            "tokens_per_s": {
                n: n * options.output / median(seconds[c.name, n]) for n in options.streams
            },
        }
        for c in contenders
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="folders of checkpoints or hub ids")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=64, help="new tokens of a stream")
    parser.add_argument("--mode", choices=("eager", "compiled"), default="compiled")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    rows = measure(options)
    stock = rows[0]
    print(f"{'engine':24} {'start s':>8} {'MiB':>7} {'prefill s':>16}", end="")
    print(*(f"{n:>10} streams" for n in options.streams))
    for row in rows:
        print(f"{row['engine']:24} {row['start_s']:8.1f} {row['memory_mib']:7.0f}", end=" ")
        print(f"{row['prefill_s']:8.2f} ({stock['prefill_s'] / row['prefill_s']:.2f}x)", end="")
        for n in options.streams:
            rate, base = row["tokens_per_s"][n], stock["tokens_per_s"][n]
            print(f" {rate:8.1f} ({rate / base:.2f}x)", end=" ")
        print()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
