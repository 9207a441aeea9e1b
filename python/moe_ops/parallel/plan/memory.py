"""Memory of a rank: persistent tensors of layers, dispatchers and FSDP2, and temporary ones.

Letters: T tokens per rank, H hidden size, I intermediate size, E experts, K experts per token, R
rows that a rank receives for its experts, b bytes per element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .cluster import Cluster, Layout, ParallelJob
from .shape import Matrix, ModelShape
from .traffic import LOSS_TOKENS, expert_weights, rows_of

_FLOAT32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank, of the busiest one if `ParallelJob.imbalance` is above 1.

    Attributes:
        experts, dense: persistent weights: float32 master weights in training.
        gradients, optimizer: float32; Adam's two moments. Gradients are counted throughout, as from
            the second micro-batch on.
        activations: saved for backward, and a layer's temporary tensors at the peak.
        dispatch: rows in flight in the layer of the peak.
        sharding: weights in use, their gradients and buffers of FSDP2 at the peak.
        workspace: memory of the experts' CUDA kernels while they run.
        moment: name of the peak moment.
    """

    experts: int
    dense: int
    gradients: int
    optimizer: int
    activations: int
    dispatch: int
    sharding: int
    workspace: int
    moment: str

    @property
    def total(self) -> int:
        states = self.experts + self.dense + self.gradients + self.optimizer
        return states + self.activations + self.dispatch + self.sharding + self.workspace


class _Moment(NamedTuple):
    name: str
    activations: int
    dispatch: int
    sharding: int
    workspace: int


class _Sizes(NamedTuple):
    """Bytes of a group of weights: of all weights in their working dtype (b bytes per element), and
    of this rank's shard in float32."""

    used: int
    own: int


class _Layer(NamedTuple):
    """Bytes of a layer.

    kept: saved for backward, without rows.
    rows: of the experts, saved for backward.
    arriving: a buffer of R rows.
    given: rows that the experts save: R, or with "tokens" in training one per slot.
    returned: a buffer of returned rows.
    weighted: saved rows that were returned, for the gradients of routing weights.
    """

    kept: int
    rows: int
    arriving: int
    given: int
    returned: int
    weighted: int
    weights: _Sizes
    experts: _Sizes


