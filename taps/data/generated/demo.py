"""Data of the demo: six small visual domains made from scikit-learn's handwritten digits and its two photographs.

They are written as ordinary image folders of 64 × 64 pixels, so that the demo runs the same code as any data set. Train and
test use different digits, and different strips of the photographs, so that they have no pixel in common. For choices there is a
copy whose two splits are made in the same way from what the demo trains on.

| domain           | classes | the image                                          |
|------------------|---------|----------------------------------------------------|
| digits           | 10      | a handwritten digit                                |
| digits_rotated   | 10      | dark on light, rotated by 90 degrees, noisy        |
| digits_outline   | 10      | only the contour, in a random colour               |
| digits_on_photo  | 10      | drawn on a part of a photograph                    |
| photo_filter     | 8       | a part of a photograph; classes are image filters  |
| photo_pattern    | 6       | a part of a photograph; classes are rearrangements |
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from taps.data.classification.folders import Reading, read_folder
from taps.data.classification.images import TaskData
from taps.data.generated.tree import temporary_folder
from taps.errors import UserError

DOMAINS = ("digits", "digits_rotated", "digits_outline", "digits_on_photo", "photo_filter", "photo_pattern")
SIZE = 64
STRIP = 80
TRAIN_IMAGES, TEST_IMAGES = 400, 300


class _Source(NamedTuple):
    """Which digits, in random order, and which strips of a photograph, by their number modulo 3, a split is made from."""

    digits: slice
    strips: tuple[int, ...]


#: by whether it is the development copy, and by split
SPLITS = {
    (False, "train"): _Source(slice(1200), (0, 1)),
    (False, "test"): _Source(slice(1200, None), (2,)),
    (True, "train"): _Source(slice(800), (0,)),
    (True, "test"): _Source(slice(800, 1200), (1,)),
}


def _pixelated(image: Image.Image) -> Image.Image:
    return image.resize((16, 16), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


FILTERS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(1.6)),
    "contoured": lambda image: image.filter(ImageFilter.CONTOUR),
    "dithered": lambda image: image.convert("1").convert("RGB"),
    "embossed": lambda image: image.filter(ImageFilter.EMBOSS),
    "grey": lambda image: ImageOps.grayscale(image).convert("RGB"),
    "original": lambda image: image,
    "pixelated": _pixelated,
    "posterized": lambda image: ImageOps.posterize(image, 2),
}


def _tiled(image: Image.Image, count: int) -> Image.Image:
    tile = image.resize((SIZE // count, SIZE // count), Image.Resampling.BICUBIC)
    tiles = Image.new("RGB", (SIZE, SIZE))
    for index in range(count * count):
        tiles.paste(tile, (index % count * tile.width, index // count * tile.height))
    return tiles


def _waves(image: Image.Image, axis: int) -> Image.Image:
    lines = np.moveaxis(np.asarray(image), axis, 0)
    shifts = (5 * np.sin(np.arange(SIZE) * 2 * np.pi / 16)).astype(int)
    moved = np.stack([np.roll(line, shift, axis=0) for line, shift in zip(lines, shifts, strict=True)])
    return Image.fromarray(np.ascontiguousarray(np.moveaxis(moved, 0, axis)))


def _shuffled(image: Image.Image) -> Image.Image:
    """Sixteen squares in a different order."""
    side = SIZE // 4
    mixed = Image.new("RGB", (SIZE, SIZE))
    for index in range(16):
        to, source = divmod(index, 4), divmod(index * 7 % 16, 4)
        square = image.crop((source[0] * side, source[1] * side, (source[0] + 1) * side, (source[1] + 1) * side))
        mixed.paste(square, (to[0] * side, to[1] * side))
    return mixed


PATTERNS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "original": lambda image: image,
    "shuffled": _shuffled,
    "tiles_of_four": lambda image: _tiled(image, 2),
    "tiles_of_sixteen": lambda image: _tiled(image, 4),
    "waves_across": lambda image: _waves(image, 0),
    "waves_upright": lambda image: _waves(image, 1),
}


def make_demo(root: Path, development: bool = False) -> None:
    """Write the six domains under ``root`` unless they exist. The files are the same every time (fixed seed).

    Args:
        root: the folder.
        development: whether to make both splits from what the demo trains on, so that choices can be made on the second one.
    """
    if _is_complete(root):
        return
    with temporary_folder(root) as building:
        for index, domain in enumerate(DOMAINS):
            for split, count in (("train", TRAIN_IMAGES), ("test", TEST_IMAGES)):
                generator = np.random.default_rng([index, split == "test"])
                images = _images(domain, SPLITS[development, split], count, generator)
                for number, (image, label) in enumerate(images):
                    folder = building / domain / split / label
                    folder.mkdir(parents=True, exist_ok=True)
                    image.save(folder / f"{number:04d}.png")
        if _is_complete(root):  # another process has been faster, and reads it
            return
        if root.exists():
            others = sorted(path.name for path in root.iterdir() if path.name not in DOMAINS)
            if others:
                raise UserError(f"{root} holds {others[0]}, which is not part of the demo; move it away")
            shutil.rmtree(root)
        building.rename(root)


def _is_complete(root: Path) -> bool:
    return all((root / domain / "test").is_dir() for domain in DOMAINS)


def read_demo(root: Path) -> list[TaskData]:
    """The six tasks, without crops and flips (a mirrored digit is not a digit)."""
    return [replace(read_folder(root / domain, Reading(cropped=True)), flip=False) for domain in DOMAINS]


def _images(domain: str, source: _Source, count: int, generator: np.random.Generator):
    """(image, class name) pairs of one split."""
    from sklearn.datasets import load_digits, load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    if domain.startswith("digits"):
        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.images))
        for index in generator.permutation(order[source.digits])[:count]:
            yield _digit(domain, digits.images[index], photos, source, generator), str(digits.target[index])
        return
    for number in range(count):
        operations = FILTERS if domain == "photo_filter" else PATTERNS
        name = sorted(operations)[number % len(operations)]
        yield operations[name](_piece(photos[generator.integers(2)], source, generator)), name


def _piece(photo: Image.Image, source: _Source, generator: np.random.Generator) -> Image.Image:
    """A random part of the split's strips of a photograph, with some contrast, resized to SIZE × SIZE."""
    width, height = photo.size
    strips = [index for index in range(width // STRIP) if index % 3 in source.strips]
    while True:
        side = int(generator.integers(56, STRIP))
        left = int(generator.choice(strips)) * STRIP
        x = int(generator.integers(left, left + STRIP - side + 1))
        y = int(generator.integers(0, height - side + 1))
        piece = photo.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
        if np.asarray(ImageOps.grayscale(piece)).std() > 25:
            return piece


def _digit(
    domain: str, pixels: np.ndarray, photos: list[Image.Image], source: _Source, generator: np.random.Generator
) -> Image.Image:
    ink = Image.fromarray((pixels * 255 / 16).astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    colour = tuple(int(value) for value in generator.integers(120, 256, size=3))
    if domain == "digits":
        return ink.convert("RGB")
    if domain == "digits_rotated":
        turned = np.asarray(ImageOps.invert(ink.rotate(90)), dtype=np.float32)[..., None]
        noise = generator.normal(0, 30, size=(SIZE, SIZE, 3))
        return Image.fromarray(np.clip(0.8 * turned + 25 + noise, 0, 255).astype(np.uint8))
    if domain == "digits_outline":
        contour = ink.point(lambda value: 255 if value > 110 else 0).filter(ImageFilter.FIND_EDGES)
        return Image.composite(Image.new("RGB", (SIZE, SIZE), colour), Image.new("RGB", (SIZE, SIZE)), contour)
    ground = ImageEnhance.Brightness(_piece(photos[generator.integers(2)], source, generator)).enhance(0.4)
    return Image.composite(Image.new("RGB", (SIZE, SIZE), colour), ground, ink)
