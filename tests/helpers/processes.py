"""Processes of torch.distributed (gloo, on this machine) that tests send functions to.

    def step(rank, seed): ...                 # at the top of a test module
    with Processes(4) as processes:
        results = processes.run(step, 7, world=2)   # [step(0, 7), step(1, 7)]

The processes live on from call to call, and each call has a process group of its own size: it is
made before the function and destroyed behind it. Results are pickled: tensors, numbers, strings.
"""

from __future__ import annotations

import datetime
import importlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT = 60.0  # seconds: of a collective, and of what a rank may take longer than another
_GRACE = 10.0  # seconds that ranks have to end by themselves once one has failed
_NO_GROUP = "the process group was not made: "  # begins the text of a rank that could not join
# What the server imports once for all processes, which are forked from it; it does not mind if one
# is not there.
_PRELOAD = [
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "transformers.modeling_utils",
]


class RankError(AssertionError):
    """A rank raised an error or ended. ranks: {rank: its text}, of those that say so; what gloo
    says of a lost peer comes last in the message."""

    def __init__(self, ranks: dict[int, str]) -> None:
        texts = sorted(ranks.items(), key=lambda item: ("gloo/transport" in item[1], item[0]))
        super().__init__("\n".join(f"rank {rank}: {text}" for rank, text in texts))
        self.ranks = ranks


class Processes:
    """A pool of `size` processes, started at the first call and anew after one that failed."""

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self._workers: list[tuple[Any, multiprocessing.connection.Connection]] = []
        self._folder = tempfile.TemporaryDirectory()
        self._calls = itertools.count()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        world: int | None = None,
        timeout: float = TIMEOUT,
    ) -> list[Any]:
        """[function(rank, *args) for each rank], in a process group of `world` ranks.

        Args:
            function: of the top level of a module, which the processes import.
            world: number of ranks, at most the size of the pool (None).
            timeout: seconds of the group's collectives.

        Raises:
            RankError: a rank failed; all processes were ended.
        """
        world = self.size if world is None else world
        named = (function.__module__, function.__qualname__)
        for last_attempt in (False, True):
            if not self._workers:
                self._start()
            init = f"file://{self._folder.name}/{next(self._calls)}"
            for rank, (_, pipe) in enumerate(self._workers[:world]):
                pipe.send((named, args, init, rank, world, timeout))
            results, failed = self._collect(world, timeout)
            if not failed:
                break
            self.close(keep_folder=True)
            # On a busy machine gloo sometimes loses a connection while it makes the group. No
            # rank has called the function then, so the second attempt hides nothing.
            if last_attempt or not all(text.startswith(_NO_GROUP) for text in failed.values()):
                raise RankError(failed)
        return [results[rank] for rank in range(world)]

    def _collect(self, world: int, timeout: float) -> tuple[dict[int, Any], dict[int, str]]:
        results: dict[int, Any] = {}
        failed: dict[int, str] = {}
        end = time.monotonic() + 10 * timeout
        while len(results) + len(failed) < world:
            open_ranks = [r for r in range(world) if r not in results and r not in failed]
            pipes = {self._workers[r][1]: r for r in open_ranks}
            left = end - time.monotonic()
            ready = multiprocessing.connection.wait(list(pipes), max(left, 0))
            if not ready:
                return results, failed or dict.fromkeys(open_ranks, "it did not answer")
            for pipe in ready:
                rank = pipes[pipe]
                try:
                    good, value = pipe.recv()
                except (EOFError, ConnectionError):
                    process = self._workers[rank][0]
                    process.join(_GRACE)
                    good, value = False, f"it ended with {process.exitcode}"
                if good:
                    results[rank] = value
                    continue
                if not failed:
                    end = min(end, time.monotonic() + _GRACE)
                failed[rank] = value
        return results, failed

    def kill(self, rank: int) -> None:
        """Ends one process as a machine that fails would."""
        self._workers[rank][0].kill()

    def close(self, *, keep_folder: bool = False) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers.clear()
        if not keep_folder:
            self._folder.cleanup()

    def _start(self) -> None:
        # Forks of a server that has imported torch, and no thread yet, take a tenth of the time.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        root = str(Path(__file__).parents[2])
        for _ in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, [root, *sys.path]), daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))


def _serve(pipe: multiprocessing.connection.Connection, path: list[str]) -> None:
    """Does the work of a process of the pool."""
    sys.path[:] = list(dict.fromkeys(path))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import debug

    torch.set_num_threads(1)
    while True:
        try:
            (module, name), args, init, rank, world, timeout = pipe.recv()
        except EOFError:
            return
        try:
            function: Any = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            torch.manual_seed(0)
            try:
                dist.init_process_group(
                    "gloo",
                    init_method=init,
                    rank=rank,
                    world_size=world,
                    timeout=datetime.timedelta(seconds=timeout),
                )
            except RuntimeError:
                pipe.send((False, _NO_GROUP + traceback.format_exc()))
                continue
            try:
                answer = (True, function(rank, *args))
            finally:
                dist.destroy_process_group()
                # DTensor keeps layouts of results, with the mesh of the first of equal ones, whose
                # groups are gone. torch 2.10 has two functions for the two places.
                for name in (
                    "_clear_sharding_prop_cache",
                    "_clear_python_sharding_prop_cache",
                    "_clear_fast_path_sharding_prop_cache",
                ):
                    getattr(debug, name, lambda: None)()
            pipe.send(answer)
        except Exception:
            pipe.send((False, traceback.format_exc()))
