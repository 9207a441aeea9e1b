"""What is installed, whether it works, and what to do about what does not.

``moe-ops doctor`` prints it; ``python -m moe_ops.doctor`` does too and needs nothing but torch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moe_ops
from moe_ops import _private_torch, _threads, ops, packing, reference
from moe_ops._requirements import TRANSFORMERS_FLOOR, transformers_is_too_old
from moe_ops.ops._checks import accumulate_dtype
from moe_ops.quant import quantize_fp8_blocks

_DISTRIBUTION = "torch-moe-ops"
# An unrelated distribution that installs a package of our name over ours.
_CLASHING_DISTRIBUTION = "moe-ops"
_REINSTALL = f"pip install --force-reinstall --no-deps {_DISTRIBUTION}"

# Relative error (Frobenius norm) against the reference in fp64. Both are several times what
# rounding costs at the sizes of the self-test and far below what a wrong formula costs.
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Finding:
    """One fact; level is ok, info, warning or fail, advice is what to do about it."""

    name: str
    level: str
    text: str
    advice: str | None = None


@dataclass(frozen=True)
class SelfTest:
    """One op on small random input against the reference; errors are relative, None if n/a."""

    op: str
    device: str
    dtype: str
    passed: bool
    forward_error: float | None
    backward_error: float | None
    tolerance: float
    seconds: float
    message: str | None = None


@dataclass(frozen=True)
class Report:
    findings: list[Finding]
    self_tests: list[SelfTest]
    versions: dict[str, str | None] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return any(f.level == "fail" for f in self.findings) or any(
            not test.passed for test in self.self_tests
        )

    @property
    def conclusion(self) -> str:
        failures = sum(f.level == "fail" for f in self.findings)
        failures += sum(not test.passed for test in self.self_tests)
        warnings = sum(f.level == "warning" for f in self.findings)
        if failures:
            return (
                f"{_count(failures, 'check')} failed. Reinstall ({_REINSTALL}); if that does not "
                "help, report the output of `moe-ops doctor --json`."
            )
        noted = f", {_count(warnings, 'warning')}" if warnings else ""
        return f"moe_ops works here: {_count(len(self.self_tests), 'self-test')} passed{noted}."

    def to_dict(self) -> dict[str, Any]:
        return {
            "failed": self.failed,
            "conclusion": self.conclusion,
            "versions": self.versions,
            "findings": [asdict(finding) for finding in self.findings],
            "self_tests": [asdict(test) for test in self.self_tests],
        }


def examine() -> Report:
    """Look at everything; takes a few seconds."""
    cuda = _cuda()
    findings = [
        *_versions(),
        *_native_library(),
        *_cpu(),
        _packed_weights(),
        *cuda,
        *_name_clash(),
        *_hugging_face(),
    ]
    tests = self_test()
    if torch.cuda.is_available() and cuda[0].level in ("ok", "info"):
        tests += self_test("cuda")
    findings.append(_same_bits_for_any_thread_count())
    names = ["torch", "numpy", "transformers", "safetensors", "matplotlib", "typer", "rich"]
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "moe_ops": moe_ops.__version__,
        **{name: _version(name) for name in names},
    }
    return Report(findings, tests, versions)


def self_test(device: str = "cpu") -> list[SelfTest]:
    """Every op that has a kernel for the device against the reference on the CPU, forward and
    backward, in fp32; moe_ffn also in bf16, on CUDA the products too."""
    cases = [case for case in _cases() if device == "cpu" or has_kernel(case.op, device)]
    halves = ("moe_ffn",) if device == "cpu" else ("moe_ffn", "grouped_gemm", "grouped_gemm_wgrad")
    return [_run_case(case, device, torch.float32) for case in cases] + [
        _run_case(case, device, torch.bfloat16) for case in cases if case.op in halves
    ]


def has_kernel(op: str, device: str) -> bool:
    """Whether this build registers a kernel of the op for cpu or cuda."""
    if not hasattr(torch.ops.moe_ops, op):
        return False
    return _private_torch.has_kernel(f"moe_ops::{op}", torch.device(device).type)


# --- findings


def _versions() -> list[Finding]:
    findings = [
        Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}"),
        Finding("torch", "ok", torch.__version__),
    ]
    where = Path(moe_ops.__file__).parent
    installed = [
        d
        for d in importlib.metadata.distributions()
        if (d.metadata["Name"] or "").lower().replace("_", "-") == _DISTRIBUTION
    ]
    if not installed:
        findings.append(
            Finding(
                "moe_ops",
                "info",
                f"{moe_ops.__version__} from {where}, not installed as a distribution",
                "Fine in a source tree; elsewhere run pip install torch-moe-ops.",
            )
        )
    elif len(installed) > 1:
        versions = ", ".join(d.version for d in installed)
        findings.append(
            Finding(
                "moe_ops",
                "warning",
                f"{moe_ops.__version__} from {where}, but {len(installed)} installs are on the "
                f"path ({versions})",
                f"pip uninstall {_DISTRIBUTION} until none is left, then install it once.",
            )
        )
    else:
        findings.append(Finding("moe_ops", "ok", f"{moe_ops.__version__} from {where}"))
    for package, extra, purpose in (
        ("numpy", None, "arrays"),
        ("transformers", "hf", "Hugging Face models"),
        ("matplotlib", "viz", "pictures"),
        ("safetensors", "zoo", "checkpoints"),
    ):
        version = _version(package)
        if version:
            findings.append(Finding(package, "ok", version))
        else:
            command = f'pip install "{_DISTRIBUTION}[{extra}]"' if extra else "pip install numpy"
            findings.append(Finding(package, "info", "not installed", f"For {purpose}: {command}"))
    return findings


def _native_library() -> list[Finding]:
    from moe_ops import _C

    facts = dict(_C.build_info())
    text = ", ".join(f"{key} {value}" for key, value in sorted(facts.items()))
    findings = []
    if _C.version() == moe_ops.__version__:
        findings.append(Finding("native library", "ok", text))
    else:
        findings.append(
            Finding(
                "native library",
                "fail",
                f"is {_C.version()}, the Python code {moe_ops.__version__}",
                f"Two installs are mixed: {_REINSTALL}",
            )
        )
    missing = [case.op for case in _cases() if not hasattr(torch.ops.moe_ops, case.op)]
    if missing:
        findings.append(
            Finding("registered ops", "fail", f"missing: {', '.join(missing)}", _REINSTALL)
        )
    return findings


def _cpu() -> list[Finding]:
    from moe_ops import _C

    active, detected = _C.cpu_isa(), _C.detected_isa()
    supported = ", ".join(_C.supported_isas())
    text = f"using {active}, detected {detected}, supported here: {supported}"
    forced = os.environ.get("MOE_OPS_CPU_ISA")
    if _C.isa_warning():
        finding = Finding("cpu", "warning", f"{text}; {_C.isa_warning()}", "Unset MOE_OPS_CPU_ISA.")
    elif active != detected:
        finding = Finding(
            "cpu", "warning", f"{text} (MOE_OPS_CPU_ISA={forced})", "Unset MOE_OPS_CPU_ISA."
        )
    elif active == "portable":
        finding = Finding(
            "cpu",
            "warning",
            f"{text}: correct but slow",
            "A processor with AVX2 and FMA runs the tuned kernels.",
        )
    else:
        finding = Finding("cpu", "ok", text)
    threads, cores = torch.get_num_threads(), _usable_cores()
    if threads > cores:
        threading = Finding(
            "threads",
            "warning",
            f"torch uses {threads} threads on {cores} usable cores",
            f"Set OMP_NUM_THREADS={cores} or call torch.set_num_threads({cores}).",
        )
    elif threads < cores:
        threading = Finding(
            "threads",
            "info",
            f"torch uses {threads} of {cores} usable cores",
            f"Set OMP_NUM_THREADS={cores} or call torch.set_num_threads({cores}) for more.",
        )
    else:
        threading = Finding("threads", "ok", f"{threads} on {cores} usable cores")
    findings = [finding, threading, _wait_policy()]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > cores:
        # A thread that spins for another one keeps the core that the other one waits for.
        findings.append(
            Finding(
                "load",
                "info",
                f"{load:.1f} processes want {cores} cores: several threads may be slower than one",
                "Set OMP_WAIT_POLICY=passive before Python starts, or use fewer threads.",
            )
        )
    return findings


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
    policy, budget = packing.prepack_settings()
    policies = {
        "auto": "made after some use in eval()",
        "always": "made at the first call in eval()",
        "off": "made only by prepack",
    }
    text = (
        f"{policies[policy]} (MOE_OPS_PREPACK={policy}), {_mebibytes(packing.packed_bytes())} now"
    )
    if policy == "auto" and budget == 0:
        return Finding(
            "packed weights",
            "info",
            f"{text}, none by itself: how much memory is available is not known",
            "Call moe_ops.prepack(model), or set MOE_OPS_PREPACK_MB to what may be used.",
        )
    if policy == "auto":
        text += f", at most {_mebibytes(budget)}"
    return Finding("packed weights", "ok", text)


# Below, no kernel runs; SIMT kernels and products on mma.sync need it.
_LEAST_CAPABILITY = (8, 0)
# The products on TMA and wgmma exist for this one only.
_HOPPER = (9, 0)


def _cuda() -> list[Finding]:
    build = _cuda_build()
    if not torch.cuda.is_available():
        text = "no GPU visible to torch"
        text += f" (torch {'has' if torch.version.cuda else 'is built without'} CUDA), moe_ops is "
        text += f"built {f'with CUDA kernels, CUDA {build}' if build else 'without CUDA kernels'}"
        advice = None
        if not torch.version.cuda and Path("/dev/nvidia0").exists():
            advice = "There is an NVIDIA GPU: install a torch with CUDA to use it."
        return [Finding("cuda", "info", text, advice)]
    name = torch.cuda.get_device_name()
    capability = torch.cuda.get_device_capability()
    text = f"{name}, compute capability {capability[0]}.{capability[1]}, "
    text += f"torch with CUDA {torch.version.cuda}"
    if not build:
        return [
            Finding(
                "cuda",
                "warning",
                f"{text}, but moe_ops is built without CUDA kernels",
                "Install a wheel with CUDA, or build with MOE_OPS_CUDA=on and nvcc on the PATH.",
            )
        ]
    text += f", kernels with CUDA {build}"
    if capability < _LEAST_CAPABILITY:
        return [
            Finding(
                "cuda",
                "warning",
                f"{text}; the CUDA kernels need compute capability 8.0 or newer",
                "Run the ops on the CPU.",
            )
        ]
    driver = _driver_version()
    if driver is not None and driver[0] < int(build.partition(".")[0]):
        return [
            Finding(
                "cuda",
                "fail",
                f"{text}; the driver supports CUDA {driver[0]}.{driver[1]} only",
                "Update the driver, or build moe_ops with the CUDA toolkit 12.8 or 12.9.",
            )
        ]
    if capability != _HOPPER:
        text += "; matrix products run on the kernels for any card, the fast ones need 9.0"
    findings = [Finding("cuda", "ok" if capability == _HOPPER else "info", text)]
    cpu_only = [op for op in dict.fromkeys(c.op for c in _cases()) if not has_kernel(op, "cuda")]
    if cpu_only:
        text = f"without a CUDA kernel: {', '.join(cpu_only)}"
        findings.append(Finding("cuda ops", "info", text))
    return findings


def _name_clash() -> list[Finding]:
    try:
        clashing = importlib.metadata.distribution(_CLASHING_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return [Finding("name clash", "ok", "no other distribution provides moe_ops")]
    return [
        Finding(
            "name clash",
            "warning",
            f"the unrelated distribution {_CLASHING_DISTRIBUTION} {clashing.version} is installed "
            "and puts its own moe_ops over this one",
            f"pip uninstall {_CLASHING_DISTRIBUTION}, then {_REINSTALL}",
        )
    ]


def _hugging_face() -> list[Finding]:
    version = _version("transformers")
    if version is None:
        return []
    if transformers_is_too_old(version):
        return [
            Finding(
                "experts implementation",
                "warning",
                f"moe_ops.hf needs transformers {TRANSFORMERS_FLOOR} or newer, found {version}",
                f'pip install --upgrade "transformers>={TRANSFORMERS_FLOOR}"',
            )
        ]
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        import moe_ops.hf  # noqa: F401

        registered = "moe_ops" in ALL_EXPERTS_FUNCTIONS.valid_keys()
    except Exception as error:
        return [
            Finding(
                "experts implementation",
                "fail",
                f"import moe_ops.hf raises {type(error).__name__}: {error}",
                "pip install --upgrade transformers torch-moe-ops",
            )
        ]
    if not registered:
        return [
            Finding(
                "experts implementation",
                "fail",
                "import moe_ops.hf did not register 'moe_ops' with transformers",
                "pip install --upgrade transformers torch-moe-ops",
            )
        ]
    return [
        Finding(
            "experts implementation",
            "ok",
            "after `import moe_ops.hf`, experts_implementation='moe_ops' works in transformers",
        )
    ]


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
        return Finding("same bits", "fail", f"moe_ffn raises {type(error).__name__}: {error}")
    finally:
        torch.set_num_threads(threads)
    if torch.equal(one, many):
        return Finding("same bits", "ok", f"from moe_ffn with 1 and {max(2, threads)} threads")
    return Finding(
        "same bits", "fail", "moe_ffn differs between thread counts", f"Reinstall: {_REINSTALL}"
    )


# --- self-test


@dataclass(frozen=True)
class _Case:
    """A call of one op: `args` and `kwargs`, whose float tensors get gradients if asked for."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    differentiable: bool = True
    tolerance: float = 0.0  # at least; for ops that round more than their dtype


