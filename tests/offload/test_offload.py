"""offload_experts: the same numbers from slots, whatever is in them."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from tests.helpers.quantized import weight_config

import moe_ops
from moe_ops.layers import Experts, MoE, TopKRouter
from moe_ops.offload import (
    BeladyPolicy,
    CachePolicy,
    ExpertCache,
    OffloadedExperts,
    offload_experts,
    record_expert_trace,
    save_experts,
)
from moe_ops.offload.store import FileStore, MemoryStore, Stored, read_header

E, H, I, K = 8, 64, 32, 3
KINDS = {
    "swiglu": {},
    "relu2": {"activation": "relu2"},
    "oai": {"activation": "swiglu_oai", "interleaved": True, "bias": True},
    "bf16": {"dtype": torch.bfloat16},
    "int8": {"format": "int8"},
    "int4": {"format": "int4", "bias": True},
}


class Layers(torch.nn.Module):
    """Two layers of experts in a row."""

    def __init__(self, kind: str, on_input: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = dict(KINDS[kind])
        format = options.pop("format", None)
        dtype = options.get("dtype")
        routers = [
            TopKRouter(H, E, K, apply_router_weight_on_input=on_input, dtype=dtype)
            for _ in range(2)
        ]
        self.layers = torch.nn.ModuleList(MoE(r, Experts(E, H, I, **options)) for r in routers)
        for layer in self.layers:
            for bias in (layer.experts.b_gate_up, layer.experts.b_down):
                if bias is not None:
                    torch.nn.init.normal_(bias)
        if format is not None:
            moe_ops.quantize(self, weight_config(format, 32 if format == "int4" else None))
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def inputs(kind: str, num_tokens: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_tokens, H, generator=generator).to(KINDS[kind].get("dtype"))


@pytest.fixture(params=["memory", "file"])
def where(request, tmp_path) -> dict:
    return {} if request.param == "memory" else {"path": tmp_path / "experts.safetensors"}


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_where_a_call_fits(kind, where):
    x = inputs(kind)
    with torch.no_grad(), moe_ops.batch_invariant():
        want = Layers(kind)(x)
        model = Layers(kind)
        cache = offload_experts(model, E, **where)  # Of 2 E.
        for _ in range(2):
            assert torch.equal(model(x), want)
    assert cache.stats.misses > E and not list(model.parameters())[4:]


@pytest.mark.parametrize("num_slots", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_rounds(kind, num_slots):
    """More experts in a call than slots. What is rounded more than once is the fp32 sum alone,
    except that quantized experts round each round's output, and their input by its rows alone."""
    for on_input in (False, True):
        x = inputs(kind)
        with torch.no_grad(), moe_ops.batch_invariant():
            want = Layers(kind, on_input)(x)
            model = Layers(kind, on_input)
            cache = offload_experts(model, num_slots)
            got = model(x)
        eps = torch.finfo(x.dtype).eps
        assert (got - want).norm() <= 4 * K * eps * want.norm()
        assert len(cache.residents()) == num_slots


def test_empty_slots_and_no_tokens():
    model = Layers("swiglu")
    bank = model.layers[0].experts
    x, weights = inputs("swiglu", 2), torch.ones(2, 2)
    ids = torch.tensor([[-1, E], [4, -1]])
    want = bank(x, weights, ids)
    offload_experts(model, 2)
    bank = model.layers[0].experts
    assert torch.equal(bank(x, weights, ids), want)
    assert torch.equal(bank(x[:1], weights[:1], ids[:1]), torch.zeros(1, H))
    assert bank(x[:0], weights[:0], ids[:0]).shape == (0, H)


def test_a_shared_bank_is_one():
    model = Layers("swiglu")
    model.layers[1].experts = model.layers[0].experts
    x = inputs("swiglu")
    want = model(x).detach()
    cache = offload_experts(model, E)
    assert cache.store.num_banks == 1
    torch.testing.assert_close(model(x).detach(), want)


def test_an_opened_file(tmp_path):
    """It has what was written, and another model of the same sizes can use it."""
    path = tmp_path / "experts.safetensors"
    x = inputs("oai")
    want = Layers("oai")(x).detach()
    offload_experts(Layers("oai"), 2, path=path).close()
    with torch.device("meta"):
        banks = Layers.__new__(Layers)
        torch.nn.Module.__init__(banks)
        banks.layers = torch.nn.ModuleList(
            MoE(TopKRouter(H, E, K), Experts(E, H, I, **KINDS["oai"])) for _ in range(2)
        )
    for layer, source in zip(banks.layers, Layers("oai").layers, strict=True):
        layer.router = source.router
    store = FileStore.open(path, keep_cached=False)
    with offload_experts(banks.eval(), E, store=store), torch.no_grad():
        torch.testing.assert_close(banks(x), want)
    with pytest.raises(RuntimeError, match="must be open"):
        banks(x)


