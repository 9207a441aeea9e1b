"""Breaks `moe_ops.parallel` in one place at a time and asks whether tests/parallel notices.

    python tests/mutation/mutants_parallel.py            # all of them
    python tests/mutation/mutants_parallel.py slots "rebalance: gradients stay"
    python tests/mutation/mutants_parallel.py --list

Prints {mutant: the test that noticed it, or null} as JSON, a line for each on the way. Each runs in
a copy of the package under build/mutants_parallel, which needs the libraries that a build leaves in
python/moe_ops. A mutant that no result can show is none: what is sent too much, or too early.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "build" / "mutants_parallel" / "python"
SECONDS = 600

DISPATCH = ("test_dispatch.py", "test_comm.py", "test_layers.py", "test_placement.py")
SHARDING = ("test_sharding.py", "test_rebalance.py", "test_checkpoint.py", "test_banks.py")


class Mutant(NamedTuple):
    """`right`, which is once in a file of moe_ops/parallel, becomes `wrong`.

    tests: files to ask. first: which of their tests to ask first, as of pytest's -k; "" is the
    first word of the name.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...] = DISPATCH
    first: str = ""


MUTANTS = [
    Mutant(
        "slots: slots of no expert name a row",
        "exchange.py",
        "slot_to_row.masked_fill(slot_to_row >= num_sent, -1)",
        "slot_to_row.clamp(max=max(num_sent - 1, 0))",
        first="as_one_process and slots and dropped",
    ),
    Mutant(
        "slots: weights twice",
        "exchange.py",
        "back._replace(topk_weights=None)",
        "back",
        first="as_one_process and slots and input",
    ),
    Mutant(
        "slots: weights in the order of tokens",
        "exchange.py",
        "topk_weights.reshape(-1, 1).index_select(0, row_to_slot)",
        "topk_weights.reshape(-1, 1)[:num_sent]",
        first="as_one_process and slots and input",
    ),
    Mutant(
        "slots: ids of the sender's order",
        "exchange.py",
        "received.view(-1), output_size=num_rows",
        "received.flip(0).view(-1), output_size=num_rows",
        first="groups_of_two and slots",
    ),
    Mutant(
        "tokens: no gradient of weights",
        "exchange.py",
        "weights = permute(topk_weights, offsets, tokens, top_k=1)",
        "weights = permute(topk_weights.detach(), offsets, tokens, top_k=1)",
        first="groups_of_two and tokens",
    ),
    Mutant(
        "tokens: weights as autocast has them",
        "exchange.py",
        "weights = permute(topk_weights, offsets, tokens, top_k=1)",
        "weights = permute(topk_weights.to(x.dtype), offsets, tokens, top_k=1)",
        first="without_gradients and tokens",
    ),
    Mutant(
        "tokens: experts of the table forgotten",
        "exchange.py",
        """            topk_ids, self.num_ranks, self.placement.per_rank, self.table(topk_ids)
""",
        """            topk_ids, self.num_ranks, self.placement.per_rank
""",
        first="as_one_process and tokens and shuffled",
    ),
    Mutant(
        "padded: one row more than fits",
        "exchange.py",
        "(nth < capacity)",
        "(nth <= capacity)",
        first="drops",
    ),
    Mutant(
        "padded: dropped slots get the first line",
        "exchange.py",
        "F.pad(line, (0, 1), value=-1)",
        "F.pad(line, (0, 1), value=0)",
        first="drops",
    ),
    Mutant(
        "padded: a count of unused rows",
        "exchange.py",
        "offsets[-1].long() - fits.sum()",
        "tokens.shape[0] - fits.sum()",
        first="drops",
    ),
    Mutant(
        "exchange: gradients of results in bfloat16",
        "comm.py",
        "grad.to(dtype).contiguous()",
        "grad.to(torch.bfloat16).contiguous()",
        first="groups_of_two and tokens",
    ),
    Mutant(
        "exchange: gradients by the splits of the way there",
        "comm.py",
        "_ops.all_to_all_single(_compact(grad, grad_dtype), send, recv, name)",
        "_ops.all_to_all_single(_compact(grad, grad_dtype), recv, send, name)",
        first="test_all_to_all",
    ),
    Mutant(
        "exchange: fp8 rows lose their scale",
        "comm.py",
        "dequantized_rows(codes.view(torch.float8_e4m3fn), scale).to(dtype)",
        "codes.view(torch.float8_e4m3fn).to(dtype)",
        first="rows_in_fp8",
    ),
    Mutant(
        "exchange: gradients of a message by the splits of the way there",
        "comm.py",
        "_ops.all_to_all_single(home.pack(grads), send, recv, name)",
        "_ops.all_to_all_single(home.pack(grads), recv, send, name)",
        first="parts_of_one_message",
    ),
    Mutant(
        "exchange: parts of a message are not aligned",
        "packing.py",
        "(-(-width // align) * align for width in self._widths)",
        "iter(self._widths)",
        first="parts_of_one_message",
    ),
    Mutant(
        "exchange: the counts of this rank for those of others",
        "comm.py",
        "    return result\n\n\ndef to_host",
        "    return counts.clone()\n\n\ndef to_host",
        first="test_all_to_all",
    ),
    Mutant(
        "gather: the mean of gradients",
        "comm.py",
        '_ops.reduce_scatter_tensor(grad.contiguous(), "sum", n, name)',
        '_ops.reduce_scatter_tensor(grad.contiguous(), "avg", n, name)',
        first="equal_sizes",
    ),
    Mutant(
        "gather: another rank's experts",
        "dispatch.py",
        "first = self.rank * self.placement.per_rank",
        "first = (self.rank ^ 1) * self.placement.per_rank",
        first="groups_of_two and gather",
    ),
    Mutant(
        "shared: gradients of this rank's experts alone",
        "comm.py",
        "return _all_reduce(grad, ctx.group_name), None",
        "return grad, None",
        first="groups_of_two and shared",
    ),
    Mutant(
        "shared: gradients n times",
        "comm.py",
        """        return grad, None
""",
        """        return _all_reduce(grad, ctx.group_name), None
""",
        first="equal_sizes",
    ),
    Mutant(
        "shared: each rank's own table",
        "dispatch.py",
        "        self.table_of = 0\n",
        "",
        first="as_one_process and shared and replicas",
    ),
    Mutant(
        "combine: rounded before",
        "dispatch.py",
        'options["out_dtype"] = torch.float32',
        "pass",
        first="fp32_combine and tokens",
    ),
    Mutant(
        "combine: not rounded after",
        "dispatch.py",
        "return y.to(dtype) if self.fp32_combine else y",
        "return y",
        first="fp32_combine and tokens",
    ),
    Mutant(
        "codes: rounded once more",
        "dispatch.py",
        'getattr(bank, "takes_fp8", False)',
        "False",
        first="test_codes",
    ),
    Mutant(
        "recomputation: counts of other ids",
        "dispatch.py",
        "self._sizes[topk_ids] = version, sizes",
        "self._sizes[topk_ids] = version + 1, sizes",
        first="asks_for_no_counts",
    ),
    Mutant(
        "placement: the table of before",
        "dispatch.py",
        "        self.placement = placement\n        self._table: Tensor | None = None\n",
        "        self.placement = placement\n"
        '        self._table: Tensor | None = getattr(self, "_table", None)\n',
        SHARDING[1:],
        first="move_to_the_bit",
    ),
    Mutant(
        "placement: an expert more",
        "placement.py",
        "valid = (topk_ids >= 0) & (topk_ids < self.num_experts)",
        "valid = (topk_ids >= 0) & (topk_ids <= self.num_experts)",
        DISPATCH[::-1],
        first="test_to_physical",
    ),
    Mutant(
        "placement: no turns",
        "placement.py",
        "copies[rank % len(copies)]",
        "copies[0]",
        DISPATCH[::-1],
        first="take_turns",
    ),
    Mutant(
        "sharding: an off-by-one placement",
        "banks.py",
        "rows = list(sharding.placement.local(self.ep_mesh.get_local_rank()))",
        "rows = list(sharding.placement.local(self.ep_mesh.get_local_rank() - 1))",
        SHARDING,
        first="has_its_experts",
    ),
    Mutant(
        "sharding: ddp's gradients n times",
        "sharding.py",
        "local = grad.to_local() / ranks",
        "local = grad.to_local() / 1",
        SHARDING,
        first="ddp",
    ),
    Mutant(
        "sharding: the mean over shards alone",
        "sharding.py",
        "set_gradient_divide_factor(float(dp_mesh.size()))",
        "set_gradient_divide_factor(float(shards))",
        SHARDING,
        first="gradients_and_norm",
    ),
    Mutant(
        "sharding: a forced sum of one shard",
        "sharding.py",
        "        if shards > 1:\n            # Other factors",
        "        if True:\n            # Other factors",
        SHARDING,
        first="gradients_and_norm",
    ),
    Mutant(
        "replicas: counted in the norm",
        "sharding.py",
        "    local[again] = 0\n",
        "",
        SHARDING[1:],
        first="of_replicas",
    ),
    Mutant(
        "replicas: gradients of one place",
        "banks.py",
        "total = _sum_of_copies(rows, here, placement, mesh)",
        "total = rows",
        SHARDING[1:],
        first="of_replicas",
    ),
    Mutant(
        "rebalance: optimizer state stays",
        "balance.py",
        "            found.append(value)\n",
        "",
        SHARDING[1:],
        first="move_to_the_bit",
    ),
    Mutant(
        "rebalance: gradients stay",
        "balance.py",
        "if tensor.grad is None else [tensor.detach(), tensor.grad]",
        "if True else [tensor.detach(), tensor.grad]",
        SHARDING[1:],
        first="move_to_the_bit",
    ),
    Mutant(
        "rebalance: parts of FSDP2 are one",
        "balance.py",
        "    share = -(-per_rank // shards)\n",
        "    share = per_rank\n",
        SHARDING[1:],
        first="move_to_the_bit",
    ),
    Mutant(
        "rebalance: dispatchers are not told",
        "balance.py",
        "        bank.dispatcher.set_placement(new)\n",
        "",
        SHARDING[1:],
        first="move_to_the_bit",
    ),
    Mutant(
        "checkpoint: in the order of places",
        "checkpoint.py",
        "torch.Size((expert - (row - start), *others))",
        "torch.Size((place - (row - start), *others))",
        SHARDING[1:],
        first="order_of_experts",
    ),
    Mutant(
        "checkpoint: the columns of the first shard",
        "checkpoint.py",
        "others[0] = share * tensor.device_mesh.get_local_rank(mesh_dim)",
        "others[0] = 0",
        SHARDING[1:],
        first="columns",
    ),
    Mutant(
        "checkpoint: replicas written twice",
        "checkpoint.py",
        "        if first[expert] == place:\n            result.written",
        "        if True:\n            result.written",
        SHARDING[1:],
        first="order_of_experts",
    ),
]


