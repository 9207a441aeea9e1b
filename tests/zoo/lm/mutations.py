"""Checkpoints of strangers: seeded damage to the files of a checkpoint folder."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

VALUES = (
    None, True, False, "x", "", "10", -1, 0, 1, 3, 3.5, -2.0, 1e300, float("nan"), float("inf"),
    10**6, 10**9, 10**12, 10**30, [], [1, 2], {}, {"a": 1}, "softmax", "yarn",
)  # fmt: skip
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "X", 7)


def mutate(folder: Path, rng: random.Random) -> str:
    """Damages one file of the folder, and says how."""
    kinds: list[Callable[[Path, random.Random], str]] = [_config, _config, _config, _bytes, _file]
    kinds += [_header] * 3
    if (folder / "model.safetensors.index.json").exists():
        kinds += [_index] * 3
    return rng.choice(kinds)(folder, rng)


def _config(folder: Path, rng: random.Random) -> str:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    place = config
    key = rng.choice(sorted(config))
    if isinstance(config[key], dict) and rng.random() < 0.7:
        place = config[key]
        key = rng.choice(sorted(place))
    change = rng.random()
    if change < 0.2:
        del place[key]
        said = f"without {key}"
    elif change < 0.3:
        own = rng.choice(("num_layers", "published", "yarn", "experts_of_layers", "init_std", "q"))
        config["moe_ops"] = rng.choice((5, [], {own: rng.choice(VALUES)}))
        said = f"moe_ops: {config['moe_ops']}"
    elif change < 0.45 and isinstance(place[key], int):
        place[key] = place[key] + 1 if rng.random() < 0.5 else 2 * place[key]
        said = f"{key}: {place[key]}"
    else:
        place[key] = rng.choice(VALUES)
        said = f"{key}: {place[key]}"
    path.write_text(json.dumps(config))
    return f"config.json {said}"


def _index(folder: Path, rng: random.Random) -> str:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    where = index["weight_map"]
    key = rng.choice(sorted(where))
    outside = folder.parent / "outside.safetensors"
    names = (
        "../outside.safetensors", str(outside), "none.safetensors", "config.json", "", ".",
        "a/../../outside.safetensors", "a\0.safetensors", rng.choice(sorted(where.values())),
        *VALUES,
    )  # fmt: skip
    change = rng.random()
    if change < 0.15:
        del where[key]
    elif change < 0.3:
        where[f"{key}.more"] = where[key]
    elif change < 0.4:
        index["weight_map"] = rng.choice(VALUES)
    elif change < 0.45:
        del index["weight_map"]
    else:
        where[key] = rng.choice(names)
    path.write_text(json.dumps(index))
    return f"index: {where.get(key)!r} for {key}, weight_map {type(index.get('weight_map'))}"


def _tensors(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def _header(folder: Path, rng: random.Random) -> str:
    path = _tensors(folder, rng)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    key = rng.choice(sorted(k for k in header if k != "__metadata__"))
    entry = header[key]
    change = rng.choice(("dtype", "shape", "size", "offsets", "delete", "rename", "length", "what"))
    if change == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif change == "shape":
        entry["shape"] = rng.choice(
            (entry["shape"][::-1], [], [1, *entry["shape"]], [2**40, 2**40], [-1], "x", 4)
        )
    elif change == "size":
        shape = list(entry["shape"])
        shape[rng.randrange(len(shape))] = rng.choice((0, 1, 3, 2**31, 2**62, 2**64, -4, 1.5, None))
        entry["shape"] = shape
    elif change == "offsets":
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            ([0, 0], [end, begin], [begin, end + 4], [begin, 2**62], [-4, end], [begin], "x", None)
        )
    elif change == "delete":
        del header[key]
    elif change == "rename":
        header[f"{key}x"] = header.pop(key)
    elif change == "what":
        header[key] = rng.choice(VALUES)
    text = json.dumps(header).encode()
    size = len(text)
    if change == "length":
        size = rng.choice((0, 1, size - 1, size + 1, len(content), 2**31, 2**63, 2**64 - 1))
    path.write_bytes(size.to_bytes(8, "little") + text + content[8 + length :])
    return f"{path.name}: {change} of {key}: {header.get(key)}, length {size}"


def _bytes(folder: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    content = bytearray(path.read_bytes())
    length = len(content)
    if path.suffix == ".safetensors":
        length = 8 + int.from_bytes(content[:8], "little")
    place = rng.randrange(length)
    if rng.random() < 0.3:
        del content[place:]
        said = f"cut at {place}"
    else:
        content[place] ^= 1 << rng.randrange(8)
        said = f"byte {place} is {content[place]}"
    path.write_bytes(bytes(content))
    return f"{path.name}: {said}"


def _file(folder: Path, rng: random.Random) -> str:
    """Another thing in the place of a file."""
    path = rng.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    outside = folder.parent / f"outside{path.suffix}"
    kind = rng.choice(("outside", "absent", "empty", "folder", "loop", "list", "deep", "fifo"))
    content = path.read_bytes()
    path.unlink()
    if kind == "outside":
        outside.write_bytes(content)
        path.symlink_to(outside)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind != "absent":
        path.write_text({"empty": "", "list": "[1]", "deep": "[" * 200_000}[kind])
    return f"{path.name}: {kind}"
