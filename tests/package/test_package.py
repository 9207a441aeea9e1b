"""The package as a user meets it: versions, import time, broken installs, the documents."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.helpers import fresh_python

import moe_ops
from moe_ops import _library
from moe_ops._requirements import TRANSFORMERS_FLOOR

ROOT = Path(__file__).parents[2]
PACKAGE = Path(moe_ops.__file__).parent
DISTRIBUTION = "torch-moe-ops"


def run_python(
    code: str,
    path: Path | str = PACKAGE.parent,
    cwd: Path | None = None,
    transformers: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Runs code where nothing of moe_ops is imported yet, and `path` comes first."""
    return fresh_python.run_python(
        "-c", code, cwd=cwd, env={"PYTHONPATH": str(path)}, timeout=300, transformers=transformers
    )


def import_error(result: subprocess.CompletedProcess[str]) -> str:
    """The message that the user sees last; it must be one line that starts no second traceback."""
    assert result.returncode == 1, result.stdout + result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: "), result.stderr
    return last.removeprefix("ImportError: ")


# --- version and metadata


def project(pattern: str, file: str = "pyproject.toml") -> str:
    found = re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)
    assert found, f"{file} has no {pattern}"
    return found[1]


def test_one_version_everywhere():
    assert moe_ops.__version__ == moe_ops._library.version()
    for file in ("pyproject.toml", "CMakeLists.txt", "integrations/vllm/pyproject.toml"):
        assert moe_ops.__version__ not in (ROOT / file).read_text(), file
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{moe_ops.__version__}]" in changes


def requirements() -> list[str]:
    try:
        return importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{DISTRIBUTION} is not installed: `make test` runs the installed package.")


def test_installed_metadata():
    requirements()
    assert importlib.metadata.version(DISTRIBUTION) == moe_ops.__version__
    scripts = importlib.metadata.entry_points(group="console_scripts")
    assert any(s.name == "moe-ops" and s.value == "moe_ops.cli:main" for s in scripts)


def test_torch_floor_is_the_same_everywhere():
    target = moe_ops._library.build_info()["torch_target"]
    assert project(r'^dependencies = \["torch>=([\d.]+)"') == target
    assert project(r'^set\(MOE_OPS_TORCH_TARGET "([\d.]+)"', "CMakeLists.txt") == target


def test_transformers_floor_is_the_same_everywhere():
    assert project(r'^hf = \["transformers>=([\d.]+)"') == TRANSFORMERS_FLOOR
    for page in ("README.md", "docs/huggingface.md"):
        named = re.findall(r"transformers\s*\(?([\d.]+)\s+or\s+newer", (ROOT / page).read_text())
        assert named == [TRANSFORMERS_FLOOR], page


