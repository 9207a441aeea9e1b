"""Every reader of a file in the package: how to make a small file, how to read it, what it may
raise, and whether the format notices changed values."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from moe_ops import _files, zoo
from moe_ops.layers import Experts
from moe_ops.offload import ExpertPredictor, ExpertTrace, save_experts
from moe_ops.offload.store import FileStore
from moe_ops.parallel import load_sharded_experts
from moe_ops.parallel.plan import find_shape

SENTENCES: tuple[type[Exception], ...] = (ValueError, FileNotFoundError)


@dataclass(frozen=True)
class Reader:
    """A reader of files.

    Attributes:
        name: what it reads.
        make: writes files into an empty folder; what it returns is given to `read`.
        read: reads them; returns nested values to compare.
        files: shell pattern of the files to damage.
        errors: what it may raise.
        protected: a changed value is always noticed.
        sealed: files end in a SHA-256 of all before.
        needs: packages.
        above: another library reads the files too, and its own errors, raised with no function of
            moe_ops on the way, are counted by themselves.
        missing: what is read where there is no file is fine.
        json_only: only values of JSON are damaged, because another library parses the file.
    """

    name: str
    make: Callable[[Path], Any]
    read: Callable[[Path, Any], Any]
    files: str = "*"
    errors: tuple[type[Exception], ...] = SENTENCES
    protected: bool = False
    sealed: bool = False
    needs: Sequence[str] = ()
    above: bool = False
    missing: bool = False
    json_only: bool = False

    @property
    def available(self) -> bool:
        return all(importlib.util.find_spec(name) is not None for name in self.needs)


@dataclass
class History:
    """The history of a training run, as the zoo's loops keep one."""

    losses: list[float] = field(default_factory=lambda: [1.0, 0.5])


@dataclass
class Settings:
    """The settings of a command of the zoo."""

    steps: int = 4
    arms: tuple[str, ...] = ("a", "b")
    rate: float = 0.5


# --- offload


def _make_predictor(folder: Path) -> None:
    torch.manual_seed(0)
    ExpertPredictor(12, 2, 4, window=4, width=8, num_layers=1, num_heads=2).save(folder / "it")


def _make_trace(folder: Path) -> None:
    ids = torch.arange(24, dtype=torch.int16).view(6, 2, 2) % 4
    steps = torch.tensor([[2, 2], [2, 1]])
    ExpertTrace(ids, torch.arange(6), steps, [0, 1], 4).save(folder / "it.npz")


def _read_trace(folder: Path, _: Any) -> Any:
    found = ExpertTrace.load(folder / "it.npz")
    return [vars(found), found.calls(), found.multi_hot(), found.sequences()]


def _make_store(folder: Path) -> None:
    torch.manual_seed(0)
    banks = [{"w": [torch.randn(3, 4, 5)], "b": [torch.randn(3, 4)]} for _ in range(2)]
    save_experts(folder / "it.safetensors", banks)


def _read_store(folder: Path, _: Any) -> Any:
    store = FileStore.open(folder / "it.safetensors")
    found = []
    try:
        for bank in range(store.num_banks):
            for expert in range(store.num_experts):
                into = {n: torch.empty(s.shape, dtype=s.dtype) for n, s in store.tensors.items()}
                store.read((bank, expert), into)
                found.append(into)
    finally:
        store.close()
    return found


# --- the zoo


def _state() -> tuple[Any, ...]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return model, optimizer, schedule, torch.Generator().manual_seed(1)


def _checkpoint(folder: Path) -> Any:
    from bench.studies.trainer import Checkpoint

    return Checkpoint(folder / "it.pt", *_state(), History())


def _make_resume(folder: Path) -> None:
    _checkpoint(folder).save(4)


def _read_resume(folder: Path, _: Any) -> Any:
    found = _checkpoint(folder)
    kept = torch.get_rng_state()
    try:
        step = found.load()
    finally:
        torch.set_rng_state(kept)
    return [step, found.model.state_dict(), found.optimizer.state_dict(), vars(found.history)]


def _make_state(folder: Path) -> None:
    from moe_ops._state import write_state

    write_state(folder / "it.pt", {"a": torch.arange(9.0), "step": 3, "b": [1, "x"]})


def _read_state(folder: Path, _: Any) -> Any:
    from moe_ops._state import read_state

    return read_state(folder / "it.pt")


def _zoo(folder: Path, name: str = "topp", **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "num_layers": 2}
    model = zoo.create_model(name, **sizes)
    model.save_pretrained(folder, **options)
    return type(model)


def _read_zoo(folder: Path, kind: Any) -> Any:
    return kind.from_pretrained(folder).state_dict()


def _make_pruned(folder: Path) -> Any:
    kind = _zoo(folder)
    from moe_ops.surgery.routed_layers import find_routed_layers

    names = [
        layer.name for layer in find_routed_layers(kind.from_pretrained(folder), caller="test")
    ]
    return kind, {name: [0, 2] for name in names}


def _read_pruned(folder: Path, made: Any) -> Any:
    from moe_ops import surgery

    kind, keep = made
    return surgery.load_pruned(folder, keep, model_class=kind).model.state_dict()


def _make_settings(folder: Path) -> Any:
    from bench.studies.settings import settings_folder

    settings_folder(folder, Settings(), "runs", ())


def _read_settings(folder: Path, _: Any) -> Any:
    from bench.studies.settings import settings_folder

    return settings_folder(folder, Settings(), "runs", ())[1]


def _make_words(folder: Path) -> None:
    from bench.studies.thor.tokens import PairTokens

    made = PairTokens.learn(["a text of some words", "another text"], 300)
    _files.write_text(folder / "tokens.json", made.json)