def memory_of(
    shape: ModelShape, cluster: Cluster, job: ParallelJob, *, kernels: bool = True
) -> Memory:
    """Computes the memory of a rank.

    Args:
        shape, cluster, job: see `estimate_plan`.
        kernels: include the workspace of kernels, which a trace does not see.

    Raises:
        ValueError: incompatible sizes.
    """
    layout = Layout.of(cluster, job)
    weights_of = _training_sizes if job.training else _inference_sizes
    experts = weights_of(expert_weights(shape, layout, job), layout.expert_shards, job)
    ends = [Matrix(shape.vocab_size, shape.hidden_size)]
    split = layout.dense_shards

    def dense(weights: list[Matrix]) -> _Sizes:
        shared = [Matrix(-(-m.rows // job.tp), m.columns) for m in weights]
        return weights_of(shared, split, job)

    dense_layer = _layer(shape, job, False, dense(shape.dense_parts(False)), _Sizes(0, 0))
    moe_layer = _layer(shape, job, True, dense(shape.dense_parts(True)), experts)
    embedding = dense(ends)
    head = dense([*ends, Matrix(shape.hidden_size, 1)])
    own = embedding.own + (0 if shape.tied else head.own)
    own += shape.num_dense_layers * dense_layer.weights.own
    own += shape.num_moe_layers * moe_layer.weights.own
    own_experts = shape.num_moe_layers * experts.own
    if job.training:
        moments = _training(shape, job, dense_layer, moe_layer, embedding, head)
    else:
        moments = _inference(shape, job, dense_layer, moe_layer)
    if not kernels:
        moments = [moment._replace(workspace=0) for moment in moments]
    fullest = max(moments, key=lambda m: sum(m[1:]))
    states = own + own_experts if job.training else 0
    return Memory(
        own_experts,
        own,
        states,
        2 * states,
        fullest.activations,
        fullest.dispatch,
        fullest.sharding,
        fullest.workspace,
        fullest.name,
    )


def _training_sizes(weights: list[Matrix], shards: int, job: ParallelJob) -> _Sizes:
    share = sum(m.share(shards) for m in weights)
    return _Sizes(share * shards * job.element_size, share * _FLOAT32)


def _inference_sizes(weights: list[Matrix], shards: int, job: ParallelJob) -> _Sizes:
    share = sum(m.share(shards) for m in weights)
    return _Sizes(0 if shards == 1 else share * shards, share * job.element_size)


def _layer(
    shape: ModelShape, job: ParallelJob, moe: bool, weights: _Sizes, experts: _Sizes
) -> _Layer:
    t, h, b = job.tokens, shape.hidden_size, job.element_size
    # The layer's input and the sum after attention, the outputs of both norms and their statistics.
    kept = 4 * t * h * b + 4 * t * _FLOAT32 + _attention(shape, job)
    if not moe:
        width = shape.dense_intermediate_size
        return _Layer(kept + t * _activated(shape, width) * b, 0, 0, 0, 0, 0, weights, experts)
    kept += t * _activated(shape, shape.shared_intermediate_size) * b
    if shape.float32_router and b < _FLOAT32:  # Copies of the operands, and the logits.
        kept += (t * h + shape.num_experts * h + t * shape.num_experts) * _FLOAT32
    else:
        kept += t * shape.num_experts * b
    rows = rows_of(shape, job)
    slots = t * shape.top_k
    kept += 5 * slots * _FLOAT32  # Ids, weights and maps between slots and rows.
    arriving = returned = 0
    if rows.name not in ("local", "shared"):
        arriving = rows.num_received * h * b
    if rows.name in ("slots", "tokens", "padded"):
        returned = rows.num_sent * h * job.result_size
    by_slot = rows.name == "tokens" and job.training
    given = rows.slots * h * b if by_slot else arriving
    weighted = returned if rows.name == "slots" else 0
    inside = rows.slots * (shape.width * b + 4 * _FLOAT32)
    saved = given + inside + weighted
    return _Layer(kept, saved, arriving, given, returned, weighted, weights, experts)


def _activated(shape: ModelShape, width: int) -> int:
    """Returns the features per token that a dense network saves: before and after its
    activation."""
    return width * (3 if shape.gated else 2)


def _attention(shape: ModelShape, job: ParallelJob) -> int:
    """Returns the bytes that attention saves: inputs of its last map and its kernel, and the
    kernel's sums."""
    heads, head = shape.num_heads, shape.head_size
    sums = job.tokens * heads * _FLOAT32
    if not shape.kv_rank:
        features = 2 * heads * head + 2 * shape.num_kv_heads * head
    else:
        unrotated = head - shape.rope_size
        keys = heads * (unrotated + shape.v_size) + heads * head  # As projected, and as used.
        latent = shape.q_rank + shape.kv_rank + shape.rope_size
        features = latent + heads * head + keys + heads * shape.v_size
    return job.tokens * features * job.element_size + sums


def _workspace(shape: ModelShape, job: ParallelJob, backward: bool) -> int:
    """Returns the workspace of `moe_ffn` on CUDA, which has room for all slots, including those of
    other ranks' experts."""
    h, i, width = shape.hidden_size, shape.intermediate_size, shape.width
    columns = max(i, h) + width if backward else i + h
    return rows_of(shape, job).slots * columns * job.element_size


def _fp8_rows(moe: _Layer, job: ParallelJob) -> int:
    """Returns the bytes of rows in fp8 and of their conversion to the dtype of x: three float32
    tensors."""
    elements = moe.arriving // job.element_size
    return elements * (1 + 3 * _FLOAT32) if job.fp8 else 0


def _training(
    shape: ModelShape, job: ParallelJob, dense: _Layer, moe: _Layer, embedding: _Sizes, head: _Sizes
) -> list[_Moment]:
    """Returns the candidate moments of peak memory in backward."""
    row = job.tokens * shape.hidden_size * job.element_size
    all_kept = moe.kept + moe.rows
    if job.recompute:
        routing = job.tokens * shape.top_k * 3 * _FLOAT32
        below = shape.num_layers * row + shape.num_moe_layers * routing
        last = all_kept - row
    else:
        below = (shape.num_moe_layers - 1) * all_kept + shape.num_dense_layers * dense.kept
        last = all_kept
    ends = 2 * row  # Input and output of the last norm.
    logits = min(LOSS_TOKENS, job.tokens) * shape.vocab_size
    before = moe if shape.num_moe_layers > 1 or not shape.num_dense_layers else dense
    gathered = before.weights.used  # Weights of the layer before, prefetched.
    # FSDP2 keeps the float32 copy of the last summed gradients until the next ones.
    copy = _FLOAT32 // job.element_size
    held = copy * head.used
    kept_now = 0 if job.recompute else last
    # Weights in use, the gradient of a chunk, and with several chunks the sum before and after.
    pieces = 4 if job.tokens > LOSS_TOKENS else 2
    return [
        _Moment(
            "the loss",
            below + kept_now + ends + logits * job.element_size,
            0,
            pieces * head.used + moe.weights.used,
            0,
        ),
        _Moment(
            "the softmax of the loss",
            below + kept_now + ends + 3 * logits * _FLOAT32,
            0,
            pieces // 2 * head.used + moe.weights.used,
            0,
        ),
        _Moment(
            "backward of the last experts",
            below + last - moe.given - moe.weighted + 2 * row,
            3 * moe.given,
            held + gathered + moe.weights.used + 2 * moe.experts.used,
            _workspace(shape, job, True),
        ),
        _Moment(
            "backward of the last combine",
            below + last - moe.given - moe.weighted + 2 * row,
            # Rows of the experts, returned rows, their gradient, and if its dtype differs, the
            # gradient in that of x.
            moe.given + moe.weighted + moe.returned + (moe.arriving if job.fp32_combine else 0),
            held + gathered + moe.weights.used + moe.experts.used,
            0,
        ),
        _Moment(
            "gradients of the last experts",
            below + last - moe.rows + 2 * row,
            0,
            gathered + moe.weights.used + (1 + copy) * moe.experts.used + moe.experts.own,
            0,
        ),
        _Moment(
            "backward of the last attention",
            below + last - moe.rows + 2 * row + _attention(shape, job),
            0,
            gathered + 2 * moe.weights.used + copy * moe.experts.used,
            0,
        ),
        _Moment(
            "the arrival of fp8 rows",
            below + moe.kept,
            _fp8_rows(moe, job),
            gathered + moe.weights.used + moe.experts.used + (held if job.recompute else 0),
            0,
        ),
        _Moment(
            "gradients of the embedding",
            2 * row,
            0,
            (1 + copy) * embedding.used + embedding.own,
            0,
        ),
    ]


def _inference(shape: ModelShape, job: ParallelJob, dense: _Layer, moe: _Layer) -> list[_Moment]:
    """Returns the candidate moments of peak memory in forward."""
    t, h, b = job.tokens, shape.hidden_size, job.element_size
    row = t * h * b
    rows = rows_of(shape, job)
    back = row if rows.name == "gather" else moe.returned
    used = moe.weights.used + moe.experts.used
    router = moe.kept - 4 * row - _attention(shape, job)
    moments = [
        _Moment("attention", 3 * row + _attention(shape, job), 0, used, 0),
        _Moment(
            "the experts",
            5 * row,
            # Received rows, the experts' outputs, returned rows.
            moe.arriving * (job.element_size + job.result_size) // job.element_size + back,
            used,
            _workspace(shape, job, False),
        ),
        _Moment("the arrival of fp8 rows", 4 * row, _fp8_rows(moe, job), used, 0),
        _Moment("the router and shared experts", 3 * row + router, 0, used, 0),
    ]
    if shape.num_dense_layers:
        width = t * _activated(shape, shape.dense_intermediate_size) * b
        moments.append(_Moment("a dense network", 3 * row + width, 0, dense.weights.used, 0))
    return moments
