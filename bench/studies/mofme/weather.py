"""Rain, snow and haze on clean images, and the photos that installed packages bring.

Letters: B images, h and w their height and width.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ops import _reading

WEATHER = ("rain", "snow", "haze")
# Name, package, file in it. All are read as colors, halved in size.
PHOTOS = (
    ("chelsea", "skimage", "data/chelsea.png"),
    ("rocket", "skimage", "data/rocket.jpg"),
    ("motorcycle", "skimage", "data/motorcycle_left.png"),
    ("camera", "skimage", "data/camera.png"),
    ("brick", "skimage", "data/brick.png"),
    ("grass", "skimage", "data/grass.png"),
    ("gravel", "skimage", "data/gravel.png"),
    ("flower", "sklearn", "datasets/images/flower.jpg"),
    ("hopper", "matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    ("astronaut", "skimage", "data/astronaut.png"),
    ("coffee", "skimage", "data/coffee.png"),
    ("china", "sklearn", "datasets/images/china.jpg"),
)
# Of those, what no model is trained on.
TEST = ("astronaut", "coffee", "china")
_MAX_PIXELS = 2**26
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


class Degraded(NamedTuple):
    """degraded, clean: [B, 3, h, w] in [0, 1]. weather: [B], numbers of names in `WEATHER`."""

    degraded: Tensor
    clean: Tensor
    weather: Tensor


def add_rain(images: Tensor, generator: torch.Generator) -> Tensor:
    """Bright streaks of one direction an image, within 30 degrees of vertical."""
    count, _, height, width = images.shape
    angle = (_uniform(count, generator, 60, 120) * (math.pi / 180))[:, None, None]
    length = _uniform(count, generator, 4, 9)[:, None, None]
    strength = _uniform(count, generator, 0.4, 0.9)[:, None, None, None]
    density = _uniform(count, generator, 0.01, 0.03)[:, None, None, None]
    drops = (torch.rand(count, 1, height, width, generator=generator) < density).float()
    # A line of that length and direction, one pixel wide, over a square of 19 pixels.
    y, x = torch.meshgrid(torch.arange(-9.0, 10), torch.arange(-9.0, 10), indexing="ij")
    across = (x * angle.sin() - y * angle.cos()).abs()
    along = (x * angle.cos() + y * angle.sin()).abs()
    line = (1 - across).clamp(min=0) * (along < length)
    return _lighten(images, strength * _spread(drops, line).clamp(max=1), 0.85)


def add_snow(images: Tensor, generator: torch.Generator) -> Tensor:
    """White blobs, the size of which differs between images."""
    count, _, height, width = images.shape
    radius = _uniform(count, generator, 0.7, 1.8)[:, None, None]
    density = _uniform(count, generator, 0.01, 0.03)[:, None, None, None]
    flakes = (torch.rand(count, 1, height, width, generator=generator) < density).float()
    y, x = torch.meshgrid(torch.arange(-5.0, 6), torch.arange(-5.0, 6), indexing="ij")
    blob = torch.exp(-(x * x + y * y) / (2 * radius**2))
    return _lighten(images, _spread(flakes, blob).clamp(max=1), 1.0)


def add_haze(images: Tensor, generator: torch.Generator) -> Tensor:
    """x t + A (1 - t), t = exp(-density depth), with a depth that changes slowly over the image."""
    count, _, height, width = images.shape
    density = _uniform(count, generator, 0.6, 1.6)[:, None, None, None]
    light = _uniform(count, generator, 0.75, 1.0)[:, None, None, None]
    coarse = torch.rand(count, 1, 3, 3, generator=generator)
    depth = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
    kept = torch.exp(-density * (0.4 + 0.6 * depth))
    return images * kept + light * (1 - kept)


def degrade(images: Tensor, generator: torch.Generator, kinds: Sequence[str] = WEATHER) -> Degraded:
    """Clean images [B, 3, h, w], each in the weather of its number: the first kind, the second,
    and so on, and again the first."""
    kind = torch.arange(len(images)) % len(kinds)
    made = torch.empty_like(images)
    functions = {"rain": add_rain, "snow": add_snow, "haze": add_haze}
    for number, name in enumerate(kinds):
        here = kind == number
        made[here] = functions[name](images[here], generator)
    numbers = torch.tensor([WEATHER.index(name) for name in kinds])
    return Degraded(made, images, numbers[kind])


def crops(photos: Sequence[Tensor], count: int, size: int, generator: torch.Generator) -> Tensor:
    """[count, 3, size, size] from random places of photos [3, h, w], each as likely as another;
    half of them mirrored."""
    which = torch.randint(len(photos), (count,), generator=generator).tolist()
    place = torch.rand(count, 2, generator=generator).tolist()
    mirrored = (torch.rand(count, generator=generator) < 0.5).tolist()
    made = []
    for photo, (down, right), flip in zip((photos[i] for i in which), place, mirrored, strict=True):
        top = int(down * (photo.shape[1] - size + 1))
        left = int(right * (photo.shape[2] - size + 1))
        crop = photo[:, top : top + size, left : left + size]
        made.append(crop.flip(2) if flip else crop)
    return torch.stack(made)


def load_photos(folder: str | Path = "") -> tuple[list[Tensor], list[Tensor]]:
    """Photos [3, h, w] in [0, 1] for training and for the test, of `PHOTOS` where their packages
    are installed, or of a folder: the last fifth of its files by name is the test.

    Raises:
        ImportError: Pillow is missing. FileNotFoundError: less than two photos for training or none
        for the test.
    """
    if folder:
        paths = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in SUFFIXES)
        cut = len(paths) - math.ceil(len(paths) / 5)
        train, test = paths[:cut], paths[cut:]
    else:
        found = {name: path for name, path in _installed() if path.is_file()}
        train = [path for name, path in found.items() if name not in TEST]
        test = [path for name, path in found.items() if name in TEST]
    if len(train) < 2 or not test:
        where = folder or "installed packages"
        raise FileNotFoundError(
            f"load_photos: there must be two photos to train on and one to test on, got "
            f"{len(train)} and {len(test)} in {where}: pip install torch-moe-ops[studies]"
        )
    return [read_photo(path) for path in train], [read_photo(path) for path in test]


def missing_photos() -> list[str]:
    """Names of `PHOTOS` that are not installed."""
    return [name for name, path in _installed() if not path.is_file()]


def _installed() -> list[tuple[str, Path]]:
    """Returns the place where each of `PHOTOS` would be; a package is found without being
    imported."""
    places = []
    for name, package, file in PHOTOS:
        spec = importlib.util.find_spec(package)
        folder = Path(spec.origin).parent if spec is not None and spec.origin else Path("missing")
        places.append((name, folder / file))
    return places


def read_photo(path: Path) -> Tensor:
    """Reads an image file as [3, h, w] in [0, 1], halved: pixels are means of four.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no regular file, or no image.
        ImportError: Pillow is missing.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ImportError(
            "bench.studies: photos need Pillow, which is not installed: "
            "pip install torch-moe-ops[studies]"
        ) from error
    with (
        _reading.open_regular(path, "read_photo") as file,
        _reading.damage("read_photo", path, "an image"),
        Image.open(file) as image,
    ):
        if image.width * image.height > _MAX_PIXELS:
            raise ValueError(f"it has {image.width} x {image.height} pixels")
        colors = image.convert("RGB")
        content = torch.frombuffer(bytearray(colors.tobytes()), dtype=torch.uint8)
    pixels = content.view(colors.height, colors.width, 3).permute(2, 0, 1)
    return F.avg_pool2d(pixels.float() / 255, 2)


def _uniform(count: int, generator: torch.Generator, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _spread(points: Tensor, kernels: Tensor) -> Tensor:
    """Each image [B, 1, h, w] convolved with its own kernel [B, k, k]."""
    count = len(points)
    spread = F.conv2d(points.transpose(0, 1), kernels[:, None], padding="same", groups=count)
    return spread.transpose(0, 1)


def _lighten(images: Tensor, mask: Tensor, light: float) -> Tensor:
    return images * (1 - mask) + light * mask
