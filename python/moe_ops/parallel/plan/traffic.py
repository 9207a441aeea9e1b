"""Traffic of a rank in a layer, from the collectives of the dispatchers and of FSDP2.

Letters: T tokens per rank, H hidden size, E experts, K experts per token, n ranks of a group, S
rows that a rank sends, R rows that it receives.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import NamedTuple

from ..registry import _best as best_dispatcher
from .cluster import Layout, ParallelJob
from .shape import Matrix, ModelShape

# Number of tokens per chunk of the loss.
LOSS_TOKENS = 512
FP8_BLOCK = 128
KNOWN = ("gather", "local", "padded", "shared", "slots", "tokens")


class Message(NamedTuple):
    """A collective from the view of one rank.

    name: of the data.
    phase: "forward" or "backward".
    group: "ep", "dp", "efsdp" or "tp".
    kind: "all_to_all", "all_gather", "reduce_scatter" or "all_reduce".
    sent, received: bytes, without a rank's own part: each of n ranks passes on n - 1 parts in a
    gather or a reduction, and twice as many in an all-reduce.
    """

    name: str
    phase: str
    group: str
    kind: str
    sent: int
    received: int


@dataclass(frozen=True)
class Rows:
    """Rows of a rank in a layer with experts.

    name: of the dispatcher.
    sent, received: rows to and from each rank of the group, including this one.
    slots: of the busiest rank, for which its experts allocate memory: K' for each row that they
        get, or with "tokens" in training those of its own experts.
    expert_slots: those of its own experts.
    """

    name: str
    sent: list[int]
    received: list[int]
    slots: int
    expert_slots: int

    @property
    def num_sent(self) -> int:
        return sum(self.sent)

    @property
    def num_received(self) -> int:
        return sum(self.received)


def visits(shape: ModelShape, places: int) -> float:
    """Returns the mean number of equal, contiguous parts of all experts (ranks or nodes) that have
    one of a token's experts, if all selections that its groups allow are equally likely."""
    per_group = shape.num_experts // shape.num_groups
    k, groups, chosen = shape.top_k, shape.num_groups, shape.num_topk_groups
    allowed = shape.allowed_experts
    share = -(-shape.num_experts // places)
    found = 0.0
    for first in range(0, shape.num_experts, share):
        last = min(first + share, shape.num_experts)
        # Number of ways to select some of the groups that overlap this part, by (groups, experts of
        # this part in them).
        ways = {(0, 0): 1}
        held = range(first // per_group, (last - 1) // per_group + 1)
        for group in held:
            size = min(last, (group + 1) * per_group) - max(first, group * per_group)
            for (taken, experts), n in list(ways.items()):
                key = (taken + 1, experts + size)
                ways[key] = ways.get(key, 0) + n
        absent = sum(
            n * comb(groups - len(held), chosen - taken) * comb(allowed - experts, k)
            for (taken, experts), n in ways.items()
            if taken <= chosen
        )
        found += 1.0 - absent / (comb(groups, chosen) * comb(allowed, k))
    return found


def split_evenly(rows: int, ranks: int) -> list[int]:
    """Returns integers that differ by at most one, the larger ones first."""
    each, more = divmod(rows, ranks)
    return [each + (rank < more) for rank in range(ranks)]


def dispatcher_name(shape: ModelShape, job: ParallelJob) -> str:
    """Returns the name of the dispatcher that `make_dispatcher` selects.

    Raises:
        ValueError: a dispatcher whose sizes are unknown.
    """
    name = job.dispatch
    if name == "auto":
        name = best_dispatcher(
            job.ep, shape.num_experts, shape.top_k, job.shared_batch, job.same_bits
        )
    if name not in KNOWN:
        raise ValueError(
            f"plan: dispatch must be one of auto, {', '.join(KNOWN)}, got {job.dispatch!r}."
        )
    if (name == "local") != (job.ep == 1):
        raise ValueError(f"plan: dispatch must be local if and only if ep is 1, got {name!r}.")
    if job.fp8 and name not in ("slots", "tokens", "local"):
        raise ValueError(f"plan: fp8 must come with slots or tokens, got {name!r}.")
    return name


def rows_of(shape: ModelShape, job: ParallelJob) -> Rows:
    """Returns the numbers of rows sent with balanced routing; received rows are multiplied by
    `ParallelJob.imbalance`."""
    name, n, tokens, k = dispatcher_name(shape, job), job.ep, job.tokens, shape.top_k
    ours = round(tokens * k * job.imbalance)
    if name == "local":
        return Rows(name, [0], [0], tokens * k, tokens * k)
    if name in ("gather", "padded"):
        return Rows(name, [tokens] * n, [tokens] * n, n * tokens * k, ours)
    if name == "shared":
        return Rows(name, [], [], tokens * k, round(tokens * k * job.imbalance / n))
    rows = tokens * k if name == "slots" else round(tokens * visits(shape, n))
    received = round(rows * job.imbalance)
    slots = received
    if name == "tokens":
        slots = ours if job.training else received * k
    return Rows(name, split_evenly(rows, n), split_evenly(received, n), slots, ours)


def local_experts(shape: ModelShape, job: ParallelJob) -> int:
    """Returns the number of physical experts of a rank. If n does not divide E, some are already
    redundant."""
    return -(-shape.num_experts // job.ep) + max(
        0, job.redundant - (shape.num_experts % job.ep > 0)
    )


# ------------------------------------------------------------------------------ expert parallelism


def expert_messages(shape: ModelShape, job: ParallelJob) -> list[Message]:
    """Returns the collectives of a layer with experts, in forward and, in training, backward."""
    rows, n = rows_of(shape, job), job.ep
    if rows.name == "local":
        return []
    row, routing = shape.hidden_size * job.element_size, shape.top_k * 4
    packed = packed_bytes(row, routing, routing)
    result = shape.hidden_size * job.result_size
    if rows.name == "shared":
        forward = [_reduced("combine", "all_reduce", job.tokens * result, n)]
        backward = [
            _reduced("dispatch", "all_reduce", job.tokens * row, n),
            _reduced("weights", "all_reduce", job.tokens * routing, n),
        ]
    elif rows.name == "gather":
        forward = [
            _gathered("sizes", 8, n),
            _gathered("dispatch", job.tokens * packed, n),
            _reduced("combine", "reduce_scatter", n * job.tokens * result, n),
        ]
        backward = [
            _gathered("combine", job.tokens * row, n),
            _reduced("dispatch", "reduce_scatter", n * job.tokens * row, n),
            _reduced("weights", "reduce_scatter", n * job.tokens * routing, n),
        ]
    else:
        forward, backward = _all_to_all(shape, job, rows)
    if not job.training:
        return forward
    again: list[Message] = []
    if job.recompute:
        # Sizes are known, and torch stops once backward has what it needs: the sum's result is not
        # needed.
        ends = ("sizes", "combine") if rows.name in ("gather", "shared") else ("sizes",)
        again = [m for m in forward if m.name not in ends]
    return forward + [m._replace(phase="backward") for m in again + backward]


def _all_to_all(
    shape: ModelShape, job: ParallelJob, rows: Rows
) -> tuple[list[Message], list[Message]]:
    n, row, routing = job.ep, shape.hidden_size * job.element_size, shape.top_k * 4
    out, back = sum(rows.sent) - rows.sent[0], sum(rows.received) - rows.received[0]

    def there(name: str, size: int) -> Message:
        return Message(name, "forward", "ep", "all_to_all", out * size, back * size)

    def home(name: str, size: int) -> Message:
        return Message(name, "forward", "ep", "all_to_all", back * size, out * size)

    # As int32; the size of gathered tokens is an int64.
    counts = {"slots": local_experts(shape, job), "tokens": 2}.get(rows.name, 0)
    sizes = 4 * (n - 1) * counts
    first = [Message("sizes", "forward", "ep", "all_to_all", sizes, sizes)] if sizes else []
    # A row, in fp8 with its scales; except for slots, also with the weights and ids of its experts.
    parts = [row]
    if job.fp8:
        parts = [shape.hidden_size, 4 * -(-shape.hidden_size // FP8_BLOCK)]
    weights = [] if rows.name == "slots" else [routing]
    parts += 2 * weights
    size = packed_bytes(*parts) if len(parts) > 1 else row
    result = shape.hidden_size * job.result_size
    forward = [*first, there("dispatch", size), home("combine", result)]
    returned = packed_bytes(row, *weights) if weights else row
    backward = [there("combine", row), home("dispatch", returned)]
    return forward, backward


def packed_bytes(*widths: int) -> int:
    """Returns the bytes of a row of several tensors in one message, aligned to 4 bytes."""
    return sum(-(-width // 4) * 4 for width in widths)


def _gathered(name: str, share: int, n: int) -> Message:
    size = share * (n - 1)
    return Message(name, "forward", "ep", "all_gather", size, size)


def _reduced(name: str, kind: str, whole: int, n: int) -> Message:
    size = whole * (n - 1) // n * (2 if kind == "all_reduce" else 1)
    return Message(name, "forward", "ep", kind, size, size)


# -------------------------------------------------------------------------------------- FSDP2


def expert_weights(shape: ModelShape, layout: Layout, job: ParallelJob) -> list[Matrix]:
    """Returns the experts of a rank as FSDP2 shards them: by experts, or by their second dimension
    if there are too few."""
    local, shards = local_experts(shape, job), layout.expert_shards
    h, i, width = shape.hidden_size, shape.intermediate_size, shape.width
    sizes = [(width, h), (h, i), *([(width, 1), (h, 1)] if shape.bias else [])]
    matrices = []
    for rows, columns in sizes:
        if local < shards and rows % shards == 0:
            matrices.append(Matrix(rows, local * columns))
        else:
            matrices.append(Matrix(local, rows * columns))
    return matrices


def sharded_messages(
    weights: list[Matrix], group: str, layout: Layout, job: ParallelJob
) -> list[Message]:
    """Returns the collectives of weights that FSDP2 shards: gathers for forward and for backward,
    and float32 sums of gradients, finally over ranks with equal shards.

    Args:
        weights: the weights that are sharded.
        group: "dp" or "efsdp".
    """
    if group == "dp":
        shards, copies = layout.dense_shards, layout.dp // layout.dense_shards
    else:
        shards, copies = layout.expert_shards, layout.efsdp // layout.expert_shards
    share = sum(m.share(shards) for m in weights)
    if not job.training or not share:
        return []
    found = []
    if shards > 1:
        gathered = share * (shards - 1) * job.element_size
        summed = share * (shards - 1) * 4
        found += [
            Message("weights", "forward", group, "all_gather", gathered, gathered),
            Message("weights", "backward", group, "all_gather", gathered, gathered),
            Message("gradients", "backward", group, "reduce_scatter", summed, summed),
        ]
    if copies > 1:
        summed = 2 * share * 4 * (copies - 1) // copies
        name = f"{group} copies"
        found.append(Message("gradients", "backward", name, "all_reduce", summed, summed))
    return found


# ------------------------------------------------------------------------------------- whole models


def layer_messages(shape: ModelShape, layout: Layout, job: ParallelJob, moe: bool) -> list[Message]:
    """Returns all collectives of a layer, with or without experts."""
    found = sharded_messages(_parts(shape.dense_parts(moe), job), "dp", layout, job)
    if moe:
        banks = expert_weights(shape, layout, job)
        found += expert_messages(shape, job) + sharded_messages(banks, "efsdp", layout, job)
    if job.tp > 1:  # Sequence parallelism: gathered before attention, scattered after it.
        size = (job.tp - 1) * job.tokens * shape.hidden_size * job.element_size
        for phase, kinds in (
            ("forward", ("all_gather", "reduce_scatter")),
            ("backward", ("all_gather", "reduce_scatter", "all_gather")),
        )[: 2 if job.training else 1]:
            found += [Message("sequence", phase, "tp", kind, size, size) for kind in kinds]
    return found


def model_messages(shape: ModelShape, layout: Layout, job: ParallelJob) -> list[Message]:
    """Returns all collectives of a step: of all layers, of the embedding, and of the head with its
    norm."""
    embedding = Matrix(shape.vocab_size, shape.hidden_size)
    found = []
    for weights in ([embedding], [embedding, Matrix(shape.hidden_size, 1)]):
        found += sharded_messages(_parts(weights, job), "dp", layout, job)
    found += shape.num_moe_layers * layer_messages(shape, layout, job, True)
    return found + shape.num_dense_layers * layer_messages(shape, layout, job, False)


def _parts(weights: list[Matrix], job: ParallelJob) -> list[Matrix]:
    """Returns a rank's part of the weights under tensor parallelism."""
    return [Matrix(-(-m.rows // job.tp), m.columns) for m in weights]