def _cases() -> list[_Case]:
    """Small inputs with an idle expert and slots without an expert."""
    T, H, I, E, K = 33, 64, 40, 5, 2
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    # Distinct and evenly spaced, so that rounding cannot change which expert is chosen.
    logits = torch.randperm(T * E, generator=generator).view(T, E) * (8.0 / (T * E)) - 4.0
    ids = torch.randint(0, E - 1, (T, K), generator=generator, dtype=torch.int32)
    ids[3, 1] = -1
    weights = torch.rand(T, K, generator=generator)
    offsets, row_to_slot, slot_to_row = reference.sort_slots(ids, E)
    w_gate_up, w_down = normal(E, 2 * I, H) / H**0.5, normal(E, H, I) / I**0.5
    x, rows = normal(T, H), normal(T * K, H)
    biases = {"b_gate_up": normal(E, 2 * I), "b_down": normal(E, H)}
    scales = [w.abs().amax(2) / 127 for w in (w_gate_up, w_down)]
    codes = [
        part
        for w, scale in zip((w_gate_up, w_down), scales, strict=True)
        for part in ((w / scale[:, :, None]).round().to(torch.int8), scale)
    ]
    return [
        _Case("topk_router", (logits, K), {"renormalize": True}),
        _Case("topp_router", (logits, 0.7, E)),
        _Case("expert_choice_router", (logits, 9)),
        _Case("router_linear", (x, normal(E, H), normal(E))),
        _Case("sort_slots", (ids, E), differentiable=False),
        _Case("permute", (x, offsets, row_to_slot)),
        _Case("unpermute", (rows, offsets, slot_to_row, weights)),
        _Case("gated_act", (normal(T, 2 * I), "swiglu")),
        _Case("add_rms_norm", (x, normal(H), normal(T, H)), {"bias": normal(H)}),
        _Case("grouped_gemm", (rows, w_gate_up, offsets)),
        _Case("grouped_gemm_wgrad", (normal(T * K, I), rows, offsets)),
        _Case("grouped_sum", (rows, offsets)),
        _Case("moe_ffn", (x, w_gate_up, w_down, weights, ids), biases),
        _Case("moe_ffn_packed", (x, w_gate_up, w_down, weights, ids), biases, differentiable=False),
        # Experts with many tokens, whose weights are widened, and such with few, whose products are
        # of integers: tokens then have 8 bits.
        _Case("moe_ffn_quantized", (x, *codes, weights, ids), biases, differentiable=False),
        _Case(
            "moe_ffn_quantized",
            (x[:4], *codes, weights[:4], ids[:4]),
            biases,
            differentiable=False,
            tolerance=5e-2,
        ),
        _Case("quantize_fp8", (x,), differentiable=False),
        _Case("grouped_gemm_fp8", (rows, w_gate_up, offsets), differentiable=False),
        # An activated feature in the middle between two codes may become either.
        _Case(
            "moe_ffn_fp8",
            (x, w_gate_up, w_down, weights, ids),
            biases,
            differentiable=False,
            tolerance=5e-3,
        ),
        _Case("moe_linear_map", (x, w_gate_up, ids)),
        _Case("moe_linear_reduce", (normal(T, K, I), w_down, weights, ids)),
        _Case("rotary", (normal(2, T, 3, 24),)),
        *(
            _Case(
                "moa_attention",
                (normal(1, T, K, 3, 24), normal(1, T + 4, 3, 24), normal(1, T + 4, 3, 24)),
                {"kind": kind},
            )
            for kind in ("softmax", "stick_breaking")
        ),
        _Case(
            "dense_ffn",
            (normal(T, 2, H), w_gate_up[:, :I], w_down, torch.arange(E) % 2),
            {"activation": "silu"},
        ),
        _Case(
            "mix_experts",
            (normal(T, E, I), normal(T, 3, E)),
            {"norm_weight": normal(E, I), "norm_bias": normal(E, I), "activation": "silu"},
        ),
    ]


