"""The rules of csrc/README.md: one stem an op in every layer, includes that point one way."""

from __future__ import annotations

import inspect
import re
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from tests.helpers.simulator import CPU_ONLY

import moe_ops
from moe_ops import ops, reference

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
LAYERS = {
    "csrc/include/moe_ops": ".h",
    "csrc/cpu": ".cpp",
    "csrc/torch": ".cpp",
    "python/moe_ops/ops": ".py",
    "python/moe_ops/reference": ".py",
    "tests/ops": ".py",
}
# Layers that an op does without, and why.
SAME_KERNEL = "moe_ffn's own kernel and adapter, which read another copy of the weights"
EXCEPTIONS = {
    ("moe_ffn_packed", "csrc/include/moe_ops"): SAME_KERNEL,
    ("moe_ffn_packed", "csrc/cpu"): SAME_KERNEL,
    ("moe_ffn_packed", "csrc/torch"): SAME_KERNEL,
    ("grouped_gemm_quantized", "csrc/cpu"): "grouped_gemm takes such weights",
}
# Files of a layer that belong to no single op.
SHARED = {
    "csrc/include/moe_ops": {
        "activation",
        "attend_decode",  # a part of attention_decode, on CUDA
        "attention_block",
        "batch_invariant",
        "common",
        "dense_layer",
        "platform",
        "router_bwd",
        "routing",
        "score_func",
        "weight_format",
    },
    "csrc/cpu": {"gemm", "isa", "kernels", "router_bwd", "runtime"},
    "csrc/torch": {"attend_decode", "device", "library", "router", "tensor_utils"},
}
# Schemas that live in another op's files.
FAMILY = {
    "moe_ffn_lora": "moe_ffn",
    "grouped_gemm_fp8_wgrad": "grouped_gemm_fp8",
    "grouped_gemm_wgrad": "grouped_gemm",
    "grouped_sum": "grouped_gemm",
    "pack_experts": "moe_ffn_packed",
    "quantize_fp8_columns": "quantize_fp8",
}
# Public names that are no ops.
TOOLS = {
    "Int4WeightConfig",
    "Int8WeightConfig",
    "__version__",
    "batch_invariant",
    "is_batch_invariant_enabled",
    "packed_weight_bytes",
    "pack_weights",
    "set_packing_policy",
    "quantize",
    "set_batch_invariant",
    "unpack_weights",
}

ISA_FILES = (
    "target_amx.cpp",
    "target_avx2.cpp",
    "target_avx512.cpp",
    "target_avx512_bf16.cpp",
)
# Headers without inline functions of external linkage: macros, typedefs, intrinsics.
ISA_HEADERS = {"stdint.h", "cstdint", "cstddef", "immintrin.h", "arm_neon.h"}


# What follows the name of an op in the name of a schema that only its own rules call.
INNER = r"_(?:fwd|bwd|bwd_accumulate|accumulate|exact)$"


@lru_cache
def schemas() -> tuple[str, ...]:
    text = (CSRC / "torch" / "library.cpp").read_text()
    return tuple(re.findall(r'm\.def\(\s*"(\w+)\(', text))


def stem_of(schema: str) -> str:
    base = re.sub(INNER, "", schema)
    return FAMILY.get(base, base)


STEMS = sorted({stem_of(name) for name in schemas()})
PUBLIC = [name for name in schemas() if not re.search(INNER, name)]


def stems_in(layer: str) -> set[str]:
    """Stems of a layer; an op whose file became a folder counts by the folder's name."""
    suffix = LAYERS[layer]
    folder = ROOT / layer
    found = {p.stem for p in folder.glob(f"*{suffix}") if not p.name.startswith(("_", "conftest"))}
    found |= {p.name for p in folder.iterdir() if p.is_dir() and any(p.glob(f"*{suffix}"))}
    return {stem.removeprefix("test_") for stem in found} if layer == "tests/ops" else found


# --- R1: the file stem is the op's name in every layer


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("stem", STEMS)
def test_op_has_a_file_in_every_layer(stem, layer):
    there = stem in stems_in(layer)
    if (stem, layer) in EXCEPTIONS:
        assert not there, f"{stem} has a file in {layer} now: drop it from EXCEPTIONS"
    else:
        assert there, f"{layer} has no file for the op {stem}"


@pytest.mark.parametrize("layer", LAYERS)
def test_every_file_belongs_to_an_op(layer):
    strays = stems_in(layer) - set(STEMS) - SHARED.get(layer, set())
    assert not strays, f"{layer}: no op is called {sorted(strays)}"


