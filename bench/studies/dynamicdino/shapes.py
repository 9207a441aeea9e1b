"""Generated detection task: colored shapes, and queries that name some of them.

Letters: B scenes, P phrases of each, S side of an image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

COLORS = ("red", "green", "blue", "yellow", "magenta", "cyan")
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
# Ids in BERT's vocabulary that Grounding DINO treats as ends of phrases.
CLS, SEP, FULL_STOP = 101, 102, 1012
VOCAB_SIZE = 1030
_FIRST_COLOR, _FIRST_SHAPE = 200, 300
TOKENS_A_PHRASE = 2
_RGB = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1.0]])

# A pair of a color and a shape has the index color * 6 + shape.
_DISTANCE = [(s - c) % 6 for c in range(6) for s in range(6)]
# Each of these contains every color and every shape.
FIRST = tuple(i for i, d in enumerate(_DISTANCE) if d in (1, 2, 3))
KNOWN = tuple(i for i, d in enumerate(_DISTANCE) if d)
HELD_OUT = tuple(i for i, d in enumerate(_DISTANCE) if not d)
ALL = tuple(range(len(_DISTANCE)))


class Scenes(NamedTuple):
    """Scenes. images [B, 3, S, S]; input_ids [B, 3P + 2]; phrases [B, P]: the queried pairs;
    labels: a scene's "class_labels" [n], indices of its phrases, and "boxes" [n, 4], center and
    size as fractions of the side."""

    images: Tensor
    input_ids: Tensor
    phrases: Tensor
    labels: list[dict[str, Tensor]]

    def take(self, start: int, end: int) -> Scenes:
        """Returns the scenes from `start` to before `end`."""
        rows = slice(start, end)
        return Scenes(
            self.images[rows], self.input_ids[rows], self.phrases[rows], self.labels[rows]
        )


def phrase(pair: int) -> str:
    """Returns a pair's phrase, such as "red circle"."""
    return f"{COLORS[pair // len(SHAPES)]} {SHAPES[pair % len(SHAPES)]}"


def tokens_of(phrases: Tensor) -> Tensor:
    """Returns token ids [B, 3P + 2] of "red circle. blue ring." and so on, for pairs [B, P]."""
    colors = _FIRST_COLOR + phrases // len(SHAPES)
    shapes = _FIRST_SHAPE + phrases % len(SHAPES)
    words = torch.stack([colors, shapes, torch.full_like(shapes, FULL_STOP)], dim=-1).flatten(1)
    ends = [torch.full((len(phrases), 1), token) for token in (CLS, SEP)]
    return torch.cat([ends[0], words, ends[1]], dim=1)


def draw_scenes(
    count: int,
    pairs: tuple[int, ...] = KNOWN,
    generator: torch.Generator | None = None,
    *,
    side: int = 64,
    num_phrases: int = 6,
) -> Scenes:
    """Draws scenes of one to four objects, one per quarter of the image, on a noise background.

    Args:
        pairs: pairs from which phrases are drawn; a scene contains some of its queried pairs.
        side: S. num_phrases: P, of different pairs.

    Raises:
        ValueError: more phrases than pairs.
    """
    if num_phrases > len(pairs):
        raise ValueError(
            f"draw_scenes: num_phrases must be at most the number of pairs, {len(pairs)}, got "
            f"{num_phrases}."
        )

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    known = torch.tensor(pairs)
    phrases = known[uniform(count, len(pairs)).argsort(1)[:, :num_phrases]]
    classes = torch.randint(num_phrases, (count, 4), generator=generator)
    number = torch.randint(1, 5, (count, 1), generator=generator)
    shown = uniform(count, 4).argsort(1) < number

    half = uniform(count, 4, 2, low=0.11, high=0.22)
    corner = torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])
    center = corner + (0.24 - half) * uniform(count, 4, 2, low=-1.0)
    images = 0.35 + 0.1 * uniform(count, 1, 1, 1) + 0.1 * uniform(count, 3, side, side, low=-1.0)
    grid = (torch.arange(side) + 0.5) / side
    chosen = phrases.gather(1, classes)
    for place in range(4):
        x, y = (
            (axis - center[:, place, i, None, None]) / half[:, place, i, None, None]
            for i, axis in enumerate((grid[None, None, :], grid[None, :, None]))
        )
        inside = _inside(x, y)[chosen[:, place] % len(SHAPES), torch.arange(count)]
        inside = inside & shown[:, place, None, None]
        color = _RGB[chosen[:, place] // len(SHAPES)][..., None, None]
        texture = uniform(count, 1, side, side, low=0.6)
        images = torch.where(inside[:, None], color * texture, images)
    boxes = torch.cat([center, 2 * half], dim=-1)
    labels = [
        {"class_labels": classes[i][shown[i]], "boxes": boxes[i][shown[i]]} for i in range(count)
    ]
    return Scenes(2 * images - 1, tokens_of(phrases), phrases, labels)


def _inside(x: Tensor, y: Tensor) -> Tensor:
    """Returns [6, B, S, S]: the points inside each shape; a shape spans -1 to 1 on both axes."""
    x, y = torch.broadcast_tensors(x, y)
    far, round_ = torch.maximum(x.abs(), y.abs()), x.square() + y.square()
    return torch.stack([
        round_ <= 1,
        far <= 1,
        (2 * x.abs() <= y + 1) & (y <= 1),
        (torch.minimum(x.abs(), y.abs()) <= 0.35) & (far <= 1),
        x.abs() + y.abs() <= 1,
        (round_ <= 1) & (round_ >= 0.3),
    ])  # fmt: skip
