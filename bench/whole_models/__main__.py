"""Times whole models, baselines in turns.

    python -m bench.whole_models --model qwen3_moe --threads 1 --json FILE

Each baseline is a process that stays; every round takes one sample of each, in rotating order.
Before anything is timed, logits are compared with those of transformers' eager experts. Models in 8
and 4 bits are loaded from checkpoints that were saved so, as llama.cpp's are. llama.cpp takes part
where llama-cpp-python and gguf are installed (an environment apart: --llama-python):

    pip install gguf numpy && CMAKE_ARGS="-DGGML_NATIVE=on" pip install llama-cpp-python

`--tiny` walks through everything in a minute, with models whose times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.harness.machine import describe_machine, load, now
from bench.whole_models.models import MODELS, build
from bench.whole_models.worker import HF, LLAMA, SEQUENCES, memory
from moe_ops.bench.timing import interleave

# How far logits may be from those of eager experts in bfloat16, by the norm.
_ERRORS = {"int8": 0.1, "q8_0": 0.1, "int4": 0.5, "q4_0": 0.8}
_ERROR = 0.06
# Of options that are not given, as usual and with --tiny.
_SIZES: dict[str, tuple[Any, Any]] = {
    "prefill": ([128, 512, 2048], [8, 16]),
    "decode": ([1, 4, 16], [1, 2]),
    "context": (128, 8),
    "steps": (32, 4),
    "rounds": (5, 1),
}


class Worker:
    def __init__(self, name: str, folder: Path, args: argparse.Namespace) -> None:
        self.name = name
        self.started = time.perf_counter()
        # A setting of the shell would slow one down and not the other: llama.cpp's threads wait for
        # each other at every product.
        env = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
        python = str(args.llama_python if name in LLAMA else sys.executable)
        longest = max(*args.prefill, max(args.decode) * (args.context + args.steps + 1))
        arguments = [name, str(folder), str(args.threads), str(longest)]
        self.process = subprocess.Popen(
            [python, "-m", "bench.whole_models.worker", *arguments],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **command: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise RuntimeError(f"{self.name} ended with status {self.process.wait()}.")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def main() -> None:
    args = _arguments()
    prompts = random.Random(0)
    folder = Path(args.folder or tempfile.mkdtemp(prefix="whole-models-")) / args.model
    num_parameters = _prepare(args, folder)
    vocabulary = 512 if args.tiny else 32000

    def ids(count: int) -> list[int]:
        return [prompts.randrange(1, vocabulary) for _ in range(count)]

    result: dict[str, Any] = {
        "model": args.model,
        "parameters": num_parameters,
        "threads": args.threads,
        "context": args.context,
        "steps": args.steps,
        "rounds": args.rounds,
        "machine": describe_machine(),
        "when": now(),
        "load": load(),
        "contenders": {},
    }

    workers = []
    for name in args.baselines:
        result["contenders"][name] = {"prefill": {}, "decode": {}}
        workers.append(Worker(name, folder, args))
    by_name = {worker.name: worker for worker in workers}

    prompt = ids(min(64, args.prefill[0]))
    logits = {name: worker.ask(do="logits", ids=prompt) for name, worker in by_name.items()}
    truth = logits[args.baselines[0]]
    for name, values in logits.items():
        error = _relative(values, truth)
        result["contenders"][name]["logits_error"] = error
        most = next((e for part, e in _ERRORS.items() if part in name), _ERROR)
        print(f"{name}: logits off by {error:.2%} of {args.baselines[0]}'s", flush=True)
        if error > most and not args.keep_going:
            raise SystemExit(f"{name} computes something else; nothing is timed.")

    jobs = [("prefill", count, {"ids": ids(count)}) for count in args.prefill]
    for batch in args.decode:
        rows = [ids(args.context) for _ in range(batch)]
        jobs.append(("decode", batch, {"ids": rows, "steps": args.steps}))
    for kind, size, command in jobs:
        seconds: dict[str, list[float]] = {name: [] for name in by_name}

        def sample(
            name: str, number: int, kind: str = kind, command: Any = command, into: Any = seconds
        ) -> None:
            taken = by_name[name].ask(do=kind, **command)
            if number > 0:  # The first one warms up, and compiles.
                into[name].append(taken)

        interleave(list(by_name), sample, lambda number: number <= args.rounds)
        for name, times in seconds.items():
            tokens = size if kind == "prefill" else size * args.steps
            result["contenders"][name][kind][str(size)] = tokens / statistics.median(times)
        _print_row(f"{kind} {size}", {n: r[kind][str(size)] for n, r in _items(result)})
    for worker in workers:
        worker.close()
    for name in by_name:  # Alone, each in a fresh process: pages of files are shared otherwise.
        worker = Worker(name, folder, args)
        worker.ask(do="prefill", ids=ids(args.prefill[0]))
        result["contenders"][name]["first_token_s"] = time.perf_counter() - worker.started
        worker.ask(do="decode", ids=[ids(args.context)], steps=args.steps)
        result["contenders"][name]["memory"] = worker.ask(do="memory")
        worker.close()
    for field in ("RssAnon", "RssFile", "VmHWM"):
        row = {n: r["memory"].get(field, 0) / 2**20 for n, r in _items(result)}
        _print_row(f"{field}, MiB", row)
    _print_row("first token, s", {n: r["first_token_s"] for n, r in _items(result)})
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


def _items(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return list(result["contenders"].items())


def _print_row(label: str, values: dict[str, float]) -> None:
    print(f"{label:18}" + "  ".join(f"{n} {v:.1f}" for n, v in values.items()), flush=True)


def _relative(values: list[float], truth: list[float]) -> float:
    off = sum((a - b) ** 2 for a, b in zip(values, truth, strict=True))
    return float((off / sum(b * b for b in truth)) ** 0.5)


def _prepare(args: argparse.Namespace, folder: Path) -> int:
    """Makes the model and its GGUF files, unless they are there. Returns its parameters."""
    note = folder / "parameters"
    if not note.exists():
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(str(build(args.model, folder, args.tiny)))
    for weights in {HF[name].get("weights") for name in args.baselines if name in HF} - {None}:
        if not (folder / weights).exists():
            command = [sys.executable, "-m", "bench.whole_models.models", str(folder), weights]
            subprocess.run(command, check=True)
    wanted = [LLAMA[name] for name in args.baselines if name in LLAMA]
    if wanted:
        code = "from bench.whole_models.files import main; main()"
        subprocess.run([args.llama_python, "-c", code, str(folder), *wanted], check=True)
    return int(note.read_text())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench.whole_models", description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="qwen3_moe")
    parser.add_argument("--baselines", nargs="+", choices=[*HF, *LLAMA])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prefill", type=int, nargs="+", help="tokens of a prompt")
    parser.add_argument("--decode", type=int, nargs="+", help="batch sizes, up to 16")
    parser.add_argument("--context", type=int, help="tokens before decoding")
    parser.add_argument("--steps", type=int, help="of decoding in a sample")
    parser.add_argument("--rounds", type=int, help="samples of each baseline")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--folder", help="where models are made and kept")
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--keep-going", action="store_true", help="whatever the logits are")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.baselines is None:
        args.baselines = ["eager", "moe_ops", "moe_ops int8", "moe_ops int4"]
    if memory() == {}:
        parser.error("memory is read from /proc, which this system lacks")
    for name, (usual, tiny) in _SIZES.items():
        if getattr(args, name) is None:
            setattr(args, name, tiny if args.tiny else usual)
    if max(args.decode) > SEQUENCES:
        parser.error(f"--decode must be at most {SEQUENCES}, got {max(args.decode)}")
    if args.tiny:
        args.keep_going = True  # A token that turns to another expert shows at this size.
    return args


if __name__ == "__main__":
    main()
