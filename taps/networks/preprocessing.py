"""Preprocessing of images for a backbone."""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass

import numpy as np
import timm
import torch
from PIL import Image, ImageColor, ImageOps
from timm.data import auto_augment
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.functional import InterpolationMode

from taps.errors import UserError

#: tags of EXIF and TIFF
_ORIENTATION, _BITS, _PHOTOMETRIC = 0x0112, 0x0102, 0x0106


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of images for a backbone.

    Attributes:
        input_size: side of the square input in pixels.
        resize: length of the shorter side in pixels before the centre crop in evaluation.
        mean, std: per RGB channel in 0..1, as in the backbone's training.
        interpolation: ``"bilinear"`` or ``"bicubic"``.
        background, published: how images are read, see :class:`ToRGB`.
    """

    input_size: int = 224
    resize: int = 256
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    background: str = "white"
    published: bool = False

    def transform(
        self, train: bool, stretch: bool = False, flip: bool = True, policy: str | None = None, erasing: float = 0.0
    ) -> v2.Compose:
        """The transform from a PIL image to a (3, input_size, input_size) float tensor.

        For training it is a random resized crop and a horizontal flip, for evaluation a centre crop; with ``stretch`` both
        use the whole image. In training, ``policy`` is one of timm's auto_augment, and ``erasing`` the probability of random
        erasing.

        Raises:
            UserError: for an unknown policy or colour.
        """
        mode = InterpolationMode(self.interpolation)
        size = (self.input_size, self.input_size)
        if stretch:
            geometry = [v2.Resize(size, mode, antialias=True)]
        elif train:
            geometry = [v2.RandomResizedCrop(size, interpolation=mode, antialias=True)]
        else:
            geometry = [without_far_ends, v2.Resize(self.resize, mode, antialias=True), v2.CenterCrop(size)]
        mirror = [v2.RandomHorizontalFlip()] if train and flip else []
        normalize = v2.Normalize(list(self.mean), list(self.std))
        change = [AutoAugment(policy, self)] if train and policy else []
        erase = [v2.RandomErasing(erasing)] if train and erasing else []
        to_tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
        return v2.Compose(
            [ToRGB(self.background, self.published), *geometry, *mirror, *change, *to_tensor, normalize, *erase]
        )

    def describe(self, stretch: bool = False) -> dict:
        """Return the values that :func:`stored_transform` needs, as ``task.json`` holds them."""
        return {**asdict(self), "crop": "stretch" if stretch else "center"}


class AutoAugment:
    """A policy of timm, whose random draws follow torch's generator like those of all other transforms."""

    def __init__(self, policy: str, prepare: Preprocessing) -> None:
        kinds = {
            "rand": auto_augment.rand_augment_transform,
            "augmix": auto_augment.augment_and_mix_transform,
        }
        hints = {
            "translate_const": int(prepare.input_size * 0.45),
            "img_mean": tuple(round(255 * value) for value in prepare.mean),
        }
        try:
            self.apply = kinds.get(policy.split("-")[0], auto_augment.auto_augment_transform)(policy, hints)
        except (AssertionError, ValueError, KeyError, NotImplementedError):
            raise UserError(
                f"--auto_augment {policy!r} is not a policy of timm; examples are rand-m9-mstd0.5-inc1, augmix-m3-w3, original, 3a"
            ) from None

    def __call__(self, image: Image.Image) -> Image.Image:
        seed, before, numpy_before = int(torch.randint(2**31, ())), random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed)
        try:
            return self.apply(image)
        finally:
            random.setstate(before)
            np.random.set_state(numpy_before)