def _run_case(case: _Case, device: str, dtype: torch.dtype) -> SelfTest:
    forward_error = backward_error = None
    message = None
    seconds = 0.0
    tolerance = max(_TOLERANCES[dtype], case.tolerance)
    try:
        inputs = _prepare(case, device, dtype)
        exact_inputs = _prepare(case, "cpu", torch.float64, rounded_to=dtype)
        started = time.perf_counter()
        outputs = _call(_function(ops, case.op), inputs)
        gradients, cotangents = _gradients(outputs, inputs, case)
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        exact_outputs = _call(_function(reference, case.op), exact_inputs)
        exact_gradients, _ = _gradients(exact_outputs, exact_inputs, case, cotangents)
        forward_error = _worst_error(outputs, exact_outputs)
        if case.differentiable:
            backward_error = _worst_error(gradients, exact_gradients)
        passed = forward_error <= tolerance and (backward_error or 0.0) <= tolerance
    except Exception as error:
        passed = False
        message = f"{type(error).__name__}: {error}"
    return SelfTest(
        op=case.op,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        passed=passed,
        forward_error=forward_error,
        backward_error=backward_error,
        tolerance=tolerance,
        seconds=seconds,
        message=message,
    )


def _prepare(
    case: _Case, device: str, dtype: torch.dtype, *, rounded_to: torch.dtype | None = None
) -> tuple[list[Any], dict[str, Any]]:
    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            return value.to(device)
        value = value.to(rounded_to or dtype).to(device=device, dtype=dtype)
        return value.requires_grad_(case.differentiable)

    return [convert(v) for v in case.args], {k: convert(v) for k, v in case.kwargs.items()}


