from __future__ import annotations

import gc
import io

import pytest
import torch
from tests.helpers.moe import build_moe
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_ops.layers import record_routing, replay_routing

T, H, I, E, K = 12, 6, 4, 8, 2

REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
KINDS = {
    "softmax": {"renormalize": True},
    "sigmoid-bias": {"score_func": "sigmoid", "expert_bias": True, "renormalize": True},
    "topp": {"kind": "topp", "top_p": 0.5, "max_k": 4},
    "expert_choice": {"kind": "expert_choice"},
    "sparsemixer": {"kind": "sparsemixer", "sparsemixer_eps": 2.0},
    "jitter": {"jitter": 0.3},
}


class Unsteady(nn.Module):
    """Adds noise that no generator of torch knows about: another value on every call."""

    def __init__(self, scale: float = 0.5) -> None:
        super().__init__()
        self.scale = scale
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        generator = torch.Generator("cpu").manual_seed(self.calls)
        noise = torch.randn(x.shape, generator=generator, device="cpu")
        return x + self.scale * noise.to(x.device)


class Block(nn.Module):
    """An unsteady operation, a MoE, and a note of all ids that the experts were given."""

    def __init__(self, scale: float = 0.5, freeze: bool = True, **router) -> None:
        super().__init__()
        self.unsteady = Unsteady(scale)
        self.moe = build_moe(H, I, E, K, freeze_routing_in_recompute=freeze, **router)
        self.seen: list[Tensor] = []
        self.moe.experts.register_forward_pre_hook(
            lambda _, args: self.seen.append(args[2].clone())
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.unsteady(x))


def inputs(n: int = 1) -> list[Tensor]:
    return [torch.randn(T, H, requires_grad=True) for _ in range(n)]


def test_without_freezing_the_choice_flips():
    # The premise of the other tests.
    block = Block(freeze=False)
    (x,) = inputs()
    checkpoint(block, x, use_reentrant=True).sum().backward()
    first, again = block.seen
    assert not torch.equal(first, again)


@REENTRANT
@pytest.mark.parametrize("kind", KINDS)
def test_recompute_repeats_the_choice(reentrant, kind):
    block = Block(**KINDS[kind])
    (x,) = inputs()
    checkpoint(block, x, use_reentrant=reentrant).sum().backward()
    first, again = block.seen
    assert torch.equal(first, again)
    assert block.moe.router.weight.grad.abs().sum() > 0


@REENTRANT
@pytest.mark.parametrize("order", ["first_in_first_out", "last_in_first_out"])
def test_micro_batches_in_flight(reentrant, order):
    block = Block()
    xs = inputs(3)
    ys = [checkpoint(block, x, use_reentrant=reentrant) for x in xs]
    first = list(block.seen)
    indices = [0, 1, 2] if order == "first_in_first_out" else [2, 1, 0]
    for i in indices:
        block.seen.clear()
        ys[i].sum().backward()
        assert len(block.seen) == 1 and torch.equal(block.seen[0], first[i])
    assert not torch.equal(first[0], first[1])


@REENTRANT
def test_one_layer_called_several_times(reentrant):
    block = Block()

    def chain(x: Tensor) -> Tensor:
        return block(block(block(x)))

    (x,) = inputs()
    checkpoint(chain, x, use_reentrant=reentrant).sum().backward()
    assert len(block.seen) == 6
    for first, again in zip(block.seen[:3], block.seen[3:], strict=True):
        assert torch.equal(first, again)


@REENTRANT
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_nested_checkpoints(reentrant):
    block = Block()

    def inner(x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=reentrant)

    (x,) = inputs()
    checkpoint(lambda x: inner(inner(x)), x, use_reentrant=reentrant).sum().backward()
    first, second = block.seen[:2]
    assert len(block.seen) >= 4
    assert all(torch.equal(s, first) or torch.equal(s, second) for s in block.seen)
    assert not torch.equal(first, second)


@REENTRANT
def test_dropout_stays_in_step(reentrant):
    block, dropout = Block(scale=0.0, kind="sparsemixer", sparsemixer_eps=2.0), nn.Dropout(0.5)

    def run(x: Tensor) -> Tensor:
        return dropout(block(dropout(x))) * x

    (x,) = inputs()
    torch.manual_seed(1)
    y = checkpoint(run, x, use_reentrant=reentrant)
    (grad,) = torch.autograd.grad(y.sum(), x) if not reentrant else (None,)
    if reentrant:
        y.sum().backward()
        grad = x.grad
    torch.manual_seed(1)
    (expected,) = torch.autograd.grad(run(x).sum(), x)
    torch.testing.assert_close(grad, expected)


