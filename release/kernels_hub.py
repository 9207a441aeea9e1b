"""Builds the layout of a kernel repository for the `kernels` package of Hugging Face.

    python -m release.kernels_hub dist/kernels-hub

The folder then holds one build of the ops, layers and quantized layers for Linux, torch 2.10 and
newer, and the CPU of this machine's architecture:

    from kernels import get_local_kernel
    moe_ops = get_local_kernel(Path("dist/kernels-hub"), backend="cpu")

It can be loaded beside an installed moe_ops and beside another build. For this, its ops have a
namespace with the commit in its name, which a macro of the compiler sets, and its imports are
relative. It needs no package but torch.
"""

from __future__ import annotations

import argparse
import ast
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "moe_ops"
_IMPORT = re.compile(r"^(?P<indent>\s*)from moe_ops(?P<module>[\w.]*) import ")


def modules_of_package() -> dict[str, Path]:
    """Returns the modules that `import moe_ops` needs, also those that it imports on first use."""
    found: dict[str, Path] = {}
    waiting = ["moe_ops"]
    while waiting:
        name = waiting.pop()
        path = _file(name)
        if name in found or path is None:
            continue
        found[name] = path
        waiting += [name.rpartition(".")[0], *_imports(name, path)]
    # Modules of the reference are imported by the names of their files.
    for path in sorted((PACKAGE / "reference").glob("*.py")):
        found.setdefault(f"moe_ops.reference.{path.stem}", path)
    return found


def _file(name: str) -> Path | None:
    """Returns the file of a module; None where the name is none of ours."""
    path = ROOT / "python" / name.replace(".", "/")
    candidates = (path / "__init__.py", path.with_suffix(".py"))
    return next((file for file in candidates if name and file.exists()), None)


def _imports(name: str, path: Path) -> Iterator[str]:
    """Yields the names that a module may import; some are functions, which have no file."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def rewritten(text: str, depth: int, namespace: str) -> str:
    """Returns a module with relative imports and another namespace of ops.

    Args:
        text: the module.
        depth: the number of packages above the module's own, 0 for those of moe_ops itself.
        namespace: of the ops.

    Raises:
        ValueError: an import of moe_ops is left.
    """
    dots = "." * (depth + 1)

    def relative(match: re.Match[str]) -> str:
        return f"{match['indent']}from {dots}{match['module'].removeprefix('.')} import "

    lines = [_IMPORT.sub(relative, line) for line in text.splitlines(keepends=True)]
    text = "".join(lines)
    text = text.replace("torch.ops.moe_ops", f"torch.ops.{namespace}")
    text = text.replace('Library("moe_ops"', f'Library("{namespace}"')
    text = re.sub(r'(f?")moe_ops::', rf"\g<1>{namespace}::", text)
    for node in ast.walk(ast.parse(text)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        if any(name.partition(".")[0] == "moe_ops" for name in names):
            raise ValueError(f"An import must be `from moe_ops... import ...`, got {names[0]}.")
    return text


def build_library(namespace: str, folder: Path, python: str) -> Path:
    """Compiles the library with its ops in `namespace`; returns its file."""
    command = [python, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    command += ["-C", f"cmake.define.CMAKE_CXX_FLAGS=-Dmoe_ops={namespace}"]
    command += ["-C", "cmake.define.MOE_OPS_CUDA=off", "-C", "cmake.define.MOE_OPS_DEV=off"]
    command += ["-C", f"build-dir={folder / 'build'}", "-w", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract("moe_ops/libmoe_ops.so", folder))


def write_repository(output: Path, library: Path, namespace: str, version: str) -> Path:
    """Writes the folder of the repository; returns that of the build in it."""
    variant = f"torch-stable-abi210-cpu-{platform.machine()}-linux"
    shutil.rmtree(output, ignore_errors=True)
    build = output / "build" / variant
    for name, source in modules_of_package().items():
        place = source.relative_to(PACKAGE)
        target = build / place
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.write_text(rewritten(source.read_text(), len(place.parts) - 1, namespace))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    with (build / "__init__.py").open("a") as file:
        file.write("\nfrom . import layers as layers, quant as quant  # noqa: E402\n")
    shutil.copy2(library, build)
    metadata = {
        "id": namespace,
        "name": "moe-ops",
        "version": int(version.partition(".")[0]),
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (build / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    shutil.copy2(ROOT / "LICENSE", output)
    (output / "README.md").write_text(_card(version))
    return build


def _card(version: str) -> str:
    return f"""---
license: apache-2.0
tags: [kernels]
---

# moe_ops {version}

Mixture-of-experts ops, layers and quantized experts for the CPU.

```python
import torch
from kernels import get_kernel

moe_ops = get_kernel("OWNER/moe-ops", version=0, backend="cpu")
weights, ids = moe_ops.topk_router(torch.randn(6, 8), 2)
```
"""


def main() -> None:
    """Reads the command line."""
    summary = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m release.kernels_hub", description=summary)
    parser.add_argument("output", type=Path, help="the folder of the repository, which is replaced")
    parser.add_argument("--python", default=sys.executable, help="has torch and the build tools")
    arguments = parser.parse_args()
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True)[:8]
    namespace = f"moe_ops_{commit}"
    text = (PACKAGE / "__init__.py").read_text()
    (version,) = re.findall(r'^__version__ = "(.+)"$', text, re.M)
    with tempfile.TemporaryDirectory() as folder:
        library = build_library(namespace, Path(folder), arguments.python)
        print(write_repository(arguments.output, library, namespace, version))


if __name__ == "__main__":
    main()