def test_sources_are_listed_by_hand():
    cmake = (ROOT / "CMakeLists.txt").read_text()
    assert "GLOB" not in cmake
    listed = re.findall(r"csrc/[\w/-]+\.(?:cpp|cu)\b", cmake)
    present = {p.relative_to(ROOT).as_posix() for p in CSRC.rglob("*.cpp")}
    present |= {p.relative_to(ROOT).as_posix() for p in CSRC.rglob("*.cu")}
    assert set(listed) == present


# --- R2: includes point one way


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*([<"][^>"]+)[>"]', path.read_text(), re.MULTILINE)


def sources(*folders: str) -> list[Path]:
    found = [p for f in folders for p in (CSRC / f).rglob("*")]
    return sorted(p for p in found if p.suffix in (".h", ".cpp", ".cu", ".cuh"))


ALL_SOURCES = sources("include", "runtime", "cpu", "cuda", "torch", "python")
# Which of our folders a folder may include from, itself among them.
MAY_INCLUDE = {
    "include": ("moe_ops/",),
    "runtime": ("moe_ops/",),
    "cpu": ("cpu/", "moe_ops/"),
    "cuda": ("cuda/", "moe_ops/"),
    "torch": ("torch/", "cpu/", "cuda/", "moe_ops/"),
    "python": ("cpu/", "cuda/", "moe_ops/"),
}
TORCH = ("<torch/", "<ATen/", "<c10/", "<caffe2/", '"ATen/', '"c10/')


def name_of(path: Path) -> str:
    return path.relative_to(CSRC).as_posix()


@pytest.mark.parametrize("path", ALL_SOURCES, ids=name_of)
def test_includes_point_one_way(path):
    layer = path.relative_to(CSRC).parts[0]
    for include in includes(path):
        what = f"csrc/{name_of(path)} includes {include[1:]}"
        if include.startswith('"'):
            assert include[1:].startswith(MAY_INCLUDE[layer]), what
        if include.startswith(TORCH):
            assert layer == "torch", what
            assert include.startswith(("<torch/csrc/stable/", "<torch/headeronly/")), what
        if "Python.h" in include or "pybind11" in include:
            assert name_of(path) == "python/dev.cpp", what
        if include.startswith("<omp"):
            pytest.fail(f"{what}: threads come through the Parallel argument")


# --- a kernel that may begin early waits before it touches memory (csrc/cuda/overlap.cuh)

KERNEL = re.compile(r"__global__[^;{]*?(\w+_kernel)\(.*?\) \{\n(.*?)\n\}", re.DOTALL)
EARLY = re.compile(r"overlaps = true;(.*?)\n\}\n", re.DOTALL)  # to the end of the launcher
WAIT = "  await_previous_kernel();\n"


def test_kernels_that_begin_early_wait_first():
    """Neither a card nor the simulator would show it every time: by the text, with all threads."""
    early, wait = set(), set()
    for path in sources("cuda"):
        text = path.read_text()
        for launcher in EARLY.findall(text):
            early |= set(re.findall(r"launch_kernel<(\w+)", launcher))
        for name, body in KERNEL.findall(text):
            before, found, _ = f"\n{body}".partition(f"\n{WAIT}")
            if found and not re.search(r"\breturn\b|\b__ldg\b|_offsets\b", before):
                wait.add(name)
    assert len(early) >= 7
    assert early <= wait, f"{sorted(early - wait)} may begin early and do not wait first"


@pytest.mark.parametrize("name", ISA_FILES)
def test_isa_files_include_no_inline_functions(name):
    """An inline function compiled with AVX may be the copy that the linker keeps for everyone."""
    todo, seen, system = [CSRC / "cpu" / "isa" / name], set(), set()
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for include in includes(path):
            if include.startswith("<"):
                system.add(include[1:])
            else:
                ours = include[1:]
                todo.append(CSRC / ("include" if ours.startswith("moe_ops/") else "") / ours)
    assert system <= ISA_HEADERS, f"{name} reaches {sorted(system - ISA_HEADERS)}"


# --- R6: a size at which a kernel changes what it does is in the table of blocking.cpp

PREFETCH = "a prefetch distance: no result depends on it"
FOLLOWS = "follows from constants that are in the table"
LAYOUT = "a leading dimension or a marker: where numbers lie, not which kernel takes them"
RATES = "a loop that measures the machine, not a kernel of an op"
MEMORY = "about pages and buffers of whole tensors"
NO_BOUNDARY = {
    "kLanes": "a loop that ends one by one: tests of attention_decode have odd lengths",
    "kChains": RATES,
    "kReadAhead": RATES,
    "kAmxPrefetch": PREFETCH,
    "kPanelPrefetch": PREFETCH,
    "kW8Prefetch": PREFETCH,
    "kW8TokensPrefetch": PREFETCH,
    "kGemvPrefetch": PREFETCH,
    "kOneRunPrefetch": PREFETCH,
    "kVectorsAhead": PREFETCH,
    "kVectorsTogether": PREFETCH,
    "kVectorAheadBytes": PREFETCH,
    "kBlock": FOLLOWS,
    "kItemRows": "rows on their own: tests of ExpertLoRA have more and fewer",
    "kTermRows": "tests of ExpertLoRA have ranks above and below",
    "kDepth": FOLLOWS,
    "kPanelLda": FOLLOWS,
    "kRowForm": FOLLOWS,
    "kStep": FOLLOWS,
    "kSteps": FOLLOWS,
    "kCount": FOLLOWS,
    "kGradLd": LAYOUT,
    "kLine": LAYOUT,
    "kNoLimit": LAYOUT,
    "kPacked": LAYOUT,
    "kPanelPad": LAYOUT,
    "kAlignment": MEMORY,
    "kHugeFrom": MEMORY,
    "kHugePage": MEMORY,
    "kLargeBuffer": MEMORY,
    "kMadvCollapse": MEMORY,
    "kPart": MEMORY,
    "kMatchSamples": "how many weights of packed copies are compared with the truth",
    "kUnderWay": "how many of those comparisons overlap",
    "kRequestPermission": "of the operating system",
    "kTileData": "of the operating system",
}
# Constants of -inl.h files are widths of a target's vectors and registers; the table of block sizes
# has the ones that choose a kernel as fields of the kernel tables. Self-tests call kernels and are
# none.


def integer_constants() -> dict[str, str]:
    """Every integer constant of csrc/cpu and the file that it is in."""
    found = {}
    for path in sources("cpu"):
        if path.name.endswith(("self_test.cpp", "-inl.h")):
            continue
        declarations = re.findall(
            r"\bconstexpr\s+(?:int64_t|int32_t|int|size_t)\s+(k\w+\s*=[^;]*);", path.read_text()
        )
        for declaration in declarations:
            for name in re.findall(r"\b(k[A-Z]\w*)\s*=(?!=)", declaration):
                found[name] = path.relative_to(CSRC).as_posix()
    return found


def test_every_block_size_is_in_the_table():
    """csrc/cpu/gemm/blocking.cpp is what tests/sweep knows of sizes: a constant that is missing
    there is one that nothing tests both sides of."""
    table = (CSRC / "cpu" / "gemm" / "blocking.cpp").read_text()
    constants = integer_constants()
    missing = [
        f"{name} ({file})"
        for name, file in sorted(constants.items())
        if name not in NO_BOUNDARY and not re.search(rf"\b{name}\b", table)
    ]
    assert not missing, (
        f"{', '.join(missing)}: add an entry to csrc/cpu/gemm/blocking.cpp, or a reason to "
        "NO_BOUNDARY"
    )
    gone = sorted(set(NO_BOUNDARY) - set(constants))
    assert not gone, f"drop {gone} from NO_BOUNDARY"


# --- CUDA kernels


def cuda_ops() -> set[str]:
    """Schemas that an adapter registers a CUDA kernel for."""
    texts = [p.read_text() for p in (CSRC / "torch").rglob("*.cpp")]
    return {name for t in texts for name in re.findall(r'm\.impl\("(\w+)", MOE_CUDA_BOX', t)}


def cuda_formulas() -> set[str]:
    """Schemas whose CUDA kernel is made of torch's operations."""
    texts = [p.read_text() for p in (ROOT / "python" / "moe_ops" / "ops").glob("*.py")]
    return {name for t in texts for name in re.findall(r'register_cuda_formula\("(\w+)"\)', t)}


def test_every_schema_has_one_cuda_kernel():
    assert cuda_ops() | cuda_formulas() == set(schemas()) - set(CPU_ONLY)
    assert not cuda_ops() & cuda_formulas()


def test_page_says_what_each_op_is_on_cuda():
    text = (ROOT / "docs" / "ops.md").read_text()
    (table,) = re.findall(
        r"Every op runs on the CPU and on CUDA(.+?)CUDA ops never wait", text, re.S
    )
    first = [row.split("|")[1] for row in table.splitlines() if row.strip().startswith("| `")]
    named = {name for cell in first for name in re.findall(r"`(\w+)`", cell)}
    assert named == set(PUBLIC)


# --- every schema has its rules, every op its page


def has_rule(schema: str, key: str) -> bool:
    return any(line.startswith(f"{key}: ") for line in dispatch_table(schema).splitlines())


@lru_cache
def dispatch_table(schema: str) -> str:
    return torch._C._dispatch_dump(f"moe_ops::{schema}")


# The outputs of these ops are integers: nothing to differentiate; the inputs of the first two are
# too: nothing to cast.
NO_AUTOGRAD = {"sort_by_expert", "dispatch_layout", "pack_experts"}
NO_AUTOCAST = {"sort_by_expert", "dispatch_layout"}


@pytest.mark.parametrize("schema", schemas())
def test_schema_has_its_rules(schema):
    assert has_rule(schema, "CPU"), "no kernel"
    fake = torch._library.simple_registry.singleton.find(f"moe_ops::{schema}").fake_impl
    assert fake.kernel is not None, "no fake"
    # Of the _bwd ops it is the second derivative or the error that says there is none.
    assert has_rule(schema, "Autograd[alias]") or schema in NO_AUTOGRAD, "no autograd rule"
    if schema in PUBLIC and schema not in NO_AUTOCAST:
        assert has_rule(schema, "AutocastCPU"), "no autocast rule"
        assert has_rule(schema, "AutocastCUDA"), "no autocast rule"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_function(name):
    function = getattr(moe_ops, name)
    assert function is getattr(ops, name)
    assert name in moe_ops.__all__
    assert function.__module__ == f"moe_ops.ops.{stem_of(name)}"
    doc = inspect.getdoc(function)
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in doc, f"{name}: its docstring has no {section}"
    described = doc.partition("Args:")[2]
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"\b{parameter}\b", described), f"{name}: nothing about {parameter}"


