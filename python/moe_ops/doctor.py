"""Checks of an installation, with advice for problems.

``moe-ops doctor`` prints them; ``python -m moe_ops.doctor`` also does and needs nothing but torch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import moe_ops
from moe_ops import _library, _private_torch, _threads, ops, packing
from moe_ops._requirements import TRANSFORMERS_FLOOR, transformers_is_too_old
from moe_ops.self_test import SelfTest, cases, has_kernel, self_test

_DISTRIBUTION = "torch-moe-ops"
# An unrelated distribution whose package overwrites this one.
_CLASHING_DISTRIBUTION = "moe-ops"
_REINSTALL = f"pip install --force-reinstall --no-deps {_DISTRIBUTION}"
_UPGRADE_BOTH = "pip install --upgrade transformers torch-moe-ops"


@dataclass(frozen=True)
class Finding:
    """One fact; level is ok, info, warning or fail, advice is a remedy."""

    name: str
    level: str
    text: str
    advice: str | None = None


@dataclass(frozen=True)
class Report:
    findings: list[Finding]
    self_tests: list[SelfTest]
    versions: dict[str, str | None] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return self._failures > 0

    @property
    def _failures(self) -> int:
        failures = sum(f.level == "fail" for f in self.findings)
        return failures + sum(not test.passed for test in self.self_tests)

    @property
    def conclusion(self) -> str:
        if self.failed:
            return (
                f"{_count(self._failures, 'check')} failed. Reinstall ({_REINSTALL}); if that does "
                "not help, report the output of `moe-ops doctor --json`."
            )
        warnings = sum(f.level == "warning" for f in self.findings)
        noted = f", {_count(warnings, 'warning')}" if warnings else ""
        return f"moe_ops works here: {_count(len(self.self_tests), 'self-test')} passed{noted}."

    def to_dict(self) -> dict[str, Any]:
        return {"failed": self.failed, "conclusion": self.conclusion, **asdict(self)}


def examine() -> Report:
    """Runs all checks; takes a few seconds."""
    cuda = list(_cuda())
    findings = [
        *_versions(),
        *_native_library(),
        *_cpu(),
        _packed_weights(),
        *cuda,
        _name_clash(),
        *_hugging_face(),
    ]
    tests = self_test()
    if torch.cuda.is_available() and cuda[0].level in ("ok", "info"):
        tests += self_test("cuda")
    findings.append(_same_bits_for_any_thread_count())
    names = ["numpy", "transformers", "safetensors", "matplotlib", "typer", "rich"]
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "moe_ops": moe_ops.__version__,
        "torch": torch.__version__,  # Its metadata may lack the variant, such as +cu130.
        **{name: _version(name) for name in names},
    }
    return Report(findings, tests, versions)


# --- findings


def _versions() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    yield Finding("torch", "ok", torch.__version__)
    installed = [
        d.version
        for d in importlib.metadata.distributions()
        if (d.metadata["Name"] or "").lower().replace("_", "-") == _DISTRIBUTION
    ]
    text = f"{moe_ops.__version__} from {Path(moe_ops.__file__).parent}"
    if not installed:
        yield Finding(
            "moe_ops",
            "info",
            f"{text}, not installed as a distribution",
            "Fine in a source tree; elsewhere run pip install torch-moe-ops.",
        )
    elif len(installed) > 1:
        yield Finding(
            "moe_ops",
            "warning",
            f"{text}, but {len(installed)} installs are on the path ({', '.join(installed)})",
            f"pip uninstall {_DISTRIBUTION} until none is left, then install it once.",
        )
    else:
        yield Finding("moe_ops", "ok", text)
    for package, wanted, purpose in (
        ("numpy", "numpy", "arrays"),
        ("transformers", f'"{_DISTRIBUTION}[hf]"', "Hugging Face models"),
        ("matplotlib", f'"{_DISTRIBUTION}[viz]"', "pictures"),
        ("safetensors", f'"{_DISTRIBUTION}[zoo]"', "checkpoints"),
    ):
        version = _version(package)
        if version:
            yield Finding(package, "ok", version)
        else:
            advice = f"For {purpose}: pip install {wanted}"
            yield Finding(package, "info", "not installed", advice)


def _native_library() -> Iterator[Finding]:
    if _library.version() == moe_ops.__version__:
        facts = sorted(dict(_library.build_info()).items())
        yield Finding("native library", "ok", ", ".join(f"{k} {v}" for k, v in facts))
    else:
        yield Finding(
            "native library",
            "fail",
            f"is {_library.version()}, the Python code {moe_ops.__version__}",
            f"Two installs are mixed: {_REINSTALL}",
        )
    missing = [case.op for case in cases() if not hasattr(torch.ops.moe_ops, case.op)]
    if missing:
        yield Finding("registered ops", "fail", f"missing: {', '.join(missing)}", _REINSTALL)


def _cpu() -> Iterator[Finding]:
    active, detected = _library.cpu_isa(), _library.detected_isa()
    supported = ", ".join(_library.supported_isas())
    text = f"using {active}, detected {detected}, supported here: {supported}"
    forced = os.environ.get("MOE_OPS_CPU_ISA")
    failing = _library.failing_kernel(active)
    if failing is not None:
        text += f"; the {active} kernels fail their self-test ({failing})"
        yield Finding("cpu", "fail", text, _REINSTALL)
    elif _library.isa_warning():
        yield Finding(
            "cpu", "warning", f"{text}; {_library.isa_warning()}", "Unset MOE_OPS_CPU_ISA."
        )
    elif active != detected:
        text += f" (MOE_OPS_CPU_ISA={forced})"
        yield Finding("cpu", "warning", text, "Unset MOE_OPS_CPU_ISA.")
    elif active == "portable":
        if platform.machine().lower() in ("x86_64", "amd64"):
            advice = "A processor with AVX2 and FMA runs the tuned kernels."
        else:
            advice = "Kernels are tuned for x86-64 only; here they run as the compiler made them."
        yield Finding("cpu", "warning", f"{text}: correct but slow", advice)
    else:
        yield Finding("cpu", "ok", text)
    threads, cores = torch.get_num_threads(), _usable_cores()
    advice = f"Set OMP_NUM_THREADS={cores} or call torch.set_num_threads({cores})"
    if threads > cores:
        text = f"torch uses {threads} threads on {cores} usable cores"
        yield Finding("threads", "warning", text, f"{advice}.")
    elif threads < cores:
        text = f"torch uses {threads} of {cores} usable cores"
        yield Finding("threads", "info", text, f"{advice} for more.")
    else:
        yield Finding("threads", "ok", f"{threads} on {cores} usable cores")
    yield _wait_policy()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > cores:
        # A spinning thread occupies the core that the thread it waits for needs.
        yield Finding(
            "load",
            "info",
            f"{load:.1f} processes want {cores} cores: several threads may be slower than one",
            "Use fewer threads, and let them sleep while they wait (see the line above).",
        )


def _wait_policy() -> Finding:
    policy = os.environ.get("OMP_WAIT_POLICY", "").lower()
    if policy == "passive":
        by = "moe-ops sets that for its own commands" if _threads.set_here else "OMP_WAIT_POLICY"
        text = f"threads sleep while they wait ({by})"
    else:
        text = "threads spin while they wait, which takes cores from other processes"
    advice = "For programs beside other work set OMP_WAIT_POLICY=passive before Python starts."
    if policy == "passive" and not _threads.set_here:
        return Finding("wait policy", "ok", text)
    return Finding("wait policy", "info", text, advice)


def _packed_weights() -> Finding:
    policy, budget = packing.packing_settings()
    policies = {
        "auto": "made after some use in eval()",
        "always": "made at the first call in eval()",
        "off": "made only by pack_weights",
    }
    held = _mebibytes(packing.packed_weight_bytes())
    text = f"{policies[policy]} (MOE_OPS_PACKING={policy}), {held} now"
    if policy == "auto" and budget == 0:
        return Finding(
            "packed weights",
            "info",
            f"{text}, none by itself: how much memory is available is not known",
            "Call moe_ops.pack_weights(model), or set MOE_OPS_PACKING_MB to what may be used.",
        )
    if policy == "auto":
        text += f", at most {_mebibytes(budget)}"
    return Finding("packed weights", "ok", text)


# Below, no kernel runs; SIMT kernels and mma.sync GEMMs need it.
_LEAST_CAPABILITY = (8, 0)
# TMA and wgmma GEMMs support only this one.
_HOPPER = (9, 0)


def _cuda() -> Iterator[Finding]:
    build = _cuda_build()
    if not torch.cuda.is_available():
        text = "no GPU visible to torch"
        text += f" (torch {'has' if torch.version.cuda else 'is built without'} CUDA), moe_ops is "
        text += f"built {f'with CUDA kernels, CUDA {build}' if build else 'without CUDA kernels'}"
        advice = None
        if not torch.version.cuda and Path("/dev/nvidia0").exists():
            advice = "There is an NVIDIA GPU: install a torch with CUDA to use it."
        yield Finding("cuda", "info", text, advice)
        return
    name = torch.cuda.get_device_name()
    capability = torch.cuda.get_device_capability()
    text = f"{name}, compute capability {capability[0]}.{capability[1]}, "
    text += f"torch with CUDA {torch.version.cuda}"
    if not build:
        advice = "Install a wheel with CUDA, or build with MOE_OPS_CUDA=on and nvcc on the PATH."
        text += ", but moe_ops is built without CUDA kernels"
        yield Finding("cuda", "warning", text, advice)
        return
    text += f", kernels with CUDA {build}"
    driver = _driver_version()
    if capability < _LEAST_CAPABILITY:
        text += "; the CUDA kernels need compute capability 8.0 or newer"
        yield Finding("cuda", "warning", text, "Run the ops on the CPU.")
        return
    if driver is not None and driver[0] < int(build.partition(".")[0]):
        text += f"; the driver supports CUDA {driver[0]}.{driver[1]} only"
        advice = "Update the driver, or build moe_ops with the CUDA toolkit 12.8 or 12.9."
        yield Finding("cuda", "fail", text, advice)
        return
    if capability != _HOPPER:
        text += "; matrix products run on the kernels for any card, the fast ones need 9.0"
    text += "; the kernels are experimental: proved on a simulator, never timed on a GPU"
    yield Finding("cuda", "ok" if capability == _HOPPER else "info", text)
    yield _cuda_stream()
    yield _cuda_device()
    yield from _cuda_kernels()
    cpu_only = [op for op in dict.fromkeys(c.op for c in cases()) if not has_kernel(op, "cuda")]
    if cpu_only:
        yield Finding("cuda ops", "info", f"without a CUDA kernel: {', '.join(cpu_only)}")


def _cuda_stream() -> Finding:
    """Checks the source of torch's current stream for the kernels."""
    found = _library.stream_source()
    if found is not None and found[1]:
        text = f"the current one of torch, asked of {found[0]}"
        margin = _library.sm_margin()
        if margin:
            text += f"; kernels that stay on an SM leave {_count(margin, 'SM')} to others"
        return Finding("cuda stream", "ok", text)
    text = "torch has loaded no libtorch_cuda.so" if found is None else f"{found[0]} has none"
    return Finding(
        "cuda stream",
        "fail",
        f"the current one of torch is not to be found: {text}",
        "Install a torch with CUDA, 2.10 or newer.",
    )


