"""The experiment of `bench.studies.t2mir` at the authors' size, for a GPU.

    python -m bench.studies.t2mir.long --device cuda --folder runs/t2mir

Sizes and rates are those of the paper's PointRobot ("ad": 100000 steps, width 128, three layers,
four episodes of 20 steps) or of its DPT variant ("dpt"), with thousands of tasks instead of 45.
A run that is cut goes on from its checkpoints when it is started again with the same arguments;
arms that are done are not repeated. The folder holds checkpoints and, in the form of
bench/studies/results, what was measured. The authors' sizes have not been run so far: no GPU
was at hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from bench.studies.queue import Item, Store
from bench.studies.report import Report
from bench.studies.study import Run
from bench.studies.t2mir import claims as t2mir
from moe_ops.zoo.t2mir import T2MIRConfig

LONG = t2mir.Scale(
    T2MIRConfig(hidden_size=128, num_layers=3, num_heads=8, dropout=0.05),
    train=5000,
    horizon=20,
    step_size=0.1,
    histories=20,
    context=4,
    steps=100_000,
    batch=32,
    rate=3e-4,
    warm_up=5000,
    balance=0.1,
    every=5000,
)
SCALES = {
    "ad": LONG,
    # The balance weight of the authors' DPT.
    "dpt": dataclasses.replace(
        LONG,
        model=dataclasses.replace(LONG.model, variant="dpt", num_layers=4),
        balance=0.01,
    ),
    # Shows that everything works, in seconds.
    "smoke": dataclasses.replace(
        t2mir.SMALL,
        model=T2MIRConfig(hidden_size=16, num_layers=2, num_heads=2, dropout=0.0),
        train=40,
        valid=20,
        test=20,
        horizon=3,
        histories=4,
        steps=4,
        batch=8,
        warm_up=2,
        every=2,
        played=2,
    ),
}


def main(arguments: Sequence[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=tuple(SCALES), default="ad")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--steps", type=int, help="instead of the scale's")
    parser.add_argument("--tasks", type=int, help="to train on, instead of the scale's")
    parser.add_argument("--routing", choices=("causal", "token", "sequence"), default="causal")
    parser.add_argument("--folder", type=Path, required=True, help="of checkpoints and results")
    args = parser.parse_args(arguments)
    scale = SCALES[args.scale]
    scale = dataclasses.replace(
        scale,
        model=dataclasses.replace(scale.model, routing=args.routing),
        steps=args.steps or scale.steps,
        train=args.tasks or scale.train,
    )
    study = t2mir.study(
        "t2mir-long", args.scale, 0, 0.0, scale, seeds=args.seeds, device=args.device
    )
    try:
        # Results of another setting must not pass for this one's.
        store = Store(study, args.folder)
    except ValueError as error:
        parser.error(str(error))
    started = time.perf_counter()
    for arm, seed in store.missing():
        item = Item(study.name, arm, seed)

        def tell(share: float, left: float, item: Item = item) -> None:
            print(f"[{time.perf_counter() - started:8.0f} s] {item}: {share:.0%}", flush=True)

        run = Run(item.checkpoint(args.folder), tell=tell)
        result = study.runs[arm](seed, run)
        store.add(arm, seed, {**result, "seconds": run.seconds})
        run.clear()
        tell(1.0, 0.0)
    report = study.report("t2mir_long", store.data)
    assert report is not None
    print(report.markdown())
    return report


if __name__ == "__main__":
    main()