@pytest.mark.parametrize("name", PUBLIC)
def test_reference_has_the_same_signature(name):
    def arguments(function):
        return [
            (p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()
        ]

    assert arguments(getattr(reference, name)) == arguments(getattr(moe_ops, name))


def test_all_names_the_ops_and_nothing_else():
    assert set(moe_ops.__all__) - TOOLS == set(PUBLIC) == set(ops.__all__)
    assert set(reference.__all__) == set(PUBLIC)


# --- the tree


def tracked_files() -> list[Path]:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("Not a git checkout: nothing says which files belong to the tree.")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_tests_of_the_zoo_mirror_it():
    """A module of the zoo has a file of tests, a package a folder with one for each large part."""
    modules = ROOT / "python" / "moe_ops" / "zoo"
    names = {p.stem for p in modules.glob("[a-z]*.py")}
    names |= {p.parent.name for p in modules.glob("*/__init__.py")}
    tests = ROOT / "tests" / "zoo"
    found = {p.stem.removeprefix("test_") for p in tests.glob("test_*.py")}
    found |= {p.parent.name for p in tests.glob("*/test_*.py")}
    assert names <= found, f"tests/zoo has nothing about {sorted(names - found)}"


def test_no_links():
    """A link to a folder of one machine dangles, or says what it should not, on every other."""
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True)
    assert not [line for line in listed.stdout.splitlines() if line.startswith("120000")]


