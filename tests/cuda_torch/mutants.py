"""Breaks what only tests/cuda_torch can notice, and asks whether it does.

    python -m tests.cuda_torch.mutants BUILD PACKAGE -- COMMAND

BUILD is the folder that CMake built the library in, PACKAGE the folder of the package that the
tests import, COMMAND what runs tests/cuda_torch (arguments are added). Each mutant is built,
tested and taken back. Ends with 1 if one of them was not noticed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "csrc" / "torch" / "device.cpp"
# What is broken, the text, what takes its place, and the tests that must fail.
MUTANTS = (
    (
        "kernels run on the default stream",
        "  return static_cast<cuda::Stream>(stream);\n",
        "  return nullptr;\n",
        ("test_streams.py::test_nothing_goes_to_the_default_stream",),
    ),
    (
        "the tensors' device is not made current",
        "  if (!first.is_cuda()) return;\n",
        "  return;\n",
        ("test_devices.py", "-k", "test_second_device and topk_router"),
    ),
    (
        "the device is made current and not restored",
        "  guard = std::make_unique<torch::stable::accelerator::DeviceGuard>(device);\n",
        "",
        ("test_devices.py", "-k", "test_second_device and topk_router"),
    ),
    (
        "the stream of device 0 is taken",
        "source.current(t.get_device_index(), &stream)",
        "source.current(0, &stream)",
        ("test_devices.py", "-k", "test_stream_of_the_tensors_device"),
    ),
)


def run(build: Path, package: Path, command: list[str]) -> int:
    source = SOURCE.read_text()
    missed = 0
    try:
        for name, text, instead, tests in MUTANTS:
            if source.count(text) != 1:
                raise RuntimeError(f"{SOURCE}: not once there: {text!r}")
            SOURCE.write_text(source.replace(text, instead))
            install(build, package)
            tests_here = f"tests/cuda_torch/{tests[0]}"
            done = subprocess.run(
                [*command, tests_here, *tests[1:]], capture_output=True, text=True
            )
            noticed = done.returncode == 1 and " failed" in done.stdout
            missed += not noticed
            print(f"{'noticed' if noticed else 'NOT NOTICED'}: {name}", flush=True)
            if done.returncode not in (0, 1):
                print(done.stdout[-2000:], done.stderr[-2000:])
    finally:
        SOURCE.write_text(source)
        install(build, package)
    return 1 if missed else 0


def install(build: Path, package: Path) -> None:
    subprocess.run(["ninja", "-C", str(build), "libmoe_ops.so"], check=True, capture_output=True)
    shutil.copy(build / "libmoe_ops.so", package)


if __name__ == "__main__":
    at = sys.argv.index("--")
    sys.exit(run(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[at + 1 :]))
