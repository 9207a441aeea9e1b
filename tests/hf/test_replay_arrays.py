"""Arrays of routed experts: layouts of engines, alignment with tokens, and hostile arrays."""

from __future__ import annotations

import base64
import io
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moe_ops.hf.routing.arrays import align

LAYERS = 4


def fake_taps(top_k=2, num_experts=6, rows=(1, 3)):
    taps = [
        SimpleNamespace(
            name=f"layers.{row}.mlp",
            rows=[row],
            num_experts=num_experts,
            top_k=top_k,
            selects=True,
        )
        for row in rows
    ]
    return SimpleNamespace(taps=taps, num_rows=LAYERS)


TAPS = fake_taps()


def draw(num_tokens, rng, layers=LAYERS, dtype=np.int16, taps=TAPS):
    tap = taps.taps[0]
    scores = rng.random((num_tokens, layers, tap.num_experts))
    return scores.argsort(-1)[..., : tap.top_k].astype(dtype)


def rng():
    return np.random.default_rng(0)


def rows(found, tap=1):
    return found[tap][0].tolist()


FREE = [-1, -1]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "int64", "uint64"])
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_types(dtype, kind):
    array = draw(5, rng(), dtype=dtype)
    assert rows(align(TAPS, kind(array))) == array[:, 3].tolist()


def test_layers_with_experts_alone():
    array = draw(5, rng(), layers=2)
    assert rows(align(TAPS, array)) == array[:, 1].tolist()


def test_dense_layers_are_not_read():
    array = draw(5, rng())
    array[:, [0, 2]] = 99
    assert rows(align(TAPS, array)) == array[:, 3].tolist()


@pytest.mark.parametrize("missing", [0, 1])
def test_padding_on_both_sides(missing):
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]])
    a, b = draw(3 - missing, rng()), draw(4 - missing, rng())
    found = rows(align(TAPS, [a, b], attention_mask=mask))
    last = [FREE] * missing
    assert found[:6] == [FREE, FREE, *a[:, 3].tolist(), *last, FREE]
    assert found[6:] == [*b[:, 3].tolist(), *last, FREE, FREE]


@pytest.mark.parametrize("missing", [0, 1])
def test_padded_arrays(missing):
    mask = np.array([[0, 1, 1], [1, 1, 0]])
    array = draw(6, rng()).reshape(2, 3, LAYERS, 2)
    array[mask == 0] = 0
    found = rows(align(TAPS, array[:, : 3 - missing], attention_mask=mask))
    second = FREE if missing else array[0, 2, 3].tolist()
    expected = [FREE, array[0, 1, 3].tolist(), second]
    assert found == [*expected, *array[1, :2, 3].tolist(), FREE]


def test_padded_arrays_without_a_mask():
    array = draw(6, rng()).reshape(2, 3, LAYERS, 2)
    assert rows(align(TAPS, array)) == array.reshape(6, LAYERS, 2)[:, 3].tolist()


def test_packed_sequences():
    a, b = draw(3, rng()), draw(2, rng())
    ends = torch.tensor([0, 3, 6], dtype=torch.int32)
    found = rows(align(TAPS, [a, b], cu_seqlens=ends))
    assert found == [*a[:, 3].tolist(), *b[:, 3].tolist(), FREE]
    whole = draw(6, rng())
    assert rows(align(TAPS, whole, cu_seqlens=ends)) == whole[:, 3].tolist()
    assert rows(align(TAPS, [a, b])) == [*a[:, 3].tolist(), *b[:, 3].tolist()]


def test_prefixes_of_turns():
    """The last answer of a conversation covers all tokens but a prefix that was not asked for."""
    a = draw(3, rng())
    found = rows(align(TAPS, [a], attention_mask=np.ones((1, 6), int), start=2))
    assert found == [FREE, FREE, *a[:, 3].tolist(), FREE]
    # A tool's answer was appended, and no engine has run it.
    found = rows(align(TAPS, [a], attention_mask=np.ones((1, 6), int), strict=False))
    assert found == [*a[:, 3].tolist(), FREE, FREE, FREE]


def test_tails_of_drafts():
    a = draw(9, rng())
    found = rows(align(TAPS, [a], attention_mask=np.ones((1, 6), int), strict=False))
    assert found == a[:6, 3].tolist()
    with pytest.raises(ValueError, match=r"sequence 0 must have 6 rows.*got 9"):
        align(TAPS, [a], attention_mask=np.ones((1, 6), int))


def test_rows_that_were_not_recorded():
    array = draw(4, rng())
    array[1] = -1
    array[:, 1] = -1
    found = align(TAPS, array)
    assert rows(found, 0) == [FREE] * 4
    assert rows(found)[1] == FREE and rows(found)[0] == array[0, 3].tolist()


def test_texts_of_servers():
    array = draw(4, rng(), dtype=np.uint8)
    file = io.BytesIO()
    np.save(file, array)
    vllm = base64.b64encode(file.getvalue()).decode()
    sglang = base64.b64encode(array.astype("<i4").tobytes()).decode()
    assert rows(align(TAPS, vllm)) == rows(align(TAPS, [sglang])) == array[:, 3].tolist()


