"""A plugin of pytest (-p tests.cuda_torch.simulated) for a CUDA build of torch on the simulator:
torch's own CUDA kernels run as their CPU versions (docs/cuda-without-a-gpu.md)."""

import importlib

import pytest
import torch
import torch_cuda  # type: ignore[import-not-found]  # of the simulator

from moe_ops.ops._library import cuda_formulas

torch_cuda.install()
# Kernels that take lists of tensors have no CPU version; optimizers then go tensor by tensor.
for _name in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
    importlib.import_module(_name)._get_foreach_kernels_supported_devices = lambda: []

# On the CPU histograms are of floats only.
_histc = torch_cuda._on_cpu(torch.ops.aten.histc.default, torch.ops.aten.histc.default)


def _histogram(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return _histc(x if x.is_floating_point() else x.double(), *args, **kwargs).to(x.dtype)


_library = torch.library.Library("aten", "IMPL")
_library.impl("histc", _histogram, "CUDA", allow_override=True)


# Kernels of torch run when they are captured, and not at a replay; so do ops that are made of them.
NEEDS_REPLAY = ("test_replays_on_new_data",)
COPIES = ("moe_ffn_packed", "pack_experts")  # call an op of the library, or nothing
GROUPED_MM = "torch's grouped products of bfloat16 on CUDA, which transformers calls, need a card."
SPARSE = "torch's kernels of sparse tensors on CUDA need a card."
NEED_A_CARD = {
    "test_sparse_gradients_are_the_dense_ones": SPARSE,
    "test_an_optimizer_takes_sparse_gradients": SPARSE,
    "test_sparse_gradients": SPARSE,
    # The compiler's own kernels are Triton's, which loads them with the driver.
    "test_generated_code_calls_the_ops": "Triton needs a card.",
    "test_half_precision": GROUPED_MM,
    "test_newer_models_with_convolutions": "torch's depthwise convolutions on CUDA need a card.",
    "test_command": GROUPED_MM,
    "test_tokens_of_replays": "Kernels of torch run when they are captured: a card replays.",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name = getattr(item, "originalname", "")
        if reason := NEED_A_CARD.get(name):
            item.add_marker(pytest.mark.skip(reason=reason))
        if name in NEEDS_REPLAY:
            op = item.callspec.params["op"]  # type: ignore[attr-defined]
            if op in cuda_formulas and op not in COPIES:
                item.add_marker(pytest.mark.skip(reason="Made of torch's kernels: a card replays."))
        if item.get_closest_marker("slow_on_simulator"):
            item.add_marker(pytest.mark.skip(reason="It takes minutes on a simulator."))
