"""A plugin of pytest (-p tests.cuda_torch.simulated) for a CUDA build of torch on the simulator:
torch's own CUDA kernels run as their CPU versions (docs/cuda-without-a-gpu.md)."""

import torch_cuda  # type: ignore[import-not-found]  # of the simulator

torch_cuda.install()
