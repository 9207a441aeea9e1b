from __future__ import annotations

import pytest

from .common import build


@pytest.fixture(params=["v1", "v2", "v3_yarn"])
def model(request):
    return build(request.param)
