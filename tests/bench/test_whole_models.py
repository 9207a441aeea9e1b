"""The benchmark of whole models at a size whose times mean nothing."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest

if importlib.util.find_spec("transformers") is None:
    pytest.skip("needs the hf extra", allow_module_level=True)

from bench.whole_models import models, to_gguf, worker
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


class Writer:
    """Stands for gguf's: what was written, by name."""

    def __init__(self, path, architecture):
        self.tensors = {}
        WRITTEN.append(self)

    def add_tensor(self, name, values, raw_dtype=None):
        assert name not in self.tensors
        itemsize = 4 if raw_dtype is None else 2
        self.tensors[name] = values.nbytes // itemsize

    def __getattr__(self, name):
        return lambda *args: None


WRITTEN: list[Writer] = []


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_gguf_has_every_weight_once(name, monkeypatch, tmp_path):
    from transformers import AutoModelForCausalLM

    enums = {
        "GGMLQuantizationType": SimpleNamespace(BF16=30),
        "ExpertGatingFuncType": SimpleNamespace(SIGMOID=2),
    }
    monkeypatch.setitem(sys.modules, "gguf", SimpleNamespace(GGUFWriter=Writer, **enums))
    model = AutoModelForCausalLM.from_config(models.config_of(name, tiny=True)).bfloat16()
    to_gguf.write(model, tmp_path / "bf16.gguf")
    written = WRITTEN.pop().tensors
    want = dict([*model.named_parameters(), *model.named_buffers()])
    numbers = sum(t.numel() for n, t in want.items() if "inv_freq" not in n)
    assert sum(written.values()) == numbers
    assert len([n for n in written if n.startswith("blk.1.")]) > 8