@REENTRANT
def test_gradients_equal_those_without_checkpointing(reentrant):
    block = Block(scale=0.0)
    (x,) = inputs()
    torch.manual_seed(1)
    block(x).square().sum().backward()
    expected = [x.grad.clone(), *(p.grad.clone() for p in block.parameters())]
    x.grad = None
    block.zero_grad()
    torch.manual_seed(1)
    checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
    for a, b in zip([x.grad, *(p.grad for p in block.parameters())], expected, strict=True):
        torch.testing.assert_close(a, b)


def test_backward_twice():
    block = Block()
    (x,) = inputs()
    y = checkpoint(block, x, use_reentrant=False).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert len(block.seen) >= 2 and all(torch.equal(s, block.seen[0]) for s in block.seen)


@REENTRANT
def test_without_rng_state_a_single_call_is_still_known(reentrant):
    block = Block()
    for _ in range(2):
        (x,) = inputs()
        block.seen.clear()
        y = checkpoint(block, x, use_reentrant=reentrant, preserve_rng_state=False)
        y.sum().backward()
        first, again = block.seen
        assert torch.equal(first, again)


@REENTRANT
def test_without_rng_state_an_ambiguous_call_is_an_error(reentrant):
    block = Block()
    xs = inputs(2)
    ys = [checkpoint(block, x, use_reentrant=reentrant, preserve_rng_state=False) for x in xs]
    with pytest.raises(RuntimeError, match="preserve_rng_state=True"):
        (ys[0].sum() + ys[1].sum()).backward()


@REENTRANT
def test_reseeding_between_calls_in_flight_is_an_error(reentrant):
    block = Block()
    ys = []
    for x in inputs(2):
        torch.manual_seed(0)
        ys.append(checkpoint(block, x, use_reentrant=reentrant).sum())
    with pytest.raises(RuntimeError, match="reseed"):
        (ys[0] + ys[1]).backward()


@REENTRANT
def test_reseeding_every_step_is_fine(reentrant):
    block = Block()
    for x in inputs(3):
        torch.manual_seed(0)
        y = checkpoint(block, x, use_reentrant=reentrant).sum()
        y.backward()
        first, again = block.seen[-2:]
        assert torch.equal(first, again)


def test_calls_are_forgotten_with_their_graph():
    block = Block()
    (x,) = inputs()
    y = block(x)
    assert len(block.moe.routing_log._calls) == 1
    del y
    gc.collect()
    assert len(block.moe.routing_log._calls) == 0
    block.eval()
    with torch.no_grad():
        block(x)
    gc.collect()
    assert len(block.moe.routing_log._calls) == 0


def test_outstanding_calls_are_bounded():
    block = Block()
    with torch.no_grad():
        for _ in range(300):
            block(torch.randn(1, H))
    assert len(block.moe.routing_log._calls) == 256


def test_evaluation_draws_no_random_numbers():
    block = Block().eval()
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    block(torch.ones(T, H))
    assert torch.equal(torch.rand(1), expected)


@REENTRANT
@pytest.mark.parametrize("freeze", [False, True])
def test_recompute_does_not_count_load_twice(reentrant, freeze):
    block = Block(freeze=freeze, scale=0.0, expert_bias=True)
    (x,) = inputs()
    checkpoint(block, x, use_reentrant=reentrant).sum().backward()
    assert block.moe.router.tokens_per_expert.sum() == T * K


# ------------------------------------------------------------------------------- record, replay


class Model(nn.Module):
    def __init__(self, checkpointing: bool | None = None, **router) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(freeze=False, **router) for _ in range(2))
        self.checkpointing = checkpointing  # use_reentrant, or None for no checkpointing

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.checkpointing is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing)
        return x


NAMES = ["blocks.0.moe", "blocks.1.moe"]


@pytest.mark.parametrize("kind", KINDS)
def test_replay_repeats_a_record(kind):
    model = Model(scale=0.5, **KINDS[kind])
    (x,) = inputs()
    with record_routing(model) as record:
        model(x)
        model(x)
    assert list(record.layers) == NAMES and len(record) == 2
    assert [len(record[n]) for n in NAMES] == [2, 2]
    assert not torch.equal(record[NAMES[0]][0].topk_ids, record[NAMES[0]][1].topk_ids)
    for block in model.blocks:
        block.seen.clear()
    with replay_routing(model, record):
        model(x)
        model(x).sum().backward()
    for name, block in zip(NAMES, model.blocks, strict=True):
        for choice, seen in zip(record[name], block.seen, strict=True):
            assert torch.equal(choice.topk_ids, seen)
        assert block.moe.router.weight.grad.abs().sum() > 0
        assert block.moe.routing_log is None


