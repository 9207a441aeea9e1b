"""ggml, the library under llama.cpp: `mul_mat_id`, SwiGLU, `mul_mat_id`, weighted sum.

    pip install libggml-python

The graph is the one that llama.cpp builds for a mixture of experts with merged gate and up weights:
activations are fp32, and ggml converts them to the format that the weights require.
"""

from __future__ import annotations

import ctypes as c
import functools
import importlib.util
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_ops.bench.baselines import Baseline, Bind, Call
from moe_ops.bench.shapes import Bank, Tokens

_F32, _F16, _Q4_0, _Q8_0, _I32, _BF16 = 0, 1, 2, 8, 26, 30
_TYPES = {"f32": _F32, "f16": _F16, "bf16": _BF16, "q8_0": _Q8_0, "q4_0": _Q4_0}
_P, _SIZE, _I64 = c.c_void_p, c.c_size_t, c.c_int64


class _InitParams(c.Structure):
    _fields_ = [("mem_size", _SIZE), ("mem_buffer", _P), ("no_alloc", c.c_bool)]


# Result and argument types of the functions that are called.
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (_P, [_InitParams]),
    "ggml_free": (None, [_P]),
    "ggml_tensor_overhead": (_SIZE, []),
    "ggml_graph_overhead": (_SIZE, []),
    "ggml_new_graph": (_P, [_P]),
    "ggml_build_forward_expand": (None, [_P, _P]),
    "ggml_new_tensor_2d": (_P, [_P, c.c_int, _I64, _I64]),
    "ggml_new_tensor_3d": (_P, [_P, c.c_int, _I64, _I64, _I64]),
    "ggml_mul_mat_id": (_P, [_P, _P, _P, _P]),
    "ggml_swiglu": (_P, [_P, _P]),
    "ggml_mul": (_P, [_P, _P, _P]),
    "ggml_add": (_P, [_P, _P, _P]),
    "ggml_view_2d": (_P, [_P, _P, _I64, _I64, _SIZE, _SIZE]),
    "ggml_cont": (_P, [_P, _P]),
    "ggml_quantize_chunk": (_SIZE, [c.c_int, _P, _P, _I64, _I64, _I64, _P]),
    "ggml_row_size": (_SIZE, [c.c_int, _I64]),
    "ggml_log_set": (None, [_P, _P]),
    "ggml_backend_cpu_init": (_P, []),
    "ggml_backend_cpu_set_n_threads": (None, [_P, c.c_int]),
    "ggml_backend_get_device": (_P, [_P]),
    "ggml_backend_dev_backend_reg": (_P, [_P]),
    "ggml_backend_reg_get_proc_address": (_P, [_P, c.c_char_p]),
    "ggml_backend_buft_name": (c.c_char_p, [_P]),
    "ggml_backend_get_default_buffer_type": (_P, [_P]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, [_P, _P]),
    "ggml_backend_buffer_free": (None, [_P]),
    "ggml_backend_free": (None, [_P]),
    "ggml_backend_tensor_set": (None, [_P, _P, _SIZE, _SIZE]),
    "ggml_backend_tensor_get": (None, [_P, _P, _SIZE, _SIZE]),
    "ggml_backend_graph_compute": (c.c_int, [_P, _P]),
}


# Kept for as long as the library may call it.
_SILENCE = c.CFUNCTYPE(None, c.c_int, c.c_char_p, _P)(lambda level, text, data: None)


@functools.cache
def _functions() -> dict[str, Any]:
    spec = importlib.util.find_spec("libggml")
    assert spec is not None and spec.origin is not None
    folder = next(Path(spec.origin).parent.glob("lib*/libggml.so")).parent
    names = ("libggml-base.so", "libggml-cpu.so", "libggml.so")
    libraries = [c.CDLL(str(folder / name), mode=c.RTLD_GLOBAL) for name in names]
    found = {}
    for name, (result, arguments) in _SIGNATURES.items():
        library = next(lib for lib in libraries if hasattr(lib, name))
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
        found[name] = function
    found["ggml_log_set"](c.cast(_SILENCE, _P), None)
    return found


class GGML(Baseline):
    """ggml baseline. `repacked`: weights in the order of ggml's kernels for eight rows at once."""

    KINDS = (
        ("fp32", "f32", False),
        ("bf16", "f16", False),
        ("bf16", "bf16", False),
        ("int8", "q8_0", False),
        ("int4", "q4_0", False),
        ("int4", "q4_0", True),
    )
    package = "libggml-python"

    def __init__(self, weight_format: str, kind: str, repacked: bool) -> None:
        self.formats = (weight_format,)
        self.kind, self.repacked = kind, repacked
        self.name = f"ggml {kind}" + (" repacked" if repacked else "")

    def missing(self) -> str | None:
        found = importlib.util.find_spec("libggml")
        return None if found else "libggml-python is not installed"

    def prepare(self, bank: Bank, weight_format: str) -> Bind:
        f = _functions()
        backend = f["ggml_backend_cpu_init"]()
        f["ggml_backend_cpu_set_n_threads"](backend, torch.get_num_threads())
        buffer_type = f["ggml_backend_get_default_buffer_type"](backend)
        if self.repacked:
            buffer_type = _repacking(backend)
        context = _context(2)
        tensors = [
            f["ggml_new_tensor_3d"](context, _TYPES[self.kind], w.shape[2], w.shape[1], w.shape[0])
            for w in (bank.w_gate_up, bank.w_down)
        ]
        buffer = f["ggml_backend_alloc_ctx_tensors_from_buft"](context, buffer_type)
        if not buffer:
            raise MemoryError("ggml found no memory for the weights")
        for tensor, w in zip(tensors, (bank.w_gate_up, bank.w_down), strict=True):
            data = _converted(w, self.kind)
            f["ggml_backend_tensor_set"](tensor, data.data_ptr(), 0, data.numel())
            del data
        weights = _Weights(backend, context, buffer, tensors)

        def bind(tokens: Tokens) -> Call:
            return _bind(weights, bank, tokens)

        return bind