def stored_transform(stored: Mapping) -> v2.Compose:
    """Return the evaluation transform that :meth:`Preprocessing.describe` describes.

    Raises:
        UserError: if an entry is missing or out of range.
    """
    try:
        prepare = Preprocessing(
            input_size=int(stored["input_size"]),
            resize=int(stored["resize"]),
            mean=tuple(map(float, stored["mean"])),
            std=tuple(map(float, stored["std"])),
            interpolation=str(stored["interpolation"]),
            background=str(stored.get("background", "white")),
            published=bool(stored.get("published", False)),
        )
        if len(prepare.mean) != 3 or len(prepare.std) != 3 or prepare.input_size < 1 or prepare.resize < 1:
            raise ValueError("sizes are above 0, and mean and std have three values")
        return prepare.transform(False, stretch={"stretch": True, "center": False}[stored["crop"]])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the stored preprocessing is damaged: {type(error).__name__}: {error}") from None


def of_network(net: nn.Module) -> dict:
    """Preprocessing that the weights were trained with: ``mean`` and ``std`` of RGB in 0..1, and ``interpolation``."""
    config = timm.data.resolve_data_config({}, model=net)
    return {"mean": tuple(config["mean"]), "std": tuple(config["std"]), "interpolation": config["interpolation"]}


class ToRGB:
    """Conversion of images of any mode to RGB: turned as the EXIF entry says, 16 bits scaled to 8, transparent pixels on a ground.

    Args:
        background: the ground's colour, a name or ``#rrggbb``.
        published: only convert the mode, as the published programs do: sideways photographs stay so, 16-bit pixels above 255
            are white, and transparent pixels have the colour that they hide.

    Raises:
        UserError: for an unknown colour; in a call, for floating-point and 32-bit pixels, whose range is unknown.
    """

    def __init__(self, background: str = "white", published: bool = False) -> None:
        try:
            self.ground = (*ImageColor.getrgb(background)[:3], 255)
        except ValueError:
            raise UserError(
                f"background {background!r} is not a colour; examples are white, grey and #ff8000"
            ) from None
        self.published = published

    def __call__(self, image: Image.Image) -> Image.Image:
        if image.mode == "La":  # Pillow converts it to LA alone
            image = image.convert("LA")
        if self.published:
            return image.convert("RGB")
        with suppress(Exception):  # a damaged block of metadata says nothing about the pixels
            if image.getexif().get(_ORIENTATION, 1) != 1:
                image = ImageOps.exif_transpose(image)
        if image.mode == "RGB" and "transparency" not in image.info:
            return image
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            return self._scaled(image)
        if image.mode[0] in "IF":
            raise UserError(
                f"pixel mode {image.mode} does not say which value is white; save the image with 8 or 16 bits"
            )
        if "A" in image.getbands() or "a" in image.mode or "transparency" in image.info:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, self.ground), image).convert("RGB")
        return image.convert("RGB")

    def _scaled(self, image: Image.Image) -> Image.Image:
        """Return a grey image of 9 to 16 bits as RGB of 8 bits."""
        tags = getattr(image, "tag_v2", {})
        values, largest = np.asarray(image).astype(np.uint32), 2 ** min(tags.get(_BITS, (16,))[0], 16) - 1
        if tags.get(_PHOTOMETRIC) == 0:  # white is zero
            values = largest - values.clip(max=largest)
        grey = ((values * 255 + largest // 2) // largest).clip(max=255).astype(np.uint8)
        pixels = np.stack([grey] * 3, axis=-1)
        clear = image.info.get("transparency")
        if isinstance(clear, int):
            pixels[values == clear] = self.ground[:3]
        return Image.fromarray(pixels)


def without_far_ends(image: Image.Image) -> Image.Image:
    """Cut a strip that is more than 20 times as long as it is wide to 8 times around its centre.

    Resized whole, a strip of 1 by 4000 pixels would fill a gigabyte; the centre crop shows none of what is cut off.
    """
    width, height = image.size
    short, long = sorted(image.size)
    if long <= 20 * short:
        return image
    across, down = (min(side, 8 * short + (side - 8 * short) % 2) for side in image.size)  # the same centre
    left, top = (width - across) // 2, (height - down) // 2
    return image.crop((left, top, left + across, top + down))
