"""Breaks the CPU kernels in one place at a time and asks whether the tests notice.

    python tests/mutation/mutants_cpu.py                 # make mutants: all of them
    python tests/mutation/mutants_cpu.py wgrad "dense: a lost block"
    python tests/mutation/mutants_cpu.py --list

Prints {mutant: what noticed it, or null} as JSON, a line for each on the way. All mutants are
compiled once, into a copy of csrc/ under build/mutants: where the text of a mutant stands there is
a choice between the right and the wrong text, and a number says which mutant is alive. Each runs in
a process forked from one that has everything imported, because some of them crash. What is asked,
in this order: the cases of tests/sweep/test_boundaries.py, at one instruction set after the other;
the tests of the ops; the long sweep (make fuzz).

A mutant that no result can show is none: what is left out of a sum of zeros, what is computed for
rows that pad, what only costs time. Nor is a race, which shows by chance (make test-tsan).

The file is long because it is a table, of some 270 mutants, with its runner at the end.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "mutants"
ISAS = ("avx512_bf16", "avx2", "portable", "avx512")
CHILD_SECONDS = 90

HEADER = """#pragma once
extern "C" int moe_ops_mutant;
#define MOE_MUTANT(n) (::moe_ops_mutant == (n))
"""
SETTER = """
extern "C" {
int moe_ops_mutant = 0;
__attribute__((visibility("default"))) void moe_ops_set_mutant(int n) { moe_ops_mutant = n; }
}
"""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """`right` in a file of csrc/cpu becomes `wrong`: an expression, or a statement where `right`
    ends with a semicolon (`wrong` may be empty then). nth: which match, if there are several."""

    name: str
    file: str
    right: str
    wrong: str
    nth: int | None = None

    def place(self, text: str) -> tuple[int, int]:
        """Returns the position of `right`."""
        pattern = r"\s+".join(re.escape(word) for word in self.right.split())
        found = [match.span() for match in re.finditer(pattern, text)]
        if not found or (self.nth is None and len(found) != 1):
            raise LookupError(f"{self.name}: {len(found)} matches of {self.right!r} in {self.file}")
        return found[self.nth or 0]

    def choice(self, right: str, number: int) -> str:
        """Text that is `right` unless mutant `number` is alive."""
        if self.right.endswith(";"):
            return f"if (MOE_MUTANT({number})) {{ {self.wrong} }} else {{ {right} }}"
        return f"(MOE_MUTANT({number}) ? ({self.wrong}) : ({right}))"


def mutated(text: str, mutants: list[tuple[int, Mutant]]) -> str:
    """The text of a file with all of its mutants in it, by number."""
    places: dict[tuple[int, int], list[tuple[int, Mutant]]] = {}
    for number, mutant in mutants:
        places.setdefault(mutant.place(text), []).append((number, mutant))
    before = len(text)
    for (begin, end), here in sorted(places.items(), reverse=True):
        if end > before:
            raise LookupError(f"{here[0][1].name}: its text overlaps that of another mutant")
        before = begin
        right = text[begin:end]
        for number, mutant in here:
            right = mutant.choice(right, number)
        text = text[:begin] + right + text[end:]
    return text


@dataclasses.dataclass(frozen=True)
class Family:
    ops: tuple[str, ...]  # of the sweep
    tests: tuple[str, ...]  # files of tests/
    mutants: tuple[Mutant, ...]


def of(file: str, *mutants: tuple) -> tuple[Mutant, ...]:
    return tuple(Mutant(m[0], file, *m[1:]) for m in mutants)


FAMILIES: dict[str, Family] = {
    "dot": Family(
        (
            "grouped_gemm",
            "moe_ffn",
            "moe_linear_reduce",
        ),
        (
            "ops/test_grouped_gemm.py",
            "contract/test_fuzz_layouts.py",
            "ops/test_moe_ffn.py",
        ),
        of(
            "gemm/gemv.h",
            (
                "features lost at the end of a pass",
                "std::min(at_once, quarter - f)",
                "std::min(at_once, quarter - f - (quarter - f < at_once))",
            ),
            ("last columns missed", "n % kGemvFeatures", "int64_t{0}"),
            (
                "pairs: a token from half the place",
                "Op::load(d, it.row_begin + t, 0, K, x + t * ldx);",
                "Op::load(d, it.row_begin, 0, K, x + t * ldx);",
            ),
            (
                "up half reads the gate's weights",
                "(s * d.features + it.feature_begin) * d.b.stride_o",
                "it.feature_begin * d.b.stride_o",
            ),
        ),
    ),
    "strip": Family(
        (
            "grouped_gemm",
            "moe_ffn",
        ),
        (
            "ops/test_grouped_gemm.py",
            "contract/test_fuzz_layouts.py",
            "ops/test_moe_ffn.py",
        ),
        of(
            "gemm/gemv.h",
            ("blocks of k not added up", "b > 0", "false"),
            (
                "half types read where they were widened",
                "widened ? static_cast<const void*>(wide) : weights",
                "static_cast<const void*>(weights)",
            ),
            ("last columns missed", "n % F", "int64_t{0}"),
            (
                "end of a row of tokens not cleared",
                "std::fill(dst + kc, dst + round_up(kc, W), T(0));",
                "",
            ),
            (
                "always the first expert's weights",
                "it.expert * d.b.stride_e + (s * d.features + it.feature_begin + f) * d.b.stride_o",
                "(s * d.features + it.feature_begin + f) * d.b.stride_o",
            ),
            ("weights of the first block for all", "w + b * block * size", "w"),
            ("tokens of the first block for all", "x + (b * m + t0) * ldx", "x + t0 * ldx"),
            ("sums of the first pass for all", "sums + t0 * features * W", "sums"),
        ),
    ),
    "rank": Family(
        (
            "grouped_gemm",
            "moe_ffn",
        ),
        (
            "ops/test_grouped_gemm.py",
            "contract/test_fuzz_layouts.py",
        ),
        of(
            "gemm/outer.h",
            ("steps of k not added up", "row > first_row", "false"),
            (
                "last steps of k lost",
                "std::min(step, end - row)",
                "std::min(step, end - row) - (row > 0 && end - row > 1 && end - row < kOuterRows)",
            ),
            ("always the first weights", "first + row * d.b.stride_k", "first"),
            ("sums of the first segment for both", "sums + s * width", "sums"),
            (
                "blocks of k not added up",
                "if (b > 0) row_kernels<T>().axpy(kAccumulate<T>, block, T(1), tile, m * ldc);",
                "",
            ),
            (
                "always the first expert",
                "it.expert * d.b.stride_e + s * d.features + it.feature_begin",
                "s * d.features + it.feature_begin",
            ),
        ),
    ),
    "pack": Family(
        (
            "grouped_gemm",
            "moe_ffn",
        ),
        (
            "ops/test_grouped_gemm.py",
            "contract/test_fuzz_layouts.py",
        ),
        of(
            "gemm/pack_b.h",
            ("blocks of k not added up", "k0 > 0", "false", 0),
            (
                "up half reads the gate's weights",
                "(s * d.features + feature) * row_bytes",
                "feature * row_bytes",
            ),
            (
                "panel of the first block of k for all",
                "if (first) pack(s, f0 + j, f1, width, k0, kc, panel);",
                "if (first && k0 == c0) pack(s, f0 + j, f1, width, k0, kc, panel);",
            ),
            (
                "kept panels of all blocks in one place",
                "kept_panels + column * K + k0 * width",
                "kept_panels + column * K",
            ),
            (
                "last row of the last block lost",
                "std::min(most_rows, it.row_end - r0)",
                "std::min(most_rows, it.row_end - r0) - (r0 > it.row_begin)",
            ),
            (
                "tokens of the first part for all",
                "f0 == it.feature_begin || chunk * depth < K",
                "f0 == it.feature_begin",
            ),
            (
                "a step of k lost in the last block",
                "std::min(depth, c1 - k0)",
                "std::min(depth, c1 - k0) - (c1 - k0 < depth)",
                1,
            ),
        ),
    ),
    "nn": Family(
        (
            "grouped_gemm",
            "moe_ffn",
            "moe_linear_map",
        ),
        (
            "ops/test_grouped_gemm.py",
            "contract/test_fuzz_layouts.py",
        ),
        of(
            "gemm/pack_b.h",
            ("blocks of k not added up", "k0 > 0", "false", -1),
            ("blocks of k not added up where panels are copied", "k0 > 0", "false", -2),
            ("the first block of weight rows for all", "kRows * k0 + kk", "kk"),
            (
                "last weight row missed",
                "row < d.in_features ? weight_row(row) : nullptr",
                "row + 1 < d.in_features ? weight_row(row) : nullptr",
            ),
            (
                "up half reads the gate's weights",
                "s * d.features * dtype_size(d.b.type)",
                "0 * dtype_size(d.b.type)",
            ),
            (
                "panels of the first columns for all",
                "direct ? 0 : j / (2 * W) * stride",
                "int64_t{0} * stride",
            ),
            (
                "tokens of the first block of k for all",
                "Op::load(d, it.row_begin + t, k0, kc, a + t * kLda);",
                "Op::load(d, it.row_begin + t, 0, kc, a + t * kLda);",
            ),
        ),
    ),
    "panels": Family(
        ("moe_ffn_packed",),
        (
            "ops/test_moe_ffn_packed.py",
            "contract/test_fuzz_layouts.py",
        ),
        of(
            "gemm/packed_b.h",
            ("last pair of an odd k not cleared", "b == k_blocks - 1 && depth > K", "false"),
            (
                "last step of k lost in the last block",
                "std::min(block_k, K - b * block_k)",
                "std::min(block_k, K - b * block_k) - (b > 0 && K - b * block_k < block_k)",
            ),
            (
                "panels of half the features skipped",
                "f0 / P * d.segments * layout.panel_bytes",
                "f0 / P * layout.panel_bytes",
            ),
            (
                "always the first expert",
                "it.expert * layout.expert_bytes()",
                "0 * layout.expert_bytes()",
            ),
            (
                "sums of both segments in one place",
                "i % d.segments * padded_n + i / d.segments * P",
                "i / d.segments * P",
            ),
            ("streams: blocks of k not added up", "b > 0", "false", -2),
            ("tiles: blocks of k not added up", "b > 0", "false", -1),
            (
                "tokens of the first block of k for all",
                "a + (b * m + i0) * kPanelLda",
                "a + i0 * kPanelLda",
            ),
            ("panel of the first block of k for all", "panel + b * block_k * size", "panel"),
            (
                "streams: the first panels for all",
                "first + done * layout.panel_bytes + b * block_k * size",
                "first + b * block_k * size",
            ),
        )
        + of(
            "gemm/prepack.cpp",
            ("a packed k in the wrong half of a pair", "k % pair", "(pair - 1 - k % pair)"),
            (
                "last step of k not packed",
                "std::min(K, k0 + kPackDepth)",
                "std::min(K, k0 + kPackDepth) - (k0 + kPackDepth > K)",
            ),
            ("up half packed from the gate's", "i % layout.segments * features + f", "f"),
        ),
    ),
    "plan": Family(
        (
            "grouped_gemm",
            "moe_ffn",
            "moe_ffn_quantized",
            "moe_ffn_packed",
            "moe_linear_reduce",
        ),
        (
            "ops/test_grouped_gemm.py",
            "contract/test_fuzz_layouts.py",
            "ops/test_moe_ffn.py",
            "ops/test_moe_ffn_quantized.py",
        ),
        of(
            "gemm/desc.h",
            ("pairs: end of an odd k not cleared", "if (n < 2 * kc) halves[n] = 0;", ""),
            (
                "pairs: a step lost at a block",
                "std::min(2 * kc, d.in_features - 2 * k0)",
                "std::min(2 * kc, d.in_features - 2 * k0) - (k0 > 0 && d.in_features - 2 * k0 < "
                "2 * kc)",
            ),
            ("row scale forgotten", "d.a_scale ? d.a_scale[r] : T(1)", "T(1)"),
            ("factors of k from the first block for all", "d.k_scale + k0", "d.k_scale"),
            (
                "scale of bfloat16 rows forgotten",
                "type == DType::kBFloat16 && scale == 1.0f",
                "type == DType::kBFloat16",
            ),
            (
                "scales of the first expert for all",
                "m.quant.scale + e * m.quant.scale_stride_e + o * m.quant.scale_stride_o",
                "m.quant.scale + o * m.quant.scale_stride_o",
            ),
            ("gathered rows read as they lie", "rows.index != nullptr ? rows.index[r] : r", "r"),
        )
        + of(
            "gemm/heuristics.h",
            (
                "a column lost between two items",
                "std::min(last, f + features)",
                "std::min(last, f + features) - (f + features < last)",
            ),
            (
                "a row lost between two items",
                "std::min(end, r + rows)",
                "std::min(end, r + rows) - (r + rows < end)",
            ),
        ),
    ),
    "tiles": Family(
        (
            "grouped_gemm",
            "moe_ffn",
            "moe_ffn_packed",
            "moe_linear_reduce",
            "all_experts_ffn",
        ),
        (
            "ops/test_grouped_gemm.py",
            "contract/test_fuzz_layouts.py",
            "ops/test_all_experts_ffn.py",
        ),
        of(
            "kernels/gemm_tiles-inl.h",
            ("steps past the last eight missed", "for (; k < kc; ++k) step();", ""),
        )
        + of(
            "kernels/rows-inl.h",
            (
                "load_row: scale forgotten in the tail",
                "for (; i < n; ++i) dst[i] = to_float(p[i]) * scale;",
                "for (; i < n; ++i) dst[i] = to_float(p[i]);",
                0,
            ),
            (
                "load_rows: tail missed",
                "for (; i < n; ++i) dst[i] = to_float(p[i]) * scale;",
                "",
                1,
            ),
            ("pack_panels: scale forgotten in the tail", "load<T>(tail) * scale", "load<T>(tail)"),
            (
                "pack_panels: panels of the last columns one row off",
                "dst + whole / (2 * W) * stride + r * last",
                "dst + whole / (2 * W) * stride + (r + 1) * last - last * (r + 1 == rows.count)",
            ),
            ("store_row: tail missed", "for (; i < n; ++i) store_one(p + i, src[i]);", "", 0),
            ("store_rows: tail missed", "for (; i < n; ++i) store_one(p + i, src[i]);", "", 1),
            (
                "gather_rows: scale forgotten in the tail",
                "for (; i < n; ++i) dst[i] = to_float(src[i]) * scale;",
                "for (; i < n; ++i) dst[i] = to_float(src[i]);",
            ),
            (
                "scatter_rows: scale forgotten in the tail",
                "for (; i < n; ++i) store_one(dst + i, src[i] * scale);",
                "for (; i < n; ++i) store_one(dst + i, src[i]);",
            ),
            ("transpose: last columns of a block missed", "i < cols - c", "i < cols - c - 1"),
            (
                "axpy: scale forgotten in the tail",
                "for (; i < n; ++i) acc[i] += to_float(p[i]) * scale;",
                "for (; i < n; ++i) acc[i] += to_float(p[i]);",
            ),
            (
                "weighted_sum: weight of the first row for all in the tail",
                "s += w * to_float(static_cast<const S*>(rows[r])[i]);",
                "s += (weights == nullptr ? T(1) : weights[0]) * to_float(static_cast<const "
                "S*>(rows[r])[i]);",
            ),
            (
                "dot_row: tail missed",
                "for (; i < n; ++i) s += to_float(pa[i]) * to_float(pb[i]);",
                "",
            ),
            (
                "combine_rows: weights of the first token for all",
                "if (weights != nullptr) weights += top_k;",
                "",
            ),
        ),
    ),
    "wgrad": Family(
        (
            "grouped_gemm_wgrad",
            "grouped_gemm",
            "moe_ffn",
            "moe_linear_reduce",
            "moe_linear_map",
        ),
        (
            "ops/test_grouped_gemm.py",
            "contract/test_fuzz_layouts.py",
            "ops/test_moe_ffn.py",
            "ops/test_moe_linear_reduce.py",
        ),
        of(
            "gemm/wgrad.h",
            ("not added to what is there", "r0 > begin || (direct && p.accumulate)", "r0 > begin"),
            (
                "pairs: scale of a row of the first block for all",
                "a_scale ? a_scale[r0 + r] : 1.0f",
                "a_scale ? a_scale[begin + r] : 1.0f",
            ),
            (
                "scales of the first block for all",
                "a_scale ? a_scale + r0 : nullptr",
                "a_scale ? a_scale + begin : nullptr",
            ),
            (
                "pairs: gradient of an odd last row not cleared",
                "std::fill(dst, dst + n, uint16_t{0});",
                "",
            ),
            ("buffers of empty experts cleared", "if (p.accumulate) return;", ""),
            (
                "last row of the last block lost",
                "std::min(kRows * kKc, end - r0)",
                "std::min(kRows * kKc, end - r0) - (r0 > begin && end - r0 > 1)",
            ),
            (
                "sums from the tile not added to what is there",
                "if (p.accumulate) row_kernels<T>().axpy(p.out_type, dst, T(1), row, j1 - from);",
                "",
            ),
            (
                "all experts' gradients in the first one's place",
                "e * O * J * size",
                "0 * O * J * size",
            ),
            (
                "panels of the first block of rows for all features",
                "o0 == o_begin || !one",
                "o0 == o_begin",
            ),
            ("gradient of the last block of rows for all columns", "j0 == 0 || !one", "j0 == 0"),
            (
                "pairs: rows pass through the tile of sums",
                "load_bf16_row(p.a.type, src, cols, scale, widened, copy);",
                "load_bf16_row(p.a.type, src, cols, scale, reinterpret_cast<float*>(tile), copy);",
            ),
            (
                "sums that are complete in a tile rounded there although others follow",
                "Op::kBf16 && p.out_type == DType::kBFloat16 && one && !p.accumulate",
                "Op::kBf16 && p.out_type == DType::kBFloat16 && !p.accumulate",
            ),
            (
                "a column lost between two blocks",
                "std::min(J, j0 + j_block)",
                "std::min(J, j0 + j_block) - (j0 + j_block < J)",
            ),
            ("bias gradient without weights", "scale ? scale[r] : T(1)", "T(1)"),
            (
                "bias gradient: the last feature of a block missed",
                "std::min(kSumFeatures, O - f)",
                "std::min(kSumFeatures, O - f) - (f > 0 && O - f > 1)",
            ),
        ),
    ),
    "quant": Family(
        ("moe_ffn_quantized",),
        (
            "ops/test_moe_ffn_quantized.py",
            "cpu/test_isa.py",
        ),
        of(
            "gemm/quant.h",
            (
                "dot8: scales of the gate for both halves",
                "scales_at(d.b, it.expert, s * d.features + it.feature_begin)",
                "scales_at(d.b, it.expert, it.feature_begin)",
            ),
            ("dot8: scales forgotten", "row_kernels<float>().multiply_row(scale, sums, n);", ""),
            ("dot8: end of the tokens not cleared", "std::fill(x + K, x + padded_k, 0.0f);", "", 0),
            (
                "panels: end of the tokens not cleared",
                "std::fill(x + K, x + padded_k, 0.0f);",
                "",
                2,
            ),
            (
                "dot8: weights of the first expert",
                "weights_at(d.b, it.expert, feature + first, 0)",
                "weights_at(d.b, 0, feature + first, 0)",
            ),
            (
                "panels: sums of both halves in one place",
                "tile + i % d.segments * part + column - part_begin",
                "tile + column - part_begin",
            ),
            (
                "panels: a token's codes lost at a block",
                "std::min(block, K - b * block)",
                "std::min(block, K - b * block) - (b > 0 && K - b * block > 1)",
            ),
            (
                "panels: the scale of the first group for all",
                "scales + begin / group * P",
                "scales",
            ),
            ("panels: weights without their bias", "four != kInt8", "!(four != kInt8)"),
            (
                "panels: columns of a part lost",
                "std::min(part, n - part_begin)",
                "std::min(part, n - part_begin) - (part_begin > 0)",
            ),
            ("panels: runs of k not added up", "begin > 0", "false"),
            (
                "panels: words of the first run for all",
                "words + (begin - k0) / word * P",
                "words",
            ),
            (
                "panels: the last word of tokens not cleared",
                "if (b == k_blocks - 1) std::fill(dst + kc, dst + round_up(kc, word), 0.0f);",
                "",
            ),
        )
        + of(
            "kernels/quant_int8-inl.h",
            (
                "byte_tile: scale of the first token for all",
                "int8_sums(acc[i][v]) * block_of(i).scale",
                "int8_sums(acc[i][v]) * block_of(0).scale",
            ),
        )
        + of(
            "kernels/quant_w4_dot-inl.h",
            (
                "dot4: scales of the first groups for all",
                "put(dst, unit_scales(scales, u, shift));",
                "put(dst, unit_scales(scales, 0, shift));",
            ),
        )
        + of(
            "kernels/quant_w8-inl.h",
            ("dot8: a byte of the end missed", "k - whole * kUnit", "k - whole * kUnit - 1"),
        )
        + of(
            "kernels/quant_repack-inl.h",
            (
                "words: a byte of the end missed",
                "__builtin_memcpy(tails[f], rows[f] + c, end - c);",
                "__builtin_memcpy(tails[f], rows[f] + c, end - c - 1);",
            ),
        ),
    ),
    "codes": Family(
        ("grouped_gemm_quantized",),
        (
            "ops/test_grouped_gemm_quantized.py",
            "quant/test_stored_formats.py",
            "cpu/test_isa.py",
        ),
        of(
            "gemm/dequant.h",
            ("scales of the first expert", "e * q.scale_stride_e", "0 * e"),
            ("zero points of the first expert", "q.zero + scale", "q.zero + 0 * scale"),
        )
        + of(
            "gemm/dequant.cpp",
            (
                "decoded: end of the tokens not cleared",
                "std::fill(x + K, x + padded_k, 0.0f);",
                "",
            ),
        )
        + of(
            "kernels/quant_codes-inl.h",
            (
                "the first run's scale for a block",
                "(b * D::kRunCount + run) >> shift",
                "(b * D::kRunCount) >> shift",
            ),
            ("q6_K: the first quarter for all", "quarter(block, run / 2)", "quarter(block, 0)"),
            (
                "fp8: NaN is 480",
                'has_e4m3_nan(codes, rows.k) ? __builtin_nanf("") : 256.0f',
                "256.0f",
            ),
            (
                "mxfp4: an exponent of 0 is 0",
                "e == 0 ? 0x00400000u : e == 255 ? 0x7fc00000u : e << 23",
                "e == 255 ? 0x7fc00000u : e << 23",
            ),
            (
                "mxfp4: no NaN",
                "e == 0 ? 0x00400000u : e == 255 ? 0x7fc00000u : e << 23",
                "e == 0 ? 0x00400000u : e << 23",
            ),
            (
                "a row's end of codes missed",
                "n * D::kBytes / D::kBlock",
                "n * D::kBytes / D::kBlock - 1",
            ),
        )
        + of(
            "kernels/quant_scales-inl.h",
            (
                "zero points of 8 for all",
                "static_cast<float>(8 - zero[how.repeat == 1 ? i : i / how.repeat])",
                "0.0f",
            ),
            ("q4_K: upper bits of scales lost", "_mm_or_si128(low, upper)", "low"),
        )
        + of(
            "kernels/quant_decoded-inl.h",
            ("offsets forgotten", "scales[0].offset == nullptr", "true"),
            ("the first row's scales for four", "scales[f].scale", "scales[0].scale"),
            ("blocks behind whole lines missed", "while (b < whole) add_blocks();", "b = whole;"),
            (
                "sums of a token by runs instead of scales",
                "sums[run >> shift]",
                "sums[run]",
            ),
        ),
    ),
    "fp8": Family(
        (
            "grouped_gemm_fp8",
            "grouped_gemm_fp8_wgrad",
            "moe_ffn_fp8",
            "quantize_fp8",
            "quantize_fp8_columns",
        ),
        (
            "ops/test_grouped_gemm_fp8.py",
            "ops/test_moe_ffn_fp8.py",
            "ops/test_quantize_fp8.py",
        ),
        of(
            "gemm/fp8.h",
            (
                "scales of the first 128 features for all",
                "o / kFp8Block * b.scale_stride_o",
                "0 * b.scale_stride_o",
            ),
            ("blocks of k not added up", "b > 0", "false"),
            (
                "scale of a token's first block for all",
                "t < m ? d.row_scale(it.row_begin + t, b) : 0.0f",
                "t < m ? d.row_scale(it.row_begin + t, 0) : 0.0f",
            ),
            (
                "scale of the weights' first block for all",
                "d.weight_scale(it.expert, feature_of(f), b)",
                "d.weight_scale(it.expert, feature_of(f), 0)",
            ),
            ("pairs: end of an odd k not cleared", "if (count % 2 != 0) halves[count] = 0;", ""),
            (
                "up half reads the gate's weights",
                "i / n * d.features + it.feature_begin + i % n",
                "it.feature_begin + i % n",
            ),
            ("dot: last columns missed", "groups + n % F", "groups"),
            (
                "dot: second token of a pass lost",
                "std::min<int64_t>(kFp8DotTokens, m - t)",
                "int64_t{1}",
            ),
            (
                "strip: weights of the first feature for all",
                "d.weight(it.expert, feature + f)",
                "d.weight(it.expert, feature)",
            ),
            (
                "dot: scale of the first feature for all",
                "d.weight_scale(it.expert, feature + f * step)",
                "d.weight_scale(it.expert, feature)",
            ),
            (
                "last step of k lost in the last block",
                "std::min(kFp8Block, K - b * kFp8Block)",
                "std::min(kFp8Block, K - b * kFp8Block) - (b > 0 && K - b * kFp8Block < kFp8Block)",
                1,
            ),
            (
                "codes of the first chunk's panels for all",
                "panels + (b - b0) * padded_m * kBlock + t0 * kc",
                "panels + t0 * kc",
            ),
            (
                "turned: codes of the first block of k for all",
                "codes + i * ld_codes + (b - b0) * kFp8Block",
                "codes + i * ld_codes",
            ),
            (
                "turned: halves of 8 x 8 bytes not swapped",
                "for (int i = 0; i < 4; ++i) swap(w[i], w[i + 4], 32, 0x00000000ffffffffu);",
                "",
            ),
            (
                "wgrad: scales of the first group for all",
                "grad.scale[block * grad.scale_stride + o]",
                "grad.scale[o]",
            ),
            (
                "wgrad: groups of another expert",
                "fp8_first_group(p.expert_offsets[e], e)",
                "fp8_first_group(p.expert_offsets[e], 0)",
            ),
        )
        + of(
            "grouped_gemm_fp8.cpp",
            (
                "wgrad: stored over what the buffer had",
                "if (p.accumulate) row_kernels<float>().axpy(p.out_type, out, 1.0f, values, n);",
                "",
            ),
        )
        + of(
            "quantize_fp8.cpp",
            (
                "columns: what no row fills is left",
                "std::memset(q + count, 0, static_cast<size_t>(kFp8Block - count));",
                "",
            ),
            (
                "columns: weight of the row for that of its slot",
                "p.topk_weights[slot]",
                "p.topk_weights[begin + r]",
            ),
        )
        + of(
            "kernels/fp8-inl.h",
            (
                "dot: scale of a token's first block for all",
                "w_scale[f][block] * x_scale[t][block]",
                "w_scale[f][block] * x_scale[t][0]",
            ),
            ("quantize: tail missed", "for (; i < n; ++i) q[i] = to_e4m3(x[i] * inverse);", ""),
            ("quantize: tail's largest missed", "largest = a > largest ? a : largest;", ""),
        )
        + of(
            "moe_ffn_fp8.cpp",
            (
                "scale of the first block of h for all",
                "r * I_blocks + (first + i) / kFp8Block",
                "r * I_blocks",
            ),
            ("bias of the down projection forgotten", "add_bias(p.b_down, e, f, n, v);", ""),
            ("routing weight of another slot", "maps.weight[r]", "maps.weight[r / 2]"),
        ),
    ),
    "ffn stages": Family(
        (
            "moe_ffn",
            "moe_ffn_packed",
            "moe_ffn_quantized",
        ),
        (
            "ops/test_moe_ffn.py",
            "ops/test_moe_ffn_packed.py",
        ),
        of(
            "moe_ffn/moe_ffn.cpp",
            ("bias of the gate for both halves", "seg * I + f", "f"),
            (
                "interleaved: all blocks of features in the first one's place",
                "h + r * I + (f + i) / 2",
                "h + r * I + f / 2",
            ),
            ("bias of the first expert for all", "e * p.b_down.stride_e + f", "f"),
            (
                "routing weights on the input forgotten",
                "if (s.apply_router_weight_on_input) up.a_scale = maps.weight;",
                "",
            ),
            (
                "pre-activation kept without its bias of the up half",
                "r * width + column",
                "r * width + f",
            ),
        )
        + of(
            "moe_ffn/ranges.h",
            (
                "rows of a range one short",
                "std::min(f + width, s.hidden_size)",
                "std::min(f + width, s.hidden_size) - (f + width < s.hidden_size)",
            ),
        )
        + of(
            "moe_ffn/backward.cpp",
            (
                "backward: weight of the first row for all",
                "on_input_ ? nullptr : maps_.weight + r",
                "on_input_ ? nullptr : maps_.weight",
            ),
            (
                "weight gradient without the routing weights on the input",
                "of_up.a_scale = on_input_ ? maps_.weight : nullptr;",
                "of_up.a_scale = nullptr;",
            ),
            (
                "x of the first range of features for all",
                "element(row_of(x_, r), type_, range.begin)",
                "element(row_of(x_, r), type_, 0)",
            ),
            (
                "gradients of gate and up swapped",
                "interleave(grad, grad + I_, I_, pre);",
                "interleave(grad + I_, grad, I_, pre);",
            ),
            (
                "pre-activation of gate and up swapped",
                "deinterleave(gate, I_, halves, halves + I_);",
                "deinterleave(gate, I_, halves + I_, halves);",
            ),
            (
                "gradient of the routing weight without the bias",
                "p_.b_down.data != nullptr",
                "false",
            ),
            (
                "gradients of skipped slots not cleared",
                "std::fill(grad_weights_, grad_weights_ + s_.routing.num_tokens * "
                "s_.routing.top_k, T(0));",
                "",
            ),
        )
        + of(
            "gemm/routed_rows.h",
            (
                "tokens of slots counted from one",
                "r.row_to_slot[row] / top_k",
                "std::min<int32_t>((r.row_to_slot[row] + 1) / top_k, r.num_tokens - 1)",
            ),
        ),
    ),
    "ffn blocks": Family(
        ("moe_ffn",),
        (
            "ops/test_moe_ffn.py",
            "cpu/test_moe_ffn_blocks.py",
        ),
        of(
            "moe_ffn/blocks.cpp",
            (
                "routing weights on the input forgotten",
                "on_input ? weights.data() : nullptr",
                "static_cast<T*>(nullptr)",
            ),
            ("sums of earlier blocks overwritten", "!first || part > 0", "part > 0"),
            (
                "weights of the first tile for all",
                "on_input ? nullptr : t.weights + r0",
                "on_input ? nullptr : t.weights",
            ),
            (
                "sums of an expert without rows not cleared",
                "if (first && wants_up_) up_sums_.begin(chunk, e, count);",
                "",
            ),
            (
                "all tiles' outputs in the first one's place",
                "(b.offsets[e] + r0) * ld",
                "b.offsets[e] * ld",
                0,
            ),
            (
                "all parts' gradients in the first one's place",
                "(b.offsets[e] + r0) * ld",
                "b.offsets[e] * ld",
                1,
            ),
            (
                "gradients of gate and up swapped",
                "interleave(grad + r * width_, grad + r * width_ + I_, I_, dpre + r * kLda);",
                "interleave(grad + r * width_ + I_, grad + r * width_, I_, dpre + r * kLda);",
            ),
            (
                "routing weights of the expert's first rows",
                "b.slots + b.offsets[e] + r0",
                "b.slots + b.offsets[e]",
            ),
            (
                "tokens of the expert's first rows",
                "b.tokens + b.offsets[e] + r0",
                "b.tokens + b.offsets[e]",
            ),
            (
                "gradient of the routing weight in the first rows' place",
                "grad_weights[s_.routing.row_to_slot[row + r0 + r]] = g;",
                "grad_weights[s_.routing.row_to_slot[row + r]] = g;",
            ),
            (
                "bias gradients of the last part only",
                "row_k_.axpy(kAccumulate<T>, t.sum, T(1), down_sums_.bias_of(chunk, e), H_);",
                "row_k_.load_row(kAccumulate<T>, t.sum, down_sums_.bias_of(chunk, e), H_, T(1));",
            ),
            (
                "routing weights of the first block for all",
                "static_cast<const T*>(s.topk_weights) + b.first",
                "static_cast<const T*>(s.topk_weights)",
                1,
            ),
            (
                "gradients of skipped slots not cleared",
                "if (grad_weights != nullptr) std::fill_n(grad_weights, "
                "s_.routing.num_slots(), T(0));",
                "",
            ),
        ),
    ),
    "slots": Family(
        (
            "moe_linear_map",
            "moe_linear_reduce",
            "moe_ffn",
        ),
        (
            "ops/test_moe_linear_map.py",
            "ops/test_moe_linear_reduce.py",
            "cpu/test_moe_ffn_blocks.py",
        ),
        of(
            "gemm/token_blocks.h",
            ("parts of an expert's rows not added up", "accumulate || part > 0", "accumulate"),
            (
                "scales of the first tile for all",
                "scales == nullptr ? nullptr : scales + r",
                "scales",
            ),
            (
                "sums of an expert without rows not cleared",
                "if (count == 0) std::fill_n(matrix_of(chunk, e), matrix(), T(0));",
                "",
            ),
            ("bias sums not cleared", "std::fill_n(bias_of(chunk, e), bias(), T(0));", ""),
            (
                "a token lost between two blocks",
                "std::min(end, t + kBlockTokens)",
                "std::min(end, t + kBlockTokens) - (t + kBlockTokens < end)",
            ),
            ("only the first chunk starts anew", "t == begin", "t == 0"),
            (
                "gradients not added to the buffer",
                "row_kernels<T>().axpy(w.type, out + i * cols_ * size, T(1), sum + i * n, cols_);",
                "",
            ),
            (
                "the first chunk's sums for all",
                "(chunk * experts_ + e) * (matrix() + bias())",
                "e * (matrix() + bias())",
                0,
            ),
        )
        + of(
            "moe_linear_map.cpp",
            (
                "slots without an expert not cleared",
                "if (b.rows[i] < 0) std::memset(h + i * O * size, 0, static_cast<size_t>(O * "
                "size));",
                "",
            ),
            ("bias of the first expert for all", "vector_of(p.bias, e)", "vector_of(p.bias, 0)"),
            (
                "bias gradient of the last row only",
                "row_kernels<T>().axpy(type, grads[i], T(1), chunks.bias_of(chunk, e), O);",
                "row_kernels<T>().load_row(type, grads[i], chunks.bias_of(chunk, e), O, T(1));",
            ),
        )
        + of(
            "moe_linear_reduce.cpp",
            (
                "routing weights of other slots",
                "weights[r] = topk_weights[slot];",
                "weights[r] = topk_weights[b.first + r];",
            ),
            (
                "routing weights of the first block for all",
                "static_cast<const T*>(p.topk_weights) + b.first",
                "static_cast<const T*>(p.topk_weights)",
            ),
            (
                "bias gradient without weights",
                "row_kernels<T>().axpy(type, grads[i], weights[i], chunks.bias_of(chunk, e), H);",
                "row_kernels<T>().axpy(type, grads[i], T(1), chunks.bias_of(chunk, e), H);",
            ),
            (
                "sorted: weight of the expert's first row for all",
                "k.load_row(kAccumulate<T>, u + r * D, grad, D, maps.weight[r]);",
                "k.load_row(kAccumulate<T>, u + r * D, grad, D, maps.weight[begin]);",
            ),
            (
                "sorted: gradient of the routing weight without the bias",
                "bias != nullptr",
                "false",
                3,
            ),
        ),
    ),
    "dense": Family(
        ("all_experts_ffn",),
        ("ops/test_all_experts_ffn.py",),
        of(
            "gemm/small_gemm.h",
            ("blocks of k not added up", "g.accumulate || k0 > 0", "g.accumulate"),
            (
                "panels of the first block of k for all",
                "b + j * depth + k0 * width",
                "b + j * depth",
            ),
            ("panels of the first columns for all", "b + j * depth + k0 * width", "b + k0 * width"),
            ("columns of the first 128 for all", "g.a_block", "0", 1),
            (
                "sums of the first 128 columns for all",
                "g.c + (m0 + t.begin) * g.ldc + j",
                "g.c + t.begin * g.ldc + j",
            ),
        )
        + of(
            "all_experts_ffn.cpp",
            ("up bias forgotten", "if (p.b_up != nullptr) set_ones(x, m, H);", ""),
            ("down bias forgotten", "if (p.b_down != nullptr) set_ones(h, m, I);", ""),
            (
                "last block of a part lost",
                "blocks * (part + 1) / parts",
                "blocks * (part + 1) / parts - (parts > 1)",
            ),
            ("gradients of x of the experts not added up", "!first", "false"),
            ("gradient of the first input lost", "store_dx(); loaded = g;", "loaded = g;"),
            (
                "a feature lost at a block of k",
                "std::min(kKc, I - c)",
                "std::min(kKc, I - c) - (c > 0 && I - c > 1)",
            ),
            (
                "gradient of an input that nobody reads not cleared",
                "std::fill_n(static_cast<char*>(p.grad_x) + (t * G + g) * H * size, H * size, "
                "char(0));",
                "",
            ),
            (
                "parts of the tokens not added up",
                "row_k.axpy(kAccumulate<T>, from + part * E * sums.expert(), T(1), row, cols);",
                "",
            ),
            (
                "last token of a block lost",
                "std::min(kDenseTokens, s.num_tokens - t0)",
                "std::min(kDenseTokens, s.num_tokens - t0) - (t0 > 0 && s.num_tokens - t0 > 1)",
                1,
            ),
        )
        + of(
            "kernels/dense-inl.h",
            ("copy: sums of whole runs lost", "if (sum != nullptr) total.add_to(sum + begin);", ""),
            (
                "act: rows of gradients lost in the tail",
                "if (to.du_rows != nullptr) store<T>(to.du_rows + r * kLda + i, dv);",
                "",
            ),
        ),
    ),
    "mix": Family(
        ("mix_expert_outputs",),
        ("ops/test_mix_expert_outputs.py",),
        of(
            "mix_expert_outputs.cpp",
            ("statistics: blocks joined as if they had one mean", "T(before) * share", "T(0)"),
            ("statistics: the first block's mean", "mean[i] += apart * share;", ""),
            (
                "factor's gradient of the first token only",
                "t % p.repeats == p.repeats - 1",
                "t % p.repeats == 0",
            ),
            (
                "factor's sum not cleared",
                "if (t % p.repeats == 0) std::fill(sum, sum + mixed, T(0));",
                "",
            ),
            ("sums of the block before kept", "std::fill(block, block + 2 * n, T(0));", ""),
            (
                "parts of the tokens not added up",
                "k.axpy(kAccumulate<T>, sums + 2 * part * n, T(1), sums, 2 * n);",
                "",
            ),
            (
                "statistics: parts not joined",
                "join(moments, moments + n, begin, other, other + n, first_of(part + 1) - begin);",
                "",
            ),
            (
                "statistics: last token of a block lost",
                "std::min(kMixTokens, end - t)",
                "std::min(kMixTokens, end - t) - (end - t > 1 && end - t < kMixTokens)",
            ),
            (
                "batch gradient without the variance",
                "sums[n + i] / (count * var)",
                "sums[n + i] / count",
            ),
            (
                "end of a row not cleared",
                "std::fill(buffer + r * pitch + size, buffer + (r + 1) * pitch, T(0));",
                "",
            ),
            (
                "last block of a part lost",
                "blocks * (part + 1) / parts",
                "blocks * (part + 1) / parts - (parts > 1)",
            ),
        )
        + of(
            "kernels/mix-inl.h",
            (
                "product: last vectors of a row missed",
                "for (; j < ld; j += W) mix_tile<T, M, 1>(depth, a, step_i, step_k, b + j, c "
                "+ j, ld);",
                "",
            ),
            (
                "weights' gradients of the last experts missed",
                "for (; e < count; ++e) mix_dots<T, 1>(g, z + e * ld, out + e, ld);",
                "",
            ),
            (
                "slope: sums without the mean",
                "load<T>(x + i) - load<T>(norm.mean + i)",
                "load<T>(x + i)",
                0,
            ),
        ),
    ),
    "attention": Family(
        ("moa_attention",),
        ("ops/test_moa_attention.py",),
        of(
            "moa_attention/blocks.h",
            (
                "causal: one key too many",
                "std::min(end, at + 1)",
                "std::min<int64_t>({end, at + 2, p.num_keys})",
            ),
            ("window: one key too many", "at - p.window + 1", "at - p.window"),
            ("tokens counted from the first key", "token + p.num_keys - p.num_tokens", "token"),
            (
                "mask of the window's start forgotten",
                "out.all_first > 0 || out.all_last < out.keys",
                "out.all_last < out.keys",
            ),
            ("keys of a panel's last rows lost", "last[r1 - 1] - at", "last[r0] - at"),
            ("sums of the first 128 features for all", "c + c0 * width", "c"),
            (
                "a feature lost at a part",
                "std::min(part_, p_.head_size - c)",
                "std::min(part_, p_.head_size - c) - (c > 0)",
            ),
            (
                "narrow heads: end of the keys not cleared",
                "std::fill(data, data + layout.size(p.head_size), T(0));",
                "",
            ),
        )
        + of(
            "moa_attention/forward.cpp",
            (
                "sums not rescaled when the maximum rises",
                "attention_.softmax(seen, buffers.s, max + r0, sum + r0, buffers.factor)",
                "attention_.softmax(seen, buffers.s, max + r0, sum + r0, buffers.factor) && false",
            ),
            (
                "last key of the last block lost",
                "std::min(kKeys, block.keys.last - j0)",
                "std::min(kKeys, block.keys.last - j0) - (j0 > block.keys.first && "
                "block.keys.last - j0 > 1 && block.keys.last - j0 < kKeys)",
            ),
            ("stick: the first panel's rest for all", "log_rest + i * panel_rows_", "log_rest"),
            (
                "output of the block before kept",
                "std::fill(buffers.out, buffers.out + block.padded * ld_, T(0));",
                "",
            ),
            ("stick: walks on after a panel is done with", "most < attention_.log_tiny", "true"),
        ),
    ),
    "attention backward": Family(
        ("moa_attention",),
        ("ops/test_moa_attention.py",),
        of(
            "moa_attention/backward.cpp",
            ("the last chunk's sums lost", "c < chunks_", "c < chunks_ - 1"),
            (
                "weights of the block before kept",
                "clear(block, i, seen_keys, seen.keys, n, x);",
                "",
                0,
            ),
            (
                "stick: weights of the block before kept",
                "clear(block, i, seen_keys, seen.keys, n, x);",
                "",
                1,
            ),
            ("rows of a tile not cleared to its end", "std::max(k_.mr1, k_.mr2)", "1"),
            ("narrow heads: keys before the window not cleared", "clear_before(seen, r0, x);", ""),
            (
                "gradient of q of the block before kept",
                "std::fill(x.grad_q, x.grad_q + numbers, T(0));",
                "",
            ),
            (
                "delta without the gradient of the rest",
                "x.delta[r] -= grad_state[r * p_.num_heads];",
                "",
            ),
            ("gradients of the first block of keys for all", "grad_k + j0 * ld_", "grad_k", 1),
            ("gradients of values of the first block for all", "grad_v + j0 * ld_", "grad_v", 1),
            (
                "rows that pad take part",
                "std::fill(from + block.count * width, from + block.padded * width, T(0));",
                "",
            ),
            (
                "sums of a chunk not cleared",
                "std::fill(grad_k, grad_k + p_.num_keys * ld_, T(0));",
                "",
            ),
            (
                "keys of a reduction lost",
                "std::min(p.num_keys, j0 + kAttentionReduceKeys)",
                "std::min(p.num_keys, j0 + kAttentionReduceKeys) - (j0 > 0)",
            ),
        )
        + of(
            "kernels/attention-inl.h",
            ("softcap: slope of another power", "slope = T(1) - t * t;", "slope = T(1) - t;"),
            (
                "softmax: factor of one",
                "exponential<T>(old[v] - most)",
                "exponential<T>(old[v] - old[v])",
            ),
            ("stick: sums of keys before forgotten", "sum[v] += g;", ""),
            (
                "stick: the key's own share forgotten",
                "g * (T(1) - z) - z * sum[v]",
                "g - z * sum[v]",
            ),
            ("softmax: delta forgotten", "load<T>(dp + at) - d[v]", "load<T>(dp + at)"),
        ),
    ),
    "routers": Family(
        (
            "topk_router",
            "topp_router",
            "expert_choice_router",
            "router_linear",
            "sort_by_expert",
        ),
        (
            "ops/test_topk_router.py",
            "ops/test_topp_router.py",
            "ops/test_expert_choice_router.py",
            "ops/test_router_linear.py",
            "ops/test_sort_by_expert.py",
        ),
        of(
            "topk_router.cpp",
            (
                "keys past the last expert not cleared",
                "std::fill(keys + E, keys + padded, kNoKey<T>);",
                "",
            ),
            (
                "groups: the best score for the sum of two",
                "value_of(first) + value_of(second)",
                "value_of(first)",
            ),
            (
                "groups: the last expert of a loser stays",
                "if (keys_[g] != kNoKey<T>) std::fill_n(keys + g * size, size, kNoKey<T>);",
                "if (keys_[g] != kNoKey<T>) std::fill_n(keys + g * size, size - 1, kNoKey<T>);",
            ),
            (
                "sum of the first token for all",
                "score[ids[k]] / sums[r]",
                "score[ids[k]] / sums[0]",
            ),
        )
        + of(
            "kernels/router_soa-inl.h",
            ("ties go to the larger id", "keys[e] > most", "keys[e] >= most"),
            (
                "softmax over one expert less",
                "sum += exponential<T, true>(tokens_of<Vec<T>>(p.x, e, i) - most);",
                "if (e + 1 < experts) sum += exponential<T, true>(tokens_of<Vec<T>>(p.x, e, i) - "
                "most);",
            ),
            (
                "not renormalized by the last slot",
                "for (int64_t k = 0; k < top_k; ++k) total += w[k];",
                "for (int64_t k = 0; k + 1 < top_k; ++k) total += w[k];",
            ),
            (
                "backward: mean of the last slot only",
                "mean += score[k] * grad[k];",
                "mean = score[k] * grad[k];",
            ),
        )
        + of(
            "kernels/router_score-inl.h",
            (
                "sqrtsoftplus of a positive logit is its root",
                "root = vsqrt(x > 0 ? x + u * q : q);",
                "root = vsqrt(x > 0 ? x : q);",
            ),
            (
                "slope of sqrtsoftplus without that of the sigmoid",
                "return factor * T(0.5) / ((T(1) + u) * root);",
                "return factor * T(0.5) / root;",
            ),
        )
        + of(
            "kernels/router_choice-inl.h",
            (
                "maxima past the last block not cleared",
                "for (int64_t b = blocks; b % W != 0; ++b) block_max[b] = kNoKey<T>;",
                "",
            ),
            (
                "a tie goes to a later vector",
                "best.lane == W && best.index + 1 < vectors",
                "best.index + 1 < vectors",
            ),
        )
        + of(
            "topp_router.cpp",
            ("unused slots hold what was there", "std::fill(ids + n, ids + K, -1);", ""),
            (
                "one expert too many",
                "!(static_cast<T>(gathered) >= top_p)",
                "!(static_cast<T>(gathered) >= top_p * T(1.01))",
            ),
        )
        + of(
            "expert_choice_router.cpp",
            ("a tie too many", "t <= h.token", "t <= h.token + 1"),
            ("ties counted wrongly", "k > key", "k >= key"),
        )
        + of(
            "router_bwd.cpp",
            (
                "values past the last expert not cleared",
                "std::fill(own + E, own + padded, -inf);",
                "",
            ),
            (
                "renormalized: mean forgotten",
                "scale * (grad[k] - weighted) / r",
                "scale * grad[k] / r",
            ),
            (
                "a token lost between two batches",
                "std::min(batch, end - t0)",
                "std::min(batch, end - t0) - (t0 > begin && end - t0 > 1)",
            ),
        )
        + of(
            "router_linear.cpp",
            (
                "bias forgotten",
                "if (p.bias != nullptr) k.load_row(p.type, p.bias, bias, E, T(1));",
                "",
            ),
            (
                "parts of the tokens not added up",
                "k.axpy(kAccumulate<T>, sums + part * step, T(1), sums, step);",
                "",
            ),
            (
                "end of a row not cleared",
                "std::fill(buffer + r * pitch + n, buffer + (r + 1) * pitch, T(0));",
                "",
            ),
            (
                "a token lost between two blocks",
                "std::min(step, end - t)",
                "std::min(step, end - t) - (t > begin && end - t > 1)",
            ),
            (
                "a token lost between two blocks, backward",
                "std::min(block, end - t)",
                "std::min(block, end - t) - (t > begin && end - t > 1)",
            ),
        )
        + of(
            "kernels/router_linear-inl.h",
            (
                "gradients of the first experts lost",
                "kFirst ? Vec<T>{} : load<T>(grad_x + t * ld_gx + i)",
                "Vec<T>{}",
            ),
        ),
    ),
    "peer_ffn": Family(
        ("peer_ffn",),
        ("ops/test_peer_ffn.py",),
        of(
            "peer_ffn.cpp",
            (
                "an id of E is an expert",
                "id >= 0 && id < d.routing.num_experts",
                "id >= 0 && id <= d.routing.num_experts",
            ),
            ("the gate twice", "g * table.stride_g", "g * 0"),
            (
                "products of the last chunk lost",
                "std::min(kVectorsTogether, count - i)",
                "std::min(kVectorsTogether, std::max<int64_t>(count - i - 1, 0))",
            ),
            ("empty slots keep what was there", "std::fill(to, to + K, T(0));", ""),
            ("weights of the first slots", "to[i] = from[slots[i]];", "to[i] = from[i];"),
            ("y: sums of the token before", "std::fill(sum, sum + H, T(0));", "", 0),
            ("grad_x: sums of the token before", "std::fill(sum, sum + H, T(0));", "", 1),
            ("gradients: the weight forgotten", "dot[i] * weight[i]", "dot[i]"),
            (
                "grad_x: the gate's vectors alone",
                "token.add_up(n, G * n, grad, sum);",
                "token.add_up(n, n, grad, sum);",
            ),
            (
                "tables: one vector's factors for both",
                "(t * table.vectors + g) * K",
                "(t * table.vectors) * K",
            ),
            ("tables: the last slot alone", "s == slots", "s >= slots"),
            (
                "tables: rows without slots are not cleared",
                "std::fill(zeros, zeros + H, T(0));",
                "",
            ),
        ),
    ),
    "rows": Family(
        (
            "permute",
            "add_rms_norm",
            "rotary",
            "gated_act",
            "quantize_fp8",
        ),
        (
            "ops/test_permute.py",
            "ops/test_unpermute.py",
            "ops/test_add_rms_norm.py",
            "ops/test_rotary.py",
            "ops/test_gated_act.py",
        ),
        of(
            "permute.cpp",
            (
                "permute: rows past the end not cleared",
                "std::memset(rows + r * bytes, 0, bytes);",
                "",
            ),
            (
                "permute: the token before",
                "p.row_to_slot[r] / top_k",
                "std::max<int64_t>(p.row_to_slot[r] / top_k - 1, 0)",
            ),
        )
        + of(
            "unpermute.cpp",
            (
                "unpermute: the first row past the end counts",
                "p.slot_to_row[s] >= p.num_valid_rows",
                "p.slot_to_row[s] > p.num_valid_rows",
            ),
            (
                "unpermute: weight of the token's first slot",
                "weights != nullptr ? weights[s] : T(1)",
                "weights != nullptr ? weights[first] : T(1)",
                0,
            ),
            (
                "unpermute: second slot of a row forgotten",
                "k.axpy(p.type, grad_of(other), weights != nullptr ? weights[other] : T(1), "
                "grad, H);",
                "",
            ),
            (
                "unpermute: gradients of unused rows not cleared",
                "std::memset(out, 0, static_cast<size_t>(H * size));",
                "",
            ),
        )
        + of(
            "kernels/norm-inl.h",
            (
                "norm: tail of y missed",
                "for (; i < n; ++i) store_one(y + i, wide[i] * r * weight[i]);",
                "",
            ),
            ("norm: another power of rstd", "c * r * r * r", "c * r * r"),
            (
                "norm: gradient of the sum forgotten",
                "if (more != nullptr) v += load_as(more + i);",
                "",
            ),
            (
                "norm: gradient of the sum forgotten in the tail",
                "if (more != nullptr) v += to_float(more[i]);",
                "",
            ),
            ("norm: bias forgotten in the tail", "if (bias != nullptr) v += bias[i];", ""),
        )
        + of(
            "add_rms_norm.cpp",
            ("norm: sums of the first part for all", "(2 * part + which) * H", "which * H"),
            (
                "norm: a row lost at a part",
                "std::min(p.num_rows, begin + kNormPartRows)",
                "std::min(p.num_rows, begin + kNormPartRows) - (begin + kNormPartRows < "
                "p.num_rows)",
            ),
        )
        + of(
            "rotary.cpp",
            ("rotary: angles of the first token for all", "s * p.half", "0 * p.half"),
            (
                "rotary: angles of the first sequence for all",
                "b * p.angles_stride_batch",
                "0 * p.angles_stride_batch",
            ),
        )
        + of(
            "kernels/rotary-inl.h",
            ("rotary: whole heads with the angles of the other half", "sign * sin[i]", "sin[i]", 0),
        )
        + of(
            "kernels/activation-inl.h",
            ("act: tail missed", "for (int64_t j = i; j < n; ++j) h[j] = out[j - i];", ""),
            ("act: up not limited", "u = u > limit ? splat<T>(limit) : u;", ""),
        )
        + of(
            "gated_act.cpp",
            ("act: interleaved gradients as halves", "weave ? row : grad", "grad"),
        )
        + of(
            "gemm/quantize_fp8_row.h",
            (
                "quantize: last of a block missed",
                "std::min(kFp8Block, n - i)",
                "std::min(kFp8Block, n - i) - (i > 0 && n - i > 1 && n - i < kFp8Block)",
            ),
        ),
    ),
}

# A number for each: what the library is told.
NUMBERED = [(f, m) for f, family in FAMILIES.items() for m in family.mutants]


def label(family: str, mutant: Mutant) -> str:
    return f"{family}: {mutant.name}"


def write_sources() -> Path:
    """A copy of the sources with all mutants in it."""
    source = WORK / "source"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    shutil.copytree(ROOT / "csrc", source / "csrc")
    (source / "python" / "moe_ops").mkdir(parents=True)
    for name in ("CMakeLists.txt", "pyproject.toml", "python/moe_ops/__init__.py"):
        shutil.copy(ROOT / name, source / name)
    (source / "mutant.h").write_text(HEADER)
    texts: dict[str, str] = {}
    faults = []
    for file in dict.fromkeys(mutant.file for _, mutant in NUMBERED):
        here = [(n, mutant) for n, (_, mutant) in enumerate(NUMBERED, 1) if mutant.file == file]
        try:
            texts[file] = mutated((ROOT / "csrc/cpu" / file).read_text(), here)
        except (LookupError, IndexError) as error:
            faults.append(f"{file}: {error}")
    if faults:
        raise SystemExit("\n".join(faults))
    texts["isa/tuning.cpp"] = (source / "csrc/cpu/isa/tuning.cpp").read_text() + SETTER
    for file, text in texts.items():
        (source / "csrc/cpu" / file).write_text(text)
    return source


def build() -> None:
    """Compiles them, and copies the package."""
    source, folder = write_sources(), WORK / "build"
    configure = [
        "cmake", "-S", source, "-B", folder, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_CXX_FLAGS=-include {source / 'mutant.h'}", "-DMOE_OPS_CUDA=off",
        "-DMOE_OPS_DEV=off", f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["ninja", "-C", folder, "--quiet", "-j2"], check=True)
    package = WORK / "python"
    shutil.rmtree(package, ignore_errors=True)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "python", package, ignore=ignore)
    for library in folder.glob("*.so"):
        shutil.copy(library, package / "moe_ops")


def environment(isa: str) -> dict[str, str]:
    path = os.pathsep.join((str(WORK / "python"), str(ROOT)))
    return {**os.environ, "MOE_OPS_CPU_ISA": isa, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def make_alive(number: int) -> None:
    import moe_ops

    library = ctypes.CDLL(str(Path(moe_ops.__file__).parent / "libmoe_ops.so"))
    library.moe_ops_set_mutant(number)


def ask(isa: str, numbers: list[int], short: bool) -> dict[int, str]:
    """Runs in a process at `isa`: {mutant: the case that notices it}."""
    import random

    import torch
    from bench.harness.dev import moe_ops_dev
    from tests.sweep.cases import cost_of, sweep
    from tests.sweep.cases import short as short_cases
    from tests.sweep.checks import fault_of

    from moe_ops import _library

    torch.set_num_threads(1)
    assert _library.cpu_isa() == isa, _library.cpu_isa()
    if short:
        cases = short_cases(moe_ops_dev.block_sizes())
    else:
        cases = [c for c in sweep(moe_ops_dev.block_sizes()) if cost_of(c) <= 4_000_000]
        random.Random(1).shuffle(cases)
    fault_of(cases[0])
    noticed: dict[int, str] = {}
    for number in numbers:
        family = NUMBERED[number - 1][0]
        ops = FAMILIES[family].ops
        mine = [c for c in cases if c["op"] in ops]
        if not short:
            mine = mine[:1500]
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            signal.alarm(CHILD_SECONDS)
            make_alive(number)
            for case in mine:
                os.write(write, f"{case}\n".encode())
                if fault_of(case):
                    os._exit(1)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            lines = pipe.read().splitlines()
        _, status = os.waitpid(child, 0)
        if status != 0:
            how = "" if os.WIFEXITED(status) else f"killed by signal {os.WTERMSIG(status)} at "
            noticed[number] = f"{how}{lines[-1] if lines else 'nothing'}"
    return noticed


def ask_tests(isa: str, number: int, tests: tuple[str, ...]) -> str:
    """Returns which test of these files notices the mutant, or nothing."""
    plugin = WORK / "plugin"
    plugin.mkdir(exist_ok=True)
    (plugin / "alive.py").write_text(
        "import os, sys\nsys.path.insert(0, os.environ['MOE_TESTS'])\n"
        "import mutants_cpu\nmutants_cpu.make_alive(int(os.environ['MOE_MUTANT']))\n"
    )
    env = environment(isa)
    env["PYTHONPATH"] = os.pathsep.join((env["PYTHONPATH"], str(plugin)))
    env |= {"MOE_MUTANT": str(number), "MOE_TESTS": str(Path(__file__).parent)}
    for test in tests:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "alive",
            "-p",
            "no:cacheprovider",
        ]
        run = subprocess.run(
            [*command, f"tests/{test}"], cwd=ROOT, env=env, capture_output=True, text=True
        )
        if run.returncode != 0:
            failed = re.findall(r"^FAILED (\S+)", run.stdout, re.M)
            return failed[0] if failed else f"{test} ended with {run.returncode}"
    return ""


def in_process(isa: str, numbers: list[int], short: bool) -> dict[int, str]:
    command = [sys.executable, __file__, "--ask", isa, *(["--long"] if not short else [])]
    run = subprocess.run(
        [*command, *map(str, numbers)], cwd=ROOT, env=environment(isa), capture_output=True,
        text=True,
    )  # fmt: skip
    if run.returncode != 0:
        raise RuntimeError(run.stderr[-2000:])
    return {int(n): how for n, how in json.loads(run.stdout.splitlines()[-1]).items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("only", nargs="*", help="families, or 'family: mutant'")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--no-build", action="store_true", help="use what is in build/mutants")
    parser.add_argument("--isas", type=lambda s: s.split(","), default=list(ISAS))
    parser.add_argument("--short-only", action="store_true", help="ask the boundary test alone")
    parser.add_argument("--ask", default="", help=argparse.SUPPRESS)
    parser.add_argument("--long", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ask:
        print(json.dumps(ask(args.ask, [int(n) for n in args.only], not args.long)))
        return 0
    chosen = [
        n
        for n, (family, mutant) in enumerate(NUMBERED, 1)
        if not args.only or family in args.only or label(family, mutant) in args.only
    ]
    if args.list:
        print("\n".join(label(*NUMBERED[n - 1]) for n in chosen))
        return 0
    if not args.no_build:
        build()
    result: dict[str, str | None] = {label(*NUMBERED[n - 1]): None for n in chosen}

    def tell(found: dict[int, str], how: str) -> None:
        for n, what in found.items():
            result[label(*NUMBERED[n - 1])] = f"{how}: {what}"
            print(f"{label(*NUMBERED[n - 1])}\n    {how}: {what}", file=sys.stderr, flush=True)

    def left() -> list[int]:
        return [n for n in chosen if result[label(*NUMBERED[n - 1])] is None]

    from moe_ops import _library

    isas = [isa for isa in args.isas if isa in _library.supported_isas()]
    started = time.monotonic()
    for isa in isas:
        if left():
            tell(in_process(isa, left(), True), f"test_boundaries, {isa}")
    if not args.short_only:
        for n in left():
            for isa in isas[:2]:
                test = ask_tests(isa, n, FAMILIES[NUMBERED[n - 1][0]].tests)
                if test:
                    tell({n: test}, isa)
                    break
        for isa in isas:
            if left():
                tell(in_process(isa, left(), False), f"make fuzz, {isa}")
    json.dump(result, sys.stdout, indent=1)
    survivors = sum(how is None for how in result.values())
    seconds = time.monotonic() - started
    print(f"\n{survivors} of {len(result)} survived; {seconds:.0f} s", file=sys.stderr)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
