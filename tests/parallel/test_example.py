"""examples/train_ep.py, as its text says to start it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.helpers.fresh_python import run_python

pytestmark = pytest.mark.cpu_only
ROOT = Path(__file__).parents[2]


def run(folder, processes, *args):
    """{step: loss} that the example prints."""
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
    assert result.returncode == 0, result.stderr[-4000:]
    found = re.findall(r"step (\d+)  loss ([\d.]+)", result.stdout)
    return {int(step): float(loss) for step, loss in found}


def test_example_trains_and_resumes_at_another_size(tmp_path):
    first = run(tmp_path, 2, "--ep", "2", "--steps", "3")
    then = run(tmp_path, 1, "--steps", "5")
    assert list(first) == [1, 2, 3] and list(then) == [4, 5]
    other = tmp_path / "other"
    other.mkdir()
    alone = run(other, 1, "--steps", "5")
    for step, loss in alone.items():
        assert (first | then)[step] == pytest.approx(loss, rel=1e-4)
