"""Measures a transformers model with its experts on the CPU (`moe_ops.hf.place`) in bfloat16 and
int4, for the steps cached and stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from bench.gpu.lease.child import UNFINISHED, Task
from bench.gpu.lease.decode import model_of
from bench.harness.files import rounded

# Tolerance of logits: the CPU's int4 kernels round tokens to 8 bits.
_TOLERANCE = 0.1

# From one number to the figures of a record, among them "error", the relative error of logits.
Measure = Callable[[int], dict[str, float]]


def run_cases(
    task: Task, step: str, unit: str, cases: Sequence[int], measure_of: Callable[[Any], Measure]
) -> tuple[int, str]:
    """Measures the cases that the journal lacks in each format. Returns status and summary.

    Args:
        step: the name of the step and of its records.
        unit: what the number of a case counts.
        measure_of: takes the model with experts of one format.
    """
    try:
        import moe_ops.hf
    except ImportError:
        return 0, "left out: transformers is not installed"
    end = time.perf_counter() + task.seconds
    done = {(r["format"], r[unit]) for r in task.journal.records(step, task.step)}
    wrong = []
    for config in (None, moe_ops.Int4WeightConfig()):
        label = "bfloat16" if config is None else config.label
        missing = [case for case in cases if (label, case) not in done]
        if not missing:
            continue
        model = model_of(task.dry, "cpu")
        started = time.perf_counter()
        moe_ops.hf.place(model, task.device, quantization=config)
        place_s = round(time.perf_counter() - started, 2)
        measure = measure_of(model)
        for case in missing:
            if time.perf_counter() > end:
                return UNFINISHED, f"the time was up before {case} {unit} in {label}"
            found = measure(case)
            record = {"format": label, unit: case, "place_s": place_s, **rounded(found)}
            task.journal.write(step, task.step, **record)
            print(f"{label}, {case} {unit}: {found}", flush=True)
            if not found["error"] <= _TOLERANCE:
                wrong.append(f"{label}, {case} {unit}: relative error {found['error']:.1e}")
    return (1 if wrong else 0), "; ".join(wrong) or f"{step}: measured"
