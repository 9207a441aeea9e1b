"""A plugin of pytest (-p tests.cuda_torch.simulated) for a CUDA build of torch on the simulator:
torch's own CUDA kernels run as their CPU versions (docs/cuda-without-a-gpu.md)."""

import importlib

import torch_cuda  # type: ignore[import-not-found]  # of the simulator

torch_cuda.install()
# Kernels that take lists of tensors have no CPU version; optimisers then go tensor by tensor.
for _name in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
    importlib.import_module(_name)._get_foreach_kernels_supported_devices = lambda: []
