from __future__ import annotations

import contextlib

import pytest
import torch

from moe_ops.testing import seed_from


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the cases marked `full`")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: part of the long sweep, run only with --full")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    kept = [item for item in items if "full" not in item.keywords]
    config.hook.pytest_deselected(items=[item for item in items if "full" in item.keywords])
    items[:] = kept


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds torch from the test's own name."""
    value = seed_from(request.node.nodeid)
    torch.manual_seed(value)
    return value


@pytest.fixture
def device() -> torch.device:
    """Where a device-agnostic test runs."""
    return torch.device("cpu")


@pytest.fixture
def set_threads():
    """A function that sets torch's number of threads; the old number comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def bad_input():
    """A context that expects one sentence: the op, the tensor or argument, what came."""
    return expect_bad_input


@contextlib.contextmanager
def expect_bad_input(op: str, name: str, *words: str):
    with pytest.raises(ValueError) as caught:
        yield
    message = str(caught.value)
    assert message.startswith(f"{op}: "), message
    assert name in message, message
    assert ", got " in message, message
    got = message.split(", got ")[-1]
    for word in words:
        assert word in got, f"{word!r} is not in what the message says came: {message}"


@pytest.fixture(autouse=True)
def fresh_compiler(request: pytest.FixtureRequest):
    """Compiled lambdas of one test must not count against the recompile limit of the next."""
    yield
    if "compile" in request.node.name:
        torch.compiler.reset()
