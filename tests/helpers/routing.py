"""The cases of the tests of how slots fall on experts."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moe_ops import reference
from moe_ops.testing import short

# Ids that no number of experts makes valid. The last three become small valid ids when an int64 is
# cut down to 32 bits.
OUT_OF_RANGE_IDS = (-1, -2, -(2**31), 2**31 - 1)
OUT_OF_RANGE_IDS_64 = (2**32, 2**32 + 1, -(2**32) + 1)


@dataclasses.dataclass(frozen=True)
class Routing:
    """The way slots fall on experts.

    kind: uniform, skewed (Zipf), one_expert, half_empty (odd experts get nothing), last_only (all
    but the last expert empty), dropped (about a third of the slots are -1), out_of_range (about a
    third hold assorted invalid ids), all_dropped, repeated (a token may name an expert twice).
    """

    num_tokens: int
    num_experts: int
    top_k: int
    kind: str = "uniform"
    id_dtype: torch.dtype = torch.int32

    def __str__(self) -> str:
        return (
            f"T{self.num_tokens}E{self.num_experts}K{self.top_k}-{self.kind}-{short(self.id_dtype)}"
        )

    @property
    def num_slots(self) -> int:
        return self.num_tokens * self.top_k

    def ids(self) -> Tensor:
        """topk_ids [T, K] drawn from the global generator."""
        t, e, k = self.num_tokens, self.num_experts, self.top_k
        if self.kind in ("one_expert", "last_only", "all_dropped"):
            value = {"one_expert": e // 2, "last_only": e - 1, "all_dropped": -1}[self.kind]
            return torch.full((t, k), value, dtype=self.id_dtype)
        if self.kind == "repeated" or k > e:
            return torch.randint(e, (t, k)).to(self.id_dtype)
        popularity = torch.zeros(e)
        if self.kind == "skewed":
            popularity = -2.0 * torch.arange(1, e + 1).log()
        elif self.kind == "half_empty":
            popularity[1::2] = -1e4
        # Gumbel top-k: k distinct experts per token, drawn by popularity.
        gumbel = -torch.empty(t, e).exponential_().log()
        ids = (popularity + gumbel).argsort(1, descending=True)[:, :k].to(torch.int64)
        if self.kind == "half_empty" and e > 1:
            ids = torch.where(ids % 2 == 1, -1, ids)
        if self.kind in ("dropped", "out_of_range"):
            invalid = torch.tensor([-1])
            if self.kind == "out_of_range":
                wide = OUT_OF_RANGE_IDS_64 if self.id_dtype == torch.int64 else ()
                invalid = torch.tensor([*OUT_OF_RANGE_IDS, e, e + 1, *wide])
            drop = torch.rand(t, k) < 1 / 3
            ids = torch.where(drop, invalid[torch.randint(len(invalid), (t, k))], ids)
        return ids.to(self.id_dtype)

    def sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        """(expert_offsets, row_to_slot, slot_to_row) of fresh ids, by the reference."""
        return reference.sort_by_expert(self.ids(), self.num_experts)


# Few enough to multiply by dtypes, varied enough that each edge of the contract appears.
ROUTINGS = (
    Routing(1, 1, 1),
    Routing(1, 4, 2, "uniform", torch.int64),
    Routing(7, 1, 1, "dropped"),
    Routing(17, 3, 3, "uniform", torch.int64),
    Routing(33, 8, 2, "skewed"),
    Routing(31, 8, 2, "half_empty", torch.int64),
    Routing(29, 5, 2, "out_of_range"),
    Routing(29, 5, 2, "out_of_range", torch.int64),
    Routing(65, 6, 1, "last_only"),
    Routing(9, 4, 2, "one_expert", torch.int64),
    Routing(13, 4, 3, "all_dropped"),
    Routing(40, 16, 4, "dropped", torch.int64),
    Routing(23, 4, 6, "repeated"),
    Routing(5, 64, 3, "uniform"),
)
EMPTY_ROUTINGS = (
    Routing(0, 4, 2),
    Routing(0, 1, 1, "uniform", torch.int64),
    Routing(3, 4, 0),
)
