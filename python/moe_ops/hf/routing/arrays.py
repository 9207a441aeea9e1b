"""Arrays of routed experts from inference engines, aligned with the tokens of a batch.

T tokens, L decoder layers, K experts per token, B sequences of length S.
"""

from __future__ import annotations

import base64
import binascii
import io
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .taps import Tap, Taps

_NAME = "hf.replay"


class Tokens(NamedTuple):
    """Places of the tokens of each sequence in a call of the model.

    num_tokens: T, padding included.
    places: indices in [0, T) of the tokens of each sequence, in their order.
    columns: S if sequences are padded, or 0.
    """

    num_tokens: int
    places: list[np.ndarray]
    columns: int

    def name(self, index: int) -> str:
        """Returns the sequence and position of a token, for errors."""
        for number, places in enumerate(self.places):
            found = np.flatnonzero(places == index)
            if found.size:
                return f"sequence {number}, token {found[0]}"
        return f"padded token {index}"


def align(
    taps: Taps,
    routed_experts: Any,
    *,
    attention_mask: Any = None,
    cu_seqlens: Any = None,
    start: int | Sequence[int] = 0,
    strict: bool = True,
) -> list[list[np.ndarray]]:
    """Returns the ids [T, K] of each tap and pass, checked; -1 where the router selects freely.

    See `replay` for the arguments.

    Raises:
        ValueError: an array does not fit the model or the tokens.
    """
    tokens = _tokens(attention_mask, cu_seqlens)
    most = max(tap.top_k for tap in taps.taps)
    if _is_list(routed_experts):
        parts = [_array(part, taps, most, dims=(3,)) for part in routed_experts]
        if not parts:
            raise ValueError(f"{_NAME}: routed_experts must have a sequence, got an empty list.")
    else:
        whole = _array(routed_experts, taps, most, dims=(3, 4))
        if whole.ndim == 4:
            return _select(taps, *_padded(whole, tokens, start))
        parts = _split(whole, tokens)
    tokens = tokens or _packed([len(part) for part in parts])
    if len(parts) != len(tokens.places):
        raise ValueError(
            f"{_NAME}: routed_experts must have one array for each of the {len(tokens.places)} "
            f"sequences, got {len(parts)}."
        )
    kinds = {part.shape[1] for part in parts}
    if len(kinds) > 1:
        raise ValueError(
            f"{_NAME}: routed_experts must have equal numbers of layers in all sequences, got "
            f"{sorted(kinds)}."
        )
    ids = np.full((tokens.num_tokens, *parts[0].shape[1:]), -1, np.int32)
    starts = _starts(start, len(parts))
    for number, (part, places) in enumerate(zip(parts, tokens.places, strict=True)):
        rest = places[starts[number] :]
        if starts[number] > len(places):
            raise ValueError(
                f"{_NAME}: start must be at most the {len(places)} tokens of sequence {number}, "
                f"got {starts[number]}."
            )
        if strict and len(part) not in (len(rest), len(rest) - 1):
            raise ValueError(
                f"{_NAME}: routed_experts of sequence {number} must have {len(rest)} rows, one per "
                f"token from {starts[number]} on, or one less (engines never run the last token), "
                f"got {len(part)}; strict=False leaves out rows or tokens at the end."
            )
        length = min(len(part), len(rest))
        ids[rest[:length]] = part[:length]
    return _select(taps, ids, tokens)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _array(value: Any, taps: Taps, top_k: int, dims: tuple[int, ...]) -> np.ndarray:
    """Returns an array [..., L, K] of int32."""
    if isinstance(value, (str, bytes)):
        value = _decoded(value, taps, top_k)
    array = _as_numpy(value)
    layers = sorted({sum(len(tap.rows) for tap in taps.taps), taps.num_rows})
    expected = f"[tokens, {' or '.join(map(str, layers))} layers, {top_k} experts]"
    if array.dtype.kind not in "iu":
        got = getattr(value, "dtype", type(value).__name__)
        raise ValueError(
            f"{_NAME}: routed_experts must be an integer array {expected}, got {got} of shape "
            f"{list(getattr(value, 'shape', array.shape))}."
        )
    if array.ndim not in dims or array.shape[-1] != top_k or array.shape[-2] not in layers:
        raise ValueError(
            f"{_NAME}: routed_experts must be {expected}"
            f"{' with or without a batch dimension' if 4 in dims else ' for each sequence'}, got "
            f"shape {list(array.shape)}."
        )
    limit = np.iinfo(np.int32).max
    if array.size and (int(array.max()) > limit or int(array.min()) < -limit):
        raise ValueError(
            f"{_NAME}: routed_experts must be ids of experts or -1, got "
            f"{int(array.max())} and {int(array.min())} as extremes."
        )
    return array.astype(np.int32)


