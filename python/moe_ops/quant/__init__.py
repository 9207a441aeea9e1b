"""Quantized experts and dense layers: how they are made, what they cost in quality, and the weights
of published checkpoints.

Letters in all files: T tokens, H hidden size, I intermediate size, E experts, K experts a token.
"""

from __future__ import annotations

from .calibration import CalibrationData, collect_calibration, perplexity
from .config import Fp8WeightConfig, Int4WeightConfig, Int8WeightConfig, WeightConfig
from .convert import quantize
from .experts import QuantizedExperts
from .formats import dequantize_weight, quantize_weight
from .fp8 import dequantize_fp8_blocks, quantize_fp8_blocks
from .linear import QuantizedLinear
from .report import QuantizationReport, compare_quality

__all__ = [
    "CalibrationData",
    "Fp8WeightConfig",
    "Int4WeightConfig",
    "Int8WeightConfig",
    "QuantizationReport",
    "QuantizedExperts",
    "QuantizedLinear",
    "WeightConfig",
    "collect_calibration",
    "compare_quality",
    "dequantize_fp8_blocks",
    "dequantize_weight",
    "perplexity",
    "quantize",
    "quantize_fp8_blocks",
    "quantize_weight",
]
