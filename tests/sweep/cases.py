"""Cases: lines of text such as ``op=grouped_gemm dtype=bf16 rows=129 k=193 n=8 seed=3``.

Every op has dimensions and options. A dimension has the sizes around each entry of the kernels'
table (``moe_ops_dev.block_sizes()``) that concerns it. The sweep puts one dimension (or two, for
the products) on such a size and leaves the others small; random cases draw all of them.

The file is long because it is a table of all ops.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from moe_ops.reference._scores import SCORE_FUNCS

Value = int | str
SizeTable = Sequence[tuple[str, str, str, int]]


class Case:
    """A description of a call. `case["rows"]` is a number or a word; the text of it makes the case
    again."""

    def __init__(self, values: dict[str, Value]) -> None:
        self.values = values

    @classmethod
    def of(cls, text: str) -> Case:
        values: dict[str, Value] = {}
        for part in text.split():
            name, _, value = part.partition("=")
            if not value:
                raise ValueError(f"a case is made of name=value, got {part!r}.")
            values[name] = int(value) if value.lstrip("-").isdigit() else value
        if "op" not in values:
            raise ValueError(f"a case must name its op, got {text!r}.")
        return cls(values)

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.values.items())

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def get(self, name: str, default: Value | None = None) -> Any:
        return self.values.get(name, default)

    def but(self, **values: Value) -> Case:
        return Case({**self.values, **values})


# Sizes for the dimensions that a case is not about. Odd ones leave tails everywhere; even ones are
# what pairs and whole vectors ask for; 160 and 193 are wider than what small experts have.
SMALL = (5, 13, 16, 24, 31, 64)
WIDER = (5, 13, 24, 31, 64, 129, 160, 193)
ROWS = (1, 2, 3, 7, 13, 30)
DTYPES = ("fp64", "fp32", "bf16", "fp16")
HALVES = ("fp32", "bf16", "fp16")
ACTS = ("swiglu", "geglu", "reglu", "swiglu_oai", "silu", "gelu", "relu2")


@dataclasses.dataclass(frozen=True)
class Dim:
    """A dimension: which entries of the table concern it, its sizes where the case is about another
    one, and its largest size."""

    entries: tuple[tuple[str, str], ...]
    others: tuple[int, ...]
    most: int
    least: int = 1
    step: int = 1


@dataclasses.dataclass(frozen=True)
class Op:
    dims: dict[str, Dim]
    options: dict[str, tuple[Value, ...]]
    dtypes: tuple[str, ...] = DTYPES
    pairs: tuple[tuple[str, str], ...] = ()  # dimensions that are at sizes of the table together
    # Elementary operations that a case may take, as a product of dimensions.
    cost: tuple[str, ...] = ()
    draws: int = 2  # cases for each size


# Most elementary operations of a case about one size, and of one about two: the fp64 reference is
# what takes time.
MOST_COST, MOST_PAIR_COST = 16_000_000, 3_000_000

GEMM_ROWS = (("gemm", "rows"), ("wgrad", "rows"))
GEMM_WIDTH = (("gemm", "depth"), ("gemm", "features"), ("wgrad", "depth"), ("wgrad", "features"))
SLOT_ROWS = (*GEMM_ROWS, ("slots", "rows"), ("slots", "tokens"))
SLOT_WIDTH = (*GEMM_WIDTH, ("slots", "width"))
LAYOUTS = ("nt", "nn", "even", "gaps")
VIEWS = ("contiguous", "transposed", "offset", "expanded")
SCALES = ("random", "ones", "half", "mixed")

OPS: dict[str, Op] = {
    "grouped_gemm": Op(
        {
            "rows": Dim(GEMM_ROWS, ROWS, 2100),
            "k": Dim(GEMM_WIDTH, WIDER, 4200),
            "n": Dim(GEMM_WIDTH, WIDER, 8200),
        },
        {
            "invariant": (0, 0, 0, 1),
            "layout": LAYOUTS,
            "bias": (0, 1),
            "experts": (1, 4),
            "grad_view": VIEWS[:3],
        },
        pairs=(("rows", "k"), ("rows", "n"), ("k", "n")),
        cost=("rows", "k", "n"),
    ),
    "grouped_gemm_wgrad": Op(
        {
            "rows": Dim((("wgrad", "rows"), ("gemm", "rows")), ROWS, 2100),
            "n": Dim((("wgrad", "features"), ("gemm", "features")), WIDER, 4200),
            "k": Dim((("wgrad", "depth"), ("gemm", "features")), WIDER, 4200),
        },
        {"experts": (1, 4), "grad_view": VIEWS[:3]},
        pairs=(("rows", "n"), ("rows", "k")),
        cost=("rows", "k", "n"),
    ),
    "moe_linear_map": Op(
        {
            "rows": Dim(SLOT_ROWS, ROWS, 2100),
            "h": Dim(SLOT_WIDTH, WIDER, 4200),
            "o": Dim(SLOT_WIDTH, WIDER, 4200),
        },
        {
            "invariant": (0, 0, 0, 1),
            "layout": LAYOUTS,
            "bias": (0, 1),
            "experts": (1, 4),
            "top_k": (1, 2),
            "repeat": (0, 0, 0, 1),
            "grad_view": VIEWS,
        },
        pairs=(("rows", "h"), ("rows", "o")),
        cost=("rows", "h", "o"),
    ),
    "moe_linear_reduce": Op(
        {
            "rows": Dim(SLOT_ROWS, ROWS, 2100),
            "h": Dim(SLOT_WIDTH, WIDER, 4200),
            "d": Dim(SLOT_WIDTH, WIDER, 4200),
        },
        {
            "invariant": (0, 0, 0, 1),
            "layout": LAYOUTS,
            "bias": (0, 1),
            "experts": (1, 4),
            "top_k": (1, 2),
            "repeat": (0, 0, 0, 1),
            "scales": SCALES,
            "grad_view": VIEWS,
        },
        pairs=(("rows", "h"), ("rows", "d")),
        cost=("rows", "h", "d"),
    ),
    "moe_ffn": Op(
        {
            "rows": Dim((*SLOT_ROWS, ("ffn", "rows")), ROWS, 2100),
            "h": Dim(SLOT_WIDTH, WIDER, 4200),
            "i": Dim(SLOT_WIDTH, WIDER, 2100),
        },
        {
            "invariant": (0, 0, 0, 1),
            "layout": LAYOUTS,
            "bias": (0, 1),
            "experts": (1, 4),
            "top_k": (1, 2),
            "repeat": (0, 0, 0, 1),
            "scales": SCALES,
            "act": ACTS,
            "interleaved": (0, 0, 1),
            "on_input": (0, 1),
            "main": ("none", "none", "same", "wide"),
            "grad_view": VIEWS,
        },
        pairs=(("rows", "h"), ("rows", "i")),
        cost=("rows", "h", "i"),
    ),
    "moe_ffn_packed": Op(
        {
            "rows": Dim((("gemm", "rows"),), ROWS, 2100),
            "h": Dim((("gemm", "depth"), ("gemm", "features")), WIDER, 8200),
            "i": Dim((("gemm", "depth"), ("gemm", "features")), WIDER, 4200),
        },
        {
            "invariant": (0, 0, 0, 1),
            "bias": (0, 1),
            "experts": (1, 4),
            "top_k": (1, 2),
            "repeat": (0, 0, 0, 1),
            "scales": SCALES,
            "act": ACTS,
            "interleaved": (0, 0, 1),
            "on_input": (0, 1),
        },
        pairs=(("rows", "h"), ("rows", "i")),
        cost=("rows", "h", "i"),
    ),
    "moe_ffn_quantized": Op(
        {
            "rows": Dim((("quant", "rows"), ("gemm", "rows")), ROWS, 1030),
            "h": Dim(
                (("quant", "depth"), ("quant", "features"), ("gemm", "features")), WIDER, 4200
            ),
            "i": Dim(
                (("quant", "depth"), ("quant", "features"), ("gemm", "features")), WIDER, 2100
            ),
        },
        {
            "invariant": (0, 0, 0, 1),
            "bits": (8, 4),
            "group": (32, 64, 128),
            "x_scale": (0, 1),
            "bias": (0, 1),
            "experts": (1, 4),
            "top_k": (1, 2),
            "repeat": (0, 0, 0, 1),
            "scales": SCALES,
            "act": ACTS,
            "interleaved": (0, 0, 1),
            "on_input": (0, 1),
        },
        dtypes=HALVES,
        pairs=(("rows", "h"), ("rows", "i")),
        cost=("rows", "h", "i"),
    ),
    "grouped_gemm_quantized": Op(
        {
            "rows": Dim((("quant", "rows"), ("gemm", "rows")), ROWS, 1030),
            "k": Dim((("quant", "depth"),), WIDER, 2100),
            "n": Dim((("quant", "features"), ("gemm", "features")), WIDER, 4200),
        },
        {
            "invariant": (0, 0, 0, 1),
            "bits": (8, 4),
            "group": (32, 64, 128),
            "bias": (0, 1),
            "experts": (1, 4),
        },
        dtypes=HALVES,
        pairs=(("rows", "k"), ("rows", "n")),
        cost=("rows", "k", "n"),
    ),
    "moe_ffn_fp8": Op(
        {
            "rows": Dim((("fp8", "rows"),), ROWS, 520),
            "h": Dim((("fp8", "depth"), ("fp8", "features")), WIDER, 4200),
            "i": Dim((("fp8", "depth"), ("fp8", "features")), WIDER, 2100),
        },
        {
            "invariant": (0, 0, 0, 1),
            "bias": (0, 1),
            "experts": (1, 4),
            "top_k": (1, 2),
            "repeat": (0, 0, 0, 1),
            "scales": SCALES[:2],
            "act": ACTS,
            "interleaved": (0, 0, 1),
            "on_input": (0, 1),
        },
        dtypes=HALVES,
        pairs=(("rows", "h"),),
        cost=("rows", "h", "i"),
    ),
    "grouped_gemm_fp8": Op(
        {
            "rows": Dim((("fp8", "rows"),), ROWS, 520),
            "k": Dim((("fp8", "depth"),), WIDER, 2100),
            "n": Dim((("fp8", "features"),), WIDER, 4200),
        },
        {"invariant": (0, 0, 0, 1), "bias": (0, 1), "experts": (1, 4), "turned": (0, 0, 1)},
        dtypes=HALVES,
        pairs=(("rows", "k"), ("rows", "n")),
        cost=("rows", "k", "n"),
    ),
    "grouped_gemm_fp8_wgrad": Op(
        {
            "rows": Dim((("fp8", "depth"),), ROWS, 520),
            "k": Dim((("fp8", "features"),), WIDER, 2100),
            "n": Dim((("fp8", "rows"),), WIDER, 2100),
        },
        {"experts": (1, 4), "main": (0, 1)},
        dtypes=HALVES,
        pairs=(("rows", "k"), ("rows", "n")),
        cost=("rows", "k", "n"),
    ),
    "quantize_fp8_columns": Op(
        {
            "rows": Dim((("fp8", "depth"),), ROWS, 520),
            "h": Dim((("rows", "hidden"),), SMALL, 4200),
        },
        {"experts": (1, 4)},
        dtypes=HALVES,
        draws=4,
    ),
    "quantize_fp8": Op(
        {
            "tokens": Dim((("rows", "tokens"),), (1, 5, 13), 200),
            "h": Dim((("rows", "hidden"),), SMALL, 4200),
        },
        {},
        dtypes=HALVES,
        draws=4,
    ),
    "all_experts_ffn": Op(
        {
            "tokens": Dim((("dense", "tokens"),), (1, 7, 33, 150), 9300),
            "h": Dim((("dense", "width"),), (5, 16, 31, 33), 400),
            "i": Dim((("dense", "width"),), (5, 16, 31, 33), 400),
            "o": Dim((("dense", "width"),), (5, 16, 31, 33), 400),
        },
        {"act": ("relu", "silu", "none", "gelu"), "bias": (0, 1), "experts": (1, 3)},
        pairs=(("tokens", "h"), ("tokens", "i"), ("tokens", "o"), ("i", "o")),
        cost=("tokens", "h", "i"),
    ),
    "mix_expert_outputs": Op(
        {
            "tokens": Dim((("mix", "tokens"),), (1, 7, 60), 8200),
            "o": Dim((("mix", "size"),), (1, 5, 17, 32), 140),
            "experts": Dim((), (1, 2, 3, 5, 8, 9, 16, 23), 23),
            "mixtures": Dim((), (1, 2, 3, 4, 5, 7, 8, 9), 9),
        },
        {
            "norm": ("plain", "given", "batch"),
            "act": ("none", "relu", "silu", "sigmoid"),
            "repeats": (0, 1, 3),
        },
        pairs=(("tokens", "o"),),
        cost=("tokens", "o", "experts", "mixtures"),
        draws=6,
    ),
    "moa_attention": Op(
        {
            "tokens": Dim((("attention", "rows"), ("attention", "keys")), (1, 7, 40, 101), 800),
            "more_keys": Dim((("attention", "keys"),), (0, 0, 3, 70), 600, least=0),
            "size": Dim((("attention", "size"),), (3, 8, 16, 17, 33), 256),
        },
        {
            "invariant": (0, 0, 0, 1),
            "kind": ("softmax", "stick_breaking"),
            "slots": (1, 2, 3),
            "heads": (1, 2),
            "window": (0, 0, 1, 17, 64, 65, 100),
            "softcap": (0, 0, 9),
            "causal": (1, 1, 0),
            "sequences": (0, 0, 1),
        },
        pairs=(("tokens", "size"), ("more_keys", "size"), ("tokens", "more_keys")),
        cost=("tokens", "tokens", "size"),
        draws=3,
    ),
    "rotary": Op(
        {
            "tokens": Dim((("rows", "tokens"),), (1, 5, 33), 200),
            "half": Dim((("rows", "hidden"),), (1, 3, 4, 8, 12, 16, 33), 4200),
        },
        {"heads": (1, 2, 3), "inverse": (0, 1), "batched": (0, 1)},
        cost=("tokens", "half"),
        draws=4,
    ),
    "router_linear": Op(
        {
            "tokens": Dim((("router", "tokens"),), (1, 5, 33, 300, 1030), 1030),
            "experts": Dim((("router", "experts"),), (1, 3, 4, 9), 140),
            "h": Dim((("router", "hidden"), ("rows", "hidden"), ("gemm", "depth")), SMALL, 4200),
        },
        {"bias": (0, 1)},
        pairs=(("tokens", "h"), ("experts", "h")),
        cost=("tokens", "experts", "h"),
    ),
    "topk_router": Op(
        {
            "tokens": Dim((("router", "tokens"),), (1, 5, 9), 140),
            "experts": Dim((("router", "experts"),), (1, 4, 8, 33), 260),
            "k": Dim((("router", "pairs"),), (1, 2, 4, 6), 32),
        },
        {
            "score": tuple(SCORE_FUNCS),
            "renormalize": (0, 1),
            "topk_first": (0, 1),
            "scaled": (0, 1),
            "bias": (0, 0, 1),
            "groups": (1, 1, 2, 4),
            "top2": (0, 1),
            "logits": ("normal", "tied", "skewed"),
        },
        pairs=(("tokens", "experts"), ("experts", "k")),
        draws=4,
    ),
    "topp_router": Op(
        {
            "tokens": Dim((("router", "tokens"),), (1, 5, 9), 140),
            "experts": Dim((("router", "experts"),), (1, 4, 8, 33), 260),
            "k": Dim((), (1, 2, 4, 6, 64), 64),
        },
        {"percent": (30, 70, 95), "renormalize": (0, 1), "logits": ("normal", "skewed")},
        draws=4,
    ),
    "expert_choice_router": Op(
        {
            "tokens": Dim((("router", "tokens"),), (1, 5, 9), 140),
            "experts": Dim((("router", "experts"),), (1, 4, 5, 8, 33), 140),
            "k": Dim((), (1, 2, 4, 6, 64, 200), 200),
        },
        {"score": tuple(SCORE_FUNCS), "logits": ("normal", "skewed")},
        draws=4,
    ),
    "sort_by_expert": Op(
        {
            "tokens": Dim((("router", "tokens"), ("slots", "tokens")), (1, 5, 33), 8200),
            "experts": Dim((("router", "experts"),), (1, 4, 9), 140),
            "k": Dim((), (1, 2, 3, 8), 8),
        },
        {},
        dtypes=("fp32",),
    ),
    "permute": Op(
        {
            "tokens": Dim((("router", "tokens"), ("slots", "tokens")), (1, 5, 33), 1030),
            "h": Dim((("rows", "hidden"),), SMALL, 4200),
            "experts": Dim((), (1, 4, 9), 9),
            "k": Dim((), (1, 2, 3, 8), 8),
        },
        {"scales": SCALES},
        cost=("tokens", "h", "k"),
        draws=4,
    ),
    "peer_ffn": Op(
        {
            "tokens": Dim((), (1, 3, 7, 13), 13),
            "h": Dim((("rows", "hidden"),), SMALL, 4200),
            "experts": Dim((), (1, 4, 9, 40), 40),
            "k": Dim((), (1, 2, 3, 4, 5, 8, 17), 17),
        },
        {"scales": SCALES, "act": ACTS, "sparse": (0, 1)},
        cost=("tokens", "h", "k"),
        draws=4,
    ),
    "gated_act": Op(
        {
            "tokens": Dim((("rows", "tokens"),), (1, 5, 13), 200),
            "h": Dim((("rows", "hidden"), ("gemm", "features")), SMALL, 4200),
        },
        {"act": ("swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_oai"), "interleaved": (0, 1)},
        cost=("tokens", "h"),
        draws=3,
    ),
    "add_rms_norm": Op(
        {
            "tokens": Dim((("rows", "tokens"),), (1, 5, 33), 300),
            "h": Dim((("rows", "hidden"),), SMALL, 4200),
        },
        {"residual": (0, 1), "bias": (0, 1)},
        cost=("tokens", "h"),
        pairs=(("tokens", "h"),),
        draws=4,
    ),
}


def around(value: int) -> tuple[int, ...]:
    """Both sides of a size, and of twice the size."""
    return (value - 1, value, value + 1, 2 * value - 1, 2 * value, 2 * value + 1)


def sizes_of(dim: Dim, table: SizeTable) -> list[int]:
    found = {
        n
        for family, axis, _, value in table
        if (family, axis) in dim.entries
        for n in around(value)
        if dim.least <= n <= dim.most
    }
    return sorted(found)


# Sizes that groups of 4-bit weights divide.
DEPTHS_IN_GROUPS = {"moe_ffn_quantized": ("h", "i"), "grouped_gemm_quantized": ("k",)}


def _tidy(values: dict[str, Value], rng: random.Random) -> dict[str, Value]:
    """Applies what some ops ask of their sizes together."""
    depths = DEPTHS_IN_GROUPS.get(str(values["op"]), ())
    if depths and values["bits"] == 4:
        group = int(values["group"])
        for name in depths:
            values[name] = -(-int(values[name]) // group) * group
    elif depths:
        values.pop("group", None)
    if values.get("interleaved") and values.get("act") in ("silu", "gelu", "relu2"):
        values["interleaved"] = 0
    # Sums of one number over and over would round to the same side each time.
    if values.get("grad_view") == "expanded" and int(values["rows"]) > 64:
        values["grad_view"] = "contiguous"
    if values["op"] == "moa_attention" and values["sequences"]:
        values["more_keys"] = 0
        values["tokens"] = max(int(values["tokens"]), 4)
    return values


def cost_of(case: Case) -> int:
    """Elementary operations, about; weights are touched however few the rows."""
    cost = 1
    for name in OPS[case["op"]].cost:
        cost *= case[name] + (16 * case.get("experts", 1) if name == "rows" else 0)
    return cost


def _filled(
    name: str, dtype: str, fixed: dict[str, int], rng: random.Random, most: int = MOST_COST
) -> Case | None:
    """A case with these sizes, and the others and the options drawn; None: it costs too much."""
    op = OPS[name]
    for _ in range(8):
        values: dict[str, Value] = {"op": name, "dtype": dtype}
        for dim, of in op.dims.items():
            values[dim] = fixed[dim] if dim in fixed else rng.choice(of.others)
        for option, choices in op.options.items():
            values[option] = rng.choice(choices)
        values = _tidy(values, rng)
        if cost_of(Case(values)) <= most:
            values["seed"] = rng.randrange(2**20)
            return Case(values)
    return None


def _special(table: SizeTable) -> Iterator[tuple[str, dict[str, int], dict[str, Value]]]:
    """(op, sizes, options) for entries that are about several dimensions together."""
    for _, axis, _, value in table:
        if axis == "depth_a_row":
            for rows in (5, 7, 9, 17, 29):
                for k in (rows * value - 1, rows * value, rows * value + 1, rows * value + 2):
                    if k <= 4200:
                        yield "grouped_gemm", {"rows": rows, "k": k, "n": 13}, {}
                        yield "moe_ffn_quantized", {"rows": rows, "h": k, "i": 33}, {"bits": 8}
        elif axis == "weights":
            for n, rows in ((1024, 130), (512, 129), (1500, 257)):
                for k in (value // n - 1, value // n, value // n + 1):
                    yield "grouped_gemm", {"rows": rows, "k": k, "n": n}, {"layout": "even"}
            for experts in (value // 128**2 - 1, value // 128**2, value // 128**2 + 1):
                if experts <= 16:
                    sizes = {"rows": 16 * experts, "h": 128, "o": 128}
                    yield "moe_linear_map", sizes, {"experts": experts, "top_k": 1}
        elif axis == "result_bytes":
            for bytes_of in (2, 4, 8):
                for k in (512, 1024):
                    for d in (-1, 0, 1):
                        n = value // bytes_of // k + d
                        for rows in (2, 9, 40, 200):
                            if n <= 4200:
                                sizes = {"rows": rows, "n": n, "k": k}
                                yield "grouped_gemm_wgrad", sizes, {"experts": 1}
                    n = value // bytes_of // k // 2
                    if n <= 2100:
                        for main in ("same", "wide"):
                            sizes = {"rows": 9, "h": k, "i": n + 1}
                            yield "moe_ffn", sizes, {"experts": 1, "main": main, "act": "swiglu"}


def sweep(table: SizeTable, ops: Sequence[str] = ()) -> Iterator[Case]:
    """The cases of the deterministic sweep, those of each op together."""
    special = list(
        dict.fromkeys((o, *map(tuple, (s.items(), v.items()))) for o, s, v in _special(table))
    )
    for name, op in OPS.items():
        if ops and name not in ops:
            continue
        sizes = {dim: sizes_of(of, table) for dim, of in op.dims.items()}
        found: dict[str, None] = {}
        for dtype in op.dtypes:
            for dim in op.dims:
                for size, draw in itertools.product(sizes[dim], range(op.draws)):
                    rng = random.Random(f"{name} {dtype} {dim} {size} {draw}")
                    found[str(_filled(name, dtype, {dim: size}, rng) or "")] = None
            for first, second in op.pairs:
                for a, b in itertools.product(sizes[first], sizes[second]):
                    # A third of the pairs in each dtype: all of them in the course of a few.
                    key = f"{name} {first} {a} {second} {b}"
                    if (zlib.crc32(key.encode()) + DTYPES.index(dtype)) % 6:
                        continue
                    rng = random.Random(f"{key} {dtype}")
                    case = _filled(name, dtype, {first: a, second: b}, rng, MOST_PAIR_COST)
                    found[str(case or "")] = None
            for op_name, fixed, options in special:
                if op_name != name:
                    continue
                rng = random.Random(f"{name} {dtype} {fixed} {options}")
                case = _filled(name, dtype, dict(fixed), rng)
                if case is not None:
                    values = (
                        _tidy({**case.values, **dict(options)}, rng) if options else case.values
                    )
                    found[str(Case(values))] = None
        yield from (Case.of(text) for text in found if text)


# Calls that were wrong once.
KNOWN = (
    # Weight gradients of more rows than a block has, with scales: rows passed through the tile that
    # held the sums of the blocks before.
    "op=moe_linear_reduce dtype=bf16 rows=385 h=193 d=8 scales=half",
    "op=moe_linear_reduce dtype=bf16 rows=771 h=160 d=130 scales=mixed top_k=2 experts=4 bias=1",
    "op=moe_ffn dtype=bf16 rows=386 h=193 i=24 scales=mixed on_input=1 act=swiglu",
    "op=moe_ffn dtype=fp16 rows=386 h=193 i=24 scales=mixed on_input=1 act=silu",
    # What only broken kernels got wrong (mutants_cpu.py), and few of the other cases would notice.
    "op=grouped_gemm dtype=fp16 rows=12 k=2050 n=9 layout=nt",
    "op=grouped_gemm dtype=fp32 rows=70 k=772 n=258 layout=nt",
    "op=moe_ffn_packed dtype=fp32 rows=3 h=1030 i=130 act=silu",
    "op=moe_ffn_packed dtype=bf16 rows=3 h=2060 i=130 act=silu",
    "op=moe_ffn_quantized dtype=bf16 rows=9 h=576 i=32 bits=4 group=32 act=silu",
    "op=moe_ffn_quantized dtype=fp32 rows=2 h=96 i=96 bits=4 group=32 act=silu",
    "op=moe_ffn dtype=fp32 rows=520 h=600 i=5 on_input=1 act=silu",
    "op=moe_ffn dtype=fp32 rows=400 h=33 i=24 top_k=2 repeat=1 act=swiglu bias=1",
    "op=moe_linear_reduce dtype=fp32 rows=400 h=33 d=24 top_k=2 repeat=1 scales=mixed",
    "op=moe_linear_map dtype=bf16 rows=500 h=33 o=24 top_k=2 repeat=1 bias=1",
    "op=topk_router dtype=fp32 tokens=9 experts=32 k=4 groups=4 top2=1 bias=1 score=sigmoid",
)
# Cases of an op in the short part.
SHORT = {
    "grouped_gemm": 100,
    "grouped_gemm_wgrad": 45,
    "moe_linear_map": 50,
    "moe_linear_reduce": 50,
    "moe_ffn": 90,
    "moe_ffn_packed": 55,
    "moe_ffn_quantized": 65,
    "moa_attention": 60,
    "all_experts_ffn": 30,
    "mix_expert_outputs": 30,
    "topk_router": 36,
}
SHORT_OTHERS, SHORT_COST = 20, 1_000_000


def short(table: SizeTable, seed: int = 0) -> list[Case]:
    """The part of the sweep that takes seconds: cases that bring a size their op was not called
    with before, of every op, and those that were wrong once."""
    found = [Case.of(text) for text in KNOWN]
    for name, op in OPS.items():
        cases = [c for c in sweep(table, [name]) if cost_of(c) <= SHORT_COST]
        random.Random(f"{name} {seed}").shuffle(cases)
        sizes = {dim: set(sizes_of(of, table)) for dim, of in op.dims.items()}
        left, seen = SHORT.get(name, SHORT_OTHERS), set()
        for case in cases:
            news = {(dim, case[dim]) for dim in op.dims if case[dim] in sizes[dim]} - seen
            if left and news:
                seen |= news
                found.append(case)
                left -= 1
        known = {str(case) for case in found}
        found += [case for case in cases if str(case) not in known][:left]
    return found


# Ops that multiply integers or fp8.
EIGHT_BITS = {
    "grouped_gemm_fp8",
    "grouped_gemm_fp8_wgrad",
    "grouped_gemm_quantized",
    "moe_ffn_fp8",
    "moe_ffn_quantized",
    "quantize_fp8",
    "quantize_fp8_columns",
}


def random_case(table: SizeTable, rng: random.Random, ops: Sequence[str] = ()) -> Case:
    """A case whose dimensions all may be at sizes of the table."""
    while True:
        name = rng.choice(list(ops) or list(OPS))
        op = OPS[name]
        fixed = {}
        for dim, of in op.dims.items():
            sizes = sizes_of(of, table)
            if sizes and rng.random() < 0.5:
                fixed[dim] = rng.choice(sizes)
        case = _filled(name, rng.choice(op.dtypes), fixed, rng)
        if case is not None:
            return case


def smaller(case: Case) -> Iterator[Case]:
    """Cases one step simpler: a smaller size, or the first of an option's values."""
    op = OPS[case["op"]]
    for option, choices in op.options.items():
        if case.get(option, choices[0]) != choices[0]:
            yield case.but(**{option: choices[0]})
    for dim, of in op.dims.items():
        size = case[dim]
        steps = [of.least, size // 2, size * 3 // 4, size * 9 // 10, size - 4, size - 1]
        if case.get("bits", 8) == 4 and dim in DEPTHS_IN_GROUPS[case["op"]]:
            group = case["group"]
            steps = [n // group * group for n in (group, size // 2, size - group)]
        for n in sorted(set(steps)):
            if (of.least <= n < size and n > 0) or (n == 0 and of.least == 0 and size > 0):
                yield case.but(**{dim: n})
