"""Quantized experts and dense layers: how they are made, what they cost in quality, and the weights
of published checkpoints.

Letters in all files: T tokens, H hidden size, I intermediate size, E experts, K experts a token.
"""

from __future__ import annotations

from moe_ops.expert_weights import ExpertInputs, ExpertWeights

from .calibration import BankRecord, CalibrationData, collect_calibration, perplexity
from .config import Fp8WeightConfig, Int4WeightConfig, Int8WeightConfig, WeightConfig
from .convert import quantize
from .experts import QuantizedExperts
from .formats import dequantize_weight, quantize_weight
from .fp8 import dequantize_fp8_blocks, fuse_fp8_gate_up, quantize_fp8_blocks
from .linear import QuantizedLinear
from .report import BankQuality, QuantizationReport, compare_quality
from .scales import ScaleChoice, find_x_scale
from .stored_linear import StoredLinear

__all__ = [
    "BankQuality",
    "BankRecord",
    "CalibrationData",
    "ExpertInputs",
    "ExpertWeights",
    "Fp8WeightConfig",
    "Int4WeightConfig",
    "Int8WeightConfig",
    "QuantizationReport",
    "QuantizedExperts",
    "QuantizedLinear",
    "ScaleChoice",
    "StoredLinear",
    "WeightConfig",
    "collect_calibration",
    "compare_quality",
    "dequantize_fp8_blocks",
    "dequantize_weight",
    "find_x_scale",
    "fuse_fp8_gate_up",
    "perplexity",
    "quantize",
    "quantize_fp8_blocks",
    "quantize_weight",
]