def _decoded(text: str | bytes, taps: Taps, top_k: int) -> np.ndarray:
    """Reads what servers send in JSON: base64 of a .npy file (vLLM) or of raw int32 (SGLang)."""
    try:
        data = base64.b64decode(text, validate=True)
        if data.startswith(b"\x93NUMPY"):
            found: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
            return found
        return np.frombuffer(data, "<i4").reshape(-1, taps.num_rows, top_k)
    except (binascii.Error, ValueError, EOFError) as error:
        raise ValueError(
            f"{_NAME}: routed_experts as text must be base64 of a .npy file or of int32 [tokens, "
            f"{taps.num_rows}, {top_k}], got {len(text)} characters that are not ({error})."
        ) from None


def _as_numpy(value: Any) -> np.ndarray:
    """Returns an array; an empty one of floats for ragged lists, and for tensors of kinds that
    numpy does not have."""
    try:
        return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    except (ValueError, TypeError, RuntimeError):
        return np.zeros(0)


def _integers(name: str, value: Any, dims: int) -> np.ndarray:
    array = _as_numpy(value)
    if array.dtype.kind not in "iub" or array.ndim != dims:
        shape = "[batch, length]" if dims == 2 else "[sequences + 1]"
        raise ValueError(
            f"{_NAME}: {name} must be an integer or bool array {shape}, got {array.dtype} of "
            f"shape {list(array.shape)}."
        )
    return array


def _tokens(attention_mask: Any, cu_seqlens: Any) -> Tokens | None:
    if attention_mask is not None and cu_seqlens is not None:
        raise ValueError(f"{_NAME}: attention_mask and cu_seqlens must not be combined, got both.")
    if attention_mask is not None:
        mask = _integers("attention_mask", attention_mask, 2) != 0
        columns = mask.shape[1]
        places = [np.flatnonzero(row) + i * columns for i, row in enumerate(mask)]
        return Tokens(mask.size, places, columns)
    if cu_seqlens is not None:
        ends = _integers("cu_seqlens", cu_seqlens, 1).astype(np.int64)
        if len(ends) < 2 or ends[0] != 0 or (np.diff(ends) < 0).any():
            raise ValueError(
                f"{_NAME}: cu_seqlens must rise from 0 to the number of tokens, got "
                f"{ends[:8].tolist()}."
            )
        return _packed(np.diff(ends).tolist())
    return None


def _packed(lengths: Sequence[int]) -> Tokens:
    ends = list(itertools.accumulate(lengths))
    places = [np.arange(end - n, end) for n, end in zip(lengths, ends, strict=True)]
    return Tokens(ends[-1], places, 0)


def _starts(start: Any, count: int) -> list[int]:
    starts: list[Any] = [start] * count if type(start) is int else [None]
    starts = list(start) if _is_list(start) else starts
    if len(starts) != count or any(type(s) is not int or s < 0 for s in starts):
        raise ValueError(
            f"{_NAME}: start must be a number of tokens, 0 or more, or one for each of the {count} "
            f"sequences, got {start!r}."
        )
    return starts