def _function(module: Any, op: str) -> Callable[..., Any]:
    function = getattr(module, op)
    if op.endswith("_fp8"):
        return _fp8_function(module, op)
    if op == "rotary":

        def rotate(t: Tensor) -> Tensor:
            # Angles are constants; made here, they are not among the leaves.
            positions = torch.arange(t.shape[1], dtype=torch.float64, device=t.device)
            angles = positions[:, None] * torch.linspace(
                1, 0.1, t.shape[-1] // 2, dtype=torch.float64, device=t.device
            )
            return function(t, angles.cos(), angles.sin())

        return rotate
    if op == "mix_experts":

        def mixture_alone(
            outputs: Tensor, *args: Tensor, activation: str, **norm: Tensor
        ) -> Tensor:
            acc = accumulate_dtype(outputs.dtype)
            wide = {name: t.to(acc) for name, t in norm.items()}
            return function(outputs, *args, activation=activation, **wide)[0]

        return mixture_alone
    if op != "moe_ffn_packed":
        return function

    def pack_and_call(
        x: Tensor, w_gate_up: Tensor, w_down: Tensor, *routing: Tensor, **kwargs: Any
    ) -> Tensor:
        copies = (module.pack_experts(w_gate_up, halves=True), module.pack_experts(w_down))
        return function(x, w_gate_up, w_down, *copies, *routing, **kwargs)

    return pack_and_call