def test_no_generated_or_binary_files():
    generated = {".so", ".o", ".a", ".pyc", ".whl", ".egg", ".pt", ".pth", ".safetensors", ".npz"}
    for path in tracked_files():
        assert path.suffix not in generated, path
        assert "__pycache__" not in path.parts, path
        data = path.read_bytes()
        assert b"\0" not in data, f"{path} is not text"
        # A measurement of a card has a line for each of some 1300 cases.
        most = 1_000_000 if path.parent.name == "results" else 300_000
        assert len(data) <= most, f"{path} has {len(data)} bytes"


def test_long_sources_say_why():
    """A source file above 500 lines gives the reason near its top: "long because"."""
    for path in tracked_files():
        if path.suffix not in (".py", ".h", ".cpp", ".cu", ".cuh"):
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        top = " ".join(" ".join(lines[:30]).replace("//", " ").split())
        assert len(lines) <= 500 or "long because" in top, f"{path} has {len(lines)} lines"


def test_class_variables_have_types():
    """Python 3.10 cannot read the annotations of a class that has a ClassVar of no type."""
    for path in (ROOT / "python").rglob("*.py"):
        plain = [x for x in path.read_text("utf-8").splitlines() if ": ClassVar =" in x]
        assert not plain, f"{path}: {plain[0].strip()}"


def test_text_files_are_tidy():
    for path in tracked_files():
        text = path.read_text(encoding="utf-8")
        assert "\r" not in text, f"{path} has carriage returns"
        assert not text or text.endswith("\n"), f"{path} does not end with a newline"
        assert "<<<<" + "<<<" not in text, f"{path} has a merge conflict"
