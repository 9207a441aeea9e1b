"""Builds and checks everything that a release consists of. In the root of a clean source tree:

    python -m release --test python3.10 "torch==2.10.*" --test python3.13 "torch==2.15.*"

`dist/` then holds the archive of the sources, the wheels, the list of their components, checksums
and RELEASE.md, which lists what was built and what was run where. Nothing is uploaded.
docs/releasing.md explains the steps.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
WORK = ROOT / "build" / "release"
TOOLS = ["build", "twine>=6.1", "cyclonedx-bom>=7", "scikit-build-core>=0.10"]
ARM_COMPILER = "aarch64-linux-gnu-g++"
# The examples of README that need torch and no other extra.
SAMPLES = ("## A layer", "## An op")


class ReleaseError(Exception):
    """One sentence about why there is no release."""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Runs a command and returns its output; a failure is a `ReleaseError` that ends with it."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except FileNotFoundError:
        raise ReleaseError(f"The program {words[0]} is not installed.") from None
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-30:])
        raise ReleaseError(f"`{' '.join(words)}` ended with status {done.returncode}:\n{tail}")
    return done.stdout


def say(text: str) -> None:
    """Prints a step at once, as the next one may take minutes."""
    print(text, flush=True)


def environment(folder: Path, python: str, *packages: str | Path) -> Path:
    """Creates an empty environment with packages and returns its Python."""
    shutil.rmtree(folder, ignore_errors=True)
    run(python, "-m", "venv", folder)
    interpreter = folder / "bin" / "python"
    run(interpreter, "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages)
    return interpreter


def check_tree() -> str:
    """Returns the commit; the files of the tree must be those of the commit."""
    changed = run("git", "status", "--porcelain").splitlines()
    if changed:
        raise ReleaseError(
            f"A release needs a tree without uncommitted files, got {len(changed)}: {changed[0]}"
        )
    return run("git", "rev-parse", "HEAD").strip()


def build_sources(tools: Path) -> tuple[Path, Path]:
    """Builds the archive of the sources from the commit; returns it and a folder with its files."""
    committed, unpacked = WORK / "committed", WORK / "unpacked"
    for folder in (committed, unpacked):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    run("git", "archive", "-o", WORK / "committed.tar", "HEAD")
    run("tar", "-xf", WORK / "committed.tar", "-C", committed)
    # Not isolated: an isolated build would download a torch, which the archive does not need.
    run(tools, "-m", "build", "--sdist", "-n", "-x", "-o", DIST, committed)
    (sources,) = DIST.glob("*.tar.gz")
    run("tar", "-xzf", sources, "-C", unpacked)
    (folder,) = unpacked.iterdir()
    return sources, folder


def build_wheel(source: Path, target: str, python: str, torch: str) -> Path:
    """Builds a wheel by a target of the Makefile in the unpacked archive of the sources."""
    run("make", target, f"PYTHON={python}", f"TORCH={torch}", "MOE_OPS_CUDA=off", cwd=source)
    (wheel,) = (source / "dist").glob("*aarch64*" if "aarch64" in target else "*x86_64*")
    return Path(shutil.copy2(wheel, DIST))


def check_wheel(wheel: Path, version: str) -> None:
    """Checks the name of a wheel of moe_ops, its library and its licences."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    info = f"torch_moe_ops-{version}.dist-info"
    wanted = ["moe_ops/libmoe_ops.so", f"{info}/licenses/LICENSE"]
    wanted += [
        f"{info}/licenses/third_party/licenses/{path.name}"
        for path in sorted((ROOT / "third_party" / "licenses").iterdir())
    ]
    absent = [name for name in wanted if name not in names]
    if absent:
        raise ReleaseError(f"{wheel.name} must contain {absent[0]}.")


def samples() -> str:
    """Returns the examples of README that `SAMPLES` names, as one program."""
    text = (ROOT / "README.md").read_text()
    found = [re.search(rf"^{head}$.*?```python\n(.*?)```", text, re.M | re.S) for head in SAMPLES]
    if not all(found):
        raise ReleaseError(f"README.md must have a block of Python under each of {SAMPLES}.")
    return "\n".join(match[1] for match in found if match)


def try_wheel(wheel: Path, plugin: Path, python: str, torch: str) -> dict[str, str]:
    """Installs a wheel in an empty environment; runs `moe-ops doctor`, the self-test and examples.

    The plugin is installed without vLLM, so that only its version and its requirement are checked.
    """
    folder = WORK / "empty"
    interpreter = environment(folder, python, torch, f"{wheel}[cli]")
    run(interpreter, "-m", "pip", "install", "-q", "--no-deps", plugin)
    doctor = run(folder / "bin" / "moe-ops", "doctor", cwd=folder)
    (folder / "sample.py").write_text(samples())
    run(interpreter, "sample.py", cwd=folder)
    facts = """if True:
        import importlib.metadata as metadata, json, platform, torch, moe_ops.self_test
        results = moe_ops.self_test.self_test()
        failed = [result for result in results if not result.passed]
        assert results and not failed, failed
        plugin = metadata.distribution("torch-moe-ops-vllm")
        assert plugin.version == moe_ops.__version__, plugin.version
        assert f"torch-moe-ops=={moe_ops.__version__}" in plugin.requires, plugin.requires
        print(json.dumps({"python": platform.python_version(), "torch": torch.__version__,
                          "self_test": f"{len(results)} ops passed"}))
    """
    found: dict[str, str] = json.loads(run(interpreter, "-c", facts, cwd=folder).splitlines()[-1])
    (WORK / f"doctor-{found['python']}.txt").write_text(doctor)
    return found


