"""The measured cases: the expert layers of 15 published models, from one token to 32768."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_ops.bench.shapes import Shape

MODELS: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("mixtral-8x7b", 4096, 14336, 8, 2, "Mixtral-8x7B"),
        Shape("mixtral-8x22b", 6144, 16384, 8, 2, "Mixtral-8x22B"),
        Shape("qwen2-moe", 2048, 1408, 60, 4, "Qwen2-MoE-A2.7B"),
        Shape("qwen3-30b", 2048, 768, 128, 8, "Qwen3-30B-A3B"),
        Shape("qwen3-235b", 4096, 1536, 128, 8, "Qwen3-235B-A22B"),
        Shape("qwen3-next", 2048, 512, 512, 10, "Qwen3-Next-80B"),
        Shape("deepseek-v3", 7168, 2048, 256, 8, "DeepSeek-V3"),
        Shape("olmoe", 2048, 1024, 64, 8, "OLMoE-1B-7B"),
        Shape("gpt-oss-120b", 2880, 2880, 128, 4, "gpt-oss-120b"),
        Shape("llama4-scout", 5120, 8192, 16, 1, "Llama-4-Scout"),
        Shape("glm4.5-air", 4096, 1408, 128, 8, "GLM-4.5-Air"),
        Shape("minimax-m2", 3072, 1536, 256, 8, "MiniMax-M2"),
        Shape("phi3.5-moe", 4096, 6400, 16, 2, "Phi-3.5-MoE"),
        Shape("jetmoe", 2048, 5632, 8, 2, "JetMoE-8B"),
        Shape("gemma4-26b", 2816, 704, 128, 8, "Gemma-4-26B-A4B"),
    )
}
TINY: dict[str, Shape] = {
    shape.name: shape
    for shape in (Shape("tiny", 64, 48, 8, 2, "a toy"), Shape("odd", 40, 24, 5, 3, "a toy"))
}
# A size that the integer formats and the tensor core kernels support.
SMALL = Shape("small", 128, 64, 8, 2, "a toy")

# Numbers of tokens of the block; single ops use every other one.
TOKENS = (1, 8, 64, 512, 4096, 32768)
OP_TOKENS = (1, 64, 4096, 32768)
USUAL_ROUTINGS = ("balanced", "skewed")
ROUTINGS = (*USUAL_ROUTINGS, "random")

# The whole block, and each op alone. GEMMs alone have the sizes of the up projection;
# grouped_gemm_down has its own sizes, with K = I.
BLOCK = ("forward", "training")
PRODUCTS = ("grouped_gemm", "grouped_gemm_down", "grouped_gemm_wgrad")
MOVES = ("topk_router", "sort_by_expert", "permute", "unpermute", "gated_act")
FP8 = ("forward_fp8", "grouped_gemm_fp8", "quantize_fp8")
PARTS = (*BLOCK, *PRODUCTS, *MOVES, *FP8)

# Additional cases of a lease (bench.gpu.lease). QUANTIZED: experts of 8 and 4 bits. STORED: the
# block on weights in gpt-oss's layout, and in Llama 4's for its shapes. MOVES_TRAINING: with
# backward. LINEAR and ATTENTION: the GEMMs and the attention of mixtures of attention heads.
QUANTIZED = ("forward_int8", "forward_int4")
STORED = ("forward_stored", "training_stored")
MOVES_TRAINING = tuple(f"{part}_training" for part in MOVES if part != "sort_by_expert")
_LINEAR = ("moe_linear_map", "moe_linear_reduce")
LINEAR = (*_LINEAR, *(f"{part}_training" for part in _LINEAR))
ATTENTION = ("attention_64", "attention_128", "attention_64_training", "attention_128_training")
LEASE_PARTS = (*QUANTIZED, *STORED, *MOVES_TRAINING, *LINEAR, *ATTENTION)

# Weight types, in the order of running. Parts with a fixed type have it in their name.
DTYPES = ("bf16", "fp16", "fp8", "int8", "int4")
USUAL_DTYPES = ("bf16", "fp8")
_OWN_DTYPE = {
    **dict.fromkeys(FP8, "fp8"),
    **{part: part.rpartition("_")[2] for part in QUANTIZED},
}

# Their time depends on the distribution of tokens over experts.
_MINDS_ROUTING = (
    *(*BLOCK, *PRODUCTS, "sort_by_expert", "forward_fp8", "grouped_gemm_fp8"),
    *(*QUANTIZED, *STORED, *LINEAR),
)
# They support only the numbers of tokens used in decoding.
_TRAINING_TOKENS = 64
_LONGEST_SEQUENCE = 4096


def _trains(part: str) -> bool:
    return "training" in part or part == "grouped_gemm_wgrad"


def dtypes_of(part: str, dtypes: Sequence[str]) -> tuple[str, ...]:
    """Returns the weight types in which a part is measured."""
    own = _OWN_DTYPE.get(part)
    return (own,) if own else tuple(d for d in dtypes if d in ("bf16", "fp16"))


@dataclass(frozen=True)
class Case:
    """One part of one layer for T tokens; `rank` 0 is measured first, the highest rank is dropped
    first when time is short."""

    part: str
    shape: Shape
    T: int
    routing: str
    dtype: str = "bf16"

    @property
    def group(self) -> tuple[str, str]:
        """Returns the group of the case: cases of a group share their weights."""
        return self.shape.name, self.dtype

    @property
    def num_slots(self) -> int:
        return self.T * self.shape.K

    @property
    def rank(self) -> int:
        if self.part in (*BLOCK, *LEASE_PARTS):
            rank = 0
        else:
            rank = 1 if self.part in (*PRODUCTS, *FP8[:2]) else 2
        rank += 0 if self.T in OP_TOKENS else 1
        return rank + (0 if self.routing == "balanced" else 1)

    def __str__(self) -> str:
        return f"{self.part} {self.shape.name} T={self.T} {self.routing} {self.dtype}"


def all_cases(
    parts: Sequence[str] = PARTS,
    shapes: Sequence[Shape] = tuple(MODELS.values()),
    tokens: Sequence[int] | None = None,
    routings: Sequence[str] = USUAL_ROUTINGS,
    dtypes: Sequence[str] = USUAL_DTYPES,
) -> list[Case]:
    """Returns every meaningful case, in the order of running: by layer and weight type, then by
    tokens, routing and part."""
    return [
        Case(part, shape, T, routing, dtype)
        for shape in shapes
        for dtype in DTYPES
        for T in tokens or TOKENS
        for routing in routings
        for part in parts
        if dtype in dtypes_of(part, dtypes)
        and (tokens is not None or part in BLOCK or T in OP_TOKENS)
        # A single token reaches K experts for any routing.
        and (routing == "balanced" or (part in _MINDS_ROUTING and T > 1))
        and (not _trains(part) or T >= min(_TRAINING_TOKENS, max(tokens or TOKENS)))
    ]


class AttentionSize(NamedTuple):
    """B sequences of S tokens, K slots, n heads of size d."""

    B: int
    S: int
    K: int
    n: int
    d: int


def attention_size(case: Case) -> AttentionSize:
    d = int(case.part.split("_")[1])
    S = min(case.T, _LONGEST_SEQUENCE)
    return AttentionSize(max(1, case.T // S), S, case.shape.K, max(1, case.shape.H // d), d)


def make_ids(
    shape: Shape, num_tokens: int, routing: str, device: torch.device | str = "cpu"
) -> Tensor:
    """Returns topk_ids [T, K], int32: K distinct experts per token.

    balanced: every expert has floor or ceil of T K / E slots, in random order of tokens. skewed:
    experts are drawn in proportion to 1 / (1 + rank) (Zipf). random: experts are drawn with equal
    probabilities, as by an untrained router.
    """
    generator = torch.Generator(device).manual_seed(num_tokens)
    E, K = shape.E, shape.K
    if routing == "balanced":
        # Slots are assigned to experts in order, so that K neighbors differ.
        ids = torch.arange(num_tokens * K, device=device).remainder(E).view(num_tokens, K)
        ids = ids[torch.randperm(num_tokens, generator=generator, device=device)]
        ids = torch.randperm(E, generator=generator, device=device)[ids]
    elif routing in ("skewed", "random"):
        popularity = -torch.arange(1, E + 1, device=device, dtype=torch.float32).log()
        if routing == "random":
            popularity.zero_()
        uniform = torch.rand(num_tokens, E, generator=generator, device=device)
        gumbel = -(-uniform.clamp(1e-30, 1 - 1e-7).log()).log()
        ids = (popularity + gumbel).topk(K, dim=1).indices
    else:
        raise ValueError(f"make_ids: routing must be one of {ROUTINGS}, got {routing!r}.")
    return ids.to(torch.int32)
