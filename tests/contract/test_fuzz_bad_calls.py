"""Random wrong calls of every op: each must raise a Python exception that names the op.

A call starts right and gets one defect. None may return, read outside a tensor, or end the process.
"""

from __future__ import annotations

import random
import zlib

import pytest
import torch

import moe_ops

NUM_CHUNKS = 100
CALLS_A_CHUNK = 20

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NOT_FLOATS = (torch.int32, torch.int64, torch.bool, torch.uint8, torch.complex64)
NOT_INDEX = (torch.float32, torch.bfloat16, torch.int16, torch.int8, torch.uint8, torch.bool)


class Sizes:
    """Sizes that are all different, so that a swapped dimension never fits by accident."""

    def __init__(self, rng: random.Random) -> None:
        self.t, self.h, self.i, self.o, self.e = rng.sample(range(2, 12), 5)
        self.k = rng.randint(1, min(self.e, 3))
        self.n = self.t * self.k
        self.dtype = rng.choice(FLOATS)
        self.id_dtype = rng.choice((torch.int32, torch.int64))

    def float(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape).to(self.dtype)

    def narrow(self, *shape: int) -> torch.Tensor:
        t = self.float(*shape)
        return t.float() if self.dtype == torch.float64 else t

    def weights(self) -> torch.Tensor:
        return torch.rand(self.t, self.k)

    def ids(self) -> torch.Tensor:
        return torch.randint(-1, self.e, (self.t, self.k)).to(self.id_dtype)

    def offsets(self) -> torch.Tensor:
        cuts = sorted(torch.randint(0, self.n + 1, (self.e,)).tolist())
        return torch.tensor([0, *cuts], dtype=torch.int32)

    def order(self) -> torch.Tensor:
        return torch.randperm(self.n).to(torch.int32)


