"""The vocabulary of a GGUF file, from the tokenizer files of a checkpoint."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

from moe_ops import _files

from .source import Source

# A piece of the expression that splits text before merging -> llama.cpp's name for it.
_SPLITS = (
    ("\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*", "llama-bpe"),
    ("[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}", "gpt-4o"),
    ("[一-龥", "deepseek-v3"),
    ("|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*", "qwen2"),
)


def add_vocabulary(writer: Any, source: Source) -> None:
    """Writes the vocabulary, or that the file has none, with which llama.cpp takes token ids."""
    folder = source.folder
    kind = None if folder is None else _kind_of(folder)
    if folder is None or kind is None:
        writer.add_tokenizer_model("no_vocab")
        return
    import gguf

    size = source.config.vocab_size
    if kind == "llama":
        pieces = gguf.SentencePieceVocab(folder)
        tokens, scores, types = map(list, zip(*pieces.all_tokens(), strict=True))
        missing = range(len(tokens), size)
        tokens += [f"[PAD{i}]".encode() for i in missing]
        scores += [-10000.0] * len(missing)
        types += [gguf.TokenType.UNUSED] * len(missing)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
    else:
        tokens, types = _byte_level_tokens(folder, size)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(kind)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=kind != "llama", n_vocab=size)
    special.add_to_gguf(writer, quiet=True)


def _kind_of(folder: Path) -> str | None:
    """Returns "llama" for sentencepiece, the name of the splitting expression for byte-level BPE,
    None for other tokenizers and none."""
    if (folder / "tokenizer.model").is_file():
        if importlib.util.find_spec("sentencepiece") is None:
            raise ImportError(
                f"export: {folder}/tokenizer.model needs the package sentencepiece to be written "
                "to a GGUF file: pip install sentencepiece"
            )
        return "llama"
    if not (folder / "tokenizer.json").is_file():
        return None
    content = _files.read_json(folder / "tokenizer.json")
    model, before = content.get("model") or {}, content.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers") or [before]
    if model.get("type") != "BPE" or not any(s.get("type") == "ByteLevel" for s in steps):
        warnings.warn(
            f"export: {folder}/tokenizer.json must be byte-level BPE to be written to a GGUF file, "
            f"got {model.get('type')}; the file will have no vocabulary.",
            stacklevel=2,
        )
        return None
    expressions = [str((step.get("pattern") or {}).get("Regex", "")) for step in steps]
    for piece, name in _SPLITS:
        if any(piece in expression for expression in expressions):
            return name
    return "gpt-2"


def _byte_level_tokens(folder: Path, size: int) -> tuple[list[str], list[Any]]:
    import gguf

    content = _files.read_json(folder / "tokenizer.json")
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    named = [
        (text, number, gguf.TokenType.NORMAL) for text, number in content["model"]["vocab"].items()
    ]
    for added in content.get("added_tokens") or ():
        kind = gguf.TokenType.CONTROL if added.get("special") else gguf.TokenType.USER_DEFINED
        named.append((added["content"], added["id"], kind))
    for text, number, kind in named:
        if number < size:
            tokens[number], types[number] = text, kind
    return tokens, types
