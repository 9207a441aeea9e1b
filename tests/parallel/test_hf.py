"""transformers' expert parallelism on moe_ops: logits and gradients are those of one process."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers needs accelerate to place a model")

import transformers
from tests.hf.models import build, tokens
from transformers import AutoModelForCausalLM

import moe_ops.hf
from moe_ops.hf.experts.parallel import Interface, MoeOpsEP, register_ep_implementation
from moe_ops.parallel import ReplicatedDispatcher
from moe_ops.testing import assert_identical

from .common import assert_same, gradients

pytestmark = pytest.mark.cpu_only
has_registry = pytest.mark.skipif(
    Interface is None,
    reason=f"transformers {transformers.__version__} has no registry of implementations",
)

MODELS = ("qwen3_moe", "gpt_oss", "deepseek_v3")
# What transformers is asked for, on as many ranks as fsdp_size * tp_size.
DATA = {"fsdp_size": 2, "ep_size": 2}  # Ranks have their own tokens.
SHARED = {"tp_size": 2, "ep_size": 2}  # Ranks have the same tokens.
EFSDP = {"fsdp_size": 4, "ep_size": 2}  # Two ranks have the same experts.
BOTH = {"fsdp_size": 2, "tp_size": 2, "ep_size": 2}
ACROSS = {"fsdp_size": 2, "tp_size": 2, "ep_size": 4}  # Two ranks of four have the same tokens.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of each model."""
    path = tmp_path_factory.mktemp("models")
    for name in MODELS:
        build(name).save_pretrained(path / name)
    return path


def load(folder, sizes=None, implementation="moe_ops", **options):
    if sizes is not None:
        from transformers.distributed import DistributedConfig

        if Interface is not None:
            sizes = {**sizes, "ep_implementation": implementation}
        options["distributed_config"] = DistributedConfig(**sizes)
    return AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation="moe_ops", attn_implementation="eager", **options
    )


def step(model, parts, part=None):
    """Logits and gradients of one of `parts` sequences, or of all; the loss is a token mean."""
    ids = tokens(batch=parts, length=9)
    ids = ids if part is None else ids[part : part + 1]
    with moe_ops.hf.assert_used(model) as calls:
        out = model(input_ids=ids, labels=ids, use_cache=False)
    assert all(calls.values())
    out.loss.backward()
    return {"logits": out.logits.detach()}, gradients(model)


