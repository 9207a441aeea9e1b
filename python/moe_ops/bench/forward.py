"""Forward of the experts of a layer: full precision, and int8 and int4 weights.

Every contender is checked against fp64 at every number of tokens before it is timed; one that is
wrong, fails or would take too long is reported as skipped with the reason.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any

import torch

from moe_ops.bench.contenders import Contender, MoeOpsPacked, tolerance
from moe_ops.bench.session import (
    TOO_SLOW_S,
    Session,
    in_a_sentence,
    make_cell,
    pace_of,
    relative_error,
    take_turns,
    tell,
)
from moe_ops.bench.shapes import DTYPES, SHAPES, Bank, exact_output, make_bank, make_tokens, take


def run_forward(session: Session) -> list[dict[str, Any]]:
    cells = []
    for shape in session.plan.shapes:
        for weight_format in session.plan.formats:
            bank = make_bank(SHAPES[shape], DTYPES[weight_format])
            contenders = session.chosen(weight_format)
            cells += _forward_cells(session, bank, weight_format, contenders)
            del bank
            gc.collect()
    return cells


def run_quantized(session: Session) -> list[dict[str, Any]]:
    """int8 and int4 contenders on weights that were bf16, beside our own bf16 (`bf16 moe_ops`)."""
    cells = []
    for shape in session.plan.quantized_shapes:
        bank = make_bank(SHAPES[shape], torch.bfloat16)
        for weight_format in ("int8", "int4"):
            contenders: list[Contender] = [*session.chosen(weight_format), _Reference()]
            cells += _forward_cells(session, bank, weight_format, contenders)
        del bank
        gc.collect()
    return cells


class _Reference(MoeOpsPacked):
    """Our bf16 among quantised contenders."""

    name = "bf16 moe_ops"
    formats = ()


def _forward_cells(
    session: Session, bank: Bank, weight_format: str, contenders: Sequence[Contender]
) -> list[dict[str, Any]]:
    plan, shape = session.plan, bank.shape
    batch = make_tokens(shape, bank.dtype, max(plan.tokens))
    rows = {T: checked_rows(T) for T in plan.tokens}
    needed = torch.tensor(sorted({row for each in rows.values() for row in each}))
    exact = exact_output(bank, batch, needed)
    skipped: dict[str, str] = {}
    bound: dict[str, Any] = {}
    for contender in contenders:
        try:
            bound[contender.name] = contender.prepare(bank, weight_format)
        except Exception as problem:
            skipped[contender.name] = in_a_sentence(problem)
    cells = []
    pace: dict[str, float] = {}
    for T in plan.tokens:
        tokens = take(batch, T)
        truth = exact[torch.searchsorted(needed, torch.tensor(rows[T]))]
        cell_skipped, jobs, errors, first = dict(skipped), {}, {}, {}
        for name, bind in bound.items():
            if pace.get(name, 0.0) * T > TOO_SLOW_S:
                cell_skipped[name] = f"would take about {pace[name] * T:.0f} s a call"
                continue
            try:
                with torch.no_grad():
                    job = bind(tokens)
                    started = time.perf_counter()
                    y = job()
                    first[name] = time.perf_counter() - started
                error = relative_error(y[torch.tensor(rows[T])], truth)
            except Exception as problem:
                cell_skipped[name] = in_a_sentence(problem)
                continue
            if not error <= tolerance(weight_format):
                cell_skipped[name] = f"wrong: relative error {error:.1e}"
                continue
            jobs[name], errors[name] = job, error
        with torch.no_grad():
            samples = take_turns(session, jobs, first)
        pace = pace_of(samples, T)
        cell = make_cell(
            "forward", bank, weight_format, tokens, samples, cell_skipped, plan.threads
        )
        for name, error in errors.items():
            cell["contenders"][name]["error"] = error
        cells.append(cell)
        tell(session, cell)
    return cells


def checked_rows(num_tokens: int) -> list[int]:
    """The first 16 rows and some 16 more over the whole batch."""
    stride = max(1, num_tokens // 16)
    return sorted({*range(min(16, num_tokens)), *range(0, num_tokens, stride), num_tokens - 1})