@pytest.mark.parametrize("preadv", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_pieces_of_a_file(tmp_path, monkeypatch, transposed, dtype, preadv):
    """Rows of 20 and of 160 bytes, 100 bytes or one row at a time where they are not read as they
    lie."""
    monkeypatch.setattr("moe_ops.offload.store._READ_BYTES", 100)
    if not preadv:
        monkeypatch.delattr(os, "preadv", raising=False)
    path = tmp_path / "experts.safetensors"
    for width in (5, 40):
        bank = torch.randn(2, 7, width)
        save_experts(path, [{"w": [bank]}])
        piece = read_header(path)["0.1.w"]._replace(transposed=transposed)
        want = bank[1].T if transposed else bank[1]
        store = FileStore([[{"w": [piece, piece]}]], {"w": Stored((0,), dtype)})
        into = torch.full((2 * want.shape[0], want.shape[1]), torch.nan, dtype=dtype)
        store.read((0, 0), {"w": into})
        assert torch.equal(into, torch.cat([want, want]).to(dtype))
        store.close()


class Gate(MemoryStore):
    """A store whose reads wait for `open`."""

    def __init__(self, banks) -> None:
        super().__init__(banks)
        self.open = threading.Event()
        self.asked = threading.Event()
        self.fails = False

    def read(self, key, into, **options) -> None:
        self.asked.set()
        assert self.open.wait(60)
        if self.fails:
            raise OSError("the disk is gone")
        super().read(key, into, **options)


def gated(policy: CachePolicy | str = "lru", num_slots: int = 4) -> tuple[Gate, ExpertCache]:
    bank = {"w_down": (torch.arange(8.0).view(8, 1, 1).expand(8, 2, 2).contiguous(),)}
    store = Gate([bank])
    return store, ExpertCache(store, num_slots, policy)


def use(cache: ExpertCache, experts: list[int]) -> list[float]:
    """Returns what the slots of these experts hold, after checking that it is theirs."""
    found = []
    with cache.turn:
        for pairs in cache.rounds(0, experts):
            for expert, slot in pairs:
                assert cache.slots["w_down"][slot].eq(expert).all()
                found.append(expert)
    return sorted(found)


class Wish(CachePolicy):
    """Fetches what a test asks for."""

    def __init__(self) -> None:
        self.keys: list[tuple[int, int]] = []

    def wanted(self):
        return self.keys

    def victim(self, keys):
        return min(keys)

    def outweighs(self, key, victim):
        return victim not in self.keys or self.keys.index(key) < self.keys.index(victim)


@pytest.mark.parametrize("on_its_way", [False, True])
def test_a_miss_waits(on_its_way):
    """A call returns when its expert is there: one that it loads, and one that a thread loads."""
    policy = Wish()
    store, cache = gated(policy)
    if on_its_way:
        policy.keys = [(0, 5)]
        fetcher = threading.Thread(target=cache.fetch_one)
        fetcher.start()
        assert store.asked.wait(60)
        policy.keys = []
    done: list[list[int]] = []
    caller = threading.Thread(target=lambda: done.append(use(cache, [5])))
    caller.start()
    assert store.asked.wait(60)
    caller.join(0.05)
    assert caller.is_alive() and not done
    store.open.set()
    caller.join(60)
    assert done == [[5]]
    assert (cache.stats.late, cache.stats.misses) == ((1, 0) if on_its_way else (0, 1))


def test_fetching_ahead():
    """Wanted experts in order, into free slots first, then in place of others; never of those that
    are wanted sooner."""
    policy = Wish()
    store, cache = gated(policy, 2)
    store.open.set()
    policy.keys = [(0, 3), (0, 4), (0, 5)]
    assert cache.fetch_one() is None and cache.residents() == [(0, 3)]
    assert cache.fetch_one() is None and cache.residents() == [(0, 3), (0, 4)]
    assert cache.fetch_one() is not None  # 5 has to wait: both slots are wanted sooner.
    assert use(cache, [3]) == [3]
    policy.keys = [(0, 4), (0, 5)]
    assert cache.fetch_one() is None and cache.residents() == [(0, 4), (0, 5)]
    assert (cache.stats.hits, cache.stats.fetched) == (1, 3)


def test_a_failed_load_is_an_error_of_the_call_alone():
    policy = Wish()
    store, cache = gated(policy)
    store.open.set()
    store.fails = True
    policy.keys = [(0, 1)]
    cache.fetch_one()  # Nobody waits for it: nothing is raised, and nothing is there.
    with pytest.raises(OSError, match="the disk is gone"):
        use(cache, [2, 3])
    assert cache.residents() == []
    store.fails = False
    assert use(cache, [1, 2, 3, 4]) == [1, 2, 3, 4]


def test_many_threads_and_a_fetcher():
    """Callers of several threads, and the thread of a policy that wants other experts all the
    time: each call finds its own (`use` looks)."""
    policy = Wish()
    policy.prefetches = True
    store, cache = gated(policy, 3)
    store.open.set()
    errors: list[BaseException] = []

    def call(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        try:
            for _ in range(60):
                experts = torch.randperm(8, generator=generator)[: 1 + seed].tolist()
                policy.keys = [(0, e) for e in torch.randperm(8, generator=generator).tolist()]
                assert use(cache, experts) == sorted(experts)
        except BaseException as error:
            errors.append(error)

    callers = [threading.Thread(target=call, args=(seed,)) for seed in (1, 3, 5)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    cache.close()
    assert not errors and not any(caller.is_alive() for caller in callers)
    assert cache.stats.uses == 60 * (2 + 4 + 6)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="There is no fork here.")
def test_a_fork_while_the_thread_loads():
    """The child has neither the thread nor what it was loading."""
    policy = Wish()
    policy.prefetches = True
    store, cache = gated(policy)
    policy.keys = [(0, 5)]
    cache.begin(None)
    assert store.asked.wait(60)
    child = os.fork()
    if child == 0:
        try:
            store.open.set()
            os._exit(int(use(cache, [1, 5]) != [1, 5]))
        finally:
            os._exit(2)
    store.open.set()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert use(cache, [1, 5]) == [1, 5]
    cache.close()


def test_trace_and_oracle():
    """The trace says what was routed; with it no policy has fewer misses."""
    x = [inputs("swiglu", n) for n in (5, 1, 1, 1)]
    model = Layers("swiglu")
    with torch.no_grad(), record_expert_trace(model) as recorder:
        want = [model(part) for part in x]
    trace = recorder.trace()
    assert trace.ids.shape == (8, 2, K) and trace.banks == [0, 1]
    assert trace.tokens.tolist() == [-1] * 8
    router = model.layers[0].router
    assert torch.equal(trace.ids[:5, 0].int(), router(x[0]).topk_ids)
    misses = {}
    for policy in ("lru", "lfu", "fifo", BeladyPolicy(trace, prefetch=False)):
        again = Layers("swiglu")
        cache = offload_experts(again, 6, policy=policy)
        with torch.no_grad(), record_expert_trace(again) as second:
            got = [again(part) for part in x]
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        assert torch.equal(second.trace().ids, trace.ids)
        misses[type(cache.policy).__name__] = cache.stats.misses
    assert min(misses.values()) == misses["BeladyPolicy"]


def test_no_gradients_and_no_state_dict():
    model = Layers("swiglu")
    offload_experts(model, 2)
    x = inputs("swiglu").requires_grad_()
    y = model(x)
    with pytest.raises(NotImplementedError, match="no gradient through offloaded experts"):
        y.sum().backward()
    with pytest.raises(NotImplementedError, match="would lack the experts"):
        model.state_dict()
    assert isinstance(model.layers[0].experts, OffloadedExperts)
    assert "num_slots=2" in repr(model)


def test_bad_calls(tmp_path):
    def fails(message, model=None, num_slots=2, **options):
        with pytest.raises(ValueError, match=message):
            offload_experts(model or Layers("swiglu"), num_slots, **options)

    fails("must hold a bank of experts, got Linear without one", torch.nn.Linear(2, 2))
    fails("which is one; put it into a MoE", Experts(2, 4, 4))
    fails("one of num_slots and max_bytes", num_slots=None)
    fails("one of num_slots and max_bytes", max_bytes=10**6)
    fails("num_slots must be at least 1, got 0", num_slots=0)
    fails("max_bytes must hold an expert of 24576 bytes", num_slots=None, max_bytes=24575)
    fails("policy must be one of lru, lfu, fifo", policy="mru")
    uneven = Layers("swiglu")
    uneven.layers[1].experts = Experts(E, H, I // 2)
    fails("banks must have one form", uneven)
    offload_experts(uneven, 2, skip="layers.1*")
    fp8 = Layers("swiglu")
    fp8.layers[0].experts.fp8_training = True
    fails("layers.0.experts must compute in the type of its weights", fp8)
    path = tmp_path / "experts.safetensors"
    offload_experts(Layers("relu2"), 2, path=path).close()
    fails("store must hold", store=FileStore.open(path))
    shortened = FileStore.open(path)
    os.truncate(path, path.stat().st_size - 1)
    into = {n: torch.empty(t.shape, dtype=t.dtype) for n, t in shortened.tensors.items()}
    shortened.read((0, 0), into)
    with pytest.raises(OSError, match=r"must have [0-9,]+ bytes, got"):
        shortened.read((1, E - 1), into)
    shortened.close()
    with pytest.raises(ValueError, match="whole safetensors file"):
        FileStore.open(path)
    path.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="must be a safetensors file"):
        FileStore.open(path)
