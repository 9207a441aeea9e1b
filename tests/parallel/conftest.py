from __future__ import annotations

import pytest
from tests.helpers.processes import Processes


@pytest.fixture(scope="session")
def processes():
    """Four processes of gloo: `processes.run(function, *args, world=2)`."""
    with Processes(4) as pool:
        yield pool