def _cuda_device() -> Finding:
    """Checks that the runtime of the kernels shares torch's devices."""
    device, count = torch.cuda.current_device(), torch.cuda.device_count()
    error = _library.bind_device(device)
    if error is None:
        text = f"{device} of {count} is current and its context bound; ops do so for that of x"
        return Finding("cuda device", "ok", text)
    return Finding(
        "cuda device",
        "fail",
        f"{device} of {count} cannot be made current: {error}",
        "Update the driver, or build moe_ops with the CUDA toolkit 12.8 or 12.9.",
    )


def _cuda_kernels() -> Iterator[Finding]:
    """Checks the code of each family of kernels for this GPU; loads all of them."""
    families: dict[str, list[tuple[str | None, int, int, int]]] = {}
    for name, error, compiled_for, from_ptx, _, spilled in _library.cuda_kernels():
        family = name.removesuffix("_kernel")
        families.setdefault(family, []).append((error, compiled_for, from_ptx, spilled))
    groups: dict[str, list[str]] = {}
    missing: dict[str, str] = {}
    for family, kernels in sorted(families.items()):
        errors = [error for error, *_ in kernels if error is not None]
        if errors:
            missing[family] = errors[0]
            continue
        _, compiled_for, from_ptx, _ = kernels[0]
        code = f"code for {compiled_for / 10:.1f}"
        if compiled_for != from_ptx:
            code += f" that the driver made of PTX for {from_ptx / 10:.1f}"
        spills = sum(spilled > 0 for *_, spilled in kernels)
        note = f" ({len(kernels)}{f', {spills} spill' if spills else ''})"
        groups.setdefault(code, []).append(family + note)
    for code, names in groups.items():
        yield Finding("cuda kernels", "ok", f"{code}: {', '.join(names)}")
    # TMA and wgmma GEMMs have code for one GPU only; others do not need them.
    hopper = [family for family in missing if "sm90" in family]
    others = {family: error for family, error in missing.items() if family not in hopper}
    if hopper:
        text = f"not for this card: {', '.join(hopper)}"
        level = "fail" if torch.cuda.get_device_capability() == _HOPPER else "info"
        advice = _REINSTALL if level == "fail" else None
        yield Finding("cuda kernels", level, text, advice)
    if others:
        text = "; ".join(f"{family}: {error}" for family, error in others.items())
        advice = f"This build has no code for this card. {_REINSTALL}"
        yield Finding("cuda kernels", "fail", text, advice)


