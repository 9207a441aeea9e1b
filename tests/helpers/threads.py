"""Many ranks of torch.distributed in one process, a thread each: for groups that are too wide to be
made of processes. torch's own tests are the only other users of the module."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch

JOIN = 120.0  # seconds


def run_on_threads(function: Callable[..., Any], num_ranks: int, *args: Any) -> list[Any]:
    """[function(rank, *args) for each rank], all at once, in a process group of `num_ranks`."""
    pg = pytest.importorskip("torch.testing._internal.distributed.multi_threaded_pg")
    isolate = getattr(torch._C._distributed_c10d, "_set_thread_isolation_mode", None)
    if isolate is None:
        pytest.skip("This torch has no process groups of threads.")
    import torch.distributed as dist

    results: dict[int, Any] = {}
    failed: dict[int, str] = {}

    def serve(rank: int, store: Any) -> None:
        dist.init_process_group("threaded", rank=rank, world_size=num_ranks, store=store)
        try:
            results[rank] = function(rank, *args)
        except BaseException as error:
            failed[rank] = traceback.format_exc()
            pg.ProcessLocalGroup.exception_handle(error)  # wakes those who wait for this one
        finally:
            dist.destroy_process_group()

    isolate(True)
    pg._install_threaded_pg()
    try:
        store = dist.HashStore()
        threads = [
            threading.Thread(target=serve, args=(rank, store), daemon=True)
            for rank in range(num_ranks)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(JOIN)
        pg.ProcessLocalGroup.reset()
    finally:
        pg._uninstall_threaded_pg()
        isolate(False)
    assert not failed, "\n".join(f"rank {rank}: {text}" for rank, text in sorted(failed.items()))
    assert len(results) == num_ranks, f"{num_ranks - len(results)} ranks did not end"
    return [results[rank] for rank in range(num_ranks)]