def write_components(tools: Path, version: str) -> Path:
    """Writes the components of the last tested environment as CycloneDX JSON."""
    path = DIST / f"torch-moe-ops-{version}.cdx.json"
    interpreter = WORK / "empty" / "bin" / "python"
    command = ("-m", "cyclonedx_py", "environment", "--of", "JSON", "--output-reproducible")
    run(tools, *command, "-o", path, interpreter)
    names = {part["name"] for part in json.loads(path.read_text())["components"]}
    if not {"torch-moe-ops", "torch"} <= names:
        raise ReleaseError(f"{path.name} must list torch-moe-ops and torch, got {sorted(names)}.")
    return path


def summary(
    version: str, commit: str, rows: list[dict[str, str]], absent: dict[str, str], seconds: float
) -> str:
    """Returns RELEASE.md."""
    files = sorted(path for path in DIST.iterdir() if path.name != "SHA256SUMS")
    lines = [
        f"# torch-moe-ops {version}",
        "",
        f"Built from commit {commit} in {seconds:.0f} s.",
        "",
    ]
    lines += ["| file | bytes |", "|---|---|"]
    lines += [f"| {path.name} | {path.stat().st_size:,} |" for path in files]
    lines += ["", "`twine check --strict` passed for each archive and wheel.", ""]
    lines += ["| Python | torch | `moe-ops doctor` | self-test | examples of README |"]
    lines += ["|---|---|---|---|---|"]
    lines += [f"| {r['python']} | {r['torch']} | passed | {r['self_test']} | ran |" for r in rows]
    lines += ["", "Not built or not run:", ""]
    lines += [f"- {what}: {why}" for what, why in absent.items()]
    return "\n".join(lines) + "\n"


def release(build_with: tuple[str, str], tests: list[tuple[str, str]]) -> None:
    """Builds into `dist/`, checks, and writes the summary."""
    began = time.monotonic()
    commit = check_tree()
    source_text = (ROOT / "python" / "moe_ops" / "__init__.py").read_text()
    found = re.search(r'^__version__ = "(.+)"$', source_text, re.M)
    if not found:
        raise ReleaseError("python/moe_ops/__init__.py must set __version__, and does not.")
    version = found[1]
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    WORK.mkdir(parents=True, exist_ok=True)

    say(f"Building the sources of {version}.")
    tools = environment(WORK / "tools", sys.executable, *TOOLS)
    _, folder = build_sources(tools)
    say("Building the plugin for vLLM.")
    run(tools, "-m", "build", "--wheel", "-o", DIST, WORK / "committed" / "integrations" / "vllm")
    (plugin,) = DIST.glob("torch_moe_ops_vllm-*.whl")
    say("Building the wheel for x86-64 from the sources' archive.")
    wheel = build_wheel(folder, "wheel", *build_with)
    wheels, absent = [wheel], {}
    if shutil.which(ARM_COMPILER):
        say("Building the wheel for Arm.")
        wheels.append(build_wheel(folder, "wheel-aarch64", *build_with))
        absent["The wheel for Arm"] = "built, but not run."
    else:
        absent["The wheel for Arm"] = f"not built, because {ARM_COMPILER} is not installed."
    absent["The wheel with CUDA kernels"] = (
        "not built; docs/releasing.md has its commands, which need nvcc and a GPU."
    )
    absent["The plugin for vLLM"] = (
        "installed without vLLM; `make test-vllm` runs its tests with vLLM."
    )
    for each in wheels:
        check_wheel(each, version)
    run(tools, "-m", "twine", "check", "--strict", *DIST.glob("*.whl"), *DIST.glob("*.tar.gz"))

    rows = []
    for python, torch in tests:
        say(f"Testing {wheel.name} with {python} and {torch}.")
        rows.append(try_wheel(wheel, plugin, python, torch))
    write_components(tools, version)
    (DIST / "RELEASE.md").write_text(
        summary(version, commit, rows, absent, time.monotonic() - began)
    )
    sums = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(DIST.iterdir())
    ]
    (DIST / "SHA256SUMS").write_text("".join(sums))
    say((DIST / "RELEASE.md").read_text())


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m release", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--build-with",
        nargs=2,
        default=("python3", "torch"),
        metavar=("PYTHON", "TORCH"),
        help="the interpreter and the requirement of torch that the wheel is compiled with",
    )
    parser.add_argument(
        "--test",
        nargs=2,
        action="append",
        metavar=("PYTHON", "TORCH"),
        help="an interpreter and a requirement of torch to test the wheel with; may be repeated",
    )
    arguments = parser.parse_args()
    try:
        release(tuple(arguments.build_with), arguments.test or [("python3", "torch")])
    except ReleaseError as error:
        raise SystemExit(f"release: {error}") from None


if __name__ == "__main__":
    main()
