"""The batch-invariant mode as a setting: blocks of threads and of asyncio tasks, in any order."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import pytest
import torch

import moe_ops
from moe_ops import _library

pytestmark = pytest.mark.cpu_only


@pytest.fixture(autouse=True, params=[False, True], ids=["off", "on"])
def base(request: pytest.FixtureRequest) -> Iterator[bool]:
    """The setting outside of all blocks."""
    before = moe_ops.is_batch_invariant_enabled()
    moe_ops.set_batch_invariant(request.param)
    yield request.param
    assert is_on() == request.param
    moe_ops.set_batch_invariant(before)


def is_on() -> bool:
    mode = moe_ops.is_batch_invariant_enabled()
    assert _library.batch_invariant() == mode
    return mode


class Actor:
    """A thread or a task that opens and closes blocks, each inside of the one before."""

    def __init__(self) -> None:
        self.blocks: list[tuple[bool, ExitStack]] = []

    def enter(self, mode: bool) -> None:
        stack = ExitStack()
        stack.enter_context(moe_ops.batch_invariant(mode))
        self.blocks.append((mode, stack))

    def leave(self, fails: bool = False) -> None:
        _, stack = self.blocks.pop()
        if not fails:
            return stack.close()
        with pytest.raises(KeyError), stack:
            raise KeyError


def expected(base: bool, actors: list[Actor]) -> bool:
    innermost = [actor.blocks[-1][0] for actor in actors if actor.blocks]
    return any(innermost) if innermost else base


def interleavings(counts: list[int]) -> Iterator[list[int]]:
    """All orders of counts[i] steps of actor i."""
    if not any(counts):
        yield []
    for i, left in enumerate(counts):
        if left > 0:
            rest = counts.copy()
            rest[i] -= 1
            for order in interleavings(rest):
                yield [i, *order]


Step = Callable[[], None]
# Modes of the blocks of each actor, each inside of the one before.
PLANS = [
    *itertools.product([(True,), (False,)], repeat=3),
    *itertools.product(itertools.product([True, False], repeat=2), repeat=2),
]


def schedules() -> Iterator[tuple[list[Actor], list[tuple[int, Step]]]]:
    """Actors, and steps as pairs of the actor and what it does."""
    for plan in PLANS:
        for order in interleavings([2 * len(modes) for modes in plan]):
            actors = [Actor() for _ in plan]
            steps, done = [], [0] * len(plan)
            for i in order:
                modes, n = plan[i], done[i]
                actor = actors[i]
                if n < len(modes):
                    steps.append((i, lambda actor=actor, mode=modes[n]: actor.enter(mode)))
                else:
                    steps.append((i, lambda actor=actor, n=n: actor.leave(fails=n % 2 == 1)))
                done[i] += 1
            yield actors, steps


def test_threads(base):
    with ExitStack() as stack:
        threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in range(3)]
        for actors, steps in schedules():
            for i, step in steps:
                threads[i].submit(step).result()
                assert is_on() == expected(base, actors)
            assert is_on() == base


def test_tasks(base):
    async def serve(queue: asyncio.Queue[Step | None]) -> None:
        while (step := await queue.get()) is not None:
            step()
            queue.task_done()

    async def main() -> None:
        queues: list[asyncio.Queue[Step | None]] = [asyncio.Queue() for _ in range(3)]
        tasks = [asyncio.create_task(serve(queue)) for queue in queues]
        for actors, steps in schedules():
            for i, step in steps:
                queues[i].put_nowait(step)
                await queues[i].join()
                assert is_on() == expected(base, actors)
            assert is_on() == base
        for queue in queues:
            queue.put_nowait(None)
        await asyncio.gather(*tasks)

    asyncio.run(main())


def test_a_task_inside_the_block_of_its_parent():
    async def child() -> None:
        with moe_ops.batch_invariant(False):
            await asyncio.sleep(0)
            assert is_on()  # as the parent wants it

    async def main() -> None:
        with moe_ops.batch_invariant():
            await asyncio.gather(child(), child())
            assert is_on()

    asyncio.run(main())


def test_blocks_of_one_thread_that_end_in_another_order():
    def generator(mode: bool) -> Iterator[None]:
        with moe_ops.batch_invariant(mode):
            yield

    for modes in itertools.product([True, False], repeat=3):
        for order in itertools.permutations(range(3)):
            blocks = [generator(mode) for mode in modes]
            for block in blocks:
                next(block)
            left = list(range(3))
            for i in order:
                assert is_on() == modes[left[-1]]
                blocks[i].close()
                left.remove(i)


def test_many_threads_at_once():
    """Each has the mode on all the time, whatever the others do."""
    wrong = []
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        for _ in range(300):
            with suppress(KeyError), moe_ops.batch_invariant():
                if not is_on():
                    wrong.append(1)
                raise KeyError

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_base_setting_changes_under_open_blocks(base):
    for mode in (True, False):
        with moe_ops.batch_invariant(mode):
            for setting in (True, False, not base):
                moe_ops.set_batch_invariant(setting)
                assert is_on() == mode
        assert is_on() == (not base)
        moe_ops.set_batch_invariant(base)


def test_nested_blocks():
    with pytest.raises(KeyError), moe_ops.batch_invariant():
        assert is_on()
        with moe_ops.batch_invariant(False):
            assert not is_on()
            with moe_ops.batch_invariant():
                assert is_on()
            assert not is_on()
        assert is_on()
        raise KeyError


def test_a_decorator():
    @moe_ops.batch_invariant()
    def call() -> bool:
        return is_on()

    assert call() and call()


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_compiled_code_opens_a_block():
    def call(x: torch.Tensor) -> torch.Tensor:
        with moe_ops.batch_invariant():
            return x + int(moe_ops.is_batch_invariant_enabled())

    compiled = torch.compile(call, backend="eager")
    assert [int(compiled(torch.zeros(()))) for _ in range(2)] == [1, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_no_blocks_of_other_threads(base):
    with ThreadPoolExecutor(1) as other, moe_ops.batch_invariant(not base):
        actor = Actor()
        other.submit(actor.enter, True).result()
        child = os.fork()
        if child == 0:
            os._exit(0 if is_on() == (not base) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        other.submit(actor.leave).result()


@pytest.mark.parametrize("function", ["set_batch_invariant", "batch_invariant"])
def test_what_is_no_bool(function):
    with (
        pytest.raises(TypeError, match=f"^{function}: mode must be a bool, got 1"),
        ExitStack() as s,
    ):
        block = getattr(moe_ops, function)(1)
        s.enter_context(block)