def changed(where, value):
    array = draw(5, rng())
    array[where] = value
    return array


WRONG = {
    "a repeated expert": (changed((2, 3), [4, 4]), r"'layers.3.mlp', sequence 0, token 2"),
    "an expert too many": (changed((2, 1, 1), 6), r"'layers.1.mlp'.*2 different ids in \[0, 6\)"),
    "below -1": (changed((0, 1), -2), "or -1 throughout, got"),
    "half a row": (changed((4, 1, 0), -1), "sequence 0, token 4"),
    "zeros": (np.zeros((5, LAYERS, 2), int), "recorded nothing"),
    "floats": (np.zeros((5, LAYERS, 2)), "integer array.*float64"),
    "bools": (np.zeros((5, LAYERS, 2), bool), "integer array"),
    "None inside": ([None], "integer array"),
    "layers": (np.zeros((5, 3, 2), int), "2 or 4 layers, 2 experts"),
    "experts per token": (np.zeros((5, 4, 3), int), "2 or 4 layers, 2 experts"),
    "no sequence": ([], "empty list"),
    "text": ("&&", "base64"),
    "cut text": (base64.b64encode(b"12345").decode(), "base64"),
    "large": (np.full((5, LAYERS, 2), 2**40), "extremes"),
    "unequal layers": ([draw(2, rng()), draw(2, rng(), layers=2)], "equal numbers of layers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arrays(case):
    array, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as error:
        align(TAPS, array)
    assert str(error.value).startswith("hf.replay: ") and str(error.value).endswith(".")


MASK = np.ones((2, 3), int)
OPTIONS = {
    "mask and offsets": ({"attention_mask": MASK, "cu_seqlens": [0, 3]}, "not be combined"),
    "mask": ({"attention_mask": np.ones(3, int)}, r"attention_mask must be"),
    "offsets": ({"cu_seqlens": [0, 4, 3]}, "rise from 0"),
    "batch": ({"attention_mask": np.ones((3, 3), int)}, "each of the 3 sequences, got 2"),
    "start": ({"attention_mask": MASK, "start": -1}, "start must be"),
    "starts": ({"attention_mask": MASK, "start": [1]}, "start must be"),
    "far start": ({"attention_mask": MASK, "start": 4}, "at most the 3 tokens"),
    "length": ({"attention_mask": np.ones((2, 5), int)}, "must have 5 rows.*got 3"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_wrong_alignment(case):
    options, message = OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        align(TAPS, [draw(3, rng()), draw(3, rng())], **options)


def test_one_expert_per_token_may_not_be_zero_everywhere():
    taps = fake_taps(top_k=1)
    with pytest.raises(ValueError, match="zeros only"):
        align(taps, np.zeros((5, LAYERS, 1), int))
    array = np.zeros((5, LAYERS, 1), int)
    array[0, 1] = 3
    assert rows(align(taps, array), 0) == [[3], [0], [0], [0], [0]]


def fuzzed(random):
    """Returns arrays, options after at most three changes, which may be wrong."""
    lengths = random.integers(0, 6, random.integers(1, 4))
    starts = [int(random.integers(0, n + 1)) if random.random() < 0.3 else 0 for n in lengths]
    short = [int(n - s > 0 and random.random() < 0.5) for n, s in zip(lengths, starts, strict=True)]
    parts = [draw(n - s - d, random) for n, s, d in zip(lengths, starts, short, strict=True)]
    columns = int(max(lengths)) + int(random.integers(0, 3))
    mask = np.zeros((len(lengths), columns), int)
    for row, n in zip(mask, lengths, strict=True):
        offset = random.integers(0, columns - n + 1)
        row[offset : offset + n] = 1
    ends = np.concatenate([[0], np.cumsum(lengths)])
    options = {"attention_mask": mask} if random.random() < 0.5 else {"cu_seqlens": ends}
    options |= {"start": starts, "strict": bool(random.random() < 0.7)}
    for _ in range(random.integers(0, 4)):
        number = random.integers(len(parts))
        part = parts[number]
        change = random.integers(9)
        if change == 0:
            parts[number] = part[: random.integers(0, len(part) + 1)]
        elif change == 1:
            parts[number] = np.concatenate([part, part[:1], part[-1:]])
        elif change == 2 and part.size:
            part.reshape(-1)[random.integers(part.size)] = value(random.integers(-3, 9), part)
        elif change == 3 and part.size:
            part[random.integers(len(part)), random.integers(part.shape[1])] = value(-1, part)
        elif change == 4:
            parts[number] = part.astype(random.choice([np.uint8, np.uint16, np.int64, np.float32]))
        elif change == 5:
            parts[number] = part[:, : random.integers(0, LAYERS + 1)]
        elif change == 6:
            parts[number] = np.swapaxes(part, random.integers(3), random.integers(3))
        elif change == 7:
            options["start"] = [int(random.integers(-1, 8)) for _ in options["start"]]
        elif change == 8:
            parts.pop()
            if not parts:
                break
    return parts, options


def value(number, part):
    """Returns a number in the type of an array, wrapped around as engines do."""
    return np.asarray(number).astype(part.dtype)


def expected_rows(parts, options):
    """Computes what the arrays mean, token by token."""
    mask, ends = options.get("attention_mask"), options.get("cu_seqlens")
    if mask is not None:
        table = [[None] * mask.shape[1] for _ in mask]
        tokens = [[(i, c) for c in range(mask.shape[1]) if m[c]] for i, m in enumerate(mask)]
    else:
        table = [[None] * int(ends[-1])]
        tokens = [[(0, t) for t in range(a, b)] for a, b in itertools.pairwise(ends)]
    for part, places, start in zip(parts, tokens, options["start"], strict=True):
        for (i, c), row in zip(places[start:], part, strict=False):
            table[i][c] = row
    return [row for line in table for row in line]


def test_fuzz():
    random = np.random.default_rng(7)
    refused = 0
    for _ in range(1500):
        parts, options = fuzzed(random)
        try:
            found = align(TAPS, parts, **options)
        except ValueError as error:
            assert str(error).startswith("hf.replay: ") and str(error).endswith(".")
            refused += 1
            continue
        rows_of = expected_rows(parts, options)
        for index, tap in enumerate(TAPS.taps):
            layers = {len(part[0]) for part in parts if len(part)}
            layer = index if layers == {2} else tap.rows[0]
            for ids, row in zip(found[index][0], rows_of, strict=True):
                expected = FREE if row is None else row[layer].astype(int).tolist()
                assert ids.tolist() == expected
                assert expected == FREE or len({*expected} & {*range(6)}) == 2
    assert 400 < refused < 1300


def hostile(random):
    """Returns one object that may be no array at all."""
    good = draw(int(random.integers(0, 5)), random)
    shape = tuple(int(n) for n in random.integers(0, 5, random.integers(0, 6)))
    tensor = torch.as_tensor(good)
    file = io.BytesIO()
    np.save(file, good)
    text = base64.b64encode(file.getvalue()).decode()
    cut = text[: random.integers(0, len(text) + 1)]
    choices = [
        lambda: random.integers(-(2**62), 2**62, shape),
        lambda: random.integers(0, 2**63, shape, dtype=np.uint64) * 2,
        lambda: random.standard_normal(shape) * np.nan,
        lambda: random.standard_normal(shape) + 1j,
        lambda: np.zeros(shape, object),
        lambda: np.zeros(shape, "datetime64[s]"),
        lambda: np.zeros(shape, [("id", "i4")]),
        lambda: np.full(shape, "expert"),
        lambda: good.tolist(),
        lambda: [good.tolist(), [1]],
        lambda: {"routed_experts": good},
        lambda: (good, None),
        lambda: iter(good),
        lambda: slice(3),
        lambda: 7,
        lambda: None,
        lambda: cut,
        lambda: cut.encode(),
        lambda: "ä" * int(random.integers(0, 9)),
        lambda: base64.b64encode(random.bytes(int(random.integers(0, 200)))),
        lambda: base64.b64encode(b"\x93NUMPY" + random.bytes(40)).decode(),
        lambda: tensor.bool(),
        lambda: tensor.to_sparse(),
        lambda: torch.empty(shape, dtype=torch.int16, device="meta"),
        lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
        lambda: tensor.float().requires_grad_(),
        lambda: good[::-1, :, ::-1],
        lambda: np.asfortranarray(good),
        lambda: good.astype(">i2"),
        lambda: np.ma.masked_array(good, good > 2),
        lambda: memoryview(np.ascontiguousarray(good)),
    ]
    return choices[random.integers(len(choices))]()


def test_hostile_objects():
    """Each is refused by a sentence, or is an array whose rows are taken exactly."""
    random = np.random.default_rng(11)
    taken = 0
    for _ in range(1500):
        given = hostile(random)
        if random.random() < 0.5:
            given = [given] * int(random.integers(1, 3))
        mask = np.ones((int(random.integers(0, 3)), int(random.integers(0, 5))), int)
        options = {"attention_mask": mask} if random.random() < 0.3 else {}
        if random.random() < 0.3:
            name = random.choice(["attention_mask", "cu_seqlens", "start"])
            options = {str(name): hostile(random)}
        try:
            found = align(TAPS, given, **options, strict=bool(random.random() < 0.7))
        except ValueError as error:
            assert str(error).startswith("hf.replay: ") and str(error).endswith("."), (given, error)
            continue
        taken += 1
        for ids in (part for parts in found for part in parts):
            assert ids.shape[1] == 2 and ((ids >= -1) & (ids < 6)).all()
            assert all(row == FREE or row[0] != row[1] for row in ids.tolist())
    assert 50 < taken < 1000
