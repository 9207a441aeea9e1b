"""Steps that measure a selection of cases each, with the loop of bench.gpu.run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from bench.gpu import cases
from bench.gpu.cases import Case
from bench.gpu.lease.child import UNFINISHED, Task
from bench.gpu.run import Options, measure
from bench.harness.files import rounded

FOUR = ("mixtral-8x7b", "qwen3-30b", "deepseek-v3", "gpt-oss-120b")
# Even routing is the best case, random the usual one.
_ROUTINGS = ("balanced", "random")
_DECODE, _TRAIN = (1, 64), (4096, 32768)


@dataclass(frozen=True)
class Selection:
    parts: tuple[str, ...]
    models: tuple[str, ...] = FOUR
    tokens: tuple[int, ...] = (*_DECODE, *_TRAIN)
    routings: tuple[str, ...] = _ROUTINGS
    dtypes: tuple[str, ...] = ("bf16",)


SELECTIONS = {
    "block": Selection(cases.BLOCK),
    "half": Selection(cases.BLOCK, tokens=(64, 4096), routings=("random",), dtypes=("fp16",)),
    "fp8": Selection(("forward_fp8", "grouped_gemm_fp8"), dtypes=("fp8",)),
    "quantized": Selection(cases.QUANTIZED, tokens=(1, 64, 4096), dtypes=("int8", "int4")),
    "stored": Selection(cases.STORED, models=("gpt-oss-120b", "llama4-scout")),
    "ops": Selection(
        (*cases.MOVES, *cases.MOVES_TRAINING),
        models=("qwen3-30b", "deepseek-v3"),
        tokens=(64, 4096, 32768),
        routings=("balanced",),
    ),
    "attention": Selection(
        (*cases.LINEAR, *cases.ATTENTION),
        models=("jetmoe",),
        tokens=(64, 4096, 32768),
    ),
}


def options_of(task: Task) -> Options:
    selection = SELECTIONS[task.step]
    shapes = tuple(cases.MODELS[name] for name in selection.models)
    if task.dry:
        shapes = (cases.SMALL,)
        selection = replace(selection, tokens=(64,))
    # A case with a recorded time is done, a failed one is retried.
    done = frozenset(
        record["case"]
        for record in task.journal.records("cell", task.step)
        if record["cell"]["contenders"]
    )
    return Options(
        seconds=task.seconds,
        parts=selection.parts,
        shapes=shapes,
        tokens=selection.tokens,
        routings=selection.routings,
        dtypes=selection.dtypes,
        tiny=task.dry,
        done=done,
    )


def run(task: Task) -> tuple[int, str]:
    def keep(case: Case, cell: dict[str, Any]) -> None:
        task.journal.write("cell", task.step, case=str(case), cell=rounded(cell))

    options = options_of(task)
    result = measure(options, device=task.device, log=print, on_cell=keep)
    facts = ("card", "versions", "limits", "absent", "clocks", "date", "seconds")
    task.journal.write("measured", task.step, **{key: result[key] for key in facts})
    cells = result["cells"]
    failed = [c for c in cells if "moe_ops" not in c["contenders"]]
    text = f"{len(cells)} cases measured"
    if options.done:
        text += f", {len(options.done)} before"
    if failed:
        text += f", {len(failed)} without moe_ops"
    if left := result["left_out"]:
        text += f", {len(left)} left out"
    if "aborted" in result:
        return 1, f"{text}; stopped by a fault of the device: {result['aborted']}"
    return (1 if failed else UNFINISHED if left else 0), text
