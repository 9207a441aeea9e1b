"""Quantised experts: int8 and int4 weights, how they are made, and what they cost in quality.

Letters in all files: T tokens, H hidden size, I intermediate size, E experts, K experts a token.
"""

from __future__ import annotations

from .baseline import BankRecord, Baseline, perplexity, record_baseline
from .convert import quantize_experts
from .formats import dequantize, quantize
from .report import BankQuality, QualityReport, quality_report
from .scales import ScaleChoice, find_x_scale

__all__ = [
    "BankQuality",
    "BankRecord",
    "Baseline",
    "QualityReport",
    "ScaleChoice",
    "dequantize",
    "find_x_scale",
    "perplexity",
    "quality_report",
    "quantize",
    "quantize_experts",
    "record_baseline",
]