def good_call(op: str, s: Sizes) -> dict:
    match op:
        case "topk_router":
            return {"router_logits": s.float(s.t, s.e), "top_k": s.k, "expert_bias": None}
        case "topp_router":
            return {"router_logits": s.float(s.t, s.e), "top_p": 0.5, "max_k": s.k}
        case "expert_choice_router":
            return {"router_logits": s.float(s.t, s.e), "capacity": s.k}
        case "sort_slots":
            return {"topk_ids": s.ids(), "num_experts": s.e}
        case "permute":
            return {
                "x": s.float(s.t, s.h),
                "expert_offsets": s.offsets(),
                "row_to_slot": s.order(),
            }
        case "unpermute":
            return {
                "rows": s.float(s.n, s.h),
                "expert_offsets": s.offsets(),
                "slot_to_row": s.order().view(s.t, s.k),
                "topk_weights": s.weights(),
            }
        case "gated_act":
            return {"gate_up": s.float(s.t, 2 * s.i), "activation": "swiglu"}
        case "add_rms_norm":
            return {
                "x": s.float(s.t, s.h),
                "weight": s.float(s.h),
                "residual": s.float(s.t, s.h),
                "bias": s.float(s.h),
            }
        case "grouped_gemm":
            return {
                "a": s.float(s.n, s.h),
                "b": s.float(s.e, s.o, s.h),
                "expert_offsets": s.offsets(),
                "bias": s.float(s.e, s.o),
            }
        case "grouped_gemm_wgrad":
            return {
                "grad": s.float(s.n, s.o),
                "a": s.float(s.n, s.h),
                "expert_offsets": s.offsets(),
            }
        case "grouped_sum":
            return {"rows": s.float(s.n, s.o), "expert_offsets": s.offsets()}
        case "moe_ffn":
            return {
                "x": s.float(s.t, s.h),
                "w_gate_up": s.float(s.e, 2 * s.i, s.h),
                "w_down": s.float(s.e, s.h, s.i),
                "topk_weights": s.weights(),
                "topk_ids": s.ids(),
                "b_gate_up": s.float(s.e, 2 * s.i),
                "b_down": s.float(s.e, s.h),
                "activation": "swiglu",
            }
        case "moe_ffn_packed":
            call = good_call("moe_ffn", s)
            call["packed_gate_up"] = moe_ops.pack_experts(call["w_gate_up"], halves=True)
            call["packed_down"] = moe_ops.pack_experts(call["w_down"])
            return call
        case "moe_ffn_quantized":
            call = good_call("moe_ffn", s)
            if s.dtype == torch.float64:
                for name in ("x", "b_gate_up", "b_down"):
                    call[name] = call[name].float()
            for name in ("w_gate_up", "w_down"):
                call[f"{name}_scale"] = torch.rand(call[name].shape[:2])
                call[name] = torch.randint(-127, 128, call[name].shape).to(torch.int8)
            call["x_scale"] = torch.rand(s.h)
            return call
        case "quantize_fp8":
            return {"x": s.narrow(s.t, s.h)}
        case "grouped_gemm_fp8":
            # Two blocks of 128 in every direction that has scales.
            k, o = 128 + s.h, 128 + s.o
            return {
                "a": torch.randn(s.n, k).to(torch.float8_e4m3fn),
                "a_scale": torch.rand(s.n, 2),
                "b": torch.randn(s.e, o, k).to(torch.float8_e4m3fn),
                "b_scale": torch.rand(s.e, 2, 2),
                "expert_offsets": s.offsets(),
                "bias": s.narrow(s.e, o),
            }
        case "moe_ffn_fp8":
            h, i = 128 + s.h, 128 + s.i
            call = {"x": s.narrow(s.t, h)}
            for name, out, depth in (("w_gate_up", 2 * i, h), ("w_down", h, i)):
                call[name] = torch.randn(s.e, out, depth).to(torch.float8_e4m3fn)
                call[f"{name}_scale"] = torch.rand(s.e, -(-out // 128), -(-depth // 128))
                call["b" + name[1:]] = call["x"].new_ones(s.e, out)
            return {**call, "topk_weights": s.weights(), "topk_ids": s.ids()}
        case "pack_experts":
            return {"w": s.float(s.e, 2 * s.o, s.h), "halves": True}
        case "dense_ffn":
            return {
                "x": s.float(s.t, s.k, s.h),
                "w_up": s.float(s.e, s.i, s.h),
                "w_down": s.float(s.e, s.o, s.i),
                "input_ids": torch.randint(s.k, (s.e,)),
                "b_up": s.float(s.e, s.i),
                "b_down": s.float(s.e, s.o),
                "activation": "silu",
            }
        case "mix_experts":
            acc = torch.float64 if s.dtype == torch.float64 else torch.float32
            features = {
                name: torch.rand(s.e, s.o, dtype=acc)
                for name in ("norm_weight", "norm_bias", "mean", "var")
            }
            return {
                "outputs": s.float(s.t, s.e, s.o),
                "weights": s.float(s.t, s.k, s.e),
                "factor": s.float(s.t, s.k, s.o),
                **features,
                "activation": "silu",
            }
        case "moe_linear_map":
            return {
                "x": s.float(s.t, s.h),
                "w": s.float(s.e, s.o, s.h),
                "topk_ids": s.ids(),
                "bias": s.float(s.e, s.o),
            }
        case "moe_linear_reduce":
            return {
                "h": s.float(s.t, s.k, s.i),
                "w": s.float(s.e, s.h, s.i),
                "topk_weights": s.weights(),
                "topk_ids": s.ids(),
                "bias": s.float(s.e, s.h),
            }
        case "rotary":
            return {
                "t": s.float(s.o, s.t, s.e, 2 * s.h),
                "cos": s.float(s.t, s.h),
                "sin": s.float(s.t, s.h),
            }
        case "router_linear":
            return {
                "x": s.float(s.t, s.h),
                "weight": s.float(s.e, s.h),
                "bias": s.float(s.e),
            }
        case "moa_attention":
            return {
                "q": s.float(2, s.t, s.k, s.e, s.h),
                "k": s.float(2, s.t, s.e, s.h),
                "v": s.float(2, s.t, s.e, s.h),
                "kind": "stick_breaking",
            }
    raise AssertionError(op)


OPS = (
    "add_rms_norm",
    "topk_router",
    "topp_router",
    "expert_choice_router",
    "sort_slots",
    "permute",
    "unpermute",
    "gated_act",
    "grouped_gemm",
    "grouped_gemm_wgrad",
    "grouped_sum",
    "grouped_gemm_fp8",
    "quantize_fp8",
    "moe_ffn",
    "moe_ffn_fp8",
    "moe_ffn_packed",
    "moe_ffn_quantized",
    "dense_ffn",
    "mix_experts",
    "moe_linear_map",
    "moe_linear_reduce",
    "rotary",
    "router_linear",
    "moa_attention",
    "pack_experts",
)
# Dimensions whose size is free, so that changing it leaves a right call.
FREE_DIMS = {
    ("topk_router", "router_logits"): {0, 1},
    ("topp_router", "router_logits"): {0, 1},
    ("expert_choice_router", "router_logits"): {0, 1},
    ("sort_slots", "topk_ids"): {0, 1},
    ("quantize_fp8", "x"): {0, 1},
    ("permute", "x"): {1},
    ("permute", "expert_offsets"): {0},
    ("unpermute", "rows"): {1},
    ("unpermute", "expert_offsets"): {0},
    ("grouped_gemm_wgrad", "grad"): {1},
    ("grouped_gemm_wgrad", "a"): {1},
    ("grouped_gemm_wgrad", "expert_offsets"): {0},
    ("grouped_sum", "rows"): {0, 1},
    ("grouped_gemm", "a"): {0},
    ("moe_linear_map", "topk_ids"): {1},
    ("dense_ffn", "x"): {0, 1},
    ("mix_experts", "factor"): {0},
    ("grouped_sum", "expert_offsets"): {0},
    ("pack_experts", "w"): {0, 2},
    ("rotary", "t"): {0, 2},
    ("router_linear", "x"): {0},
    ("moa_attention", "q"): {1, 2},
}
BAD_ARGUMENTS = {
    "add_rms_norm": [("eps", (-1e-6, float("nan")))],
    "topk_router": [
        ("top_k", (0, -1, 99, 2**31, 2**62, -(2**62))),
        ("score_func", ("", "Softmax", "tanh")),
        ("num_groups", (0, -1, 97, 2**40)),
        ("num_topk_groups", (0, -3, 2, 2**40)),
    ],
    "topp_router": [
        ("top_p", (0.0, -0.5, 1.0001, float("nan"), float("inf"), -float("inf"))),
        ("max_k", (0, -1, 99, 2**62)),
        ("min_k", (-1, 99, 2**62)),
    ],
    "expert_choice_router": [("capacity", (-1, -(2**62))), ("score_func", ("", "exp"))],
    "sort_slots": [("num_experts", (-1, -(2**40), -(2**63)))],
    "gated_act": [("activation", ("", "silu", "gelu", "SWIGLU", "swiglu\0"))],
    "moa_attention": [
        ("kind", ("", "Softmax", "softmax\0")),
        ("window", (0, -1, -(2**62))),
        ("softcap", (0.0, -2.0, float("nan"), float("inf"))),
        ("scale", (float("nan"), float("inf"))),
        ("cu_seqlens", (torch.tensor([0, 1]), torch.tensor([0.0]))),
    ],
    "moe_ffn": [("activation", ("", "swish", "SWIGLU"))],
    "dense_ffn": [("activation", ("", "swiglu", "ReLU", "relu\0"))],
    "mix_experts": [
        ("activation", ("", "swish", "ReLU", "relu\0")),
        ("eps", (-1.0, float("nan"))),
        ("norm_weight", (None,)),
        ("norm_bias", (None,)),
        ("mean", (None,)),
        ("var", (None,)),
    ],
    "router_linear": [("logits_dtype", (torch.int32, torch.bool, torch.float8_e4m3fn))],
    "grouped_gemm_fp8": [("out_dtype", (torch.float64, torch.int32, torch.float8_e4m3fn))],
    "moe_ffn_fp8": [("activation", ("", "swish", "SWIGLU", "swiglu\0"))],
    "moe_ffn_packed": [("activation", ("", "swish", "SWIGLU", "swiglu\0"))],
    "moe_ffn_quantized": [("activation", ("", "swish", "SWIGLU", "swiglu\0"))],
}
INDEX_TENSORS = ("input_ids", "topk_ids", "expert_offsets", "row_to_slot", "slot_to_row")
OUT_OF_RANGE = (-1, -(2**31), 2**31 - 1, 1000)


def defects(op: str, call: dict) -> list[tuple[str, str]]:
    found = [("argument", name) for name, _ in BAD_ARGUMENTS.get(op, [])]
    tensors = [name for name, value in call.items() if isinstance(value, torch.Tensor)]
    for name in tensors:
        found += [("dtype", name), ("rank", name), ("size", name)]
        if len(tensors) > 1:
            found.append(("device", name))
        if name in ("expert_offsets", "row_to_slot", "slot_to_row"):
            found.append(("range", name))
    prefixes = ("moe_ffn", "dense_ffn", "mix_", "grouped_gemm", "moe_linear", "moa_", "add_rms")
    prefixes += ("router_linear",)
    if op.startswith(prefixes):
        found += [("float_dtype", name) for name in tensors if call[name].is_floating_point()]
    return found


def spoil(op: str, call: dict, defect: tuple[str, str], rng: random.Random) -> str | None:
    """Puts one defect into `call`; what was done in words, None where this one cannot be made."""
    kind, name = defect
    t = call.get(name)
    if kind == "argument":
        value = rng.choice(dict(BAD_ARGUMENTS[op])[name])
        call[name] = value
        return f"{name}={value!r}"
    if kind == "dtype":
        dtypes = NOT_INDEX if name in INDEX_TENSORS else NOT_FLOATS
        dtype = rng.choice([d for d in dtypes if d != t.dtype])
        call[name] = t.to(dtype)
        return f"{name} as {dtype}"
    if kind == "float_dtype":
        if name == "topk_weights" or (op, name) == ("grouped_gemm_fp8", "bias"):
            return None
        dtype = rng.choice([d for d in FLOATS if d != t.dtype])
        call[name] = t.to(dtype)
        return f"{name} as {dtype}"
    if kind == "rank":
        if op == "gated_act":
            call[name] = t.sum()
        elif rng.random() < 0.5:
            call[name] = t[..., None]
        else:
            call[name] = t.flatten() if t.dim() > 1 else t.sum().to(t.dtype)
        return f"{name} of shape {list(call[name].shape)}"
    if kind == "size":
        dims = [d for d in range(t.dim()) if d not in FREE_DIMS.get((op, name), ())]
        if op == "gated_act":
            dims = [1]
        if not dims:
            return None
        d = rng.choice(dims)
        longer = rng.random() < 0.5
        index = [*range(t.shape[d]), 0] if longer else list(range(t.shape[d] - 1))
        call[name] = t.index_select(d, torch.tensor(index, dtype=torch.int64))
        if op == "permute" and call["row_to_slot"].numel() % call["x"].shape[0] == 0:
            # Another number of tokens that divides N: a right call with another K.
            return None
        return f"{name} of shape {list(call[name].shape)}"
    if kind == "device":
        call[name] = t.to("meta")
        return f"{name} on meta"
    if kind == "range":
        value = rng.choice(OUT_OF_RANGE)
        call[name] = t.clone()
        call[name].view(-1)[rng.randrange(t.numel())] = value
        return f"{name} with {value}"
    raise AssertionError(kind)


def bad_call(chunk: int, index: int) -> tuple[str, dict, str]:
    rng = random.Random(zlib.crc32(f"{chunk}-{index}".encode()))
    torch.manual_seed(rng.randrange(2**31))
    while True:
        op = rng.choice(OPS)
        call = good_call(op, Sizes(rng))
        done = spoil(op, call, rng.choice(defects(op, call)), rng)
        if done is not None:
            return op, call, done


@pytest.mark.parametrize("chunk", range(NUM_CHUNKS))
def test_bad_calls(chunk):
    # A chunk of calls is one test; all its faults are told at once.
    faults = []
    for index in range(CALLS_A_CHUNK):
        op, call, done = bad_call(chunk, index)
        try:
            getattr(moe_ops, op)(**call)
        except Exception as error:
            if op not in str(error):
                faults.append(f"{op}({done}): the message does not name the op: {error}")
        else:
            faults.append(f"{op}({done}) returned")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("op", OPS)
def test_good_calls(op):
    """The calls that the defects go into are right, or every refusal above would prove nothing."""
    rng = random.Random(op)
    for _ in range(5):
        getattr(moe_ops, op)(**good_call(op, Sizes(rng)))