class _Weights:
    """Frees ggml's memory when it is no longer used."""

    def __init__(self, backend: int, context: int, buffer: int, tensors: list[int]) -> None:
        self.backend, self.tensors = backend, tensors
        weakref.finalize(self, _free, backend, [context], [buffer])


def _free(backend: int | None, contexts: list[int], buffers: list[int]) -> None:
    f = _functions()
    for buffer in buffers:
        f["ggml_backend_buffer_free"](buffer)
    for context in contexts:
        f["ggml_free"](context)
    if backend is not None:
        f["ggml_backend_free"](backend)


def _bind(weights: _Weights, bank: Bank, tokens: Tokens) -> Call:
    f, shape, T = _functions(), bank.shape, tokens.count
    context = _context(16 + 3 * shape.K)
    x = f["ggml_new_tensor_3d"](context, _F32, shape.H, 1, T)
    ids = f["ggml_new_tensor_2d"](context, _I32, shape.K, T)
    routing = f["ggml_new_tensor_3d"](context, _F32, 1, shape.K, T)
    gate_up = f["ggml_mul_mat_id"](context, weights.tensors[0], x, ids)
    h = f["ggml_swiglu"](context, gate_up)
    out = f["ggml_mul"](context, f["ggml_mul_mat_id"](context, weights.tensors[1], h, ids), routing)
    # [H, K, T]: the K outputs of a token are added one by one, as llama.cpp does.
    row = 4 * shape.H
    parts = [
        f["ggml_view_2d"](context, out, shape.H, T, row * shape.K, row * k) for k in range(shape.K)
    ]
    y = parts[0] if shape.K > 1 else f["ggml_cont"](context, parts[0])
    for part in parts[1:]:
        y = f["ggml_add"](context, y, part)
    graph = f["ggml_new_graph"](context)
    f["ggml_build_forward_expand"](graph, y)
    default = f["ggml_backend_get_default_buffer_type"](weights.backend)
    buffer = f["ggml_backend_alloc_ctx_tensors_from_buft"](context, default)
    for tensor, value in (
        (x, tokens.x.float()),
        (ids, tokens.topk_ids.int()),
        (routing, tokens.topk_weights),
    ):
        value = value.contiguous()
        f["ggml_backend_tensor_set"](
            tensor, value.data_ptr(), 0, value.numel() * value.element_size()
        )
    result = torch.empty(T, shape.H)

    def call() -> Tensor:
        if f["ggml_backend_graph_compute"](weights.backend, graph) != 0:
            raise RuntimeError("ggml_backend_graph_compute failed")
        f["ggml_backend_tensor_get"](y, result.data_ptr(), 0, 4 * result.numel())
        return result

    weakref.finalize(call, _free, None, [context], [buffer])
    return call


def _context(num_tensors: int) -> int:
    f = _functions()
    size = num_tensors * f["ggml_tensor_overhead"]() + f["ggml_graph_overhead"]()
    return int(f["ggml_init"](_InitParams(size, None, True)))


def _repacking(backend: int) -> int:
    """Returns the buffer type whose tensors are reordered when they are set."""
    f = _functions()
    registry = f["ggml_backend_dev_backend_reg"](f["ggml_backend_get_device"](backend))
    address = f["ggml_backend_reg_get_proc_address"](registry, b"ggml_backend_dev_get_extra_bufts")
    list_types = c.CFUNCTYPE(c.POINTER(_P), _P)(address)
    for buffer_type in list_types(f["ggml_backend_get_device"](backend)):
        if buffer_type is None:
            break
        if b"REPACK" in f["ggml_backend_buft_name"](buffer_type).upper():
            return int(buffer_type)
    raise RuntimeError("this ggml does not repack weights")


def _converted(w: Tensor, kind: str) -> Tensor:
    """Returns the bytes of [E, O, K] in a format of ggml, expert after expert."""
    f = _functions()
    if kind in ("f32", "f16", "bf16"):
        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
        return w.to(dtype).contiguous().view(torch.uint8).flatten()
    experts, rows, width = w.shape
    row_bytes = f["ggml_row_size"](_TYPES[kind], width)
    data = torch.empty(experts, rows * row_bytes, dtype=torch.uint8)
    for expert in range(experts):
        values = w[expert].float().contiguous()
        f["ggml_quantize_chunk"](
            _TYPES[kind], values.data_ptr(), data[expert].data_ptr(), 0, rows, width, None
        )
    return data.flatten()