def _fp8_function(module: Any, op: str) -> Callable[..., Any]:
    """The op on operands that are rounded to e4m3 in front of it, and scales in fp32."""
    function = getattr(module, op)

    def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
        q, scale = function(x)
        return q.float(), scale

    def grouped_gemm(a: Tensor, b: Tensor, expert_offsets: Tensor) -> Tensor:
        operands = (*module.quantize_fp8(a), *quantize_fp8_blocks(b))
        if a.dtype == torch.float64:
            operands = tuple(t.double() for t in operands)
        return function(*operands, expert_offsets, out_dtype=a.dtype)

    def moe_ffn(
        x: Tensor, w_gate_up: Tensor, w_down: Tensor, *routing: Tensor, **kwargs: Any
    ) -> Tensor:
        weights = (*quantize_fp8_blocks(w_gate_up), *quantize_fp8_blocks(w_down))
        return function(x, *weights, *routing, **kwargs)

    wrapped: dict[str, Callable[..., Any]]
    wrapped = {"quantize_fp8": quantize, "grouped_gemm_fp8": grouped_gemm, "moe_ffn_fp8": moe_ffn}
    return wrapped[op]


def _call(function: Callable[..., Any], inputs: tuple[list[Any], dict[str, Any]]) -> list[Tensor]:
    result = function(*inputs[0], **inputs[1])
    return [result] if isinstance(result, Tensor) else list(result)


