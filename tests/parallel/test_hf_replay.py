"""Routing replay of sharded models: logits and gradients are those of one process."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers needs accelerate to place a model")

from tests.hf.models import build

import moe_ops.hf

from .common import assert_same
from .test_hf import DATA, SHARED, has_registry, load, parts_of, step

pytestmark = pytest.mark.cpu_only

MODELS = ("qwen3_moe", "deepseek_v3")
NUM_TOKENS = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    for name in MODELS:
        build(name).save_pretrained(path / name)
    return path


def routed_experts(parts, part=None):
    """Returns ids [B, S, L, K] of all sequences, or of one."""
    scores = np.random.default_rng(3).random((parts, NUM_TOKENS, 2, 8))
    ids = scores.argsort(-1)[..., :3].astype(np.uint8)
    return ids if part is None else ids[part : part + 1]


def replayed_step(folder, sizes, part, checkpointing=False):
    model = load(folder, sizes).train(checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable()
    parts = parts_of(sizes)
    with moe_ops.hf.replay(model, routed_experts(parts, part)):
        return step(model, parts, part)


def steps_of_a_rank(rank, folder):
    return [
        replayed_step(folder / name, sizes, rank if sizes is DATA else 0, checkpointing)
        for name in MODELS
        for sizes, checkpointing in ((DATA, False), (DATA, True), (SHARED, False))
    ]


@has_registry
def test_two_ranks(processes, folder):
    def alone(name, parts):
        model = load(folder / name)
        with moe_ops.hf.replay(model, routed_experts(parts)):
            return step(model, parts)

    want = {(name, parts): alone(name, parts) for name in MODELS for parts in (1, 2)}
    for rank, found in enumerate(processes.run(steps_of_a_rank, folder, world=2)):
        cases = [(name, sizes) for name in MODELS for sizes in (DATA, DATA, SHARED)]
        for (name, sizes), (logits, grads) in zip(cases, found, strict=True):
            parts = parts_of(sizes)
            expected, gradients = want[name, parts]
            part = rank if parts == 2 else 0
            assert_same(logits, {"logits": expected["logits"].chunk(parts)[part]})
            assert_same(grads, gradients)
