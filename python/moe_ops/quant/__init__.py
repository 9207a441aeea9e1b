"""Quantised experts: int8 and int4 weights, how they are made, and what they cost in quality; and
the fp8 weights of DeepSeek's checkpoints.

Letters in all files: T tokens, H hidden size, I intermediate size, E experts, K experts a token.
"""

from __future__ import annotations

from moe_ops.expert_weights import ExpertInputs, ExpertWeights

from .calibration import BankRecord, CalibrationData, collect_calibration, perplexity
from .convert import quantize_experts
from .formats import dequantize_weight, quantize_weight
from .fp8 import dequantize_fp8_blocks, fuse_fp8_gate_up, quantize_fp8_blocks
from .report import BankQuality, QuantizationReport, compare_quality
from .scales import ScaleChoice, find_x_scale

__all__ = [
    "BankQuality",
    "BankRecord",
    "CalibrationData",
    "ExpertInputs",
    "ExpertWeights",
    "QuantizationReport",
    "ScaleChoice",
    "collect_calibration",
    "compare_quality",
    "dequantize_fp8_blocks",
    "dequantize_weight",
    "find_x_scale",
    "fuse_fp8_gate_up",
    "perplexity",
    "quantize_experts",
    "quantize_fp8_blocks",
    "quantize_weight",
]