def _gradients(
    outputs: Sequence[Tensor],
    inputs: tuple[list[Any], dict[str, Any]],
    case: _Case,
    cotangents: list[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    if not case.differentiable:
        return [], []
    floats = [o for o in outputs if o.is_floating_point()]
    if cotangents is None:
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(o.shape, generator=generator).to(o) for o in floats]
    leaves = [
        v
        for v in [*inputs[0], *inputs[1].values()]
        if isinstance(v, Tensor) and v.is_floating_point()
    ]
    matched = [c.to(o) for c, o in zip(cotangents, floats, strict=True)]
    return list(torch.autograd.grad(floats, leaves, matched)), cotangents


def _worst_error(values: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest relative error of the pairs; infinite where integers, shapes or NaNs differ."""
    worst = 0.0
    for a, b in zip(values, exact, strict=True):
        a, b = a.detach().cpu(), b.detach()
        if a.shape != b.shape:
            return float("inf")
        if not b.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(a.long(), b.long()) else float("inf"))
            continue
        error, norm = (a.double() - b).norm().item(), b.norm().item()
        if error != error:
            return float("inf")
        worst = max(worst, error / norm if norm > 0 else (0.0 if error == 0 else float("inf")))
    return worst


# --- helpers


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown" if importlib.util.find_spec(package) else None


def _cuda_build() -> str:
    """What the CUDA kernels were built with, "13.0 (static runtime)"; empty without them."""
    from moe_ops import _C

    build = dict(_C.build_info()).get("cuda", "off")
    return "" if build.lower() in ("", "off", "0") else build


def _driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver supports."""
    version = _private_torch.cuda_driver_version()
    return None if version is None else (version // 1000, version % 1000 // 10)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _mebibytes(number: int) -> str:
    return f"{number / 2**20:.0f} MiB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def main() -> int:
    """Print the report as plain text; the exit status is 1 when something failed."""
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
