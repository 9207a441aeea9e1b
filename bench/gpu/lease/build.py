"""Builds a package of the tree for child processes, with CMake alone: no pip, no network.

The package is build/lease/package: a copy of python/moe_ops and the library. There are three ways:
everything is compiled, with the provided CUTLASS headers; the library is provided, which works with
every Python version, and nothing is compiled; or a whole package is provided.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from bench.gpu import steps
from bench.gpu.steps import Outcome, said
from bench.harness.files import ROOT

FOLDER = ROOT / "build" / "lease"
PACKAGE = FOLDER / "package"
_BUILD = FOLDER / "cmake"
_CUTLASS = FOLDER / "cutlass"


@dataclass(frozen=True)
class Sources:
    """Provided files. `cutlass`: the nvidia-cutlass wheel, a folder with cutlass_library in it, or
    the headers (a folder with cute in it). `library`: libmoe_ops.so of this tree. `package`: a
    folder with a built moe_ops in it. `defines`: CMake settings, NAME=VALUE."""

    cutlass: Path | None = None
    library: Path | None = None
    package: Path | None = None
    defines: tuple[str, ...] = ()


def package_of(sources: Sources) -> Path:
    """Returns the folder for PYTHONPATH."""
    return sources.package.resolve() if sources.package else PACKAGE


def is_built(sources: Sources) -> bool:
    """Returns whether the library was built from the present source with the present options."""
    folder = package_of(sources) / "moe_ops"
    there = (folder / "libmoe_ops.so").exists()
    return there and (sources.package is not None or _stamp() == _stamp_of(sources))


def fingerprint() -> str:
    """Returns a hash of the library's sources, which separates measurements of different
    versions."""
    digest = hashlib.sha256()
    for folder in ("csrc", "python/moe_ops"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".h", ".cuh", ".cu", ".cpp", ".py"):
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def build(sources: Sources, limit_s: float) -> Outcome:
    """Builds the package and returns the outcome of the step."""
    if sources.package is not None:
        if not is_built(sources):
            return _outcome("failed", 0.0, f"{sources.package} holds no built moe_ops")
        if refusal := _refusal(sources.package, limit_s):
            return _outcome("failed", 0.0, f"{sources.package} does not load: {refusal}")
        return _outcome("passed", 0.0, f"uses the package in {sources.package}")
    environment = {"PYTHONPATH": _python_path(sources)}
    seconds = 0.0
    commands = (("configure", configure(sources)), ("build", compile_()))
    for name, command in () if sources.library else commands:
        status, took, log = steps.run_logged(name, command, limit_s - seconds, environment)
        seconds += took
        if status is None:
            return _outcome("unfinished", seconds, f"{name} takes longer; what is compiled stays")
        if status != 0:
            lines = log.read_text(errors="replace").strip().splitlines()
            wrong = [line for line in lines if "rror" in line] or lines or ["?"]
            return _outcome("failed", seconds, f"{name}: {wrong[0].strip()} ({log})")
    _assemble(sources)
    if refusal := _refusal(PACKAGE, limit_s - seconds):
        (PACKAGE / "stamp").unlink()
        return _outcome("failed", seconds, f"what was built does not load: {refusal}")
    what = f"uses {sources.library}" if sources.library else "built the whole tree"
    return _outcome("passed", seconds, what)


def configure(sources: Sources) -> list[str]:
    command = [
        *(_tool("cmake"), "-S", str(ROOT), "-B", str(_BUILD), "-G", "Ninja"),
        *("-DCMAKE_BUILD_TYPE=Release", "-DMOE_OPS_CUDA=on"),
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    if capability := _capability():
        # Kernels for any GPU take half of the build time, once for each architecture.
        command.append(f"-DMOE_OPS_CUDA_SASS={capability}")
    return [*command, *(f"-D{define}" for define in sources.defines)]


def _capability() -> str:
    """Returns the compute capability of the first GPU without its dot; "" if nvidia-smi prints
    none."""
    lines = said(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    told = lines[0].strip().replace(".", "") if lines else ""
    return told if told.isdecimal() else ""


def compile_() -> list[str]:
    return [_tool("cmake"), "--build", str(_BUILD), "--parallel", str(os.cpu_count())]


def _assemble(sources: Sources) -> None:
    shutil.rmtree(PACKAGE, ignore_errors=True)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "python" / "moe_ops", PACKAGE / "moe_ops", ignore=ignore)
    shutil.copy(sources.library or _BUILD / "libmoe_ops.so", PACKAGE / "moe_ops" / "libmoe_ops.so")
    (PACKAGE / "stamp").write_text(_stamp_of(sources))


def _refusal(package: Path, limit_s: float) -> str:
    """Returns the reason why this Python cannot import the package; "" if it can. A library built
    from other sources lacks functions that the package calls."""
    path = os.pathsep.join([str(package.resolve()), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", "import moe_ops"]
    status, _, log = steps.run_logged("import", command, max(5.0, limit_s), {"PYTHONPATH": path})
    if status == 0:
        return ""
    return (log.read_text(errors="replace").strip().splitlines() or ["no answer"])[-1]


def _stamp_of(sources: Sources) -> str:
    """Returns an identifier of a package's inputs: another library or other settings change it."""
    library = "" if sources.library is None else str(sources.library.resolve())
    return " ".join([fingerprint(), library, *sources.defines])


def _stamp() -> str:
    path = PACKAGE / "stamp"
    return path.read_text() if path.exists() else ""


def _python_path(sources: Sources) -> str:
    """Returns a Python path with the folder in which CMake finds cutlass_library."""
    parts = [os.environ.get("PYTHONPATH", "")]
    if (folder := _cutlass_folder(sources.cutlass)) is not None:
        parts.insert(0, str(folder))
    return os.pathsep.join(part for part in parts if part)


def _cutlass_folder(given: Path | None) -> Path | None:
    if given is None:
        return None
    given = given.resolve()
    if given.is_dir() and (given / "cutlass_library").is_dir():
        return given
    shutil.rmtree(_CUTLASS, ignore_errors=True)
    library = _CUTLASS / "cutlass_library"
    if given.is_file():
        with zipfile.ZipFile(given) as wheel:
            wheel.extractall(_CUTLASS)
    elif (given / "cute").is_dir():
        (library / "source").mkdir(parents=True)
        (library / "source" / "include").symlink_to(given)
    if not (library / "source" / "include" / "cute").is_dir():
        raise FileNotFoundError(
            f"--cutlass must be the nvidia-cutlass wheel, a folder with cutlass_library in it, or "
            f"a folder with cute in it, got {given}."
        )
    (library / "__init__.py").touch()
    return _CUTLASS


def _tool(name: str) -> str:
    """Finds a tool on PATH, or next to the running Python."""
    beside = Path(sys.executable).parent / name
    return shutil.which(name) or str(beside)


def _outcome(status: str, seconds: float, text: str) -> Outcome:
    return {"status": status, "seconds": round(seconds, 1), "text": text}
