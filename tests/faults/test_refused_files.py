"""Things that are no regular files, and damage that once ended in errors of other libraries."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bench.studies import trainer

from moe_ops import _reading
from moe_ops.offload import ExpertPredictor, ExpertTrace
from moe_ops.offload.store import FileStore
from moe_ops.parallel.plan import find_shape

from . import hf_readers, readers

pytestmark = pytest.mark.cpu_only


@pytest.fixture
def prompt() -> Iterator[None]:
    """A test that waits ends in an error."""

    def late(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def readers_of(names: tuple[str, ...]) -> list[readers.Reader]:
    return [reader for reader in readers.READERS if reader.name in names]


# --- pipes, folders, devices


@pytest.mark.parametrize(
    "reader",
    readers_of(("ExpertPredictor", "ExpertTrace", "FileStore", "state", "resume", "plan")),
    ids=lambda reader: reader.name,
)
@pytest.mark.parametrize("kind", ["named pipe", "folder", "device"])
def test_what_is_no_regular_file_is_refused_at_once(reader, kind, tmp_path, prompt):
    made = reader.make(tmp_path)
    (path,) = (p for p in tmp_path.iterdir() if p.is_file())
    path.unlink()
    if kind == "named pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r" must be .*, got") as caught:
        reader.read(tmp_path, made)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


def test_open_regular_says_what_is_there(tmp_path, prompt):
    os.mkfifo(tmp_path / "pipe")
    for path, text in ((tmp_path / "pipe", "a named pipe"), (tmp_path, "a folder")):
        with pytest.raises(ValueError, match=f"^read: {path} must be a regular file, got {text}.$"):
            _reading.open_regular(path, "read")
    with pytest.raises(FileNotFoundError, match=r"^read: .*none must be a file, got no such file"):
        _reading.open_regular(tmp_path / "none", "read")
    (tmp_path / "it").write_bytes(b"12345")
    assert _reading.read_bytes(tmp_path / "it", "read") == b"12345"
    with pytest.raises(ValueError, match="must have at most 4 bytes, got 5"):
        _reading.read_bytes(tmp_path / "it", "read", 4)


def test_training_does_not_begin_where_a_pipe_is_in_the_way(tmp_path, prompt):
    os.mkfifo(tmp_path / "it.pt")
    with pytest.raises(ValueError, match="must be a regular file, got a named pipe"):
        trainer.train_once(torch.nn.Linear(1, 1), tmp_path, "it", lambda _: pytest.fail("trained"))


# --- files of offloading


def test_every_flipped_bit_of_a_predictor_is_noticed(tmp_path, seed):
    predictor = ExpertPredictor(5, 1, 2, window=2, width=4, num_layers=1, num_heads=1)
    path = tmp_path / "it"
    predictor.save(path)
    again = ExpertPredictor.load(path)
    assert not again.training and again.config == predictor.config
    for name, tensor in predictor.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    content, rng = path.read_bytes(), random.Random(seed)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"^ExpertPredictor.load: .*it must match its checksum"
        ):
            ExpertPredictor.load(path)


def test_predictor_refuses_pickles_and_sizes_that_its_weights_do_not_have(tmp_path):
    predictor = ExpertPredictor(5, 1, 2, window=2, width=4, num_layers=1, num_heads=1)
    torch.save({"config": predictor.config, "state": predictor.state_dict()}, tmp_path / "it")
    with pytest.raises(ValueError, match="was not written by this version of moe_ops"):
        ExpertPredictor.load(tmp_path / "it")
    for name, value in (("num_layers", 2**31 - 1), ("vocab_size", 2**31 - 1), ("width", -4)):
        changed = {**predictor.config, name: value}
        kept, predictor.config = predictor.config, changed
        predictor.save(tmp_path / "it")
        predictor.config = kept
        with pytest.raises(
            ValueError, match=r"^ExpertPredictor.load: .* must be .*, got"
        ) as caught:
            ExpertPredictor.load(tmp_path / "it")
        assert str(tmp_path / "it") in str(caught.value) or name in str(caught.value)


def test_trace_does_not_believe_sizes(tmp_path):
    """An array of 2^40 numbers in a file of a few hundred bytes."""
    import zipfile

    import numpy as np

    readers._make_trace(tmp_path)
    path = tmp_path / "it.npz"
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    header = b"\x93NUMPY\x01\x00\x76\x00{'descr': '<i8', 'fortran_order': False, 'shape': (%d,), }"
    parts["tokens.npy"] = (header % 2**40).ljust(127) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    with pytest.raises(ValueError, match=r"^ExpertTrace.load: .* must be a saved trace, got"):
        ExpertTrace.load(path)
    np.savez(path, ids=np.zeros((1, 1, 1)))
    with pytest.raises(ValueError, match="got something else: it holds no tokens"):
        ExpertTrace.load(path)


def test_trace_of_tokens_that_its_steps_do_not_have(tmp_path):
    trace = ExpertTrace(
        torch.zeros(4, 1, 1).short(), torch.arange(4), torch.tensor([[1, 3]]), [0], 2
    )
    trace.save(tmp_path / "it.npz")
    with pytest.raises(ValueError, match=r"holds no .N, L, K. ids of its steps' tokens"):
        ExpertTrace.load(tmp_path / "it.npz")


def test_changed_experts_are_noticed_when_they_are_read(tmp_path):
    readers._make_store(tmp_path)
    path = tmp_path / "it.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    store = FileStore.open(path)
    into = {n: torch.empty(s.shape, dtype=s.dtype) for n, s in store.tensors.items()}
    store.read((0, 0), into)
    with pytest.raises(ValueError, match=r"^FileStore: .* of expert 2 of bank 1 in .* checksum"):
        store.read((1, 2), into)
    header = path.read_bytes().replace(b'"0.1.w"', b'"0.7.w"', 1)
    path.write_bytes(header)
    with pytest.raises(ValueError, match="its header does not match its checksum"):
        FileStore.open(path)


# --- files of others


@pytest.mark.parametrize("value", ["x", 5, [[1]], {"a": 1}, [None], True])
@pytest.mark.parametrize("name", ["mlp_only_layers", "moe_layers"])
def test_lists_of_layers(name, value, tmp_path):
    readers._make_shape(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(
        ValueError, match=f"^plan: in {path}, {name} must be numbers of layers, got"
    ):
        find_shape(path)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, object]]:
    pytest.importorskip("transformers")
    made = {}
    for method in ("gptq", "fp8"):
        folder = tmp_path_factory.mktemp(method)
        made[method] = folder, hf_readers._make(method)(folder)
    return made


@pytest.mark.parametrize(
    ("method", "leaf", "change", "sentence"),
    [
        ("gptq", "scales", lambda t: t.to(torch.float64), "must be one of F32, BF16, F16, got F64"),
        ("gptq", "scales", lambda t: t[:0], "a number of groups that divides 128 inputs, got"),
        ("gptq", "scales", lambda t: t[0], "must have two dimensions"),
        ("gptq", "qweight", lambda t: t.float(), "qweight must be int32 of two dimensions"),
        ("gptq", "qweight", lambda t: t[:, :8].contiguous(), "in place of"),
        ("gptq", "qzeros", lambda t: t[:, :1].contiguous(), "in place of"),
        ("fp8", "weight", lambda t: t.float(), "got something else: "),
        ("fp8", "weight_scale_inv", lambda t: t.repeat(1, 2), "got something else: "),
        ("fp8", "weight_scale_inv", lambda t: t[0], "got something else: "),
    ],
)
def test_tensors_of_published_experts(method, leaf, change, sentence, published, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, config = published[method]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    (key,) = (k for k in tensors if k.endswith(f"layers.0.{_first(method)}.{leaf}"))
    tensors[key] = change(tensors[key])
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"^from_pretrained: ") as caught:
        hf_readers._read(tmp_path, config)
    message = str(caught.value)
    assert sentence in message and "\n" not in message, message
    assert "model.safetensors" in message or key in message


def _first(method: str) -> str:
    if method == "gptq":
        return "block_sparse_moe.experts.0.w1"
    return "mlp.experts.0.gate_proj"


def test_gguf_file_that_lacks_a_tensor_or_ends_too_soon(tmp_path, prompt):
    pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    config = hf_readers._make_gguf(tmp_path)
    path = tmp_path / "model.gguf"
    content = path.read_bytes()
    for damaged, sentence in (
        (content.replace(b"blk.0.ffn_up_exps", b"blk.7.ffn_up_exps"), "blk.0.ffn_up_exps"),
        (content[:-100_000], "ends behind the file"),
        (content[:500], "it ends before"),
        (content[:8] + b"\xff" * 8 + content[16:], "got something else"),
        (b"", "it has 0 bytes"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"^from_pretrained: ") as caught:
            hf_readers._read_gguf(tmp_path, config)
        assert sentence in str(caught.value) and "model.gguf" in str(caught.value)