def test_replay_computes_weights_from_present_logits():
    model = Model(scale=0.0)
    (x,) = inputs()
    with record_routing(model) as record:
        expected = model(x)
    with replay_routing(model, record):
        torch.testing.assert_close(model(x), expected)
    moe = model.blocks[0].moe
    with torch.no_grad():
        moe.router.weight.mul_(-2)
    choice = record[NAMES[0]][0]
    with replay_routing(moe, type(record)({"": [choice]})):
        out = moe(x, return_routing=True)
    assert torch.equal(out.topk_ids, choice.topk_ids)
    weights = moe.router.weights_at(out.router_logits, choice.topk_ids)
    torch.testing.assert_close(out.topk_weights, weights)
    assert not torch.allclose(out.topk_weights, choice.topk_weights)
    with replay_routing(moe, type(record)({"": [choice]}), use_recorded_weights=True):
        out = moe(x, return_routing=True)
    assert torch.equal(out.topk_weights, choice.topk_weights)
    assert out.router_logits is not None


@REENTRANT
def test_record_under_checkpointing(reentrant):
    model = Model(reentrant)
    xs = inputs(2)
    with record_routing(model) as record:
        ys = [model(x) for x in xs]
        for y in ys:
            y.sum().backward()
    for name, block in zip(NAMES, model.blocks, strict=True):
        assert len(record[name]) == 2 and len(block.seen) == 4
        for choice, first, again in zip(record[name], block.seen[:2], block.seen[2:], strict=True):
            assert torch.equal(choice.topk_ids, first) and torch.equal(first, again)


@REENTRANT
def test_replay_under_checkpointing(reentrant):
    model = Model(reentrant)
    xs = inputs(2)
    with record_routing(model) as record:
        for x in xs:
            model(x)
    for block in model.blocks:
        block.seen.clear()
    with replay_routing(model, record):
        ys = [model(x) for x in xs]
        for y in ys:
            y.sum().backward()
    for name, block in zip(NAMES, model.blocks, strict=True):
        assert len(block.seen) == 4
        for choice, first, again in zip(record[name], block.seen[:2], block.seen[2:], strict=True):
            assert torch.equal(choice.topk_ids, first) and torch.equal(first, again)


def test_record_moves_and_saves():
    model = Model()
    with record_routing(model) as record:
        model(*inputs())
    buffer = io.BytesIO()
    torch.save(record.to("cpu").state_dict(), buffer)
    buffer.seek(0)
    again = type(record).from_state_dict(torch.load(buffer, weights_only=True))
    assert list(again.layers) == NAMES
    choice = again[NAMES[1]][0]
    assert torch.equal(choice.topk_ids, record[NAMES[1]][0].topk_ids.cpu())
    assert choice.topk_ids.dtype == torch.int32 and not choice.topk_weights.requires_grad


def test_record_of_given_ids_and_masks():
    model = Block(freeze=False, scale=0.0)
    x, ids = torch.randn(T, H), torch.randint(E, (T, 3))
    mask = torch.ones(E, dtype=torch.bool)
    mask[0] = False
    with record_routing(model) as record:
        model.moe(x, topk_ids=ids)
        model.moe(x, expert_mask=mask)
    assert torch.equal(record["moe"][0].topk_ids, ids)
    with replay_routing(model, record):
        kept = model.moe(x, expert_mask=mask, return_routing=True)
        own = model.moe(x, topk_ids=ids + 1, return_routing=True)
    assert torch.equal(kept.topk_ids, torch.where(ids == 0, -1, ids))
    assert torch.equal(own.topk_ids, ids + 1)


def test_contexts_restore_the_layer():
    model = Block(freeze=True)
    log = model.moe.routing_log
    with pytest.raises(KeyError), record_routing(model):
        raise KeyError
    assert model.moe.routing_log is log


def test_errors():
    model = Model()
    x = torch.randn(T, H)
    with pytest.raises(ValueError, match="MoE"), record_routing(nn.Linear(2, 2)):
        pass
    with record_routing(model) as record:
        model(x)
        with pytest.raises(RuntimeError, match="already"), record_routing(model):
            pass
    with pytest.raises(ValueError, match="layers"), replay_routing(model.blocks[0], record):
        pass
    with replay_routing(model, record):
        with pytest.raises(ValueError, match="12 tokens"):
            model(x[:5])
    with replay_routing(model, record):
        model(x)
        with pytest.raises(RuntimeError, match="at most 1 times"):
            model(x)
