"""Tests of what the native library asks of other libraries and what it shows them.

One binary must load in every torch from 2.10 on, CPU or CUDA, so it may need nothing but the
stable C interface of libtorch_cpu and the C and C++ runtimes. A build for a simulator also needs
the CUDA runtime that the simulator stands in for.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

import moe_ops
from moe_ops import _library

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the symbol rules are written for ELF"
)

PACKAGE = Path(moe_ops.__file__).parent
LIBRARY = _library.PATH
ROOT = Path(__file__).parents[2]
STABLE_SYMBOLS = Path(__file__).with_name("torch_2_10_stable_symbols.txt")

# The C and C++ runtimes; before glibc 2.34 threads and dl were files of their own.
RUNTIMES = ("libstdc++", "libm", "libgcc_s", "libc", "ld-linux", "libpthread", "libdl", "librt")
# What moe_ops_dev calls (csrc/python/dev.cpp).
EXPORTS = {
    "moe_ops::cpu::block_sizes",
    "moe_ops::cpu::failing_kernel",
    "moe_ops::cpu::gemm_config",
    "moe_ops::cpu::kernel_entries",
    "moe_ops::cpu::supported_isas",
}
CUDA = _library.build_info()["cuda"]
SHARED_CUDA_RUNTIME = {"libcudart"} if "shared runtime" in CUDA else set()
ISA_FILES = ("target_avx2", "target_avx512", "target_avx512_bf16", "target_amx")


def run_tool(name: str, *arguments: str | Path) -> list[str]:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed: install binutils to check the binary.")
    command = [name, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


@lru_cache
def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """(type letter, demangled name without arguments and version) of each symbol."""
    found = []
    for line in run_tool("nm", "--demangle", *options, path):
        parsed = re.match(r"^(?:[0-9a-f]+)?\s+([a-zA-Z])\s+(.*)$", line)
        if parsed:
            found.append((parsed[1], parsed[2].partition("@")[0]))
    assert found, f"nm {' '.join(options)} {path} lists nothing"
    return found


def test_no_unstable_torch_symbol_is_needed():
    unstable = re.compile(r"(?<![\w:])(?:c10|at|caffe2|torch)::")
    names = [name for _, name in symbols(LIBRARY, "--dynamic", "--undefined-only")]
    assert not [name for name in names if unstable.search(name)]
    mangled = run_tool("nm", "--dynamic", "--undefined-only", LIBRARY)
    assert not [line for line in mangled if re.search(r"\b_Z\w*?(?:N|NK)(?:3c10|2at)\d", line)]


def test_torch_symbols_are_those_of_the_oldest_torch():
    """A weak symbol may be missing where the library is loaded, and the code says what then."""
    stable = set(STABLE_SYMBOLS.read_text().split())
    needed = {
        name
        for kind, name in symbols(LIBRARY, "--dynamic", "--undefined-only")
        if kind == "U" and re.match(r"(?:aoti_)?torch_", name)
    }
    assert needed, "the library calls nothing of torch"
    assert needed <= stable, f"not in torch 2.10: {sorted(needed - stable)}"


def test_symbol_list_is_sorted():
    lines = STABLE_SYMBOLS.read_text().splitlines()
    assert lines == sorted(set(lines))


def needed_libraries(path: Path) -> set[str]:
    lines = run_tool("objdump", "-p", path)
    return {line.split()[1].partition(".so")[0] for line in lines if "NEEDED" in line}


def test_library_needs_torch_cpu_and_the_runtimes_only():
    """No libc10 (not stable), no libgomp (a second pool beside torch's), no library of CUDA, whose
    runtime is linked statically but for a simulator."""
    needed = {re.sub(r"^ld-linux.*", "ld-linux", name) for name in needed_libraries(LIBRARY)}
    assert "libtorch_cpu" in needed
    assert needed & {"libcudart"} == SHARED_CUDA_RUNTIME
    assert needed - {"libtorch_cpu"} - SHARED_CUDA_RUNTIME <= set(RUNTIMES)


C_TYPES = {
    "void": None,
    "bool": ctypes.c_bool,
    "int": ctypes.c_int,
    "int64_t": ctypes.c_int64,
    "size_t": ctypes.c_size_t,
    "double": ctypes.c_double,
    "const char*": ctypes.c_char_p,
    "void*": ctypes.c_void_p,
    "bool*": ctypes.POINTER(ctypes.c_bool),
}


def c_types(parameters: str) -> list[object]:
    """Returns the types of parameters such as `int64_t rows, bool halves`."""
    named = (re.fullmatch(r"(.*?)\s*\w*", p.strip()) for p in parameters.split(",") if p.strip())
    return [C_TYPES.get(match[1] or match[0], match[1] or match[0]) for match in named]


def c_functions() -> dict[str, tuple[object, list[object]]]:
    """Name, result and parameters of those of csrc/python/library.cpp; a callback by its name."""
    text = re.sub(r"\s+", " ", (ROOT / "csrc" / "python" / "library.cpp").read_text())
    found: dict[str, tuple[object, list[object]]] = {}
    for result, name, parameters in re.findall(
        r"MOE_FOR_PYTHON ([\w* ]+?) (moe_ops_\w+)\((.*?)\) noexcept", text
    ):
        signature = C_TYPES[result], c_types(parameters)
        assert found.setdefault(name, signature) == signature, f"{name} in two forms"
    callbacks = dict(re.findall(r"using (\w+) = void \(\*\)\((.*?)\);", text))
    for _, types in found.values():
        types[:] = [(None, *c_types(callbacks[t])) if t in callbacks else t for t in types]
    return found


def test_python_declares_the_c_functions_as_they_are():
    """ctypes would call one of another signature and read what lies in the registers."""
    declared = {}
    for library in (_library._quick, _library._slow):
        for name, function in vars(library).items():
            if name.startswith("moe_ops_"):
                types = [
                    (t._restype_, *t._argtypes_) if hasattr(t, "_argtypes_") else t
                    for t in function.argtypes
                ]
                declared[name] = function.restype, types
    assert declared == c_functions()


def test_library_exports_nothing_else():
    """Weak data of std templates cannot be hidden: the type is not ours."""
    exported = symbols(LIBRARY, "--dynamic", "--defined-only")
    ours = {re.split(r"[(\[]", name)[0] for kind, name in exported if kind in "TDBR"}
    assert ours == EXPORTS | set(c_functions())
    weak = [name for kind, name in exported if kind not in "TDBR"]
    std = re.compile(r"^(?:(?:typeinfo(?: name)?|vtable|guard variable) for )?std::")
    assert not [name for name in weak if not std.match(name)]


def test_no_path_of_the_build_machine():
    data = LIBRARY.read_bytes()
    places = {str(ROOT), sys.prefix, sys.base_prefix, str(Path.home()), str(PACKAGE)}
    found = [place for place in places if len(place) > 4 and place.encode() in data]
    absolute = rb"(?<![\w:/.<-])/[A-Za-z0-9_.+-]+(?:/[A-Za-z0-9_.+-]+)+"
    known = (b"/proc/", b"/sys/", b"/dev/")
    # Whole strings only: in megabytes of instructions a few bytes may look like a short path.
    for string in re.findall(rb"[\t\n -~]{8,}(?=\0)", data):
        found += [m.decode() for m in re.findall(absolute, string) if not m.startswith(known)]
    assert not found


def test_no_thread_local_variable_needs_static_memory():
    """A library that is loaded late gets 2 KiB of it, and the CUDA runtime alone has 4."""
    static_tls = 0x10
    flags = [line.split()[1] for line in run_tool("objdump", "-p", LIBRARY) if " FLAGS " in line]
    assert not [f for f in flags if int(f, 16) & static_tls]


def test_no_search_path():
    assert not [
        line for line in run_tool("objdump", "-p", LIBRARY) if re.search(r"R(UN)?PATH", line)
    ]


def compiled_objects() -> list[Path]:
    """The objects of the kernels in this tree's newest build without a sanitizer."""
    found = [
        path
        for path in ROOT.glob("build/**/target_portable.cpp.o")
        if not {"asan", "tsan"} & set(path.relative_to(ROOT).parts)
    ]
    found.sort(key=lambda path: path.stat().st_mtime)
    if not found:
        pytest.skip("No build tree here: `make build` leaves the objects that this looks at.")
    return sorted(found[-1].parents[1].rglob("*.cpp.o"))


def test_isa_files_share_no_symbol():
    """The linker keeps one copy of a weak symbol. Were it the AVX-512 one, other machines crash."""
    for path in compiled_objects():
        stem = path.name.removesuffix(".cpp.o")
        if stem not in ISA_FILES:
            continue
        namespace = f"moe_ops::cpu::{stem.removeprefix('target_')}::"
        for kind, name in symbols(path):
            assert kind not in "WVu", f"{path.name} leaks {name}"
            assert kind not in "TDBR" or name.startswith(namespace), f"{path.name} defines {name}"


def test_other_code_uses_the_baseline_instructions_only():
    """Functions compiled for one instruction set live in a namespace of its name."""
    flags = os.environ.get("CXXFLAGS", "")
    if "-m" in flags:
        pytest.skip(f"CXXFLAGS={flags} sets instruction sets for every file.")
    for path in compiled_objects():
        if path.name.removesuffix(".cpp.o") in ISA_FILES:
            continue
        function = ""
        for line in run_tool("objdump", "-d", "--demangle", "--no-show-raw-insn", path):
            if label := re.match(r"^[0-9a-f]+ <(.*)>:$", line):
                function = label[1]
            elif re.search(r"%[yz]mm\d", line) and not re.search(r"::(?:avx\w*|amx)::", function):
                pytest.fail(f"{path.name}: {function} has {line.strip()}")