def step_of_a_rank(rank, folder, cases):
    found = []
    for name, sizes, implementation in cases:
        model = load(folder / name, sizes, implementation)
        if implementation == "moe_ops":
            shared = sizes.get("tp_size") == sizes["ep_size"]
            assert (
                isinstance(model.model.layers[1].mlp.experts.dispatcher, ReplicatedDispatcher)
                == shared
            )
        found.append(step(model, parts_of(sizes), rank // sizes.get("tp_size", 1)))
    return found


def parts_of(sizes):
    """Ranks with tokens of their own."""
    return sizes.get("fsdp_size", 1)


def check(folder, cases, ranks):
    """Checks what ranks found in each case against each model alone."""
    alone = {}
    for name, sizes, _ in cases:
        if (name, parts_of(sizes)) not in alone:
            alone[name, parts_of(sizes)] = step(load(folder / name), parts_of(sizes))
    for rank, found in enumerate(ranks):
        for (name, sizes, _), (logits, grads) in zip(cases, found, strict=True):
            want_logits, want_grads = alone[name, parts_of(sizes)]
            own = want_logits["logits"].chunk(parts_of(sizes))[rank // sizes.get("tp_size", 1)]
            assert_same(logits, {"logits": own})
            assert_same(grads, want_grads)


@has_registry
@pytest.mark.parametrize("sizes", [DATA, SHARED], ids=["data", "shared"])
def test_two_ranks(processes, folder, sizes):
    cases = [(name, sizes, "moe_ops") for name in MODELS]
    check(folder, cases, processes.run(step_of_a_rank, folder, cases, world=2))


@has_registry
def test_four_ranks(processes, folder):
    cases = [(name, EFSDP, "moe_ops") for name in MODELS]
    # The experts of gpt-oss are no multiple of 4.
    cases += [("qwen3_moe", BOTH, "moe_ops"), ("deepseek_v3", ACROSS, "moe_ops")]
    check(folder, cases, processes.run(step_of_a_rank, folder, cases))


# Ours, and transformers' own, and tensor parallelism of the experts, around our experts.
NAMED = (
    ("qwen3_moe", DATA, "slots"),
    ("qwen3_moe", SHARED, "padded"),
    ("deepseek_v3", DATA, "all_to_all"),
    ("gpt_oss", SHARED, "all_reduce"),
    ("qwen3_moe", {"tp_size": 2}, "auto"),
)


def named_steps(rank, folder):
    register_ep_implementation("slots", dispatch="slots")
    register_ep_implementation("padded", dispatch="padded", capacity=9, fp32_combine=True)
    register_ep_implementation("fp8_rows", dispatch="tokens", fp8=True)
    register_ep_implementation("same_tokens", dispatch="shared")
    try:
        found = step_of_a_rank(rank, folder, NAMED)
        model = load(folder / "qwen3_moe", DATA).train()
        model.gradient_checkpointing_enable()
        found.append(step(model, 2, rank))
        model = load(folder / "qwen3_moe", DATA, "fp8_rows")
        logits, _ = step(model, 2, rank)
        with pytest.raises(ValueError, match='dispatch="shared" needs ranks with the same tokens'):
            load(folder / "qwen3_moe", DATA, "same_tokens")
        moe_ops.hf.disable(model)
        with pytest.raises(ValueError, match=r"must be .moe_ops., got 'grouped_mm'"):
            model(tokens())
        return found, logits
    finally:  # The process goes on to other tests.
        for name in ("slots", "padded", "fp8_rows", "same_tokens"):
            del Interface._global_mapping[name]


@has_registry
def test_implementations_by_name(processes, folder):
    ranks = processes.run(named_steps, folder, world=2)
    cases = [*NAMED, ("qwen3_moe", DATA, "moe_ops")]
    check(folder, cases, [found for found, _ in ranks])
    logits, _ = step(load(folder / "qwen3_moe"), 2)
    # Rows of fp8 have 3 bits behind the point.
    rounded = torch.cat([logits["logits"] for _, logits in ranks])
    error = (rounded - logits["logits"]).norm() / logits["logits"].norm()
    assert 1e-6 < error < 0.1


def generate_packed(rank, folder):
    model = load(folder / "qwen3_moe", SHARED).eval()
    packed = moe_ops.pack_weights(model)
    out = model.generate(tokens(batch=2, length=5), max_new_tokens=6, do_sample=False)
    moe_ops.unpack_weights(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_identical(
            compiled(tokens(), use_cache=False).logits, model(tokens(), use_cache=False).logits
        )
    return packed, out


@has_registry
def test_generate_with_packed_experts_and_compiled(processes, folder):
    model = load(folder / "qwen3_moe").eval()
    whole = moe_ops.pack_weights(model)
    want = model.generate(tokens(batch=2, length=5), max_new_tokens=6, do_sample=False)
    for packed, got in processes.run(generate_packed, folder, world=2):
        assert packed == whole // 2
        assert torch.equal(got, want)


@has_registry
def test_names(bad_input):
    assert issubclass(Interface()["moe_ops"], MoeOpsEP)
    with bad_input("register_ep_implementation", "name", "'moe_ops'"):
        register_ep_implementation("moe_ops")
    with bad_input("register_ep_implementation", "placement", "5"):
        register_ep_implementation("placed", placement=5)


# ------------------------------------------------------------------------------------- loading


class Reads:
    """A file or a tensor of it, and how many elements are read of each."""

    def __init__(self, inner, read, key=""):
        self.inner, self.read, self.key = inner, read, key

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self.inner.__exit__(*error)

    def get_slice(self, key):
        return Reads(self.inner.get_slice(key), self.read, key)

    def __getitem__(self, where):
        part = self.inner[where]
        self.read[self.key] = self.read.get(self.key, 0) + part.numel()
        return part


@contextlib.contextmanager
def watch_files():
    """{key: elements that are read of it}."""
    from transformers import modeling_utils

    read, real = {}, modeling_utils.safe_open
    with mock.patch.object(modeling_utils, "safe_open", lambda *a, **k: Reads(real(*a, **k), read)):
        yield read


def elements_read(rank, folder, sizes):
    with watch_files() as read:
        load(folder, sizes)
    return read


@has_registry
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_rank_reads_only_its_experts(processes, folder, name):
    """A rank reads its part of tensors that each expert has for itself, and of one for all."""
    with watch_files() as whole:
        load(folder / name)
    of_experts = {key: size for key, size in whole.items() if ".experts." in key}
    assert of_experts
    found = processes.run(elements_read, folder / name, DATA, world=2)
    for key, size in of_experts.items():
        assert sum(read.get(key, 0) for read in found) == size
    for read in found:
        assert sum(read.get(key, 0) for key in of_experts) == sum(of_experts.values()) // 2


# ------------------------------------------------------------------------- before the registry


def older_step(rank, folder, name):
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=2, enable_expert_parallel=True)
    return step(load(folder / name, distributed_config=config), 2)


@pytest.mark.skipif(Interface is not None, reason="transformers has the registry")
@pytest.mark.parametrize("name", MODELS)
def test_plans_of_older_transformers(processes, folder, name, bad_input):
    """There the experts of a rank get ids of others as one that none has."""
    want = step(load(folder / name), 2)
    for got in processes.run(older_step, folder, name, world=2):
        assert_same(got[0], want[0])
        assert_same(got[1], want[1])
    with pytest.raises(ImportError, match=r"transformers 5\.23"):
        register_ep_implementation("other")
