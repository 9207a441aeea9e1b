"""Hit rates of the cache of placed experts."""

from __future__ import annotations

from bench.offload.slots import hit_rate, main


def test_hit_rate_by_hand():
    calls = [(0, [0, 1]), (0, [1, 2]), (0, [0, 1]), (0, [2, 1])]
    # Expert 2 evicts 0, and 0 evicts 2: only 1 is found, three times.
    assert hit_rate(calls, 2) == 3 / 8
    assert hit_rate(calls, 3) == 5 / 8
    # Expert 1 is the last of the first call, and no call with 1 evicts it.
    assert hit_rate(calls, 1) == 3 / 8
    assert hit_rate([], 1) == 0.0


def test_layers_have_their_own_slots():
    calls = [(0, [3]), (1, [4]), (0, [3]), (1, [4])]
    assert hit_rate(calls, 1) == 1 / 2


def test_the_table(capsys):
    main(["--steps", "1", "--tokens", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2].startswith("| 1 | 4.0 |") and lines[3].startswith("| 8 |")
