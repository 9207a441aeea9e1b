"""examples/train_ep.py, as its text says to start it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.helpers.fresh_python import run_python

pytestmark = pytest.mark.cpu_only
ROOT = Path(__file__).parents[2]


def run(folder, processes, *args, code=0):
    """{step: loss} that the example prints; its errors where it must fail with `code`."""
    text = "the quick brown fox jumps over the lazy dog; " * 100
    (folder / "text.txt").write_text(text)
    example = [str(ROOT / "examples" / "train_ep.py"), "--folder", str(folder / "run")]
    example += ["--data", str(folder / "text.txt"), *args]
    if processes == 1:  # What torchrun tells a single process; it takes seconds to start.
        alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        result = run_python(*example, env=alone, cwd=folder, timeout=300)
    else:
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        result = run_python("-m", *torchrun, *example, cwd=folder, timeout=300)
    assert result.returncode == code, result.stderr[-4000:]
    if code:
        return result.stderr
    assert "tokens/s" in result.stdout and "128 tokens per step" in result.stdout
    found = re.findall(r"step (\d+)  loss ([\d.]+)", result.stdout)
    return {int(step): float(loss) for step, loss in found}


def test_example_trains_and_resumes_at_another_size(tmp_path):
    """Losses and learning rates are those of a run that was not interrupted."""
    how = ("--batch-size", "2", "--warmup-steps", "2", "--schedule-steps", "8")
    first = run(tmp_path, 2, "--ep", "2", "--steps", "3", "--save-every", "2", *how)
    saved = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert saved == ["step-2", "step-3"]
    then = run(tmp_path, 1, "--steps", "5", *how)
    assert list(first) == [1, 2, 3] and list(then) == [4, 5]
    other = tmp_path / "other"
    other.mkdir()
    alone = run(other, 1, "--steps", "5", *how)
    for step, loss in alone.items():
        assert (first | then)[step] == pytest.approx(loss, rel=1e-4)
    errors = run(tmp_path, 1, "--steps", "6", *how[:-1], "9", code=2)
    assert "train_ep: schedule_steps must be that of" in errors and "Traceback" not in errors


def test_bad_arguments_of_the_example_are_one_sentence(tmp_path):
    errors = run(tmp_path, 1, "--ep", "3", code=2)
    assert errors == "train_ep: --ep must divide the 1 processes and the 8 experts, got 3.\n"
