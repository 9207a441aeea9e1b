"""The benchmark of whole models at a size whose times mean nothing."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("transformers") is None:
    pytest.skip("needs the hf extra", allow_module_level=True)

from bench.whole_models import models, worker
from bench.whole_models.__main__ import _relative


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_baselines(name, tmp_path, set_threads):
    set_threads(1)
    num_parameters = models.build(name, tmp_path, tiny=True)
    assert num_parameters > 10**6
    ids = list(range(1, 9))
    eager = worker.Transformers("eager", tmp_path, 1, 64)
    truth = eager.logits(ids)
    assert len(truth) == 512
    for weights in ("int8", "int4"):
        models.quantize(tmp_path, weights)
    # In 4 bits, and at this size, tokens turn to other experts.
    for baseline, most in (("moe_ops", 0.1), ("moe_ops int8", 0.2), ("moe_ops int4", 2.0)):
        it = worker.Transformers(baseline, tmp_path, 1, 64)
        assert _relative(it.logits(ids), truth) < most, baseline
    assert it.prefill(ids) > 0
    assert it.decode([ids, ids], 2) > 0
    assert worker.memory() == {} or worker.memory()["VmHWM"] > 0