# Imported only when asked for, and the extra that brings them.
EXTRAS = {
    "cli": ("typer", "rich", "safetensors"),
    "viz": ("matplotlib",),
    "hf": ("transformers", "safetensors"),
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_extra_brings_what_its_code_imports(extra):
    brought = {
        re.split(r"[^\w-]", requirement)[0]
        for requirement in requirements()
        if re.search(rf"extra == ['\"]{extra}['\"]", requirement)
    }
    assert set(EXTRAS[extra]) <= brought


def test_every_extra_named_in_a_message_exists():
    section = project(r"^\[project\.optional-dependencies\]\n((?:.+\n)+)")
    defined = set(re.findall(r"^(\w+) = ", section, re.MULTILINE))
    named = set()
    for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for extras in re.findall(r"torch-moe-ops\[([\w,]+)\]", path.read_text()):
            named |= set(extras.split(","))
    assert named and named <= defined


# --- importing


def imported_modules(before: str = "") -> list[str]:
    """Returns what `import moe_ops` imports over torch, which every user of it has imported anyway.
    Each is a file to find, read and run: a count of them is the same on every machine, a time is
    not."""
    code = (
        f"import sys, torch\n{before}\nbefore = set(sys.modules)\nimport moe_ops\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return run.stdout.split()


IMPORT_LIMIT = 100


def test_import_is_small():
    # The registry of FLOP formulas is torch's, and imports triton in a build for CUDA.
    modules = imported_modules("import torch.utils.flop_counter")
    assert "moe_ops.ops" in modules
    assert len(modules) <= IMPORT_LIMIT
    outside = [name for name in modules if name.split(".")[0] != "moe_ops"]
    assert len(outside) <= 5, outside


def test_import_pulls_in_nothing_optional():
    names = sorted({name for extra in EXTRAS.values() for name in extra})
    result = run_python(f"import sys, moe_ops; print([n for n in {names} if n in sys.modules])")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_layers_and_reference_need_no_extra():
    names = sorted({name for extra in EXTRAS.values() for name in extra})
    code = (
        f"import sys\nfor n in {names}: sys.modules[n] = None\n"
        "import moe_ops, moe_ops.layers, moe_ops.reference, moe_ops.doctor\nprint('fine')"
    )
    result = run_python(code)
    assert result.stdout.strip() == "fine", result.stderr


def without(package: str) -> str:
    """Code that makes `import package` fail as it does where the package is not installed."""
    return (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {package!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )


def test_hf_without_transformers_names_its_extra():
    message = import_error(run_python(without("transformers") + "import moe_ops.hf"))
    assert "transformers" in message and "pip install torch-moe-ops[hf]" in message


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_command_without_a_package_names_its_extra(package):
    code = "from moe_ops.cli import main\nmain(['doctor'])"
    result = run_python(without(package) + code)
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert 'pip install "torch-moe-ops[cli]"' in result.stderr


def test_pictures_without_matplotlib_name_their_extra():
    code = "from moe_ops import viz\nviz._canvas.expert_colors(4)"
    result = run_python(without("matplotlib") + code)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1
    assert "torch-moe-ops[viz]" in last, result.stderr


# --- an install that is broken says so in one sentence


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the installed package, to be broken; the folder to import it from is its parent."""
    return Path(shutil.copytree(PACKAGE, tmp_path / "moe_ops", symlinks=True))


def native_files(package: Path) -> list[Path]:
    found = [p for p in package.iterdir() if ".so" in p.suffixes or p.suffix in (".dylib", ".pyd")]
    assert found, package
    return found


def test_copy_works(copy):
    result = run_python("import moe_ops; print(moe_ops.__file__)", copy.parent)
    assert Path(result.stdout.strip()).parent == copy, result.stderr


def test_missing_library(copy):
    for path in native_files(copy):
        path.unlink()
    message = import_error(run_python("import moe_ops", copy.parent))
    assert "moe_ops is not built here" in message
    assert "pip install --no-build-isolation ." in message


def test_damaged_library(copy):
    for path in native_files(copy):
        if path.name.startswith("libmoe_ops"):
            path.write_bytes(b"not a library")
    message = import_error(run_python("import moe_ops", copy.parent))
    assert "does not load with torch" in message
    assert "pip install" in message


def test_library_of_another_version(copy):
    init = copy / "__init__.py"
    text = init.read_text()
    changed = text.replace(f'__version__ = "{moe_ops.__version__}"', '__version__ = "99.0.0"')
    assert changed != text
    init.write_text(changed)
    message = import_error(run_python("import moe_ops", copy.parent))
    assert "99.0.0" in message and moe_ops.__version__ in message
    assert "pip uninstall torch-moe-ops" in message


@pytest.mark.parametrize("version", ["2.9.1", "2.9.1+cu128", "1.13.0"])
def test_old_torch(version):
    code = f"import torch\ntorch.__version__ = {version!r}\nimport moe_ops"
    message = import_error(run_python(code))
    assert "2.10" in message and version in message
    assert "pip install --upgrade torch" in message


@pytest.mark.parametrize("version", ["2.10.0", "2.15.0a0+gitabc", "3.0.0"])
def test_new_torch(version):
    code = f"import torch\ntorch.__version__ = {version!r}\nimport moe_ops\nprint('fine')"
    result = run_python(code)
    assert result.stdout.strip() == "fine", result.stderr


def test_library_without_a_function(copy):
    """One of an older version, whose functions are others."""
    path = copy / "_library.py"
    changed = path.read_text().replace('"cpu_isa"', '"no_such_function"')
    assert changed != path.read_text()
    path.write_text(changed)
    message = import_error(run_python("import moe_ops", copy.parent))
    assert "two installs are mixed" in message


def test_one_library_serves_every_python():
    """No file of the package is a module of Python's C API, which would be one of a version."""
    assert [path.name for path in native_files(PACKAGE)] == [_library.PATH.name]
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    modules = [path for path in PACKAGE.rglob("*") if path.name.endswith(suffixes)]
    assert [path for path in modules if not path.name.startswith("lib")] == []
    assert not re.search(rb"\bPyInit_|\bPyModule_", _library.PATH.read_bytes())


def test_installed_files_hold_one_library():
    requirements()
    installed = importlib.metadata.distribution(DISTRIBUTION)
    if Path(str(installed.locate_file("moe_ops"))).resolve() != PACKAGE.resolve():
        pytest.skip("another moe_ops is installed: `make test` runs the installed package.")
    files = installed.files or []
    native = [p.name for p in files if p.suffix in (".so", ".pyd", ".dylib", ".dll")]
    assert native == [_library.PATH.name]
    wheel = next(p for p in files if p.name == "WHEEL").read_text()
    assert re.search(r"^Tag: py3-none-\w+$", wheel, re.MULTILINE), wheel


def test_the_module_of_tests_is_no_part_of_the_package():
    code = "import moe_ops, sys; print('moe_ops_dev' in sys.modules, hasattr(moe_ops, '_C'))"
    assert run_python(code).stdout.split() == ["False", "False"]
    assert (PACKAGE / "py.typed").is_file()


def test_compiled_code_calls_the_library_each_time():
    """ctypes splits the graph, as a module of Python's C API does: nothing is a constant of it."""

    @torch.compile(backend="eager")
    def f(x, mode):
        with moe_ops.batch_invariant(mode):
            return x + _library.batch_invariant()

    for mode in (True, False, True):
        assert f(torch.zeros(2), mode).tolist() == [float(mode)] * 2


# --- the documents say what is so

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/*.md"), *ROOT.glob("[a-z]*/*/*.md")])
PAGES = [path for path in PAGES if path.relative_to(ROOT).parts[0] not in ("build", "dist")]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# What an example mentions, and the package it then needs.
EXAMPLES_NEED = {
    "transformers": "transformers",
    "from transformers import Trainer": "accelerate",
    "moe_ops.zoo.mowst": "torch_geometric",
    "from river": "river",
    "moe_ops.onnx": "onnxruntime",
}
# The same for one block, without which the others of its page run.
BLOCKS_NEED = {
    "peft": "peft",
    "lightning": "lightning",
    # Of transformers 5.23, which Python 3.10 has not.
    "ep_implementation": "transformers.distributed.expert_parallel",
}


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def runnable(block: str) -> bool:
    """Returns whether the modules are there that a block alone on its page needs."""
    needed = [module for mentioned, module in BLOCKS_NEED.items() if mentioned in block]
    try:
        return all(importlib.util.find_spec(module) is not None for module in needed)
    except ModuleNotFoundError:  # Nor is the package of a module.
        return False


def run_examples(path: Path, code: str, folder: Path) -> None:
    for mentioned, package in EXAMPLES_NEED.items():
        if mentioned in "".join(blocks(path, "python")):
            pytest.importorskip(package)
    # Pages of the zoo import bench.studies, which is found at the root of the source tree.
    where = f"{PACKAGE.parent}{os.pathsep}{ROOT}" if "bench.studies" in code else PACKAGE.parent
    result = run_python(code, where, folder, "transformers" in code)
    assert result.returncode == 0, result.stderr
    assert not re.search(r"^<string>:\d+: \w*Warning", result.stderr, re.MULTILINE), result.stderr


@pytest.mark.parametrize(
    "path", [p for p in DOCUMENTS[1:] if blocks(p, "python")], ids=lambda p: p.name
)
def test_examples_run(path, tmp_path):
    """The blocks of one document, in order, as one program in an empty folder."""
    run_examples(path, "\n".join(filter(runnable, blocks(path, "python"))), tmp_path)
    for line in "".join(blocks(path, "sh")).splitlines():  # Commands on what the blocks have made.
        command, *arguments = line.split()
        if command == "moe-ops" and any((tmp_path / a).exists() for a in arguments):
            code = f"from moe_ops.cli import main; main({arguments})"
            result = run_python(code, cwd=tmp_path)
            assert result.returncode == 0, result.stdout + result.stderr


NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path):
    """The cells of one notebook, in order, as one program in an empty folder."""
    for package in ("transformers", "matplotlib", *(["peft"] if "qlora" in path.stem else [])):
        pytest.importorskip(package)
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    result = run_python(code, cwd=tmp_path, transformers=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path):
    assert path.name in (ROOT / "docs" / "notebooks.md").read_text()
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_examples_of_the_readme_run_alone(tmp_path):
    """Each is a program of its own; they share the folder, in which the first saves its model."""
    readme = ROOT / "README.md"
    examples = [block for block in blocks(readme, "python") if runnable(block)]
    code = f"for block in {examples!r}: exec(block, {{}})"
    run_examples(readme, code, tmp_path)


def signature(function) -> str:
    """Returns the signature as docs/ops.md prints it."""
    words, starred = [], False
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not starred:
            words.append("*")
            starred = True
        default = "" if p.default is p.empty else f" = {p.default!r}".replace("'", '"')
        words.append(f"{p.name}: {p.annotation}{default}")
    returns = inspect.signature(function).return_annotation
    return f"{function.__name__}({', '.join(words)}) -> {returns}"


@pytest.mark.parametrize("name", sorted(moe_ops.ops.__all__))
def test_op_page_has_the_signature(name):
    page = ROOT / "docs" / "ops.md"
    assert f"\n### {name}\n" in page.read_text()
    printed = [
        " ".join(b.split()).replace("( ", "(").replace(" )", ")") for b in blocks(page, "text")
    ]
    assert signature(getattr(moe_ops, name)) in printed


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{path.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in anchors, f"{path.name} links to {target}"