def noticed_by(mutant: Mutant) -> str | None:
    """The first test that fails, or what else happens."""
    source = ROOT / "python" / "moe_ops" / "parallel" / mutant.file
    text = source.read_text()
    if text.count(mutant.right) != 1:
        raise ValueError(f"{mutant.name}: {mutant.file} must hold {mutant.right!r} once.")
    target = PACKAGE / "moe_ops" / "parallel" / mutant.file
    target.write_text(text.replace(mutant.right, mutant.wrong))
    env = {**os.environ, "PYTHONPATH": f"{PACKAGE}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/parallel/{name}" for name in mutant.tests]
    try:
        for chosen in (["-k", mutant.first or mutant.name.partition(":")[0]], []):
            run = subprocess.run(
                [*command, *chosen],
                cwd=ROOT,
                env=env,
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
            if run.returncode not in (0, 5):  # 5: no test of that name.
                failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.M)
                return failed[0] if failed else f"pytest ended with {run.returncode}"
    except subprocess.TimeoutExpired:
        return f"more than {SECONDS} s"
    finally:
        target.write_text(text)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("only", nargs="*", help="families, or 'family: mutant'")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    chosen = [
        m
        for m in MUTANTS
        if not args.only or m.name in args.only or m.name.partition(":")[0] in args.only
    ]
    if args.list:
        print("\n".join(m.name for m in chosen))
        return 0
    shutil.rmtree(PACKAGE, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "python", PACKAGE, ignore=ignore)
    result = {}
    started = time.monotonic()
    for mutant in chosen:
        result[mutant.name] = noticed_by(mutant)
        print(f"{mutant.name}\n    {result[mutant.name]}", file=sys.stderr, flush=True)
    json.dump(result, sys.stdout, indent=1)
    survivors = sum(how is None for how in result.values())
    seconds = time.monotonic() - started
    print(f"\n{survivors} of {len(result)} survived; {seconds:.0f} s", file=sys.stderr)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
