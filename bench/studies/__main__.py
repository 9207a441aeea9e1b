"""The command line: ``python -m bench.studies [SYSTEM ...] --hours 2``, and `train`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from bench.harness.arguments import whole
from moe_ops._files import make_folder, write_text

from . import page, queue, registry, train, worth
from .inference import power
from .study import FIRST_SEED, Results, Study

PILOT_SEEDS = range(3)
assert PILOT_SEEDS.stop <= FIRST_SEED


def hours(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1000:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1000, got {text}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.studies",
        epilog="python -m bench.studies train SYSTEM --folder FOLDER trains one system; python -m "
        "bench.studies efficiency counts and measures claims of efficiency.",
        description="Puts what the systems of the zoo claim to the test. Runs what is missing, "
        "goes on with what was cut, and writes results and pages into the tree.",
    )
    parser.add_argument("systems", nargs="*", metavar="SYSTEM", help=", ".join(registry.NAMES))
    parser.add_argument("--hours", type=hours, default=2.0, help="how long (2)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument(
        "--jobs", type=whole(1, 1024), default=cores, help="runs at a time, one thread each (cores)"
    )
    parser.add_argument("--study", help="only this one, of `--list`")
    parser.add_argument(
        "--folder", type=Path, default=queue.CHECKPOINTS, help="of checkpoints (%(default)s)"
    )
    parser.add_argument(
        "--list", action="store_true", help="studies, what is done, left, and promised"
    )
    parser.add_argument("--pages", action="store_true", help="write the pages and run nothing")
    parser.add_argument(
        "--again",
        nargs=3,
        metavar=("STUDY", "RUN", "SEED"),
        help="do one run again and say whether it gives the stored numbers",
    )
    parser.add_argument(
        "--pilot", metavar="STUDY", help="run seeds 0 to 2, which no test uses, and say the power"
    )
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if given[:1] == ["train"]:
            return train.main(given[1:])
        if given[:1] == ["efficiency"]:
            from .efficiency import main as efficiency

            return efficiency.main(given[1:])
        if given[:1] == ["power"]:
            from . import planning

            return planning.main(given[1:])
        if given[:1] == ["published"]:
            from . import published

            return published.main(given[1:])
        options = parser.parse_args(given)
        if options.again:
            return again(*options.again)
        if options.pilot:
            return pilot(registry.study(options.pilot), options.folder)
        studies = registry.studies(tuple(options.systems))
        if options.study:
            studies = [registry.study(options.study)]
        if options.list:
            for study in sorted(studies, key=lambda s: s.rank):
                print(listed(study))
            return 0
        if not options.pages:
            left = queue.work(
                studies, hours=options.hours, jobs=options.jobs, folder=options.folder
            )
            if left:
                print(f"{left} runs are left: start the same command again")
        for path in page.write():
            print(f"wrote {path}")
    except (ImportError, FileNotFoundError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")
    return 0


def listed(study: Study) -> str:
    """Returns a study as one line."""
    store = queue.Store(study)
    total, left = len(study.runs) * study.seeds, len(store.missing())
    return (
        f"{study.name}: {total - left} of {total} runs, {left * store.minutes():.0f} min left; "
        f"{worth.said(worth.decisions(study))}"
    )


def pilot(study: Study, folder: Path) -> int:
    """Runs the pilot seeds, stores them with the checkpoints, and prints the resulting power
    estimates."""
    path = folder / "pilots" / f"{study.name}.json"
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    for seed in PILOT_SEEDS:
        for run in study.runs:
            if str(seed) not in found.setdefault(run, {}):
                item = queue.Item(study.name, run, seed)
                found[run][str(seed)] = queue.perform(item, folder / "pilots", float("inf"))
                make_folder(path.parent)
                write_text(path, json.dumps(found, indent=1) + "\n")
                print(f"{item}: {found[run][str(seed)]['rows']}", flush=True)
    runs = {run: {int(seed): result for seed, result in of.items()} for run, of in found.items()}
    results = Results(runs, PILOT_SEEDS)
    for h in study.hypotheses:
        values = h.of(results)
        mean, deviation = fmean(values), stdev(values)
        beyond = h.bound - mean if h.below else mean - h.bound
        chance = power(beyond, deviation, study.seeds) if deviation > 0 else float(beyond > 0)
        print(
            f"{h.statement}: {mean:.3g} with a deviation of {deviation:.2g} a seed; {study.seeds} "
            f"seeds show it with a chance of {chance:.2f}"
        )
    return 0


def again(name: str, run: str, seed: str) -> int:
    """Repeats one run without writing anything; returns 1 if its numbers differ from the stored
    ones."""
    study = registry.study(name)
    if run not in study.runs or not seed.isdecimal() or int(seed) not in study.numbers:
        raise ValueError(
            f"--again: {name} must have the run and the seed, one of {', '.join(study.runs)} and "
            f"of {study.numbers.start} to {study.numbers.stop - 1}, got {run!r} and {seed}."
        )
    stored = queue.Store(study).find(run, int(seed))
    found = queue.perform(queue.Item(name, run, int(seed)), None, float("inf"))
    assert found is not None
    print(json.dumps(found["rows"], indent=1))
    if stored is None:
        print("no stored run to compare it with")
        return 0
    same = {**found, "seconds": 0} == {**stored, "seconds": 0}
    print("the stored numbers" if same else f"other numbers than stored: {stored['rows']}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