def _name_clash() -> Finding:
    try:
        clashing = importlib.metadata.distribution(_CLASHING_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return Finding("name clash", "ok", "no other distribution provides moe_ops")
    return Finding(
        "name clash",
        "warning",
        f"the unrelated distribution {_CLASHING_DISTRIBUTION} {clashing.version} is installed "
        "and puts its own moe_ops over this one",
        f"pip uninstall {_CLASHING_DISTRIBUTION}, then {_REINSTALL}",
    )


def _hugging_face() -> Iterator[Finding]:
    name, version = "experts implementation", _version("transformers")
    if version is None:
        return
    if transformers_is_too_old(version):
        text = f"moe_ops.hf needs transformers {TRANSFORMERS_FLOOR} or newer, found {version}"
        advice = f'pip install --upgrade "transformers>={TRANSFORMERS_FLOOR}"'
        yield Finding(name, "warning", text, advice)
        return
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        import moe_ops.hf  # noqa: F401

        registered = "moe_ops" in ALL_EXPERTS_FUNCTIONS.valid_keys()
    except Exception as error:
        text = f"import moe_ops.hf raises {type(error).__name__}: {error}"
        yield Finding(name, "fail", text, _UPGRADE_BOTH)
        return
    if registered:
        text = "after `import moe_ops.hf`, experts_implementation='moe_ops' works in transformers"
        yield Finding(name, "ok", text)
    else:
        text = "import moe_ops.hf did not register 'moe_ops' with transformers"
        yield Finding(name, "fail", text, _UPGRADE_BOTH)


def _same_bits_for_any_thread_count() -> Finding:
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(257, 64, generator=generator)
    w_gate_up = torch.randn(8, 96, 64, generator=generator)
    w_down = torch.randn(8, 64, 48, generator=generator)
    weights, ids = ops.topk_router(torch.randn(257, 8, generator=generator), 2)
    try:
        torch.set_num_threads(1)
        one = ops.moe_ffn(x, w_gate_up, w_down, weights, ids)
        torch.set_num_threads(max(2, threads))
        many = ops.moe_ffn(x, w_gate_up, w_down, weights, ids)
    except Exception as error:
        return Finding("reproducible", "fail", f"moe_ffn raises {type(error).__name__}: {error}")
    finally:
        torch.set_num_threads(threads)
    if torch.equal(one, many):
        return Finding(
            "reproducible",
            "ok",
            f"moe_ffn with 1 and {max(2, threads)} threads is bitwise identical",
        )
    return Finding(
        "reproducible", "fail", "moe_ffn differs between thread counts", f"Reinstall: {_REINSTALL}"
    )


# --- helpers


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown" if importlib.util.find_spec(package) else None


def _cuda_build() -> str:
    """Returns the toolkit of the CUDA kernels, "13.0 (static runtime)"; empty without them."""
    build = dict(_library.build_info()).get("cuda", "off")
    return "" if build.lower() in ("", "off", "0") else build


def _driver_version() -> tuple[int, int] | None:
    """Returns the newest CUDA version that the driver supports."""
    version = _private_torch.cuda_driver_version()
    return None if version is None else (version // 1000, version % 1000 // 10)


def _usable_cores() -> int:
    cores = _library.num_usable_cores()
    if cores is not None:
        return cores
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _mebibytes(number: int) -> str:
    return f"{number / 2**20:.0f} MiB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def main() -> int:
    """Prints the report as plain text; returns exit status 1 if a check failed."""
    report = examine()
    for finding in report.findings:
        print(f"{finding.level:8}{finding.name}: {finding.text}")
        if finding.advice:
            print(f"{'':8}  -> {finding.advice}")
    for test in report.self_tests:
        verdict = "pass" if test.passed else "FAIL"
        errors = "" if test.forward_error is None else f", error {test.forward_error:.1e}"
        if test.backward_error is not None:
            errors += f" and {test.backward_error:.1e} backward"
        print(f"{verdict:8}{test.op} {test.dtype} on {test.device}{errors}{test.message or ''}")
    print(report.conclusion)
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
