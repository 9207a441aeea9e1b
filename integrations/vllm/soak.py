"""Many requests to vLLM's server with the plugin: are all answered, and does its memory stay flat?

    python soak.py MODEL [--requests 2000] [--streams 16]

MODEL is a folder with a tokenizer. A fifth of the clients close their streams after a few tokens,
and a tenth send something wrong. Afterwards the engine's process is killed, and the server must
answer with an error and end. The status is 1 if a request is lost or memory grows.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import aiohttp
import psutil

# Wrong bodies, and the statuses that say so.
WRONG: list[dict[str, Any]] = [
    {"prompt": [], "max_tokens": 4},
    {"prompt": "a", "max_tokens": -1},
    {"prompt": "a", "max_tokens": 4, "temperature": "hot"},
    {"prompt": "a " * 5000, "max_tokens": 4},
]
# A first part of the requests fills caches; memory is compared after it.
SETTLED = 0.25
GROWTH = 1.03


class Server:
    def __init__(self, model: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_WAIT_POLICY": "passive",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        command += ["--served-model-name", "model", "--port", str(self.port)]
        command += ["--dtype", "bfloat16", "--max-model-len", "512", "--max-num-seqs", "16"]
        self.process = subprocess.Popen(command, env=os.environ | environment)
        self.url = f"http://127.0.0.1:{self.port}"

    def engine(self) -> psutil.Process:
        """Returns the process that computes: the child with the most memory."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return max(children, key=lambda child: child.memory_info().rss)

    def memory(self) -> float:
        """Returns the resident memory of all processes in MiB."""
        parent = psutil.Process(self.process.pid)
        return sum(p.memory_info().rss for p in (parent, *parent.children(True))) / 2**20

    async def wait(self, session: aiohttp.ClientSession) -> None:
        while True:
            if self.process.poll() is not None:
                raise RuntimeError("The server ended before it answered.")
            try:
                async with session.get(f"{self.url}/health") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(1)


async def request(server: Server, session: aiohttp.ClientSession, number: int) -> str:
    """Sends one request; returns how it ended."""
    draw = random.Random(number)
    address = f"{server.url}/v1/completions"
    kind = draw.random()
    if kind < 0.1:
        async with session.post(address, json={"model": "model", **draw.choice(WRONG)}) as answer:
            message = (await answer.json()).get("error", {}).get("message", "")
            refused = 400 <= answer.status < 500 and bool(message)
            return "refused" if refused else f"wrong input got status {answer.status}"
    wanted = draw.randint(1, 48)
    body = {
        "model": "model",
        "prompt": " ".join(draw.choice("abcdefgh") for _ in range(draw.randint(1, 200))),
        "max_tokens": wanted,
        "ignore_eos": True,
        "stream": kind < 0.5,
        "temperature": draw.choice([0.0, 1.0]),
    }
    async with session.post(address, json=body) as answer:
        if answer.status != 200:
            return f"status {answer.status}"
        if not body["stream"]:
            tokens = (await answer.json())["usage"]["completion_tokens"]
            return "answered" if tokens == wanted else "too few tokens"
        lines = 0
        async for line in answer.content:
            lines += line.startswith(b"data: {")
            if kind < 0.3 and lines >= 3:
                return "cancelled"
        return "streamed" if lines >= 1 else "empty stream"


async def soak(server: Server, options: argparse.Namespace) -> bool:
    ends: Counter[str] = Counter()
    settled = 0.0
    limits = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=limits) as session:
        await server.wait(session)
        numbers = iter(range(options.requests))

        async def client() -> None:
            nonlocal settled
            for number in numbers:
                ends[await request(server, session, number)] += 1
                if sum(ends.values()) == int(SETTLED * options.requests):
                    settled = server.memory()

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(options.streams)))
        seconds, memory = time.perf_counter() - started, server.memory()
        print(f"{options.requests} requests in {seconds:.0f} s: {dict(ends)}")
        print(f"memory: {settled:.0f} MiB after a quarter, {memory:.0f} MiB at the end")
        server.engine().send_signal(signal.SIGKILL)
        try:
            after = await request(server, session, 10**6)
        except aiohttp.ClientError as error:
            after = type(error).__name__
        status = await asyncio.to_thread(server.process.wait, 60)
        print(f"after the engine was killed: {after}; the server ended with status {status}")
    good = set(ends) <= {"refused", "answered", "streamed", "cancelled"}
    return good and memory <= GROWTH * settled and after != "answered"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a checkpoint with a tokenizer, or a hub id")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--streams", type=int, default=16)
    options = parser.parse_args()
    server = Server(options.model)
    try:
        passed = asyncio.run(soak(server, options))
    finally:
        server.process.kill()
    sys.exit(not passed)


if __name__ == "__main__":
    main()
