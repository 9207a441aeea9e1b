"""The batch-invariant mode in the engine: a request alone and among others."""

from __future__ import annotations

import pytest
import torch
from integrations.vllm.tests.engine import run
from integrations.vllm.tests.test_models import write
from tests.hf import published_checkpoints as checkpoints

pytest.importorskip("vllm")

from moe_ops_vllm.batch_invariant import _LinearMethod
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import LinearMethodBase

LENGTHS = (3, 17, 300, 40, 33, 64, 7, 1, 128, 600, 15, 16, 31, 160, 77, 50)
WIDE = {"hidden_size": 512, "head_dim": 64, "max_position_embeddings": 1024}


@pytest.mark.parametrize(
    ("method", "mode"), [(None, "eager"), (None, "compiled"), ("gptq", "eager"), ("fp8", "eager")]
)
def test_a_request_alone_and_among_16(monkeypatch, tmp_path, method, mode):
    """All bits of the log-probabilities of each step are equal. Prompts are cut into chunks, which
    differ between the two, and two threads share the keys of a query outside of the mode."""
    for name, size in WIDE.items():
        monkeypatch.setitem(checkpoints.SIZES, name, size)
    if method is None:
        checkpoints.build("qwen3_moe").save_pretrained(tmp_path / "model")
    else:
        write(monkeypatch, tmp_path / "model", "qwen3_moe", method, False)
    prompts = [torch.randint(3, 60, (n,)).tolist() for n in LENGTHS]
    result, log = run(
        tmp_path / "model",
        tmp_path,
        [prompts, *([prompt] for prompt in prompts)],
        engine={
            "enforce_eager": mode == "eager",
            "max_model_len": 1024,
            "max_num_batched_tokens": 100,
            "enable_prefix_caching": False,
        },
        sampling={"max_tokens": 8},
        env={
            "MOE_OPS_BATCH_INVARIANT": "1",
            "OMP_NUM_THREADS": "2",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        },
    )
    assert "Experts run on moe_ops" in log
    assert result["ops"].keys() > {"moe_ops::grouped_gemm"}
    together, *alone = result["batches"]
    assert [[one[0]] for one in together] == [[one[0][0]] for one in alone]


class Clipped(LinearMethodBase):
    """A method that rounds inputs to a fixed range."""

    def create_weights(self, *args, **options):
        raise NotImplementedError

    def process_weights_after_loading(self, layer):
        pass

    def apply(self, layer, x, bias=None):
        return x.clamp(max=0.25) @ layer.weight.T


def test_fixed_ranges_are_refused():
    layer = torch.nn.Module()
    layer.weight, layer.prefix = torch.nn.Parameter(torch.randn(4, 8)), "layer.0"
    layer.input_size_per_partition = 8
    config = VllmConfig()
    config.model_config = type("Model", (), {"dtype": torch.float32})()
    with (
        set_current_vllm_config(config),
        pytest.raises(ValueError, match=r"Clipped rounds inputs of layer\.0 to a fixed range"),
    ):
        _LinearMethod(Clipped()).process_weights_after_loading(layer)
