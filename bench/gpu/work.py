"""Operations and bytes of a case: the minimum for any implementation.

T tokens of width H, E experts of width I, K per token, N = T K rows; w bytes per weight, b = 2
bytes per activation, 4 per routing weight or index. `used` experts have tokens.

Bytes are those that must cross the memory once even if every cache were perfect inside a kernel:
operands read, results written, and between the two GEMMs of a block the hidden rows [N, I], written
and read. Gathered copies of x are not counted: they can be avoided.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.gpu import cases
from bench.gpu.cases import AttentionSize, Case, attention_size

_B = 2
_WORD = 4
# fp8 weights have one fp32 scale per block of 128 by 128, activations one per 128 elements of a
# row.
_BLOCK = 128
_INT4_GROUP = 64


@dataclass(frozen=True)
class Work:
    flops: float
    bytes: float


def work_of(case: Case, used: int) -> Work:
    """Returns the work of a case whose tokens reach `used` of the experts."""
    H, I, E = case.shape.H, case.shape.I, case.shape.E
    T, N = case.T, case.num_slots
    part = case.part
    up, down = 2 * I * H, H * I  # weights per expert
    product = 2.0 * N  # operations per weight of an expert, for all rows
    if part == "forward":
        return Work(
            product * (up + down), _B * (used * (up + down) + 2 * T * H + 2 * N * I) + 8 * N
        )
    if part == "training":
        return Work(3 * product * (up + down), _training_bytes(case, used))
    if part == "grouped_gemm":
        return Work(product * up, _B * (used * up + N * H + 2 * N * I))
    if part == "grouped_gemm_down":
        return Work(product * down, _B * (used * down + N * I + N * H))
    if part == "grouped_gemm_wgrad":
        return Work(product * up, _B * (E * up + N * H + 2 * N * I))
    if part == "forward_fp8":
        # Rows of hidden features cross the memory in fp8, with their scales.
        scales = _WORD * (used * (up + down) / _BLOCK**2 + 2 * N * I / _BLOCK)
        moved_bytes = used * (up + down) + _B * 2 * T * H + 2 * N * I + 8 * N + scales
        return Work(product * (up + down), moved_bytes)
    if part == "grouped_gemm_fp8":
        scales = _WORD * (used * up / _BLOCK**2 + N * H / _BLOCK)
        return Work(product * up, used * up + N * H + _B * 2 * N * I + scales)
    if part in cases.QUANTIZED:
        bits = 8 if case.dtype == "int8" else 4
        scales = used * ((2 * I + H) if bits == 8 else (up + down) / _INT4_GROUP)
        weights_bytes = used * (up + down) * bits / 8 + _WORD * scales
        return Work(product * (up + down), weights_bytes + _B * (2 * T * H + 2 * N * I) + 8 * N)
    if part in cases.STORED:
        own = work_of(replace(case, part=part.removesuffix("_stored")), used)
        if case.shape.name.startswith("llama4"):
            return own
        read, written = used * (2 * I + H), E * (2 * I + H)  # biases
        biases = read if part == "forward_stored" else 2 * read + written
        return Work(own.flops, own.bytes + _B * biases)
    if part in cases.LINEAR:
        # One matrix [I, H] per expert; the slots [N, I] are one side, the tokens [T, H] the other.
        training = part.endswith("training")
        reduces = part.startswith("moe_linear_reduce")
        once = _B * (used * down + T * H + N * I) + _WORD * N * (2 if reduces else 1)
        backward = _B * (used * down + E * down + 2 * T * H + 2 * N * I) if training else 0
        if reduces and training:
            backward += 2 * _WORD * N - _B * T * H  # the gradient of x is computed by slot
        return Work(product * down * (3 if training else 1), once + backward)
    if part in cases.ATTENTION:
        return _attention_work(attention_size(case), part.endswith("training"))
    if part in cases.MOVES_TRAINING:
        return Work(0.0, _moves_training_bytes(case))
    moved = {
        "topk_router": _WORD * T * E + 2 * _WORD * N,  # fp32 logits; weights and ids
        "sort_by_expert": _WORD * (N + (E + 1) + 2 * N),  # ids; offsets and both maps
        "permute": _B * (T * H + N * H) + _WORD * N,
        "unpermute": _B * (N * H + T * H) + 2 * _WORD * N,
        "gated_act": _B * 3 * N * I,
        "quantize_fp8": _B * T * H + T * H + _WORD * T * H / _BLOCK,
    }
    return Work(0.0, moved[part])


def _attention_work(size: AttentionSize, training: bool) -> Work:
    """Returns the work of causal attention: half of two GEMMs of S by S by d per head forward, of
    five backward."""
    B, S, K, n, d = size
    square = 2.0 * B * K * n * S * S * d / 2
    queries, keys = B * S * K * n * d, B * S * n * d
    forward = _B * (2 * queries + 2 * keys)
    # Reads q, k, v, the result and its gradient, writes three gradients.
    backward = _B * (4 * queries + 4 * keys)
    return Work((7 if training else 2) * square, forward + (backward if training else 0))


def _moves_training_bytes(case: Case) -> float:
    """Returns the bytes that forward and backward of an op that moves rows read and write."""
    H, I, E = case.shape.H, case.shape.I, case.shape.E
    T, N = case.T, case.num_slots
    return {
        # Logits twice and their gradient; weights, ids, the gradient of the weights, ids again.
        "topk_router_training": _WORD * (3 * T * E + 4 * N),
        "permute_training": 2 * (_B * (T * H + N * H) + _WORD * N),
        # Rows twice and their gradient, y and its gradient; weights, ids, both again, a gradient.
        "unpermute_training": _B * (3 * N * H + 2 * T * H) + 5 * _WORD * N,
        "gated_act_training": _B * (3 * N * I + 5 * N * I),
    }[case.part]


def _training_bytes(case: Case, used: int) -> float:
    """Returns the bytes of forward, then of the gradients of x, of both weights and of the routing
    weights.

    Forward also writes the pre-activation [N, 2I]. Backward reads the weights, x, the gradient of y
    and the pre-activation again, and writes the gradients of x and of the weights of all experts;
    between its GEMMs the gradient of the pre-activation and the hidden rows are written and read.
    """
    H, I, E = case.shape.H, case.shape.I, case.shape.E
    T, N = case.T, case.num_slots
    weights = 3 * H * I
    forward = used * weights + 2 * T * H + 2 * N * I + 2 * N * I
    backward = used * weights + E * weights + 3 * T * H + 2 * N * I + 2 * (2 * N * I) + 2 * N * I
    return _B * (forward + backward) + 8 * N + _WORD * N