def _read_words(folder: Path, _: Any) -> Any:
    from bench.studies.sentence.tokens import WordPieces

    return WordPieces(folder / "tokens.json")(["some words"])


def _read_pairs(folder: Path, _: Any) -> Any:
    from bench.studies.thor.training import Settings, make_tokens

    made = make_tokens(Settings(tokens="300"), TEXT, folder / "tokens.json")
    return made.numbers("some words")


TEXT: Any = SimpleNamespace(train=[("a text of some words", "another text")])


def _make_photo(folder: Path) -> None:
    from PIL import Image

    Image.new("RGB", (16, 8), (200, 10, 10)).save(folder / "it.png")


def _read_photo(folder: Path, _: Any) -> Any:
    from bench.studies.mofme.weather import read_photo

    return read_photo(folder / "it.png")


def _make_text(folder: Path) -> None:
    (folder / "it.txt").write_text("words " * 2000)


def _read_text(folder: Path, _: Any) -> Any:
    from bench.studies import python_texts

    return vars(python_texts.load(["mine"], {"mine": str(folder / "it.txt")})["mine"])


# --- experts of others, plans


def _make_experts(folder: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    names = {"gate_proj": (6, 4), "up_proj": (6, 4), "down_proj": (4, 6)}
    tensors = {f"x.{e}.{n}.weight": torch.randn(s) for e in range(2) for n, s in names.items()}
    save_file(tensors, folder / "model.safetensors")


def _make_experts_indexed(folder: Path) -> None:
    _make_experts(folder)
    from safetensors.torch import load_file

    names = sorted(load_file(folder / "model.safetensors"))
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    _files.write_json(folder / "model.safetensors.index.json", index)


def _read_experts(folder: Path, _: Any) -> Any:
    bank = Experts(2, 4, 6)
    load_sharded_experts(bank, folder, "x")
    return bank.state_dict()


def _make_shape(folder: Path) -> None:
    config = {
        "model_type": "qwen3_moe", "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16,
        "moe_intermediate_size": 32, "intermediate_size": 128, "num_experts": 8, "vocab_size": 99,
        "num_experts_per_tok": 2, "num_hidden_layers": 6, "mlp_only_layers": [1],
        "decoder_sparse_step": 1, "num_key_value_heads": 2, "tie_word_embeddings": False,
        "text_config": None, "n_shared_experts": 1,
    }  # fmt: skip
    _files.write_json(folder / "config.json", config)


def _read_shape(folder: Path, _: Any) -> Any:
    found = find_shape(folder / "config.json")
    return [vars(found), found.total_weights, found.active_weights]


# --- surgery, the demo


def _make_profile(folder: Path) -> None:
    from moe_ops.surgery import profile_experts

    torch.manual_seed(0)
    model = zoo.create_model("topp", vocab_size=16, num_layers=1).eval()
    profile_experts(model, [torch.arange(8)[None]]).save(folder / "it.safetensors")


def _read_profile(folder: Path, _: Any) -> Any:
    from moe_ops.surgery import ExpertProfile

    found = ExpertProfile.load(folder / "it.safetensors")
    return {name: vars(found[name]) for name in found}


def _make_patterns(folder: Path) -> None:
    from moe_ops.surgery import TaskRoutingPatterns

    torch.manual_seed(0)
    TaskRoutingPatterns(["a", "b"], ["l"], torch.randn(2, 1, 4), torch.randn(2, 1, 4)).save(
        folder / "it.safetensors"
    )


def _read_patterns(folder: Path, _: Any) -> Any:
    from moe_ops.surgery import TaskRoutingPatterns

    return vars(TaskRoutingPatterns.load(folder / "it.safetensors"))


READERS = [
    Reader(
        "ExpertPredictor", _make_predictor,
        lambda folder, _: ExpertPredictor.load(folder / "it").state_dict(),
        protected=True, sealed=True,
    ),
    Reader("ExpertTrace", _make_trace, _read_trace, protected=True),
    Reader("FileStore", _make_store, _read_store, protected=True),
    Reader("state", _make_state, _read_state, protected=True, sealed=True),
    Reader("resume", _make_resume, _read_resume, protected=True, sealed=True, missing=True),
    Reader("zoo", _zoo, _read_zoo, "*.safetensors", protected=True, needs=("safetensors",)),
    Reader("zoo, config", _zoo, _read_zoo, "*.json", needs=("safetensors",)),
    Reader(
        "zoo, sharded", lambda folder: _zoo(folder, "jetmoe", max_shard_bytes=20_000), _read_zoo,
        needs=("safetensors",),
    ),
    Reader("load_pruned", _make_pruned, _read_pruned, needs=("safetensors",)),
    Reader("settings", _make_settings, _read_settings, missing=True),
    Reader("WordPieces", _make_words, _read_words, needs=("tokenizers",)),
    Reader("PairTokens", _make_words, _read_pairs, needs=("tokenizers",), missing=True),
    Reader("photo", _make_photo, _read_photo, needs=("PIL",)),
    Reader("text", _make_text, _read_text),
    Reader("load_experts", _make_experts, _read_experts, needs=("safetensors",)),
    Reader("load_experts, index", _make_experts_indexed, _read_experts, needs=("safetensors",)),
    Reader("plan", _make_shape, _read_shape),
    Reader("Profile", _make_profile, _read_profile, protected=True, needs=("safetensors",)),
    Reader(
        "TaskRoutingPatterns", _make_patterns, _read_patterns, protected=True,
        needs=("safetensors",),
    ),
]  # fmt: skip