def _split(whole: np.ndarray, tokens: Tokens | None) -> list[np.ndarray]:
    """Splits an array [T, L, K] of all sequences."""
    if tokens is None or len(tokens.places) == 1:
        return [whole]
    lengths = [len(places) for places in tokens.places]
    if len(whole) != sum(lengths):
        raise ValueError(
            f"{_NAME}: routed_experts of {len(lengths)} sequences in one array must have a row for "
            f"each of their {sum(lengths)} tokens, got {len(whole)}; pass a list of arrays."
        )
    return np.split(whole, np.cumsum(lengths)[:-1])


def _padded(whole: np.ndarray, tokens: Tokens | None, start: Any) -> tuple[np.ndarray, Tokens]:
    """Returns the ids [T, L, K] of an array [B, S, L, K] or [B, S - 1, L, K]."""
    if start != 0:
        raise ValueError(f"{_NAME}: start must be 0 for an array [B, S, L, K], got {start!r}.")
    batch, length = whole.shape[:2]
    if tokens is None:
        places = [np.arange(i * length, (i + 1) * length) for i in range(batch)]
        tokens = Tokens(batch * length, places, length)
    columns = tokens.columns
    if not columns or len(tokens.places) != batch or length not in (columns, columns - 1):
        got = f"[{len(tokens.places)}, {columns}]" if columns else "cu_seqlens"
        raise ValueError(
            f"{_NAME}: routed_experts [B, S, L, K] must have the B and S of attention_mask, or one "
            f"column less, got shape {list(whole.shape)} for {got}."
        )
    ids = np.full((batch, columns, *whole.shape[2:]), -1, np.int32)
    ids[:, :length] = whole
    flat = ids.reshape(tokens.num_tokens, *whole.shape[2:])
    padding = np.ones(tokens.num_tokens, bool)
    padding[np.concatenate(tokens.places)] = False
    flat[padding] = -1
    return flat, tokens


def _select(taps: Taps, ids: np.ndarray, tokens: Tokens) -> list[list[np.ndarray]]:
    """Returns the ids of each tap and pass, and raises for the first row that is wrong."""
    every = ids.shape[1] == taps.num_rows
    order = {row: n for n, row in enumerate(sorted(r for tap in taps.taps for r in tap.rows))}
    found = []
    for tap in taps.taps:
        rows = tap.rows if every else [order[row] for row in tap.rows]
        of_tap = [np.ascontiguousarray(ids[:, row, : tap.top_k]) for row in rows]
        if tap.selects:
            for part in of_tap:
                _check(tap, part, tokens)
        found.append(of_tap)
    pairs = zip(taps.taps, found, strict=True)
    _check_zeros([part for tap, parts in pairs if tap.selects for part in parts])
    return found


def _check(tap: Tap, ids: np.ndarray, tokens: Tokens) -> None:
    unset = ids < 0
    in_order = np.sort(ids, axis=1)
    wrong = (ids < -1) | (ids >= tap.num_experts)
    wrong[:, 1:] |= (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)
    wrong |= unset & ~unset.all(1, keepdims=True)
    bad = np.flatnonzero(wrong.any(1))
    if not bad.size:
        return
    index = int(bad[0])
    hint = ""
    if tap.top_k > 1 and not ids[~unset.all(1)].any():
        hint = " (the layer has zeros only, so the engine recorded nothing)"
    raise ValueError(
        f"{_NAME}: routed_experts of layer {tap.name!r}, {tokens.name(index)}, must be "
        f"{tap.top_k} different ids in [0, {tap.num_experts}), or -1 throughout, got "
        f"{ids[index].tolist()}{hint}."
    )


def _check_zeros(layers: list[np.ndarray]) -> None:
    """Rejects zeros in every row of every layer, which only K = 1 lets pass until here."""
    if layers and sum(len(ids) for ids in layers) > 1 and not any(ids.any() for ids in layers):
        raise ValueError(
            f"{_NAME}: routed_experts must not be zero for all tokens of all layers, as in arrays "
            "of engines that recorded nothing, got zeros only."
        )
